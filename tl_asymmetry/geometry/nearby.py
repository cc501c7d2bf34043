"""Leading eigenvectors of a matrix whose neighbour has been solved: a few products instead of an eigensolve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.geometry.lanczos import largest_eigenvalue
from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.subspace import Subspace, faster_solver

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
    A = symmetric.to(faster_solver(d, symmetric.dtype))
    start = neighbour.basis[:, :columns].to(A)
    middle = float(neighbour.eigenvalues[columns]) / 2
    X = start
    with exact_products(A.device):
        for rounds in _ROUNDS:
            for _ in range(rounds):
                once = A @ X / middle - X
                X = torch.linalg.qr(2 * (A @ once / middle - once) - X).Q
            AX = A @ X
            θ, turn = (part.flip(-1) for part in torch.linalg.eigh(X.mT @ AX))
            X, AX = X @ turn, AX @ turn
            residuals, gaps = (AX - X * θ).norm(dim=0), θ - _largest_beyond(A, X)
            if bool(gaps[k - 1] > 0) and _certified(residuals, θ, gaps, (start.mT @ X).square(), ranks):
                return X[:, :k].cpu()
    return None


def _certified(
    residuals: Float64[Tensor, " m"], θ: Float64[Tensor, " m"], gaps: Float64[Tensor, " m"],
    kept: Float64[Tensor, "m m"], ranks: Sequence[int],
) -> bool:  # fmt: skip
    """Whether at every rank what is left to turn is small beside what was turned.

    Args:
        residuals: ‖r_i‖.
        θ: Ritz values, descending.
        gaps: θ_i − μ, positive up to the largest rank.
        kept: squared cosines of the neighbour's directions (rows) and these.
        ranks: as in `nearby_directions`.
    """
    for rank in ranks:
        off = residuals[:rank] / gaps[:rank]
        mixed = off.unsqueeze(1) * residuals[rank:] / (θ[:rank].unsqueeze(1) - θ[rank:])
        turned = (rank - kept[:rank, :rank].sum()).clamp(min=_NO_TURN)
        if not bool(off.square().sum() + mixed.square().sum() <= CERTIFIED**2 * turned):
            return False
    return True


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
