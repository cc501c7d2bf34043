"""Sparse, or just small? How many stored entries moved, and how many a dense change of that size would have moved."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_SAMPLE = 65_536
_BISECTIONS = 40
_FEW = 64


def changed_share(delta: Float[Tensor, "head rows columns"]) -> Float64[Tensor, " head"]:
    """Share of the entries that moved, of the difference of two stored weights.

    Example:
        >>> changed_share(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])).item()
        0.25
    """
    return (delta != 0).double().mean((-2, -1))


def changed_expected(
    base: Float[Tensor, "head rows columns"],
    delta: Float[Tensor, "head rows columns"],
    stored: torch.dtype,
    *,
    seed: int,
) -> Float64[Tensor, " head"]:
    """Share of the entries that a dense delta of the same norm and entry law would have changed once stored.

    With R the rounding to the storage format and E the law of the entries that moved where the format is finest
    (|W| in its lowest tenth; Gaussian where hardly any did), σ solves ‖R(W + σE) − W‖ = ‖ΔW‖; the answer is the share
    of entries that R(W + σE) changes. Only what lies below it is sparsity.

    Args:
        base: W, exactly as stored.
        delta: ΔW of the stored weights.
        stored: the format, see `storage_dtype`.
        seed: of the law's draws, and of the entries looked at where there are more than 65,536 a head.

    Returns:
        0 to 1; NaN for a zero delta.
    """
    W, ΔW = base.flatten(1), delta.flatten(1)
    target = ΔW.double().square().mean(-1)
    generator = torch.Generator().manual_seed(seed)
    if W.shape[1] > _SAMPLE:
        at = torch.randint(W.shape[1], (_SAMPLE,), generator=generator).to(W.device)
        W, ΔW = W.index_select(1, at), ΔW.index_select(1, at)
    W, ΔW = W.double(), ΔW.double()
    E = torch.stack([_dense_law(w, change, generator) for w, change in zip(W, ΔW, strict=True)])
    low, high = torch.zeros_like(target), 2 * target.sqrt() + W.abs().amax(-1) * torch.finfo(stored).eps
    for _ in range(_BISECTIONS):
        σ = (low + high) / 2
        too_small = _stored(W, σ, E, stored).sub(W).square().mean(-1) < target
        low, high = torch.where(too_small, σ, low), torch.where(too_small, high, σ)
    share = (_stored(W, high, E, stored) != W).double().mean(-1)
    return torch.where(target > 0, share, torch.nan)


def _stored(W: Tensor, σ: Tensor, E: Tensor, stored: torch.dtype) -> Tensor:
    return (W + σ.unsqueeze(-1) * E).to(stored).double()


def _dense_law(W: Tensor, ΔW: Tensor, generator: torch.Generator) -> Tensor:
    """Entries of unit mean square, as many as W has, drawn from those that moved where the format is finest."""
    finest = W.abs().argsort()[: max(1, len(W) // 10)]
    moved = ΔW[finest]
    moved = moved[moved != 0]
    if len(moved) < _FEW:
        return torch.randn(len(W), generator=generator, dtype=torch.float64).to(W.device)
    drawn = moved[torch.randint(len(moved), (len(W),), generator=generator).to(W.device)]
    return drawn / moved.square().mean().sqrt()
