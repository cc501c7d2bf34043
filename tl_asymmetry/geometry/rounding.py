"""How much of a delta the storage format alone explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.fraction import inner_product

_DRAWS = 3
_BISECTIONS = 40
# Entries looked at for each head: the share is an average over entries, and 65,536 of them fix it to well under 1 %.
_SAMPLE = 65_536
_PIECE = 1 << 20
# Numbers of the draws at work at once: what stays in a core's own cache.
_AT_ONCE = 1 << 18

# Coarsest first.
_STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@checked
def storage_dtype(weight: Float[Tensor, "*axes"]) -> torch.dtype:
    """The coarsest of bf16, fp16 and fp32 that holds every entry exactly: what the tensor was stored in.

    A bf16 checkpoint loaded as float32 is still bf16. float64 where float32 is not enough.

    Example:
        >>> storage_dtype(torch.tensor([0.5, 0.25]))
        torch.bfloat16
    """
    if not weight.is_floating_point():
        raise ValueError(f"expected weight as a tensor of floats, got {weight.dtype}; pass the weights as they are run")
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


@dataclass(frozen=True)
class Rounding:
    """What storage alone does to a delta of this size."""

    share: Float64[Tensor, "*head"]
    """ρ, the share of ‖ΔW‖² that rounding explains, 0 to 1; 0 for float32 and finer; NaN for a zero delta."""
    rows: Float64[Tensor, "*head rows"]
    """How that noise is spread over the rows, adding up to 1: bf16 rounds in proportion to |W_ij|, not evenly."""

    def fraction(self, basis: Float[Tensor, "rows k"]) -> Float64[Tensor, "*head k"]:
        """Expected fraction of the noise in the leading 1 … k columns of a basis: its entries are uncorrelated."""
        return self.rows @ basis.to(self.rows).square().cumsum(-1)


@checked
def rounding_noise(
    base: Float[Tensor, "*head rows columns"],
    delta: Float[Tensor, "*head rows columns"],
    stored: torch.dtype,
    *,
    seed: int,
) -> Rounding:
    """The share of a delta that rounding to the storage format explains, by re-rounding.

    With R the rounding and E noise of unit size drawn from the delta's own entries, σ solves ‖R(W + σE) − W‖ = ‖ΔW‖,
    and ρ = 1 − cos²(R(W + σE) − W, σE), the mean of 3 seeded draws. The entries are taken where |W| is smallest and
    the format therefore finest, so that they still have the law they had before they were stored: for sign-like
    updates a Gaussian law is 0.08 too low.

    Args:
        base: weights W `[..., rows, columns]`; the leading axes (heads) are treated apart.
        delta: ΔW, the same shape.
        stored: storage format of the pair, see `storage_dtype` and `coarser`.
        seed: of the draws.
    """
    heads, d = base.shape[:-2], base.shape[-2]
    target = (inner_product(delta, delta) / (d * delta.shape[-1])).reshape(-1)
    rows = torch.full((len(target), d), 1 / d, dtype=torch.float64, device=target.device)
    if torch.finfo(stored).eps <= torch.finfo(torch.float32).eps:
        share = torch.zeros_like(target)
    else:
        W, ΔW = base.reshape(len(target), -1), delta.reshape(len(target), -1)
        generator = torch.Generator().manual_seed(seed)
        if W.shape[1] > _SAMPLE:
            at = torch.randint(W.shape[1], (_SAMPLE,), generator=generator).to(W.device)
        else:
            at = torch.arange(W.shape[1], device=W.device)
        W, row = W.index_select(1, at).double(), at // base.shape[-1]
        law = _entry_law(W, ΔW.index_select(1, at).double())
        drawn = [torch.randint(law.shape[1], W.shape, generator=generator).to(W.device) for _ in range(_DRAWS)]
        E = torch.stack([law.gather(1, places) for places in drawn])
        few = max(1, _AT_ONCE // (_DRAWS * W.shape[1]))
        parts = zip(W.split(few), target.split(few), E.split(few, 1), strict=True)
        shares, noises = zip(*(_of_draws(*part, stored) for part in parts), strict=True)
        share, noise = torch.cat(shares), torch.cat(noises)
        spread = torch.zeros_like(rows).index_add_(1, row, noise)
        ones = torch.ones_like(row, dtype=torch.float64)
        counts = torch.zeros(d, dtype=torch.float64, device=W.device).index_add_(0, row, ones)
        spread = spread / counts.clamp(min=1)
        total = spread.sum(-1, keepdim=True)
        rows = torch.where(total > 0, spread / total, rows)
    return Rounding(torch.where(target > 0, share, torch.nan).reshape(heads), rows.reshape(*heads, d))


def _entry_law(W: Tensor, ΔW: Tensor) -> Tensor:
    """Entries of the delta where the format is finest, of unit size `[head, n]`; Gaussian where none of them moved."""
    finest = W.abs().argsort(-1).narrow(-1, 0, max(1, W.shape[1] // 10))
    law = ΔW.gather(1, finest)
    size = law.square().mean(-1, keepdim=True).sqrt()
    normal = torch.special.ndtri(
        (torch.arange(law.shape[1], dtype=torch.float64, device=W.device) + 0.5) / law.shape[1]
    )
    return torch.where(size > 0, law / size, normal)


def _of_draws(
    W: Float64[Tensor, "head n"],
    target: Float64[Tensor, " head"],
    E: Float64[Tensor, "draw head n"],
    stored: torch.dtype,
) -> tuple[Float64[Tensor, " head"], Float64[Tensor, "head n"]]:
    """ρ, the mean over draws, and the squared noise of every entry, added up over these."""
    # ‖R(W + σE) − W‖ grows from the noise of storing W itself to ~σ‖E‖.
    low = E.new_zeros(E.shape[:-1])
    high = (2 * target.sqrt() + W.abs().amax(-1) * torch.finfo(stored).eps).expand_as(low)
    for _ in range(_BISECTIONS):
        σ = (low + high) / 2
        too_small = _stored_delta(W, σ, E, stored).square().mean(-1) < target
        low, high = torch.where(too_small, σ, low), torch.where(too_small, high, σ)
    change, intended = _stored_delta(W, high, E, stored), high.unsqueeze(-1) * E
    inner, energy = (change * intended).sum(-1), intended.square().sum(-1)
    norms = change.square().sum(-1) * energy
    share = 1 - torch.where(norms > 0, inner.square() / norms, torch.zeros_like(norms))
    scale = torch.where(energy > 0, inner / energy, torch.zeros_like(energy))
    return share.mean(0), (change - scale.unsqueeze(-1) * intended).square().sum(0)


def _stored_delta(W: Tensor, σ: Tensor, E: Tensor, stored: torch.dtype) -> Tensor:
    """R(W + σE) − W."""
    return (W + σ.unsqueeze(-1) * E).to(stored).double() - W


def without_rounding(
    fraction: Float[Tensor, "*item"], share: Float[Tensor, "*item"], noise: Float[Tensor, "*item"], *, most: float
) -> Float64[Tensor, "*item"]:
    """(f − ρ f_noise)/(1 − ρ), between 0 and 1; NaN above a share of `most`, where nothing is left to divide by."""
    corrected = ((fraction - share * noise) / (1 - share)).clamp(0, 1)
    return torch.where(share <= most, corrected, torch.nan)
