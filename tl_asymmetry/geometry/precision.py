"""Numbers that mean what they say: no TF32, no bf16 shortcut, no autocast, no other default of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tl_asymmetry.interrupts import temporarily

P = ParamSpec("P")
ResultT = TypeVar("ResultT")
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_AS_IT_IS = nullcontext()


def exact_products(device: torch.device) -> AbstractContextManager[None]:
    """Run float32 matrix products in float32, whatever the caller has switched on, and put his settings back.

    `torch.set_float32_matmul_precision("high" | "medium")` (TF32, bf16 on CPU), a backend's `fp32_precision` and an
    enclosing `torch.autocast` shorten the mantissa of a product silently; a second moment does not survive that (18 %
    off in bf16).
    """
    # Inside `with_fresh_settings` nothing is left to change, and small products are many.
    return _AS_IT_IS if _exact(device) else _made_exact(device)


def _exact(device: torch.device) -> bool:
    return _precision() == "highest" and not torch.is_autocast_enabled(device.type)


@contextmanager
def _made_exact(device: torch.device) -> Iterator[None]:
    with _full_products(), torch.autocast(device.type, enabled=False):
        yield


def with_fresh_settings(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """A function on whose numbers the caller's settings of torch have no influence; they are put back afterwards.

    Of this thread: `torch.autocast`, the default device, inference mode, whether gradients are recorded. Of the
    process: the default dtype, the precision of float32 products.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        with fresh_settings():
            return function(*args, **kwargs)

    return call


@contextmanager
def fresh_settings() -> Iterator[None]:
    """What `with_fresh_settings` runs a function in."""
    with ExitStack() as stack:
        stack.enter_context(_full_products())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in filter(torch.is_autocast_enabled, _AUTOCAST):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


def _full_products() -> AbstractContextManager[None]:
    aside = _Aside()
    return temporarily(aside.enter, aside.leave)


class _Aside:
    """The caller's precision of float32 products, while ours holds."""

    def __init__(self) -> None:
        self.backends: tuple[Any, ...] = (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul)
        self.own: list[tuple[Any, str]] = []
        self.before: list[str] = []

    def enter(self) -> None:
        if (before := _precision()) is not None:
            self.before.append(before)
        else:
            self.own.extend([(backend, backend.fp32_precision) for backend in self.backends])
            for backend in self.backends:
                backend.fp32_precision = "ieee"
            self.before.append(torch.get_float32_matmul_precision())
        if self.before != ["highest"]:
            torch.set_float32_matmul_precision("highest")

    def leave(self) -> None:
        for precision in self.before:
            if precision != "highest":
                torch.set_float32_matmul_precision(precision)
        for backend, precision in self.own:
            backend.fp32_precision = precision


def _precision() -> str | None:
    """Of float32 products; None where a backend was given its own (`fp32_precision`): torch ≥ 2.9 names none then."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


SMALLEST_SQUARE, LARGEST_SQUARE = 1e-24, 1e24
"""Mean squares of the entries between which sums of products of two in float32 keep their digits."""


def squares_fit(mean_square: Tensor, least: float = SMALLEST_SQUARE, most: float = LARGEST_SQUARE) -> bool:
    """Whether float32 can hold products of entries of this mean square; NaN and infinity say that it could not.

    Args:
        mean_square: as computed, of each matrix; exactly 0 counts as fitting.
        least, most: the range.

    Example:
        >>> squares_fit(torch.tensor([1e-6, 0.0])), squares_fit(torch.tensor([1e-6, 1e-30]))
        (True, False)
    """
    return bool((((mean_square >= least) & (mean_square <= most)) | (mean_square == 0)).all())


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: what a product of them is computed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
