"""Second moments on axes that are not the residual stream's: heads, kept apart; a wide axis, sketched."""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.precision import exact_products, product_dtype

SKETCH = 64
"""Columns of the random test matrix of `SketchedMoments`."""

_SumsT = TypeVar("_SumsT", bound="_Sums")


class _Sums:
    """Float64 sums by name that add up over rows; they live on the device of the first rows."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def _like(self: _SumsT) -> _SumsT:
        """The same kind, without rows."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Number of rows taken in."""
        return int(self._sums["count"].item()) if self._sums else 0

    def merge(self: _SumsT, other: _SumsT) -> _SumsT:
        """Take in all that `other` has seen, and return self; `other` stays as it is."""
        for name, value in other._sums.items():
            mine = self._sums.get(name)
            self._sums[name] = value.clone() if mine is None else mine + value.to(mine.device)
        return self

    def cpu(self: _SumsT) -> _SumsT:
        """The same sums on CPU."""
        result = self._like()
        result._sums = {name: value.cpu() for name, value in self._sums.items()}
        return result

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value.to(torch.float64)

    def _mean(self, name: str) -> Tensor:
        if not self._sums or not bool(self._sums["count"] > 0):
            raise ValueError("expected moments of at least one row, got none; call update first")
        return self._sums[name] / self._sums["count"]


class HeadMoments(_Sums):
    """Uncentred second moments of every head's row vectors, which arrive in batches.

    Products in float32 (float64 for float64 rows), sums in float64, `heads · d²` numbers whatever the number of rows.

    Args:
        heads: number of heads.
        d: length of a head's row.

    Example:
        >>> moments = HeadMoments(2, 1)
        >>> moments.update(torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]]))
        >>> moments.second_moment.flatten().tolist(), moments.count
        ([5.0, 2.0], 2)
    """

    def __init__(self, heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.d = heads, d

    def _like(self) -> HeadMoments:
        return HeadMoments(self.heads, self.d)

    def update(self, x: Float[Tensor, "*batch head d"], mask: Bool[Tensor, "*batch"] | None = None) -> None:
        """Take in the rows of `x` where `mask` is true (all rows without a mask)."""
        if x.shape[-2:] != (self.heads, self.d):
            raise ValueError(f"expected rows [..., {self.heads}, {self.d}], got {tuple(x.shape)}; pass heads apart")
        x = _masked(x.detach().to(product_dtype(x)).flatten(0, -3), mask)
        with exact_products(x.device):
            by_head = x.transpose(0, 1)
            self._add("gram", by_head.mT @ by_head)
        self._add("count", _rows(x, mask))

    @property
    def second_moment(self) -> Float64[Tensor, "head d d"]:
        """Σ x xᵀ / n of every head."""
        return self._mean("gram")


class SketchedMoments(_Sums):
    """What a second moment Σ on a wide axis is like, without its d² numbers: its trace and Σ times a random matrix Ω.

    The trace is exact. ‖Σ‖²_F is estimated from ‖ΣΩ‖²_F without bias (Hutchinson), with a relative standard error of at
    most √(2/r) for r columns, and the leading eigenvalues by Nyström's formula (Tropp, Yurtsever, Udell & Cevher 2017,
    algorithm 3): never too large, and close where they fall off within the first r/2.

    Args:
        test: Ω `[d, r]`, Gaussian entries of unit variance; the same one for moments that are to be merged.
    """

    def __init__(self, test: Float[Tensor, "d r"]) -> None:
        super().__init__()
        self.test = test

    def _like(self) -> SketchedMoments:
        return SketchedMoments(self.test)

    def update(
        self,
        x: Float[Tensor, "*batch d"],
        mask: Bool[Tensor, "*batch"] | None = None,
        *,
        seen: Float[Tensor, "*batch r"] | None = None,
    ) -> None:
        """Take in the rows of `x` where `mask` is true; `seen` is `x Ω`, if it is known already."""
        x = x.detach().to(product_dtype(x))
        with exact_products(x.device):
            y = x @ self.test.to(x) if seen is None else seen
            x, y = _masked(x.flatten(0, -2), mask), y.flatten(0, -2)
            self._add("product", x.mT @ y)
        self._add("trace", x.square().sum(dtype=torch.float64))
        self._add("count", _rows(x, mask))

    @property
    def trace(self) -> float:
        """Σ ‖x‖² / n."""
        return float(self._mean("trace"))

    @property
    def squared_norm(self) -> float:
        """Estimate of ‖Σ‖²_F."""
        return float(self._mean("product").square().sum()) / self.test.shape[1]

    @property
    def leading_eigenvalues(self) -> Float64[Tensor, " half"]:
        """The r/2 largest eigenvalues of Σ, descending, from the sketch alone; CPU."""
        Y = self._mean("product").cpu()
        Ω = self.test.double().cpu()
        # Σ ≈ Y (ΩᵀY)⁺ Yᵀ, shifted by a hair so that the Cholesky factor exists (their ν).
        ν = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(Y)
        Y = Y + ν * Ω
        inner = Ω.mT @ Y
        L, failed = torch.linalg.cholesky_ex((inner + inner.mT) / 2)
        if int(failed):  # a moment of rank below r, to rounding
            λ, V = torch.linalg.eigh((inner + inner.mT) / 2)
            keep = λ > λ[-1] * 1e-9
            B = Y @ (V[:, keep] / λ[keep].sqrt())
        else:
            B = torch.linalg.solve_triangular(L, Y.mT, upper=False).mT
        λ = torch.linalg.svdvals(B).square() - ν
        return λ.clamp(min=0)[: max(self.test.shape[1] // 2, 1)]


def sketch_matrix(d: int, seed: int) -> Float[Tensor, "d r"]:
    """Gaussian test matrix of `SKETCH` columns (d of them where d is smaller), float32 on CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, min(SKETCH, d), generator=generator)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    mask = mask.reshape(-1, *([1] * (x.ndim - 1))).to(x.device)
    # where, not a product: a masked NaN must not survive
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
    return mask.sum(dtype=torch.float64).to(x.device)
