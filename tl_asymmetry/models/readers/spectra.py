"""Norms and ranks of deltas by themselves: no activations, no subspace, for an adapter no base."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.spectrum import effective_rank, stable_rank

DELTA_NUMBERS = ("delta_norm", "delta_relative_norm", "stable_rank", "effective_rank")
"""Columns of `WeightSource.table`, in this order."""


def delta_numbers(λ: Float64[Tensor, "head r"], base: Tensor | None) -> list[list[float]]:
    """`DELTA_NUMBERS` of every head.

    Args:
        λ: eigenvalues of ΔW ΔWᵀ.
        base: the weight before, `[head?, d, m]`; without it relative norms are NaN.
    """
    norm = λ.sum(-1).sqrt()
    relative = torch.full_like(norm, torch.nan)
    if base is not None:
        relative = norm / (base.unsqueeze(0) if base.ndim == 2 else base).double().flatten(1).norm(dim=-1).cpu()
    return torch.stack([norm, relative, stable_rank(λ), effective_rank(λ)], -1).tolist()


def eigenvalues(delta: Tensor) -> Float64[Tensor, "head r"]:
    """Of ΔW ΔWᵀ, by the shorter side."""
    ΔW = (delta.unsqueeze(0) if delta.ndim == 2 else delta).cpu()
    ΔW = ΔW if ΔW.shape[-1] <= ΔW.shape[-2] else ΔW.mT
    with exact_products(ΔW.device):
        return torch.linalg.eigvalsh((ΔW.mT @ ΔW).double()).flip(-1).clamp(min=0)
