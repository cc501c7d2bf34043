"""What can be said of a weight delta before it is held against anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.factored import factored_energy, factored_svd
from tl_asymmetry.geometry.fraction import gram_energy, inner_product, row_pieces, total
from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.geometry.precision import exact_products, product_dtype, squares_fit
from tl_asymmetry.geometry.rounding import coarser, rounding_noise, storage_dtype
from tl_asymmetry.geometry.subspace import ordered_eigh
from tl_asymmetry.models.readers.base import Factors, Weights, WeightSource
from tl_asymmetry.names import kind_of

_DECAY = 1e-3

# Of base weights. Circuits multiply four entries, so that these have half the range of a delta's (`squares_fit`).
_SMALLEST_BASE, _LARGEST_BASE = 1e-10, 1e12

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
    """Share of the energy that storage alone explains, see `rounding_noise`."""
    noise_rows: Float64[Tensor, "head d_model"]
    """How that noise is spread over the coordinates of the residual axis."""
    columns: int = 0
    """Columns of the whole matrix, all heads together, of experts each one's own; 0 where they were not kept."""
    pooled_spectrum: Float64[Tensor, " r"] | None = None
    """Eigenvalues of Σ_h ΔW_h ΔW_hᵀ, the heads together as one delta; None where they were not kept."""
    unshrunk: Delta | None = None
    """The same of ΔW − sW, s = ⟨ΔW, W⟩/‖W‖² over all heads; None where decay is under 0.1 % of the energy."""


@dataclass(frozen=True)
class LiveDelta:
    """ΔW itself, as long as its layer is at work, and its numbers."""

    numbers: Delta
    """What stays when the tensors go."""
    change: Float[Tensor, "head d_model other"] | None
    """ΔW, the residual axis first, on the device of the base's weights; None where its Gram matrix stands in for it.
    `measure_delta` lays it out as `flat` wants it, so that of the two there is one."""
    gram: Float[Tensor, "head d_model d_model"] | None
    """ΔW ΔWᵀ where the other axis is the longer one: smaller than ΔW, and all that a projection needs."""
    unshrunk: LiveDelta | None = None
    """ΔW − sW; None where weight decay can make no difference."""

    @cached_property
    def flat(self) -> Float[Tensor, "d_model columns"]:
        """ΔW with its heads side by side: one large product is faster than one for each head."""
        return self._change().transpose(0, 1).flatten(1)

    @property
    def matrix(self) -> str:
        """Name of the matrix."""
        return self.numbers.matrix

    def energies(self, basis: Float[Tensor, "d_model k"]) -> Float64[Tensor, "head k"]:
        """‖q_iᵀ ΔW‖² for each direction of an orthonormal basis, on CPU."""
        if self.gram is not None:
            return gram_energy(self.gram, basis).cpu()
        heads = self._change().shape[0]
        with exact_products(self.flat.device):
            projected = basis.to(self.flat).mT @ self.flat
        return total(projected.square().unflatten(-1, (heads, -1))).mT.cpu()

    def factors(self) -> tuple[Float[Tensor, "head d_model r"], None]:
        """ΔW as residual · otherᵀ with `other` the identity (None)."""
        return self._change(), None

    def _change(self) -> Float[Tensor, "head d_model other"]:
        if self.change is None:
            raise RuntimeError(f"ΔW of {self.matrix} has been reduced to its Gram matrix")
        return self.change


@dataclass(frozen=True)
class FactoredDelta:
    """ΔW as a product of two thin factors, as an adapter gives it: nothing of the size of W is ever made of it."""

    numbers: Delta
    """What stays when the tensors go."""
    residual: Float64[Tensor, "d_model r"]
    """The factor on the residual stream, the same for all heads."""
    other: Float64[Tensor, "head other r"]
    """The other factor, so that ΔW_h = residual · other_hᵀ."""
    unshrunk: None = None
    """An adapter does not decay what it is added to."""

    @property
    def matrix(self) -> str:
        """Name of the matrix."""
        return self.numbers.matrix

    def energies(self, basis: Float[Tensor, "d_model k"]) -> Float64[Tensor, "head k"]:
        """‖q_iᵀ ΔW‖² for each direction of an orthonormal basis, on CPU."""
        return factored_energy(self.residual.unsqueeze(0), self.other, basis).cpu()

    def factors(self) -> tuple[Float64[Tensor, "head d_model r"], Float64[Tensor, "head other r"]]:
        """ΔW as residual · otherᵀ."""
        return self.residual.expand(len(self.other), -1, -1), self.other


AnyDelta = LiveDelta | FactoredDelta
"""What one layer's work is done with."""


def of_unit(delta: AnyDelta, unit: int) -> AnyDelta:
    """The change of one head or expert by itself."""
    numbers, own = _numbers_of_unit(delta.numbers, unit), slice(unit, unit + 1)
    if isinstance(delta, FactoredDelta):
        return FactoredDelta(numbers, delta.residual, delta.other[own])
    twin = None if delta.unshrunk is None else of_unit(delta.unshrunk, unit)
    return LiveDelta(
        numbers,
        None if delta.change is None else delta.change[own],
        None if delta.gram is None else delta.gram[own],
        twin if isinstance(twin, LiveDelta) else None,
    )


def _numbers_of_unit(numbers: Delta, unit: int) -> Delta:
    own = {name: getattr(numbers, name)[unit : unit + 1] for name in _OF_EACH_UNIT}
    twin = None if numbers.unshrunk is None else _numbers_of_unit(numbers.unshrunk, unit)
    return replace(numbers, **own, pooled_spectrum=None, unshrunk=twin)


_OF_EACH_UNIT = ("base_energy", "energy", "shrink", "spectrum", "directions", "partners", "rounding", "noise_rows")


def measure_change(base: Weights, aligned: Weights, layer: int, matrix: str, *, seed: int) -> AnyDelta:
    """The change of one matrix, by factors where the aligned weights come as such, else by subtraction."""
    factors = aligned.factors(layer, matrix) if isinstance(aligned, WeightSource) else None
    W = base.weight(layer, matrix)
    if factors is None:
        return measure_delta(matrix, W, aligned.weight(layer, matrix), seed=seed)
    return measure_factors(matrix, W, factors)


def measure_delta(
    matrix: str, base: Float[Tensor, "*head rows columns"], aligned: Float[Tensor, "*head rows columns"], *, seed: int
) -> LiveDelta:
    """Subtract two matrices and measure the difference: in float32, in float64 if either is or float32 cannot hold
    products of their entries.

    Args:
        matrix: name; W_O and W_out have their residual axis last, all others second to last.
        base: TransformerLens orientation, heads first.
        aligned: the same shape; moved to the base's device.
        seed: for the rounding share.
    """
    stored = coarser(storage_dtype(base), storage_dtype(aligned))
    W = residual_first(matrix, base)
    ΔW = _subtracted(residual_first(matrix, aligned).to(W.device), W)
    base_energy, energy, inner = (inner_product(x, y) for x, y in ((W, W), (ΔW, ΔW), (ΔW, W)))
    if ΔW.dtype == torch.float32 and not (_base_fits(W, base_energy) and _delta_fits(ΔW, energy)):
        del ΔW
        return measure_delta(matrix, base.double(), aligned.double(), seed=seed)
    del aligned  # read from files for this one subtraction
    rounding = rounding_noise(W, ΔW, stored, seed=seed)
    wide = ΔW.shape[-1] > ΔW.shape[-2]
    with exact_products(ΔW.device):
        gram = ΔW @ ΔW.mT if wide else ΔW.mT @ ΔW
    # d_head × d_head in float64; d_model × d_model in the Gram's own precision, at half the time.
    λ, V = ordered_eigh(gram if wide else gram.double())
    V = V[..., :DIRECTIONS].to(ΔW, copy=True)  # a view would keep all d² entries for as long as the result lives
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
        rounding=rounding.share.cpu(),
        noise_rows=rounding.rows.cpu(),
        columns=_columns(matrix, ΔW),
        pooled_spectrum=_pooled_spectrum(ΔW),
    )
    replaced = wide and kind_of(matrix).heads is None  # circuits multiply heads, however wide
    live = LiveDelta(numbers, None if replaced else ΔW, gram if wide else None)
    s = float(inner.sum() / base_energy.sum())
    if s**2 * float(base_energy.sum()) < _DECAY * float(energy.sum()):
        return live
    rest = _shrunk(ΔW, W, s)
    with exact_products(rest.device):
        gram = rest @ rest.mT if wide else rest.mT @ rest
    left = replace(
        numbers,
        energy=inner_product(rest, rest).cpu(),
        spectrum=torch.linalg.eigvalsh(gram if wide else gram.double()).flip(-1).double().clamp(min=0).cpu(),
        pooled_spectrum=_pooled_spectrum(rest),
    )
    twin = LiveDelta(left, None if replaced else rest, gram if wide else None)
    return replace(live, numbers=replace(numbers, unshrunk=left), unshrunk=twin)


def _columns(matrix: str, W: Float[Tensor, "head d_model other"]) -> int:
    """Columns of what an optimizer sees as one matrix: of heads all together, of experts each one's own."""
    return W.shape[2] * (W.shape[0] if kind_of(matrix).heads else 1)


def _base_fits(W: Float[Tensor, "head d_model other"], energy: Float64[Tensor, " head"]) -> bool:
    return squares_fit(energy / W[0].numel(), _SMALLEST_BASE, _LARGEST_BASE) and not _vanished(W, energy)


def _delta_fits(change: Float[Tensor, "head d_model other"], energy: Float64[Tensor, " head"]) -> bool:
    return squares_fit(energy / change[0].numel()) and not _vanished(change, energy)


def _vanished(x: Float[Tensor, "head d_model other"], energy: Float64[Tensor, " head"]) -> bool:
    """Whether all squares of a head that is not zero underflowed."""
    return any(bool(x[head].any()) for head in (energy == 0).nonzero().flatten().tolist())


def _shrunk(
    change: Float[Tensor, "head d_model other"], base: Float[Tensor, "head d_model other"], s: float
) -> Float[Tensor, "head d_model other"]:
    """ΔW − sW, laid out as ΔW is."""
    return torch.sub(change.transpose(0, 1), base.to(change).transpose(0, 1), alpha=s).contiguous().transpose(0, 1)


def _pooled_spectrum(change: Float[Tensor, "head d_model other"]) -> Float64[Tensor, " r"] | None:
    """Eigenvalues of Σ_h ΔW_h ΔW_hᵀ; None of one head, whose own they are."""
    if len(change) == 1:
        return None
    flat = change.transpose(0, 1).flatten(1)
    with exact_products(flat.device):
        gram = flat @ flat.mT if flat.shape[1] > flat.shape[0] else flat.mT @ flat
    return torch.linalg.eigvalsh(gram).flip(-1).double().clamp(min=0).cpu()


def _subtracted(
    aligned: Float[Tensor, "head d_model other"], base: Float[Tensor, "head d_model other"]
) -> Float[Tensor, "head d_model other"]:
    """ΔW in float32 (float64 if either is), its rows side by side in memory over all heads."""
    heads, d, other = base.shape
    ΔW = torch.empty(d, heads, other, dtype=product_dtype(base, aligned), device=base.device).transpose(0, 1)
    row = 0
    for theirs, ours in row_pieces(aligned, base):
        torch.sub(theirs, ours, out=ΔW[:, row : (row := row + ours.shape[1])])
    return ΔW


def measure_factors(matrix: str, base: Float[Tensor, "*head rows columns"], factors: Factors) -> FactoredDelta:
    """Measure a change that is known as two thin factors, in rank-r algebra.

    The rounding share is 0: nothing stored was subtracted.

    Args:
        matrix: its name.
        base: TransformerLens orientation, heads first.
        factors: of ΔW, the scale included.
    """
    W = residual_first(matrix, base)
    base_energy = inner_product(W, W)
    if not _base_fits(W, base_energy):
        W = W.double()
        base_energy = inner_product(W, W)
    dtype = product_dtype(W)
    residual, other = (side.to(W.device, torch.float64) for side in (factors.residual, factors.other))
    U, σ, V = factored_svd(residual.unsqueeze(0), other)
    energy = σ.square().sum(-1)
    with exact_products(W.device):
        inner = total((W.mT.to(dtype) @ residual.to(dtype)).double() * other, axes=2)  # ⟨residual otherᵀ, W⟩
    directions, partners = _signed(_padded(U), _padded(V), wide=W.shape[-1] > W.shape[-2])
    together = other.shape[0] * other.shape[1]
    pooled = factored_svd(residual, other.flatten(0, 1))[1] if len(σ) > 1 else None
    numbers = Delta(
        matrix=matrix,
        base_energy=base_energy.cpu(),
        energy=energy.cpu(),
        shrink=(inner / base_energy).cpu(),
        spectrum=_whole_spectrum(σ, min(W.shape[-2:])),
        directions=directions.cpu().float().mT,
        partners=partners.cpu().float().mT,
        rounding=torch.where(energy > 0, 0.0, torch.nan).double().cpu(),
        noise_rows=torch.full((len(σ), W.shape[-2]), 1 / W.shape[-2], dtype=torch.float64),
        columns=_columns(matrix, W),
        pooled_spectrum=None if pooled is None else _whole_spectrum(pooled, min(W.shape[-2], together)),
    )
    return FactoredDelta(numbers, residual, other)


def _whole_spectrum(σ: Float64[Tensor, "*head k"], r: int) -> Float64[Tensor, "*head r"]:
    """Squares of the singular values of thin factors, and zeros up to the length that the whole matrix has."""
    return torch.nn.functional.pad(σ.square().cpu(), (0, r - σ.shape[-1]))


def _padded(vectors: Float64[Tensor, "head long r"]) -> Float64[Tensor, "head long n"]:
    """Up to DIRECTIONS orthonormal columns: the first ones given, then any that are orthogonal to them."""
    wanted = min(DIRECTIONS, vectors.shape[-2])
    if vectors.shape[-1] >= wanted:
        return vectors[..., :wanted]
    axes = torch.eye(vectors.shape[-2], dtype=vectors.dtype, device=vectors.device)
    # One of any r + 1 axes sticks out of r columns: the least covered ones are far from them.
    covered = vectors.square().sum(-1)
    least = covered.argsort(-1)[..., :wanted]
    return _orthonormal(torch.cat([vectors, axes[least].mT], -1))[..., :wanted]


def _signed(directions: Tensor, partners: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """Signs as `measure_delta` gives them: the largest entry on the shorter side is positive."""
    n = min(directions.shape[-1], partners.shape[-1])
    directions, partners = directions[..., :n], partners[..., :n]
    leading = directions if wide else partners
    largest = leading.gather(-2, leading.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(leading)
    return directions * sign, partners * sign


def _orthonormal(columns: Float[Tensor, "head long n"]) -> Float[Tensor, "head long n"]:
    """Columns to unit length, in order; those that are only rounding (beyond the delta's rank) to what is left."""
    Q, R = torch.linalg.qr(columns.double())
    return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def stacked(layers: Sequence[object | None], name: str) -> Tensor:
    """One tensor field of what the layers have, `[layer, ...]`; NaN where a layer has nothing, see `padded_stack`."""
    beyond = 0.0 if name in ("spectrum", "pooled_spectrum", "directions", "partners") else math.nan
    return padded_stack([None if layer is None else getattr(layer, name) for layer in layers], beyond=beyond)


def residual_first(matrix: str, weight: Float[Tensor, "*head rows columns"]) -> Float[Tensor, "head d_model other"]:
    """A matrix with its residual axis second to last and a head axis in front, of length 1 for the MLP; a view."""
    weight = weight.detach()
    weight = weight.mT if kind_of(matrix).writes else weight
    return weight.unsqueeze(0) if weight.ndim == 2 else weight
