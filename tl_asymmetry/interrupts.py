"""What is changed for a while is put back, also when Ctrl-C comes while it is being changed or put back.

Python raises a KeyboardInterrupt between any two steps of its main thread, those of a `finally` included: a second
`finally` around the first is what makes up for that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


class temporarily(AbstractContextManager[None]):
    """Do something for as long as a `with` block lasts.

    An interrupt is one event: of two calls it cuts off one. So what undoes is called twice, and once more when the
    context is dropped without having been left, as by an interrupt between the block's last step and the first of
    leaving it. One that comes in the very step in which a context is dropped undoes nothing and ends nothing: Python
    reports it on stderr and goes on, and Ctrl-C wants to be pressed again.

    Args:
        do: makes the change; it must note what it is about to change before it does.
        undo: puts back what was noted, however far `do` had come; bears being called twice, and after being cut off.

    Example:
        >>> changed = []
        >>> with temporarily(lambda: changed.append(1), changed.clear):
        ...     print(changed)
        [1]
        >>> changed
        []
    """

    _in_force = False

    def __init__(self, do: Callable[[], object], undo: Callable[[], object]) -> None:
        self._do, self._undo = do, undo

    def __enter__(self) -> None:
        self._in_force = True
        try:
            self._do()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._undo()
        finally:
            self._undo()
            self._in_force = False

    def __del__(self) -> None:
        if self._in_force:
            self.__exit__()


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits for the end of a few lines that must not be cut off; in other threads than the main one, none comes.

    For lines that cannot note what they change before they do: a hook is registered before its handle is there.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
