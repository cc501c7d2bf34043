"""Ctrl-C that waits while a model's weights are being changed or put back.

A KeyboardInterrupt may be raised at almost any bytecode, also at the first one of `__exit__`, before any `try` has
begun. Held back by the signal handler itself, it cannot leave a model half restored.
"""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


class _Held:
    """How many hold interrupts back, and whether one waits."""

    holders = 0
    waits = False


held = _Held()
# The functions in C, where there are: those around them make enums of handlers, which takes as long as a small edit.
_c: Any = sys.modules.get("_signal", signal)
_get, _set, _SIGINT = _c.getsignal, _c.signal, int(signal.SIGINT)
_critical: list[CodeType] = []


def critical(function: FunctionT) -> FunctionT:
    """Mark a function inside which, and inside whose callees, a held interrupt waits.

    Whichever way it ends, its last act must be `if held.waits: raise interrupt()`, unless interrupts are still held:
    between a test without a call and the return no interrupt can come.
    """
    _critical.append(inspect.unwrap(function).__code__)
    return function


def hold_interrupts() -> bool:
    """Until `release_interrupts`, Ctrl-C inside a critical function waits for its end; elsewhere it is as ever.

    Returns:
        Whether it is held: in the main thread, where Python's own handler is in place. A handler of the user's is left
        alone.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if _get(_SIGINT) not in (signal.default_int_handler, _raise_or_wait):
        return False
    if held.holders == 0:
        _set(_SIGINT, _raise_or_wait)
    held.holders += 1
    return True


def release_interrupts(was_held: bool) -> None:
    """Undo one `hold_interrupts`, given what it returned."""
    if not was_held:
        return
    held.holders -= 1
    in_main = threading.current_thread() is threading.main_thread()
    if held.holders == 0 and in_main and _get(_SIGINT) is _raise_or_wait:
        _set(_SIGINT, signal.default_int_handler)


def interrupt() -> KeyboardInterrupt:
    """The interrupt that has been waiting, to be raised."""
    held.waits = False
    return KeyboardInterrupt()


def _raise_or_wait(_: int, frame: FrameType | None) -> None:
    while frame is not None:
        if any(frame.f_code is code for code in _critical):
            held.waits = True
            return
        frame = frame.f_back
    raise KeyboardInterrupt
