"""Random projections that keep inner products: rows of 10⁹ numbers become rows of some thousand."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class RowSketch:
    """Signed, shifted folding of a row onto `size` numbers: E⟨Sa, Sb⟩ = ⟨a, b⟩ (Charikar, Chen & Farach-Colton 2002).

    The row is cut into pieces of `size`; each gets random signs and a random cyclic shift, and all are added. Two
    entries meet with probability 1/size or never, so ⟨Sa, Sb⟩ has a standard error of at most √(2/size) ‖a‖ ‖b‖: a
    Johnson–Lindenstrauss map at the cost of reading the row once, with one byte of memory an entry.

    Args:
        size: numbers kept.
        seed: of signs and shifts; two sketches with one seed are the same map.

    Raises:
        ValueError: size < 2.

    Example:
        >>> sketch = RowSketch(256, seed=0)
        >>> tuple(sketch(torch.ones(10_000)).shape)
        (256,)
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        if size < 2:
            raise ValueError(f"expected a sketch of at least 2 numbers, got {size}; pass some thousand")
        self.size, self.seed = size, seed
        self._signs = torch.empty(0, dtype=torch.int8)
        self._shifts: list[int] = []

    def __call__(self, row: Float[Tensor, " parameters"]) -> Float[Tensor, " size"]:
        """The sketch of a row, in float64, on the row's device."""
        pieces = -(-len(row) // self.size)
        if len(self._signs) != len(row) or self._signs.device != row.device:
            generator = torch.Generator().manual_seed(self.seed)
            self._shifts = torch.randint(self.size, (pieces,), generator=generator).tolist()
            signs = torch.randint(2, (len(row),), generator=generator, dtype=torch.int8) * 2 - 1
            self._signs = signs.to(row.device)
        folded = torch.zeros(self.size, dtype=torch.float64, device=row.device)
        signed = zip(row.split(self.size), self._signs.split(self.size), self._shifts, strict=True)
        for piece, signs, shift in signed:
            first = piece[: self.size - shift].double() * signs[: self.size - shift]
            folded[shift : shift + len(first)] += first
            if len(piece) > len(first):  # what was shifted past the end comes in at the start
                folded[: len(piece) - len(first)] += piece[len(first) :].double() * signs[len(first) :]
        return folded
