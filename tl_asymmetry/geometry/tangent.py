"""A fixed low-rank basis against gradients: energy and anisotropy inside it, beside control subspaces of equal rank."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import check_draws
from tl_asymmetry.names import SIGNIFICANT

Control = Literal["complement", "haar"]
"""How control subspaces are drawn: orthogonal to the basis, or anywhere."""

CONTROLS: tuple[str, ...] = ("complement", "haar")

_GAUSSIANS = 20_000_000
_MOST_SIMULATIONS = 2000
_FEWEST_SIMULATIONS = 200
_CHUNK = 4_000_000
_BLOCK = 64


def control_subspaces(
    basis: Float[Tensor, "d rank"], draws: int, *, control: Control = "complement", seed: int
) -> Float[Tensor, "draw d rank"]:
    """Random subspaces of the rank of `basis`: orthonormal columns, float64 on CPU.

    "complement": orth((I − QQᵀ) · Gaussian), uniform among the subspaces orthogonal to the basis, the *normal* controls
    of arXiv 2604.08764. "haar": uniform among all subspaces, whatever the basis.

    Args:
        basis: orthonormal columns Q.
        draws: how many.
        control: which kind.
        seed: equal seeds give equal draws.

    Raises:
        ValueError: too few or many draws, another kind, or a complement too small for a subspace of this rank.

    Example:
        >>> Q = torch.eye(8)[:, :2].double()
        >>> N = control_subspaces(Q, 5, seed=0)
        >>> N.shape, bool((Q.mT @ N).abs().max() < 1e-12)
        (torch.Size([5, 8, 2]), True)
    """
    d, rank = basis.shape
    check_controls(d, rank, draws, control)
    Q = basis.detach().cpu().double()
    X = torch.randn(draws, d, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if control == "haar":
        return torch.linalg.qr(X).Q
    # Projected twice: where the complement is barely large enough, QR would blow up what the first pass leaves behind.
    N = torch.linalg.qr(X - Q @ (Q.mT @ X)).Q
    return torch.linalg.qr(N - Q @ (Q.mT @ N)).Q


def check_controls(d: int, rank: int, draws: int, control: str) -> None:
    """Refuse what has no control subspaces of equal rank.

    Raises:
        ValueError: too few or many draws, another kind, a rank outside 1 … d − 1, or above d/2 for "complement".
    """
    if control not in CONTROLS:
        raise ValueError(f'expected control "complement" or "haar", got {control!r}; pass one of the two')
    check_draws(draws)
    if not 1 <= rank < d:
        raise ValueError(f"expected a rank from 1 to {d - 1} (d_model - 1), got {rank}; pass a smaller rank")
    if control == "complement" and 2 * rank > d:
        raise ValueError(
            f"expected a rank of at most {d // 2} (d_model / 2), for controls of equal rank in the orthogonal "
            f'complement, got {rank}; pass a smaller rank or control="haar"'
        )


def energies(
    rows: Float[Tensor, "*item sample d"], bases: Float[Tensor, "basis d rank"]
) -> Float[Tensor, "*item basis"]:
    """E(Q) = ‖G Q‖²_F / ‖G‖²_F of each basis; NaN where G is zero. Float64.

    Args:
        rows: G, one gradient a row (or a factor F with FᵀF = GᵀG up to scale).
        bases: orthonormal columns each.

    Example:
        >>> energies(torch.tensor([[3.0, 4.0]]), torch.eye(2)[:, :1].unsqueeze(0)).tolist()
        [0.36]
    """
    G = rows.double()
    return _projected(G, bases).square().sum((-3, -1)) / G.square().sum((-2, -1)).unsqueeze(-1)


def moment_energies(
    second_moment: Float[Tensor, "*item d d"], bases: Float[Tensor, "basis d rank"]
) -> Float[Tensor, "*item basis"]:
    """tr(QᵀMQ) / tr M: `energies` of the rows behind an uncentred second moment M. NaN where M is zero. Float64."""
    M = second_moment.double()
    count, d, rank = bases.shape
    Q = bases.to(M).permute(1, 0, 2).reshape(d, count * rank)
    inside = ((M @ Q) * Q).sum(-2).unflatten(-1, (count, rank)).sum(-1)
    return inside / M.diagonal(dim1=-2, dim2=-1).sum(-1).unsqueeze(-1)


def factor_of(covariance: Float[Tensor, "*item d d"]) -> Float[Tensor, "*item d d"]:
    """F with FᵀF = C, for `anisotropy_shares`: √Λ Vᵀ. Float64."""
    λ, V = torch.linalg.eigh(covariance.double())
    return λ.clamp(min=0).sqrt().unsqueeze(-1) * V.mT


def anisotropy_shares(
    factor: Float[Tensor, "*item sample d"], bases: Float[Tensor, "basis d rank"]
) -> tuple[Float[Tensor, "*item"], Float[Tensor, "*item basis"]]:
    """Iso(C), and for each basis what it gains when the basis is taken out: ΔIso(Q) = Iso((I − P) C (I − P)) − Iso(C).

    C = FᵀF, P = QQᵀ, Iso = (PR − 1)/(d − 1) with the participation ratio PR.
    Positive where taking Q out leaves a rounder covariance: the anisotropy sat in Q. Never forms a d × d projector. NaN
    where nothing is left outside Q. Float64.

    Args:
        factor: F with C = FᵀF up to scale, e.g. centred gradients in rows.
        bases: orthonormal columns each.
    """
    F = factor.double()
    d = F.shape[-1]
    FQ = _projected(F, bases)  # [item, sample, basis, rank]
    trace, inside = F.square().sum((-2, -1)), FQ.square().sum((-3, -1))
    gram = F @ F.mT if F.shape[-2] <= d else F.mT @ F
    square = gram.square().sum((-2, -1))
    CQ = torch.einsum("...sd,...sbk->...bdk", F, FQ)
    QCQ = torch.einsum("...sbj,...sbk->...bjk", FQ, FQ)
    # ‖(I − P) C (I − P)‖² = ‖C‖² − 2‖CQ‖² + ‖QᵀCQ‖²
    left = trace.unsqueeze(-1) - inside
    left_square = square.unsqueeze(-1) - 2 * CQ.square().sum((-2, -1)) + QCQ.square().sum((-2, -1))
    iso = (trace.square() / square - 1) / (d - 1)
    left_iso = (left.square() / left_square - 1) / (d - 1)
    # What cancels to rounding is nothing: both numbers are differences of terms of the size of trace and square.
    something = (left > 1e-10 * trace.unsqueeze(-1)) & (left_square > 1e-13 * square.unsqueeze(-1))
    return iso, torch.where(something, left_iso - iso.unsqueeze(-1), torch.nan)


def rank_p(observed: Float[Tensor, "*item"], controls: Float[Tensor, "*item draw"]) -> Float[Tensor, "*item"]:
    """(1 + #{controls ≥ observed}) / (1 + draws): one-sided, at least 1 / (1 + draws). NaN where either is NaN.

    Exact where the observed value and the controls are exchangeable: random subspaces of one law.

    Example:
        >>> rank_p(torch.tensor(0.9), torch.linspace(0, 0.8, 19)).item()
        0.05
    """
    # A flat gradient has the same energy everywhere: what differs is rounding, and counts as equal.
    x = observed.unsqueeze(-1)
    p = (1 + (controls >= x - 1e-12 * x.abs()).sum(-1)).double() / (1 + controls.shape[-1])
    unknown = observed.isnan() | controls.isnan().any(-1)
    return torch.where(unknown, torch.nan, p)


def control_size(
    spectra: Float[Tensor, "item d"],
    rank: int,
    draws: int,
    *,
    control: Control = "complement",
    level: float = SIGNIFICANT,
    seed: int = 0,
    simulations: int | None = None,
) -> tuple[Float[np.ndarray, " item"], int]:
    """How often the rank test rejects at `level` when the basis is random: what `level` really means for a spectrum.

    Draws a Haar-random basis and its controls again and again and counts p ≤ level for the energy. By rotation only the
    gradient's spectrum matters, so all items share the draws: E = Σ λ_i ‖Qᵀe_i‖². For "haar" controls the basis and
    its controls are exchangeable, and the size is exactly ⌊level (draws + 1)⌋ / (draws + 1), without simulation.

    Args:
        spectra: eigenvalues of GᵀG, zeros included, any scale.
        rank: of basis and controls.
        draws: controls per basis.
        control: which kind.
        level: nominal level.
        seed: of the simulation.
        simulations: how many; by default as many as 2 · 10⁷ Gaussians allow, from 200 to 2000.

    Returns:
        The rate for each item (NaN for a zero spectrum) and the number of simulations; a rate's standard error is
        √(rate (1 − rate) / simulations).

    Example:
        >>> rates, simulations = control_size(torch.linspace(1, 2, 16).unsqueeze(0), 4, 20, control="haar")
        >>> round(rates.item(), 4), simulations
        (0.0476, 0)
    """
    items, d = spectra.shape
    check_controls(d, rank, draws, control)
    λ = spectra.detach().cpu().double().clamp(min=0)
    cells = int(level * (draws + 1) + 1e-9)
    zero = (λ.sum(-1) <= 0).numpy()
    if control == "haar":
        return np.where(zero, np.nan, cells / (draws + 1)), 0
    if simulations is None:
        simulations = int(np.clip(_GAUSSIANS // (draws * d * rank), _FEWEST_SIMULATIONS, _MOST_SIMULATIONS))
    observed, controls = _leverages(simulations, d, rank, draws, seed)
    rejected = torch.zeros(items, dtype=torch.float64)
    for own, others in zip(observed.split(_BLOCK), controls.split(_BLOCK), strict=True):
        energy = own.double() @ λ.mT  # [simulation, item]
        beaten = (torch.einsum("sjd,id->sji", others.double(), λ) >= energy.unsqueeze(1) * (1 - 1e-6)).sum(1)
        rejected += (beaten < cells).sum(0)
    return np.where(zero, np.nan, (rejected / simulations).numpy()), simulations


@lru_cache(maxsize=4)
def _leverages(
    count: int, d: int, rank: int, draws: int, seed: int
) -> tuple[Float[Tensor, "count d"], Float[Tensor, "count draw d"]]:
    """‖Qᵀe_i‖² of Haar-random bases and of normal controls of each. Float32, which is enough to count."""
    generator = torch.Generator().manual_seed(seed)
    observed, controls = [], []
    chunk = max(1, _CHUNK // (draws * d * rank))
    for start in range(0, count, chunk):
        n = min(chunk, count - start)
        Q = torch.linalg.qr(torch.randn(n, d, rank, dtype=torch.float64, generator=generator)).Q
        X = torch.randn(n, d, draws * rank, dtype=torch.float64, generator=generator)
        X = (X - Q @ (Q.mT @ X)).unflatten(-1, (draws, rank)).transpose(1, 2)
        # ‖Nᵀe_i‖² = x_iᵀ (XᵀX)⁻¹ x_i with N = orth(X)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(X.mT @ X))
        observed.append(Q.square().sum(-1).float())
        controls.append(((X @ inverse) * X).sum(-1).float())
    return torch.cat(observed), torch.cat(controls)


def _projected(rows: Tensor, bases: Tensor) -> Float[Tensor, "*item sample basis rank"]:
    """G Q for every basis, as one product."""
    count, d, rank = bases.shape
    Q = bases.to(rows).permute(1, 0, 2).reshape(d, count * rank)
    return (rows @ Q).unflatten(-1, (count, rank))
