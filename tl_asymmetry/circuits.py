"""Changes of the products that a head computes with, whichever way they are split into two matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.bases import LayerBases
from tl_asymmetry.deltas import LiveDelta, residual_first
from tl_asymmetry.geometry.precision import exact_products

CIRCUIT_COLUMNS = (
    "layer", "head", "circuit", "side", "pathway", "subspace", "rank", "fraction", "relative", "delta_norm",
    "delta_relative_norm",
)  # fmt: skip
"""Columns of the circuits table, in this order."""


_CIRCUITS = (
    ("QK", ("W_Q", "W_K"), (("query", "left", "read", "attn_in"), ("key", "right", "read", "attn_in"))),
    ("OV", ("W_V", "W_O"), (("value", "left", "read", "attn_in"), ("output", "right", "write", "prediction"))),
)


@dataclass(frozen=True)
class ProductChange:
    """X'Y'ᵀ − XYᵀ of every head, as two factors of 2 · d_head columns: never a d × d matrix."""

    left: Float[Tensor, "head d r"]
    """[ΔX, X]."""
    right: Float[Tensor, "head d r"]
    """[Y', ΔY], so that left rightᵀ = ΔX Y'ᵀ + X ΔYᵀ: nothing large is subtracted from something large."""
    energy: Float64[Tensor, " head"]
    """‖X'Y'ᵀ − XYᵀ‖²."""
    base_energy: Float64[Tensor, " head"]
    """‖XYᵀ‖²."""

    def energies(self, basis: Float[Tensor, "d k"], side: str) -> Float64[Tensor, "head k"]:
        """‖q_iᵀ (left rightᵀ)‖² for side "left", ‖(left rightᵀ) q_i‖² for side "right"."""
        near, far = (self.left, self.right) if side == "left" else (self.right, self.left)
        with exact_products(near.device):
            projected = basis.to(near).mT @ near
            # ‖p Yᵀ‖² = p (YᵀY) pᵀ
            return ((projected @ (far.mT @ far)) * projected).sum(-1, dtype=torch.float64).cpu()


def product_change(
    base_left: Float[Tensor, "head d r"],
    base_right: Float[Tensor, "head d r"],
    left_change: Float[Tensor, "head d r"],
    right_change: Float[Tensor, "head d r"],
) -> ProductChange:
    """The change of X Yᵀ from the two bases and their changes, which may have fewer heads on one side (grouped-query)."""
    heads = max(len(base_left), len(base_right))
    X, Y, ΔX, ΔY = (
        t.repeat_interleave(heads // len(t), 0) for t in (base_left, base_right, left_change, right_change)
    )
    left, right = torch.cat([ΔX, X], -1), torch.cat([Y + ΔY, ΔY], -1)
    return ProductChange(left, right, energy=_product_energy(left, right), base_energy=_product_energy(X, Y))


def layer_circuits(
    layer: int, base: Mapping[str, Tensor], deltas: Mapping[str, LiveDelta], bases: LayerBases, ranks: Sequence[int]
) -> pd.DataFrame:
    """Rows for W_Q W_Kᵀ ("QK") and W_V W_O ("OV") of every query head, as far as both matrices were analysed.

    The query and key sides of QK and the value side of OV are held against the attention input, the output side of OV
    against the prediction directions. Under rotary positions, biases and query-key norms the products are no longer
    all a head computes with, but they stay free of the gauge X → XG, Y → YG⁻ᵀ that single matrices depend on.

    Args:
        layer: which layer.
        base: the base's matrices `[head, ...]` in TransformerLens orientation.
        deltas: of this layer, by matrix.
        bases: of this layer.
        ranks: ranks to read; those above a basis's size are left out.
    """
    frames = [pd.DataFrame(columns=list(CIRCUIT_COLUMNS))]
    for circuit, (left, right), sides in _CIRCUITS:
        if left not in deltas or right not in deltas:
            continue
        ΔX, ΔY = deltas[left].change, deltas[right].change
        change = product_change(residual_first(left, base[left]).to(ΔX), residual_first(right, base[right]).to(ΔY), ΔX, ΔY)
        for side, axis, pathway, name in sides:
            basis = bases.subspace(name).basis
            profile = change.energies(basis, axis).cumsum(-1)
            frames += [
                _rows(change, profile[:, k - 1], k, basis.shape[0]).assign(
                    layer=layer, circuit=circuit, side=side, pathway=pathway, subspace=name
                )
                for k in ranks
                if k <= basis.shape[1]
            ]
    return pd.concat(frames[1:] or frames, ignore_index=True)[list(CIRCUIT_COLUMNS)]


def _rows(change: ProductChange, inside: Tensor, k: int, d: int) -> pd.DataFrame:
    fraction = inside / change.energy
    columns = {
        "fraction": fraction,
        "relative": fraction * d / k,
        "delta_norm": change.energy.sqrt(),
        "delta_relative_norm": (change.energy / change.base_energy).sqrt(),
    }
    frame = pd.DataFrame({name: value.numpy() for name, value in columns.items()})
    return frame.assign(head=range(len(frame)), rank=k)


def _product_energy(left: Tensor, right: Tensor) -> Tensor:
    """‖X Yᵀ‖² = ⟨XᵀX, YᵀY⟩, float64 on CPU."""
    with exact_products(left.device):
        return ((left.mT @ left).double() * (right.mT @ right).double()).sum((-2, -1)).cpu()

