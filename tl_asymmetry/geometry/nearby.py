"""Leading eigenvectors of a matrix whose neighbour has been solved: a few products, or a part of an eigensolve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.lanczos import largest_eigenvalue
from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.subspace import Subspace, faster_solver, leading_directions

# Columns that are iterated, for each one wanted; rounds of a second-degree filter (two products each) until the first
# look at what was reached, and until the second.
_BLOCK, _ROUNDS = 2, (2, 1)
# Largest share of the dimension up to which this was measured to be faster than an eigensolve.
_SHARE = 1 / 8
_SMALLEST = 256
# What may be wrong with a replicate, as a share of how far it has turned from the full sample. An interval's half-width
# is made of these turns; its own error was seen at a third of this, see benchmarks/replicates.py.
CERTIFIED = 0.02
# Products by which the largest eigenvalue beyond the block is found, and the risk of being further below it than said.
_PRODUCTS, _RISK = 20, 1e-4
_NO_TURN = 1e-12
FLOAT32_WIDTH = 512
"""From here on it counts that float32 eigenvalues take half the time, and some leading vectors 0.4 of it."""
# It does no harm while the largest eigenvalue is less than so many times the smallest one in use: else its rounding
# (ε λ_1) is no longer small beside what a group of texts turns, the less so the closer eigenvalues lie at that end: an
# interval's half-width was at most 0.02 % off at 100, 0.2 % at 200, 5 % at 930 (benchmarks/replicates.py).
_FLOAT32_RANGE = 2e2
# Larger ones are taken out first, if they are at most this share of the dimension, with so many columns more, until
# what is left of them is this share of the smallest eigenvalue in use.
_LARGE_SHARE, _MORE, _LEFT = 1 / 32, 8, 1e-6
_LARGE_ROUNDS = (1,) * 7


def worth_iterating(d: int, k: int) -> bool:
    """Whether `nearby_directions` takes less time than an eigensolve, for the k leading ones of d."""
    return d >= _SMALLEST and k <= d * _SHARE


def operations(d: int, k: int) -> int:
    """Of `nearby_directions` in float64: its products, orthonormal bases and the small eigensolve."""
    columns = _BLOCK * k
    return (2 * _ROUNDS[0] + 1) * 2 * d**2 * columns + (8 * _ROUNDS[0] + 12) * d * columns**2


def nearby_directions(
    symmetric: Float64[Tensor, "d d"], neighbour: Subspace, ranks: Sequence[int]
) -> Float64[Tensor, "d k"] | None:
    """The leading eigenvectors of a positive semidefinite matrix, in order, from all those of another one close to it.

    Chebyshev-filtered subspace iteration from the neighbour's leading eigenvectors (Zhou, Saad, Tiago & Chelikowsky
    2006) and one Rayleigh–Ritz step. With residuals r_i, and μ the largest eigenvalue beyond the block, what is left to
    turn the first k of them is at most, to second order,

        Σ_{i≤k} ‖c_i‖² + Σ_{i≤k<j} (‖c_i‖ ‖r_j‖ / (θ_i − θ_j))²,  ‖c_i‖ ≤ ‖r_i‖ / (θ_i − μ)   (Davis & Kahan 1970).

    Args:
        symmetric: the matrix.
        neighbour: with its eigenvalues.
        ranks: the numbers of leading eigenvectors whose span is certified; the largest is how many are returned.

    Returns:
        On CPU; None where for one of the ranks that bound exceeds a fiftieth of the turn away from the neighbour: solve
        it in full. μ is too low with a probability under 1e-4 (Kuczyński & Woźniakowski 1992).

    Example:
        >>> spectrum = 1 / torch.arange(1, 301, dtype=torch.float64)
        >>> known = Subspace(torch.eye(300, dtype=torch.float64), spectrum)
        >>> turned = torch.diag(spectrum) + 1e-3 / torch.arange(1, 301).outer(torch.arange(1, 301))
        >>> found = nearby_directions(turned, known, [1, 8])
        >>> exact = torch.linalg.eigh(turned)[1].flip(-1)[:, :8]
        >>> bool((found.mT @ exact).diagonal().abs().min() > 1 - 1e-9)
        True
    """
    k, d = max(ranks), len(symmetric)
    columns = _BLOCK * k
    if neighbour.eigenvalues is None or columns >= neighbour.existing:
        return None
    for ritz in _ritz(symmetric.to(faster_solver(d, symmetric.dtype)), neighbour, columns, _ROUNDS):
        if bool(ritz.gaps[k - 1] > 0) and _certified(ritz, ranks):
            return ritz.vectors[:, :k].cpu()
    return None


def rounded_directions(symmetric: Float64[Tensor, "d d"], neighbour: Subspace, k: int) -> Float[Tensor, "d k"] | None:
    """The k leading eigenvectors, in order, of which a float32 eigensolve finds those that float32 has digits for.

    Of a residual stream's second moment one direction holds nine tenths of the trace, and float32 would round what is
    a hundred thousandth of it away. Such directions are found in float64 by subspace iteration from the neighbour's,
    and taken out on both sides, (I − QQᵀ) A (I − QQᵀ), before the matrix is rounded.

    Args:
        symmetric: positive semidefinite.
        neighbour: with its eigenvalues.
        k: how many.

    Returns:
        On CPU; None where that takes no less time or loses digits: solve it in float64.

    Example:
        >>> spectrum = torch.cat([torch.tensor([1e5]), 1 / torch.arange(1, 512)]).double()
        >>> known = Subspace(torch.eye(512, dtype=torch.float64), spectrum)
        >>> found = rounded_directions(torch.diag(spectrum), known, 64)
        >>> bool((found.double().abs() - torch.eye(512, 64)).abs().max() < 1e-4)
        True
    """
    λ, d = neighbour.eigenvalues, len(symmetric)
    if λ is None or d < FLOAT32_WIDTH:
        return None
    large = int((λ >= _FLOAT32_RANGE * λ[k - 1]).sum())
    if not large:
        return leading_directions(symmetric.float(), k)
    columns = large + max(large, _MORE)
    if large > _LARGE_SHARE * d or columns >= neighbour.existing:
        return None
    A = symmetric.to(faster_solver(d, torch.float32))
    for ritz in _ritz(A, neighbour, columns, _LARGE_ROUNDS, crude=large):
        # What a direction that is off by an angle α leaves of its eigenvalue θ in the others: θ α².
        left = ritz.values[:large] * (ritz.residuals[:large] / ritz.gaps[:large]).square()
        if bool(ritz.gaps[large - 1] > 0) and bool(left.sum() <= _LEFT * λ[k - 1]):
            Q, AQ = ritz.vectors[:, :large], ritz.images[:, :large]
            with exact_products(A.device):
                W = AQ - Q @ (Q.mT @ AQ) / 2
                # A − QWᵀ − WQᵀ
                freed = torch.addmm(A, torch.cat([Q, W], 1), torch.cat([W, Q], 1).mT, alpha=-1).float()
                rest = leading_directions(freed, k - large).to(Q)
                return torch.cat([Q, rest - Q @ (Q.mT @ rest)], dim=1).cpu()
    return None


@dataclass(frozen=True)
class _Ritz:
    """What a block of columns tells of a matrix's leading eigenvectors."""

    values: Float64[Tensor, " m"]
    """θ, descending."""
    vectors: Float64[Tensor, "d m"]
    """Orthonormal."""
    images: Float64[Tensor, "d m"]
    """The matrix times these."""
    residuals: Float64[Tensor, " m"]
    """‖r_i‖."""
    gaps: Float64[Tensor, " m"]
    """θ_i − μ, μ the largest eigenvalue beyond the block."""
    start: Float64[Tensor, "d m"]
    """The neighbour's."""


def _ritz(
    A: Float64[Tensor, "d d"], neighbour: Subspace, columns: int, rounds: Sequence[int], *, crude: int = 0
) -> Iterator[_Ritz]:
    """Subspace iteration from a neighbour's leading eigenvectors, a look after each number of rounds.

    `crude`: where so many eigenvalues are above all that lies beyond the block together, that is bound enough.
    """
    assert neighbour.eigenvalues is not None
    X = start = neighbour.basis[:, :columns].to(A)
    middle = float(neighbour.eigenvalues[columns]) / 2
    with exact_products(A.device):
        for number in rounds:
            for _ in range(number):
                once = _times(A, X) / middle - X
                X = torch.linalg.qr(2 * (_times(A, once) / middle - once) - X).Q
            AX = _times(A, X)
            θ, turn = (part.flip(-1) for part in torch.linalg.eigh(X.mT @ AX))
            X, AX = X @ turn, AX @ turn
            beyond = _norm_beyond(A, θ, AX) if crude else math.inf
            if float(θ[max(crude, 1) - 1]) < 2 * beyond:
                beyond = _largest_beyond(A, X)
            yield _Ritz(θ, X, AX, (AX - X * θ).norm(dim=0), θ - beyond, start)


def _times(A: Float64[Tensor, "d d"], X: Float64[Tensor, "d m"]) -> Float64[Tensor, "d m"]:
    """AX, A symmetric: in this order a product with few columns takes half the time."""
    return (X.mT @ A).mT


def _certified(ritz: _Ritz, ranks: Sequence[int]) -> bool:
    """Whether at every rank what is left to turn is small beside what was turned; gaps are positive up to the last."""
    residuals, θ, gaps = ritz.residuals, ritz.values, ritz.gaps
    kept = (ritz.start.mT @ ritz.vectors).square()
    for rank in ranks:
        off = residuals[:rank] / gaps[:rank]
        mixed = off.unsqueeze(1) * residuals[rank:] / (θ[:rank].unsqueeze(1) - θ[rank:])
        turned = (rank - kept[:rank, :rank].sum()).clamp(min=_NO_TURN)
        if not bool(off.square().sum() + mixed.square().sum() <= CERTIFIED**2 * turned):
            return False
    return True


def _norm_beyond(A: Float64[Tensor, "d d"], θ: Float64[Tensor, " m"], AX: Float64[Tensor, "d m"]) -> float:
    """‖A‖_F on the complement of Ritz vectors: no less than the largest eigenvalue there."""
    whole = torch.linalg.matrix_norm(A).square()
    left = whole - 2 * AX.square().sum() + θ.square().sum()
    return float((left.clamp(min=0) + _NO_TURN * whole).sqrt())


def _largest_beyond(A: Float64[Tensor, "d d"], X: Float64[Tensor, "d m"]) -> float:
    """An upper bound of the largest eigenvalue of A on the complement of orthonormal columns."""

    def outside(v: Tensor) -> Tensor:
        v = v.to(A)
        v = v - X @ (X.mT @ v)
        image = A @ v
        return image - X @ (X.mT @ image)

    value, _ = largest_eigenvalue(outside, len(A), tolerance=0.0, most=_PRODUCTS)
    missed = math.log(1.648 * math.sqrt(len(A)) / _RISK) / (2 * _PRODUCTS - 1)
    return value / (1 - missed**2)
