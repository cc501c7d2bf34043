"""How much of a delta the storage format alone explains."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.fraction import inner_product

_DRAWS = 3
_BISECTIONS = 40
# Entries looked at for each head: the share is an average over entries, and 65,536 of them fix it to well under 1 %.
_SAMPLE = 65_536
_PIECE = 1 << 20

# Coarsest first.
_STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def storage_dtype(weight: Tensor) -> torch.dtype:
    """The coarsest of bf16, fp16 and fp32 that holds every entry exactly: what the tensor was stored in.

    A bf16 checkpoint loaded as float32 is still bf16. float64 where float32 is not enough.

    Example:
        >>> storage_dtype(torch.tensor([0.5, 0.25]))
        torch.bfloat16
    """
    # In pieces: the first one is enough to tell in nearly every case that a format is too coarse.
    weight = weight.reshape(1) if weight.ndim == 0 else weight
    pieces = weight.split(max(1, _PIECE * len(weight) // max(1, weight.numel())))
    for dtype in _STORAGE_DTYPES:
        if all(bool((piece.to(dtype).to(weight.dtype) == piece).all()) for piece in pieces):
            return dtype
    return torch.float64


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The one of two storage formats with the shorter mantissa."""
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def rounding_share(
    base: Float[Tensor, "*head rows columns"],
    delta: Float[Tensor, "*head rows columns"],
    stored: torch.dtype,
    *,
    seed: int,
) -> Float64[Tensor, "*head"]:
    """Share ρ of ‖ΔW‖² that rounding to the storage format explains, by re-rounding.

    With G Gaussian and R the rounding, σ solves ‖R(W + σG) − W‖ = ‖ΔW‖, and ρ = 1 − cos²(R(W + σG) − W, σG), the mean
    of 3 seeded draws: a delta of this size, stored in this format, would carry this share of noise.

    Args:
        base: weights W `[..., rows, columns]`; the leading axes (heads) are treated apart.
        delta: ΔW, the same shape.
        stored: storage format of the pair, see `storage_dtype` and `coarser`.
        seed: of the draws.

    Returns:
        ρ between 0 and 1; 0 for float32 and finer; NaN for a zero delta.
    """
    heads = base.shape[:-2]
    target = (inner_product(delta, delta) / (delta.shape[-2] * delta.shape[-1])).reshape(-1)
    if torch.finfo(stored).eps <= torch.finfo(torch.float32).eps:
        share = torch.zeros_like(target)
    else:
        W = base.reshape(len(target), -1)
        generator = torch.Generator().manual_seed(seed)
        if W.shape[1] > _SAMPLE:
            W = W.index_select(1, torch.randint(W.shape[1], (_SAMPLE,), generator=generator).to(W.device))
        W = W.double()
        draws = (torch.randn(W.shape, generator=generator, dtype=torch.float64).to(W) for _ in range(_DRAWS))
        share = torch.stack([_share_of_one_draw(W, target, G, stored) for G in draws]).mean(0)
    return torch.where(target > 0, share, torch.nan).reshape(heads)


def _share_of_one_draw(W: Tensor, target: Tensor, G: Tensor, stored: torch.dtype) -> Tensor:
    def stored_delta(σ: Tensor) -> Tensor:
        return (W + σ.unsqueeze(-1) * G).to(stored).double() - W

    # ‖R(W + σG) − W‖ grows from the noise of storing W itself to ~σ‖G‖.
    low, high = torch.zeros_like(target), 2 * target.sqrt() + W.abs().amax(-1) * torch.finfo(stored).eps
    for _ in range(_BISECTIONS):
        σ = (low + high) / 2
        too_small = stored_delta(σ).square().mean(-1) < target
        low, high = torch.where(too_small, σ, low), torch.where(too_small, high, σ)
    stored_change, intended = stored_delta(high), high.unsqueeze(-1) * G
    inner = (stored_change * intended).sum(-1).square()
    norms = stored_change.square().sum(-1) * intended.square().sum(-1)
    return 1 - torch.where(norms > 0, inner / norms, torch.zeros_like(norms))
