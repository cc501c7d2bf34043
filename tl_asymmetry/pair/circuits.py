"""Changes of the products that a head computes with, whichever way they are split into two matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.fraction import total
from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.deltas import AnyDelta, residual_first

CIRCUIT_COLUMNS = (
    "layer", "head", "circuit", "side", "pathway", "subspace", "rank", "fraction", "relative", "delta_norm",
    "delta_relative_norm",
)  # fmt: skip
"""Columns of the circuits table, in this order."""


# A product's change this much smaller (in energy) than the two terms it is the sum of has no digits left in float32.
_CANCELLED = 1e-6
# Entries of a side at work at once: heads do not mix, and both factors of all of them are many times ΔW.
_SIDE = 1 << 20

_CIRCUITS = (
    ("QK", ("W_Q", "W_K"), (("query", "left", "read", "attn_in"), ("key", "right", "read", "attn_in"))),
    ("OV", ("W_V", "W_O"), (("value", "left", "read", "attn_in"), ("output", "right", "write", "prediction"))),
)

LatentGains = Mapping[str, tuple[Tensor | None, Tensor | None]]
"""By latent what the norm behind it multiplies by, in the base and in the aligned model; None without a norm."""


Factored = tuple[Tensor, Tensor | None]
"""A change as residual `[head, d, r]` and other `[head, e, r]`; None for the identity."""


@dataclass(frozen=True)
class ProductChange:
    """X'Y'ᵀ − XYᵀ of every head, as two factors of 2 · d_head columns: never a d × d matrix."""

    left: Float[Tensor, "head d r"]
    """[R_X, X S_Y], with ΔX = R_X S_Xᵀ and ΔY = R_Y S_Yᵀ; [ΔX, X] where the changes are no thinner."""
    right: Float[Tensor, "head d r"]
    """[Y' S_X, R_Y], so that left rightᵀ = ΔX Y'ᵀ + X ΔYᵀ: nothing large is subtracted from something large."""
    left_gram: Float[Tensor, "head r r"]
    """leftᵀ left."""
    right_gram: Float[Tensor, "head r r"]
    """rightᵀ right."""
    energy: Float64[Tensor, " head"]
    """‖X'Y'ᵀ − XYᵀ‖²; 0 where only rounding is left of it."""
    base_energy: Float64[Tensor, " head"]
    """‖XYᵀ‖²."""

    def energies(self, basis: Float[Tensor, "d k"], side: str) -> Float64[Tensor, "head k"]:
        """‖q_iᵀ (left rightᵀ)‖² for side "left", ‖(left rightᵀ) q_i‖² for side "right"."""
        near, gram = (self.left, self.right_gram) if side == "left" else (self.right, self.left_gram)
        with exact_products(near.device):
            projected = basis.to(near).mT @ near
            # ‖p Yᵀ‖² = p (YᵀY) pᵀ
            return total((projected @ gram) * projected).cpu()


def product_change(
    base_left: Float[Tensor, "left_head d r"],
    base_right: Float[Tensor, "right_head d r"],
    left_change: Float[Tensor, "left_head d r"] | Factored,
    right_change: Float[Tensor, "right_head d r"] | Factored,
) -> ProductChange:
    """The change of X Yᵀ from the two bases and their changes; one side may have fewer heads (grouped-query).

    A change is a tensor, or a pair with residual · otherᵀ for it (`other` None: the residual itself).
    """
    heads = max(len(base_left), len(base_right))
    X, Y = (_repeated(t, heads) for t in (base_left, base_right))
    changes = [(c, None) if isinstance(c, Tensor) else c for c in (left_change, right_change)]
    (R_X, S_X), (R_Y, S_Y) = ((_repeated(R, heads), None if S is None else _repeated(S, heads)) for R, S in changes)
    with exact_products(X.device):
        ΔY = R_Y if S_Y is None else R_Y @ S_Y.mT
        left = torch.cat([R_X, _times(X, S_Y)], -1)
        right = torch.cat([_times(Y + ΔY, S_X), R_Y], -1)
    grams = _gram(left), _gram(right)
    energy = _inner(*grams)
    # ΔX Y'ᵀ and X ΔYᵀ cancel where the two changes are mostly a change of gauge.
    terms = _change_energy(R_X, S_X) * _norm(Y) + _norm(X) * _change_energy(R_Y, S_Y)
    energy = torch.where(energy > _CANCELLED * terms, energy, 0)
    return ProductChange(left, right, *grams, energy=energy, base_energy=_product_energy(X, Y))


def layer_circuits(
    layer: int,
    base: Mapping[str, Tensor],
    deltas: Mapping[str, AnyDelta],
    bases: LayerBases,
    ranks: Sequence[int],
    gains: LatentGains = MappingProxyType({}),
) -> pd.DataFrame:
    """Rows for W_Q W_Kᵀ ("QK") and W_V W_O ("OV") of every query head, as far as both matrices were analysed.

    The query and key sides of QK and the value side of OV are held against the attention input, the output side of OV
    against the prediction directions. Under rotary positions, biases and query-key norms the products are no longer
    all a head computes with, but they stay free of the gauge X → XG, Y → YG⁻ᵀ that single matrices depend on.

    Under latent attention a head's query map is W_DQ diag(γ) W_UQ, its key and value maps are W_DKV diag(γ) W_UK and
    W_DKV diag(γ) W_UV, γ the gain of the norm behind the latent. The products are those of these maps, of queries
    without the rotary part, which meets that of W_KR.

    Args:
        layer: which layer.
        base: the base's matrices `[head, ...]` in TransformerLens orientation.
        deltas: of this layer, by matrix.
        bases: of this layer.
        ranks: ranks to read; those at which a subspace has no directions are left out.
        gains: of the norms behind latents.
    """
    blocks: list[dict[str, np.ndarray]] = []
    maps: dict[str, tuple[Tensor, Factored]] = {
        m: (residual_first(m, base[m]), delta.factors()) for m, delta in deltas.items() if kind_of(m).heads
    }
    maps |= _through_latents(base, deltas, gains)
    for circuit, (left, right), both in _CIRCUITS:
        sides = [side for side in both if bases.has(side[-1])]
        if left not in maps or right not in maps:
            continue
        (X, ΔX), (Y, ΔY) = maps[left], maps[right]
        subspaces = [bases.subspace(name) for *_, name in sides]
        leading = [subspace.basis[:, : max(ranks)] for subspace in subspaces]
        energy, base_energy = [], []
        profiles: list[list[Tensor]] = [[] for _ in sides]
        for change in _changes_of_few_heads(X, Y, ΔX, ΔY):
            energy.append(change.energy)
            base_energy.append(change.base_energy)
            for profile, (_, axis, *_), basis in zip(profiles, sides, leading, strict=True):
                profile.append(change.energies(basis, axis).cumsum(-1))
        norms = torch.cat(energy), torch.cat(base_energy)
        for profile, (side, _, pathway, name), subspace in zip(profiles, sides, subspaces, strict=True):
            read = [k for k in ranks if k <= min(subspace.rank, subspace.existing)]
            if not read:
                continue
            numbers = _columns(*norms, torch.cat(profile)[:, [k - 1 for k in read]], read, subspace.d)
            same = {"layer": layer, "circuit": circuit, "side": side, "pathway": pathway, "subspace": name}
            blocks.append(numbers | {column: np.full(len(numbers["rank"]), value) for column, value in same.items()})
    if not blocks:
        return pd.DataFrame(columns=list(CIRCUIT_COLUMNS))
    return pd.DataFrame({column: np.concatenate([of[column] for of in blocks]) for column in CIRCUIT_COLUMNS})


def _through_latents(
    base: Mapping[str, Tensor], deltas: Mapping[str, AnyDelta], gains: LatentGains
) -> dict[str, tuple[Tensor, Factored]]:
    """Queries, keys and values of latent attention as maps of the stream, by the names that these have elsewhere."""
    found: dict[str, tuple[Tensor, Factored]] = {}
    for name, down, up in (("W_Q", "W_DQ", "W_UQ"), ("W_K", "W_DKV", "W_UK"), ("W_V", "W_DKV", "W_UV")):
        if down in deltas and up in deltas:
            sides = residual_first(down, base[down]), residual_first(up, base[up])
            changes = _dense(deltas[down]), _dense(deltas[up])
            dtype = product_dtype(*sides, *changes)
            D, U, ΔD, ΔU = (x.to(dtype) for x in (*sides, *changes))
            γ, twin = (
                torch.ones(len(U[0]), 1).to(D) if gain is None else gain.to(D).unsqueeze(-1)
                for gain in gains.get(kind_of(up).point, (None, None))
            )
            with exact_products(D.device):
                change = ΔD @ (twin * (U + ΔU)) + D @ (twin * ΔU + (twin - γ) * U)
                found[name] = D @ (γ * U), (change, None)
    if "W_K" in found:
        content = found["W_K"][0].shape[-1]
        if "W_Q" in deltas:  # queries that read the stream themselves
            found["W_Q"] = residual_first("W_Q", base["W_Q"]), (_dense(deltas["W_Q"]), None)
        if "W_Q" in found:
            W, (change, _) = found["W_Q"]
            found["W_Q"] = W[..., :content], (change[..., :content], None)
    return found


def _dense(delta: AnyDelta) -> Tensor:
    residual, other = delta.factors()
    return residual if other is None else residual @ other.mT


def _changes_of_few_heads(
    X: Float[Tensor, "left_head d r"], Y: Float[Tensor, "right_head d r"], *changes: Factored
) -> Iterator[ProductChange]:
    """The change of X Yᵀ, some heads at a time, in their order; heads that share a key or value stay together."""
    dtype = product_dtype(X, Y, *(residual for residual, other in changes if other is None))
    apart, heads = min(len(X), len(Y)), max(len(X), len(Y))
    step = max(1, _SIDE * apart // (heads * X[0].numel()))

    def few(tensor: Tensor, start: int) -> Tensor:
        each = len(tensor) // apart
        return tensor[start * each : (start + step) * each].to(dtype)

    for start in range(0, apart, step):
        yield product_change(
            few(X, start), few(Y, start),
            *((few(residual, start), None if other is None else few(other, start)) for residual, other in changes),
        )  # fmt: skip


def _columns(
    energy: Float64[Tensor, " head"], base_energy: Float64[Tensor, " head"], inside: Float64[Tensor, "head rank"],
    ranks: Sequence[int], d: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """A row for each head and rank."""
    energy, base_energy = energy.unsqueeze(-1), base_energy.unsqueeze(-1)
    fraction = inside / energy.masked_fill(energy == 0, torch.nan)
    columns = {
        "fraction": fraction,
        "relative": fraction * d / torch.tensor(ranks),
        "delta_norm": energy.sqrt(),
        "delta_relative_norm": (energy / base_energy).sqrt(),
        "head": torch.arange(len(energy)).unsqueeze(-1),
        "rank": torch.tensor(ranks),
    }
    return {name: value.expand(fraction.shape).flatten().numpy() for name, value in columns.items()}


def _repeated(side: Tensor, heads: int) -> Tensor:
    return side.repeat_interleave(heads // len(side), 0)


def _times(matrix: Tensor, factor: Tensor | None) -> Tensor:
    return matrix if factor is None else matrix @ factor


def _change_energy(residual: Tensor, other: Tensor | None) -> Tensor:
    """‖residual otherᵀ‖²."""
    return _norm(residual) if other is None else _product_energy(residual, other)


def _product_energy(left: Tensor, right: Tensor) -> Tensor:
    """‖X Yᵀ‖² = ⟨XᵀX, YᵀY⟩, float64 on CPU."""
    return _inner(_gram(left), _gram(right))


def _gram(x: Tensor) -> Tensor:
    """XᵀX."""
    with exact_products(x.device):
        return x.mT @ x


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """⟨X, Y⟩, float64 on CPU."""
    return (x.double() * y.double()).sum((-2, -1)).cpu()


def _norm(x: Tensor) -> Tensor:
    """‖X‖², float64 on CPU."""
    return total(x.square(), axes=2).cpu()
