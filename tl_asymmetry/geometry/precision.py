"""Products that mean what they say: no TF32, no bf16 shortcut, no autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Run float32 matrix products in float32, whatever the caller has switched on, and put his settings back.

    `torch.set_float32_matmul_precision("high" | "medium")` (TF32, bf16 on CPU), a backend's `fp32_precision` and an
    enclosing `torch.autocast` shorten the mantissa of a product silently; a second moment does not survive that (18 %
    off in bf16).
    """
    backends: tuple[Any, ...] = (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul)
    own: list[str] = []
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch ≥ 2.9 will not name one precision where a backend was given its own (`fp32_precision`): put these aside.
        own = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, own, strict=False):
            backend.fp32_precision = precision


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: what a product of them is computed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
