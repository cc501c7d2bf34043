"""What becomes of a step in a chain of steps: kept, undone, turned; and how alike two steps are by chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_ENTRIES = 1 << 16
_BISECTIONS = 30


@dataclass(frozen=True)
class Ledger:
    """Shares of each step's own ‖Δ_i‖²; NaN for a step of no length. Made by `ledger`."""

    kept: Float64[Tensor, "*item stage"]
    """1 + Σ_{j≠i} ⟨Δ_i, Δ_j⟩ / ‖Δ_i‖²: how much of the step the whole way has. Unbounded; Σ kept ‖Δ_i‖² = ‖Δ‖²."""
    undone: Float64[Tensor, "*item stage"]
    """max(0, −⟨Δ_i, Σ_{j>i} Δ_j⟩) / ‖Δ_i‖²: how much the later steps took back; above 1 they overshot."""
    turned: Float64[Tensor, "*item stage"]
    """√(‖Σ_{j>i} Δ_j‖² − ⟨Δ_i, Σ_{j>i} Δ_j⟩² / ‖Δ_i‖²) / ‖Δ_i‖: how far the later steps went beside it."""


def step_gram(steps: Float[Tensor, "stage *item rows columns"]) -> Float64[Tensor, "*item stage stage"]:
    """Inner products ⟨Δ_i, Δ_j⟩ of a chain's steps, summed in float64.

    Example:
        >>> step_gram(torch.stack([torch.ones(2, 3), -torch.ones(2, 3)])).tolist()
        [[6.0, -6.0], [-6.0, 6.0]]
    """
    rows = steps.double().flatten(-2).movedim(0, -2)
    return rows @ rows.mT


def ledger(gram: Float64[Tensor, "*item stage stage"]) -> Ledger:
    """What becomes of each step, from the inner products of all.

    Example:
        >>> there_and_back = ledger(torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
        >>> there_and_back.kept.tolist(), there_and_back.undone[0].item()
        ([0.0, 0.0], 1.0)
    """
    own = gram.diagonal(dim1=-2, dim2=-1)
    own = torch.where(own > 0, own, torch.nan)
    after = torch.ones_like(gram[..., :, :]).triu(1)
    with_later = (gram * after).sum(-1)
    later = torch.einsum("...ij,...jk,...ik->...i", after, gram, after)
    beside = (later - with_later.square() / own).clamp(min=0)
    return Ledger(gram.sum(-1) / own, (-with_later).clamp(min=0).abs() / own, (beside / own).sqrt())


def cosine_spread(
    first: Float[Tensor, "*item rows columns"], second: Float[Tensor, "*item rows columns"]
) -> Float64[Tensor, "*item"]:
    """Standard deviation of the cosine of two deltas that share nothing but their row and column covariances.

    √(tr(Δ₁Δ₁ᵀΔ₂Δ₂ᵀ) tr(Δ₁ᵀΔ₁Δ₂ᵀΔ₂)) / (‖Δ₁‖²‖Δ₂‖²); 1/√(rows · columns) where both are white. NaN for a zero delta.

    Example:
        >>> round(cosine_spread(torch.eye(4), torch.eye(4)).item(), 3)
        0.25
    """
    A, B = first.double(), second.double()
    if A.shape[-1] > A.shape[-2]:  # the formula is the same in both axes: products as large as the shorter one
        A, B = A.mT, B.mT
    sizes = A.square().sum((-2, -1)) * B.square().sum((-2, -1))
    crossed = (A.mT @ B).square().sum((-2, -1))  # tr(AAᵀBBᵀ)
    within = ((A.mT @ A) * (B.mT @ B)).sum((-2, -1))  # tr(AᵀABᵀB)
    return (crossed * within).sqrt() / torch.where(sizes > 0, sizes, torch.nan)


def leading_overlap(
    first: Float[Tensor, "*item rows columns"], second: Float[Tensor, "*item rows columns"], rank: int
) -> Float64[Tensor, "*item"]:
    """‖U₁ᵀU₂‖² / k of the leading k left singular directions; k / rows by chance, 1 where they span the same.

    Example:
        >>> leading_overlap(torch.eye(4), torch.eye(4), 4).item()
        1.0
    """
    U, V = (_leading_left(x.double(), rank) for x in (first, second))
    return (U.mT @ V).square().sum((-2, -1)) / rank


def _leading_left(x: Tensor, rank: int) -> Tensor:
    if x.shape[-1] > x.shape[-2]:
        return torch.linalg.eigh(x @ x.mT).eigenvectors[..., -rank:]
    return torch.linalg.svd(x, full_matrices=False).U[..., :rank]


def storage_product(
    middle: Float[Tensor, "*item rows columns"],
    before: Float64[Tensor, "*item"],
    after: Float64[Tensor, "*item"],
    dtype: torch.dtype,
    *,
    seed: int,
) -> Float64[Tensor, "*item"]:
    """⟨Δ₁, Δ₂⟩ of two steps that have nothing to do with each other but the stored checkpoint in which they meet.

    What the checkpoint's storage rounds off enters both with opposite signs. It is simulated: x is the checkpoint with
    what rounding took off drawn anew, uniform within a unit in the last place; x − σ₁E₁ and x + σ₂E₂, E Gaussian, are
    stored as well, σ such that the stored steps are as long as those at hand. At most 65,536 entries of each are drawn.

    Args:
        middle: W at the checkpoint, as stored.
        before: ‖Δ₁‖, of the step that ends there.
        after: ‖Δ₂‖, of the step that begins there.
        dtype: what it is stored in; 0 for float32 and finer.
        seed: of the draws.
    """
    if torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps:
        return torch.zeros_like(before)
    W = middle.double().flatten(-2).cpu()
    total = W.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    if total > _ENTRIES:
        W = W[..., torch.randint(total, (_ENTRIES,), generator=generator)]
    share = W.shape[-1] / total
    unit = torch.ldexp(torch.full_like(W, torch.finfo(dtype).eps), torch.frexp(W).exponent - 1)
    x = W + unit * (torch.rand(W.shape, dtype=W.dtype, generator=generator) - 0.5)
    R = x.to(dtype).double()
    steps = [
        _stored_step(
            x, R, sign * torch.randn(W.shape, dtype=W.dtype, generator=generator), share * size.square(), dtype
        )
        for sign, size in ((-1, before), (1, after))
    ]
    return -(steps[0] * steps[1]).sum(-1) / share


def _stored_step(x: Tensor, R: Tensor, E: Tensor, energy: Tensor, dtype: torch.dtype) -> Tensor:
    """R(x + σE) − R(x) of the wanted energy; its size grows with σ."""

    def step(σ: Tensor) -> Tensor:
        return (x + σ.unsqueeze(-1) * E).to(dtype).double() - R

    # Past the coarsest rounding the stored step is about σE.
    coarsest = x.abs().amax(-1) * torch.finfo(dtype).eps
    low, high = torch.zeros_like(energy), 2 * (energy / x.shape[-1]).sqrt() + coarsest
    for _ in range(_BISECTIONS):
        σ = (low + high) / 2
        short = step(σ).square().sum(-1) < energy
        low, high = torch.where(short, σ, low), torch.where(short, high, σ)
    return step(high)
