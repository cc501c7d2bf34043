"""What can be said of a weight delta before it is held against anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.fraction import gram_energy, total
from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.geometry.rounding import coarser, rounding_share, storage_dtype
from tl_asymmetry.geometry.subspace import ordered_eigh
from tl_asymmetry.models.view import WRITE

DIRECTIONS = 5
"""Leading residual directions kept of each head's delta."""


@dataclass(frozen=True)
class Delta:
    """Numbers of one matrix's ΔW in one layer, all heads; an MLP matrix counts as one head. Float64 on CPU."""

    matrix: str
    """Its name, W_Q … W_out."""
    base_energy: Float64[Tensor, " head"]
    """‖W_base‖² of each head."""
    energy: Float64[Tensor, " head"]
    """‖ΔW‖² of each head."""
    shrink: Float64[Tensor, " head"]
    """⟨ΔW, W_base⟩ / ‖W_base‖²: −0.1 is what a weight decay by a tenth leaves."""
    spectrum: Float64[Tensor, "head r"]
    """Eigenvalues of ΔW ΔWᵀ, descending, r = min(d_model, other axis)."""
    directions: Float[Tensor, "head n d_model"]
    """Leading left singular vectors on the residual axis, float32."""
    partners: Float[Tensor, "head n other"]
    """The right singular vectors that belong to them, on the matrix's other axis, float32."""
    rounding: Float64[Tensor, " head"]
    """Share of the energy that storage alone explains, see `rounding_share`."""


@dataclass(frozen=True)
class LiveDelta:
    """ΔW itself, as long as its layer is at work, and its numbers."""

    numbers: Delta
    """What stays when the tensors go."""
    change: Float[Tensor, "head d_model other"]
    """ΔW, the residual axis first, on the device of the base's weights."""
    gram: Float[Tensor, "head d_model d_model"] | None
    """ΔW ΔWᵀ where the other axis is the longer one: it then stands in for ΔW in every projection."""

    @cached_property
    def flat(self) -> Float[Tensor, "d_model columns"]:
        """ΔW with its heads side by side: one large product is faster than one for each head."""
        return self.change.transpose(0, 1).flatten(1)

    @property
    def matrix(self) -> str:
        """Name of the matrix."""
        return self.numbers.matrix

    def energies(self, basis: Float[Tensor, "d_model k"]) -> Float64[Tensor, "head k"]:
        """‖q_iᵀ ΔW‖² for each direction of an orthonormal basis, on CPU."""
        if self.gram is not None:
            return gram_energy(self.gram, basis).cpu()
        heads = self.change.shape[0]
        with exact_products(self.flat.device):
            projected = basis.to(self.flat).mT @ self.flat
        return total(projected.square().unflatten(-1, (heads, -1))).mT.cpu()


def measure_delta(
    matrix: str, base: Float[Tensor, "*head rows columns"], aligned: Float[Tensor, "*head rows columns"], *, seed: int
) -> LiveDelta:
    """Subtract two matrices (in float32, or float64 if either is) and measure the difference.

    Args:
        matrix: name; W_O and W_out have their residual axis last, all others second to last.
        base: TransformerLens orientation, heads first.
        aligned: the same shape; moved to the base's device.
        seed: for the rounding share.
    """
    stored = coarser(storage_dtype(base), storage_dtype(aligned))
    dtype = product_dtype(base, aligned)
    W = residual_first(matrix, base).to(dtype)
    ΔW = residual_first(matrix, aligned).to(W) - W
    rounding = rounding_share(W, ΔW, stored, seed=seed)
    base_energy, energy, inner = (total(product, axes=2) for product in (W.square(), ΔW.square(), ΔW * W))
    wide = ΔW.shape[-1] > ΔW.shape[-2]
    with exact_products(ΔW.device):
        gram = ΔW @ ΔW.mT if wide else ΔW.mT @ ΔW
    # d_head × d_head in float64; d_model × d_model in the Gram's own precision, at half the time.
    λ, V = ordered_eigh(gram if wide else gram.double())
    V = V[..., :DIRECTIONS].to(ΔW)
    with exact_products(ΔW.device):
        other = (ΔW.mT @ V if wide else ΔW @ V).cpu()
    sides = V.cpu().float().mT, _orthonormal(other).float().mT
    numbers = Delta(
        matrix=matrix,
        base_energy=base_energy.cpu(),
        energy=energy.cpu(),
        shrink=(inner / base_energy).cpu(),
        spectrum=λ.double().clamp(min=0),
        directions=sides[0] if wide else sides[1],
        partners=sides[1] if wide else sides[0],
        rounding=rounding.cpu(),
    )
    return LiveDelta(numbers, ΔW, gram if wide else None)


def _orthonormal(columns: Float[Tensor, "head long n"]) -> Float[Tensor, "head long n"]:
    """Columns to unit length, in order; those that are only rounding (beyond the delta's rank) to what is left."""
    Q, R = torch.linalg.qr(columns.double())
    return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def stacked(layers: Sequence[object], name: str) -> Tensor:
    """One tensor field of what every layer has, `[layer, ...]`."""
    return torch.stack([getattr(layer, name) for layer in layers])


def residual_first(matrix: str, weight: Float[Tensor, "*head rows columns"]) -> Float[Tensor, "head d_model other"]:
    """A matrix with its residual axis second to last and a head axis in front, of length 1 for the MLP; a view."""
    weight = weight.detach()
    weight = weight.mT if matrix in WRITE else weight
    return weight.unsqueeze(0) if weight.ndim == 2 else weight
