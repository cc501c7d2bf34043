"""Semi-nonnegative matrix factorisation A ≈ Z D, Z ≥ 0: directions that rows of A are built from, never subtracted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tl_asymmetry.arguments import checked, listed
from tl_asymmetry.geometry.precision import exact_products, product_dtype, with_fresh_settings

_SWEEPS = 3
_ROWS_PER_BLOCK = 2048


@dataclass(frozen=True)
class SemiNMF:
    """The best of several starts of a semi-NMF, and how far the others agree with it. Made by `semi_nmf`."""

    Z: Float[Tensor, "sample rank"]
    """Codes, never negative, in the dtype the products were made in."""
    D: Float[Tensor, "rank d"]
    """Dictionary, one direction a row, of any sign."""
    objective: float
    """‖A − Z D‖²_F of the best start."""
    objectives: tuple[float, ...]
    """The same for every start, in the order of `seeds`: their spread says how much the start matters."""
    history: tuple[float, ...]
    """The best start's objective before the first and after every iteration; it never rises."""
    stability: Float[Tensor, " rank"]
    """For each row of D the mean over the other starts of its cosine with the row matched to it (one to one, best
    total); 1 where every start finds the same direction, NaN with a single start."""
    converged: bool
    """Whether the best start met `tol` within `max_iter`."""
    relative_error: float
    """`objective` over ‖A‖²_F: the share of A's energy left over."""


@checked
@with_fresh_settings
def semi_nmf(
    A: Float[Tensor, "sample d"],
    rank: int,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    tol: float = 1e-5,
    max_iter: int = 500,
) -> SemiNMF:
    """Factorise A ≈ Z D with Z ≥ 0 and D free (Ding, Li & Jordan 2010), by hierarchical alternating least squares.

    D is the exact least-squares solution for Z; Z is swept column by column (Cichocki & Phan 2009), several sweeps an
    iteration since they are cheap beside the products with A (Gillis & Glineur 2012). A is read in blocks of rows, and
    only ZᵀZ and ZᵀA are summed over them, in float64. A start is `rank` rows of A chosen far from each other
    (k-means++, Arthur & Vassilvitskii 2007). The problem is not convex: compare `objectives` and `stability`.

    The rows of D span nearly what `rank` principal directions span where the rows of A all lie on one side of some
    plane through 0, as activations with a large mean do: there the best semi-NMF is as good as the best unconstrained
    factorisation (Gillis & Kumar 2015, "Exact and heuristic algorithms for semi-nonnegative matrix factorization").

    Args:
        A: rows are samples, e.g. activations of tokens.
        rank: number of directions.
        seeds: one start each.
        tol: stop once an iteration lowers the objective by less than this share of it.
        max_iter: iterations per start at most.

    Raises:
        ValueError: a rank outside 1 … min(samples, d), rows that are not finite, all zero, no seed, tol < 0 or
            max_iter < 1.

    Example:
        >>> Z, D = torch.rand(50, 2), torch.randn(2, 6)
        >>> fit = semi_nmf(Z @ D, 2)
        >>> bool((fit.Z >= 0).all()), fit.relative_error < 1e-3
        (True, True)
    """
    if A.ndim != 2:
        raise ValueError(f"expected A as rows [sample, d], got {list(A.shape)}; pass a matrix")
    samples, d = A.shape
    starts_at = listed("seeds", seeds, int, instead="seeds=(0,)")
    if not 1 <= rank <= min(samples, d):
        raise ValueError(f"expected a rank from 1 to {min(samples, d)}, got {rank}; pass a smaller rank or more rows")
    if not starts_at:
        raise ValueError("expected at least one seed, got none; pass seeds=(0,)")
    if not 0 <= tol < float("inf") or max_iter < 1:
        raise ValueError(f"expected tol >= 0 and max_iter >= 1, got {tol} and {max_iter}; pass tol=1e-5, max_iter=500")
    A = A.detach().to(product_dtype(A))
    energy = A.square().sum(dtype=torch.float64).item()
    if not 0 < energy < float("inf"):
        raise ValueError(f"expected finite rows that are not all zero, got ‖A‖² = {energy}; pass other rows")
    with exact_products(A.device):
        starts = [_Start(A, rank, seed) for seed in starts_at]
        for start in starts:
            start.descend(tol, max_iter)
    best = min(starts, key=lambda start: start.history[-1])
    return SemiNMF(
        Z=best.Z.mT.contiguous(),
        D=best.D.to(A.dtype),
        objective=best.history[-1],
        objectives=tuple(start.history[-1] for start in starts),
        history=tuple(best.history),
        stability=_stability(best, starts),
        converged=best.converged,
        relative_error=best.history[-1] / energy,
    )


class _Start:
    """One descent: Z (transposed, so that a component is contiguous), D, and the objective so far."""

    def __init__(self, A: Tensor, rank: int, seed: int) -> None:
        self.A = A
        self.D = _distant_rows(A, rank, seed).double()
        self.Z = A.new_zeros(rank, len(A))
        self.converged = False
        self._update_Z()
        self._update_D()
        self.history = [self._objective()]

    def descend(self, tol: float, max_iter: int) -> None:
        for _ in range(max_iter):
            before = self.Z, self.D
            self.Z = self.Z.clone()
            self._update_Z()
            self._update_D()
            now = self._objective()
            if not now <= self.history[-1]:  # rounding, at the bottom
                self.Z, self.D = before
                self.converged = True
                return
            last = self.history[-1]
            self.history.append(now)
            if last - now <= tol * last:
                self.converged = True
                return

    def _update_Z(self) -> None:
        """Some sweeps of z_j ← max(0, z_j + (a − z D) d_jᵀ / ‖d_j‖²), and the products ZᵀZ and ZᵀA of the result."""
        D = self.D.to(self.A.dtype)
        rank, d = D.shape
        S = (self.D @ self.D.mT).to(self.A.dtype)
        norms = S.diagonal().tolist()
        self.ZZ = torch.zeros(rank, rank, dtype=torch.float64, device=D.device)
        self.ZA = torch.zeros(rank, d, dtype=torch.float64, device=D.device)
        for rows in _blocks(len(self.A)):
            A, Z = self.A[rows], self.Z[:, rows]
            P = D @ A.mT
            for _ in range(_SWEEPS):
                for j in range(rank):
                    if norms[j] > 0:
                        Z[j].add_(torch.addmv(P[j], Z.mT, S[j], alpha=-1), alpha=1 / norms[j]).clamp_(min=0)
            self.ZZ += (Z @ Z.mT).double()
            self.ZA += (Z @ A).double()

    def _update_D(self) -> None:
        """D = (ZᵀZ)⁺ ZᵀA; a component no row uses is set on the worst explained row, which costs nothing."""
        λ, V = torch.linalg.eigh(self.ZZ)
        inverse = torch.where(λ > λ[-1] * 1e-12, 1 / λ.clamp(min=1e-300), torch.zeros_like(λ))
        self.D = V @ (inverse.unsqueeze(1) * (V.mT @ self.ZA))
        unused = (self.ZZ.diagonal() == 0).nonzero().flatten().tolist()
        if unused:
            residual = self.A - self.Z.mT @ self.D.to(self.A.dtype)
            worst = residual.square().sum(1).topk(len(unused)).indices
            self.D[unused] = residual[worst].double()

    def _objective(self) -> float:
        """‖A − Z D‖²_F from the residual itself: ‖A‖² − 2⟨ZᵀA, D⟩ + ⟨ZᵀZ, D Dᵀ⟩ would cancel where little of A is left,
        as under massive activations."""
        D = self.D.to(self.A.dtype)
        total = torch.zeros((), dtype=torch.float64, device=D.device)
        for rows in _blocks(len(self.A)):
            residual = torch.addmm(self.A[rows], self.Z[:, rows].mT, D, alpha=-1)
            total += residual.square_().sum(dtype=torch.float64)
        return total.item()


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(first, first + _ROWS_PER_BLOCK) for first in range(0, rows, _ROWS_PER_BLOCK))


def _distant_rows(A: Tensor, rank: int, seed: int) -> Tensor:
    """`rank` rows, each drawn with probability proportional to its squared distance from those already drawn."""
    generator = torch.Generator().manual_seed(seed)
    weight = A.square().sum(1, dtype=torch.float64)
    chosen = []
    for _ in range(rank):
        total = weight.cumsum(0)
        if total[-1] <= 0:  # fewer distinct rows than directions: any will do
            weight = torch.ones_like(weight)
            total = weight.cumsum(0)
        u = torch.rand((), generator=generator, dtype=torch.float64).to(A.device) * total[-1]
        row = A[int(torch.searchsorted(total, u, right=True).clamp(max=len(A) - 1))]
        chosen.append(row)
        distance = (A - row).square().sum(1, dtype=torch.float64)
        weight = distance if len(chosen) == 1 else torch.minimum(weight, distance)
    return torch.stack(chosen)


def _stability(best: _Start, starts: Sequence[_Start]) -> Tensor:
    others = [start for start in starts if start is not best]
    if not others:
        return torch.full((len(best.D),), torch.nan, dtype=torch.float64)
    D = torch.nn.functional.normalize(best.D.cpu(), dim=1)
    total = torch.zeros(len(D), dtype=torch.float64)
    for other in others:
        cosines = D @ torch.nn.functional.normalize(other.D.cpu(), dim=1).mT
        mine, theirs = linear_sum_assignment(cosines.numpy(), maximize=True)
        total[mine] += cosines[mine, theirs]
    return total / len(others)
