"""The tests; and the checker of shapes that those of the kernels run under."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What beartype makes of a function, made at its first call.

    A function within a function is a new one each time; where nothing is checked, making a checker for it was a
    fiftieth of the time of all tests.
    """

    @cache
    def made() -> Callable[..., Any]:
        from beartype import beartype

        return beartype(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return made()(*args, **kwargs)

    return call
