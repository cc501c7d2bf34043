"""What the tables read: every matrix's deltas in numbers, by themselves and, at each rank, against each subspace.

Small enough to keep for every checkpoint of a run: sizes are set by heads, ranks and groups of texts, not by widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of, reads_latent
from tl_asymmetry.pair.bases import REFERENCES, Routed
from tl_asymmetry.pair.deltas import Delta
from tl_asymmetry.pair.plan import Plan
from tl_asymmetry.pair.projections import Projection

MATCHED = (*REFERENCES, "weighted", "lora")
"""Nulls of read matrices. They expect one fraction of all heads of a layer, but for gradients of each head's own."""


@dataclass(frozen=True)
class Layout:
    """Which numbers there are."""

    d: int
    """d_model."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Query heads."""
    units: Mapping[str, tuple[str | None, ...]]
    """For each matrix and layer what there are several of, "head" or "expert"; None for one of a kind."""
    targets: Mapping[str, tuple[str, ...]]
    """For each matrix, in order, the subspaces it is held against."""
    ranks: tuple[int, ...]
    """Ascending; a subspace with fewer directions has the first of them."""
    measured: Mapping[str, tuple[int, ...]]
    """For each subspace those ranks that tables show."""
    latents: Mapping[str, int] | None = None
    """Widths of what is no stream, by the matrices that read it; None where none does."""

    def width(self, matrix: str) -> int:
        """Of the axis on which a matrix is held against subspaces: d_model, or its latent's."""
        return (self.latents or {}).get(matrix, self.d)

    @classmethod
    def of(cls, view: ModelView, plan: Plan) -> Layout:
        """Of an analysis that begins."""
        units = {m: tuple(view.unit(layer, m) for layer in range(view.n_layers)) for m in plan.matrices}
        targets = {matrix: plan.targets[matrix] for matrix in plan.matrices}
        latents = {
            matrix: max(view.latent_width(layer, kind_of(matrix).point) for layer in range(view.n_layers))
            for matrix in plan.matrices
            if reads_latent(matrix)
        }
        return cls(view.d_model, view.n_layers, view.n_heads, units, targets, plan.ranks, plan.measured, latents)


@dataclass(frozen=True)
class DeltaNumbers:
    """Of one matrix's deltas by themselves, float64 on CPU; a place is a layer, in a trajectory of one checkpoint."""

    base_energy: Float64[Tensor, "*place head"]
    """‖W_base‖²."""
    energy: Float64[Tensor, "*place head"]
    """‖ΔW‖²."""
    shrink: Float64[Tensor, "*place head"]
    """⟨ΔW, W_base⟩ / ‖W_base‖²."""
    rounding: Float64[Tensor, "*place head"]
    """Share of the energy that storage alone explains."""
    spectrum: Float64[Tensor, "*place head r"]
    """Eigenvalues of ΔW ΔWᵀ, descending."""
    pooled_spectrum: Float64[Tensor, "*place s"] | None = None
    """Of the heads together as one delta; None of a matrix without heads."""
    unshrunk_energy: Float64[Tensor, "*place head"] | None = None
    """‖ΔW − sW‖²; None where weight decay can make no difference in any place."""
    unshrunk_spectrum: Float64[Tensor, "*place head r"] | None = None
    """Of ΔW − sW."""
    unshrunk_pooled_spectrum: Float64[Tensor, "*place s"] | None = None
    """Of ΔW − sW."""
    tokens_routed: Float64[Tensor, "*place head"] | None = None
    """Tokens that the router gave each expert; None outside mixtures."""
    routing_weight: Float64[Tensor, "*place head"] | None = None
    """Mean weight of an expert's output over these tokens."""


@dataclass(frozen=True)
class RankNumbers:
    """Of one matrix's deltas against one subspace, at each of its ranks; float64 on CPU.

    Of experts against their own inputs, each of which has a subspace of its own, "of_head" is an axis of experts.
    """

    inside: Float64[Tensor, "*place head rank"]
    """‖Q_kᵀ ΔW‖²."""
    eigenvalues: Float64[Tensor, "*place_of_head rank 2"]
    """λ_k and λ_{k+1}; NaN where there is none."""
    exists: Float64[Tensor, "*place_of_head rank"]
    """1.0 where the subspace has so many directions, else 0.0."""
    noise: Float64[Tensor, "*place head rank"]
    """Fraction of storage noise in the subspace."""
    activation: Float64[Tensor, "*place_of_head rank"] | None
    """Fraction by chance under the chosen optimiser on the matrix's own input, one for all heads of a place or one for
    each; None for write matrices."""
    activation_replicates: Float64[Tensor, "*place_group_of_head rank"] | None
    """The same with one group of texts left out."""
    tails: Float64[Tensor, "*place 2 item rank"] | None
    """P(fraction ≥) and P(fraction ≤) under it, of heads and then of the heads pooled; None where it is not tested."""
    expected: Mapping[str, Float64[Tensor, "*place_of_head rank"]]
    """Fractions by chance under those of `MATCHED` that apply: none to write matrices, "weighted" (the chosen
    optimiser's, inputs weighted by gradients) where there are such gradients, "lora" to adapters."""
    gradient: Float64[Tensor, "*place head rank"] | None
    """Of the chosen optimiser on the output's gradients; None for read matrices and without gradients."""
    permuted: Float64[Tensor, "*place 3 head rank"] | None
    """Mean and 95 % range of the fraction of gradients with δ permuted within sequences; None without such draws."""
    replicates: Float64[Tensor, "*place group head rank"] | None
    """‖Q_kᵀ ΔW‖² with one group of texts left out; None for a subspace that needs no texts."""
    unshrunk_inside: Float64[Tensor, "*place head rank"] | None
    """‖Q_kᵀ (ΔW − sW)‖²; None where weight decay can make no difference in any place."""
    unshrunk_tails: Float64[Tensor, "*place 2 item rank"] | None
    """Of ΔW − sW."""


@dataclass(frozen=True)
class Measurements:
    """All numbers of some places, one after the other."""

    places: pd.DataFrame
    """One row per place: `layer`, and before it what tells runs of layers apart (a checkpoint's step and reference)."""
    layout: Layout
    """Which numbers there are."""
    deltas: Mapping[str, DeltaNumbers]
    """By matrix."""
    held: Mapping[tuple[str, str], RankNumbers]
    """By matrix and subspace."""

    @classmethod
    def read(cls, layout: Layout, tensors: Mapping[str, Tensor], *, delta: str = "") -> Measurements:
        """From tensors by name, layers first, as `layer_tensors` names them.

        Args:
            layout: which there are.
            tensors: the numbers.
            delta: what stands in front of the names that belong to one delta of several.
        """
        named: dict[str, dict[str, Any]] = {
            m: {f.name: tensors.get(f"{delta}{m}/{f.name}") for f in fields(DeltaNumbers)} for m in layout.targets
        }
        deltas = {matrix: DeltaNumbers(**of) for matrix, of in named.items()}
        held = {
            (m, name): RankNumbers(
                **_one_delta(tensors, f"{delta}{m}/{name}")
                | {field: tensors[f"{field}/{name}"] for field in _OF_A_SUBSPACE}
            )
            for m, names in layout.targets.items()
            for name in names
        }
        return cls(pd.DataFrame({"layer": pd.array(range(layout.n_layers), dtype="Int64")}), layout, deltas, held)

    @classmethod
    def of_layers(cls, layout: Layout, layers: Sequence[Mapping[str, Tensor]]) -> Measurements:
        """From `layer_tensors` of every layer."""
        return cls.read(layout, stacked_layers(layers))

    @classmethod
    def joined(cls, parts: Sequence[tuple[Mapping[str, Any], Measurements]]) -> Measurements:
        """One after the other, each with the labels that tell it apart."""
        first = parts[0][1]
        places = [part.places.assign(**labels)[[*labels, "layer"]] for labels, part in parts]
        return cls(
            pd.concat(places, ignore_index=True),
            first.layout,
            {m: _joined([part.deltas[m] for _, part in parts]) for m in first.deltas},
            {key: _joined([part.held[key] for _, part in parts]) for key in first.held},
        )

    def ranks_of(self, matrix: str, subspace: str) -> tuple[int, ...]:
        """The ranks that a subspace has."""
        return self.layout.ranks[: self.held[matrix, subspace].inside.shape[-1]]

    @property
    def labels(self) -> list[str]:
        """Columns of `places` that tell runs of layers apart."""
        return [column for column in self.places.columns if column != "layer"]

    @property
    def runs(self) -> np.ndarray:
        """For each place the number of its run of layers: what is tested together."""
        if not self.labels:
            return np.zeros(len(self.places), dtype=int)
        return self.places.groupby(self.labels, sort=False).ngroup().to_numpy()

    def rows(self, blocks: Sequence[tuple[int, Sequence[str | None]]]) -> dict[str, pd.Series]:
        """Labels, layer, head, expert (NA where there are none) and run of blocks' entries, one block after the other.

        Args:
            blocks: of each, how many heads or experts a place has, and for each layer which of the two they are.
        """
        place = np.concatenate([np.repeat(np.arange(len(self.places)), heads) for heads, _ in blocks])
        layer = self.places["layer"].to_numpy(int)
        unit = np.concatenate([np.repeat(np.array(units, dtype=object)[layer], heads) for heads, units in blocks])
        number = pd.Series(
            np.concatenate([np.tile(np.arange(heads), len(layer)) for heads, _ in blocks]), dtype="Int64"
        )
        frame = self.places.iloc[place].reset_index(drop=True)
        axes = {axis: number.where(unit == axis) for axis in ("head", "expert")}
        return {**frame, **axes, "run": pd.Series(self.runs[place])}


_OF_A_SUBSPACE = ("eigenvalues", "exists")
_OF_ONE_DELTA = tuple(f.name for f in fields(RankNumbers) if f.name not in (*_OF_A_SUBSPACE, "expected"))
_UNSHRUNK = "unshrunk_"


def stacked_layers(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`layer_tensors` of every layer, stacked. Where weight decay makes no difference ΔW − sW is ΔW."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    stacks = {name: [layer.get(name, layer.get(name.replace(_UNSHRUNK, ""))) for layer in layers] for name in names}
    return {name: _stacked(name, parts) for name, parts in stacks.items()}


def _stacked(name: str, parts: Sequence[Tensor | None]) -> Tensor:
    """Layers with fewer heads than others are padded; beyond the end of a spectrum there is nothing."""
    if name.endswith("tails"):
        return padded_stack(_aligned(parts))
    return padded_stack(parts, beyond=0.0 if name.endswith("spectrum") else math.nan)


def _aligned(parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tails `[2, item, rank]` of layers with different numbers of heads, the heads pooled last in each."""
    most = max(part.shape[1] for part in parts if part is not None)

    def widened(part: Tensor | None) -> Tensor | None:
        if part is None or part.shape[1] == most:
            return part
        heads = part[:, : max(part.shape[1] - 1, 1)]  # one alone is its own pool
        gap = part.new_full((2, most - heads.shape[1] - 1, part.shape[2]), torch.nan)
        return torch.cat([heads, gap, part[:, -1:]], 1)

    return [widened(part) for part in parts]


def _one_delta(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Of the numbers of one delta against one subspace those that there are."""
    expected = {null: tensors[f"{name}/{null}"] for null in MATCHED if f"{name}/{null}" in tensors}
    return {field: tensors.get(f"{name}/{field}") for field in _OF_ONE_DELTA} | {"expected": expected}


def layer_tensors(
    deltas: Mapping[str, Delta],
    projections: Sequence[Projection],
    ranks: Sequence[int],
    *,
    routed: Mapping[str, Routed] = MappingProxyType({}),
    delta: str = "",
) -> dict[str, Tensor]:
    """What `Measurements.read` reads, of one layer.

    Args:
        deltas: numbers by matrix.
        routed: of those with experts, what the router gave these.
        projections: of these matrices, each against its subspaces.
        ranks: ranks to read; those that a subspace is too small for are left out for it.
        delta: what to put in front of the names that belong to one delta of several.
    """
    tensors = {
        f"{delta}{m}/{prefix}{name}": value.double()
        for m, of in deltas.items()
        for prefix, numbers, names in (("", of, _OF_A_DELTA), (_UNSHRUNK, of.unshrunk, _OF_AN_UNSHRUNK))
        for name in names
        if numbers is not None and (value := getattr(numbers, name)) is not None
    }
    for matrix, of_experts in routed.items():
        tensors[f"{delta}{matrix}/tokens_routed"] = of_experts.tokens
        tensors[f"{delta}{matrix}/routing_weight"] = of_experts.weight
    for projection in projections:
        numbers = _at_ranks(projection, [k for k in ranks if k <= projection.energies.shape[-1]])
        for field in _OF_A_SUBSPACE:
            tensors[f"{field}/{projection.subspace}"] = getattr(numbers, field)
        own = {**{field: getattr(numbers, field) for field in _OF_ONE_DELTA}, **numbers.expected}
        for field, value in own.items():
            if value is not None:
                tensors[f"{delta}{projection.matrix}/{projection.subspace}/{field}"] = value
    return tensors


_OF_A_DELTA = ("base_energy", "energy", "shrink", "rounding", "spectrum", "pooled_spectrum")
_OF_AN_UNSHRUNK = ("energy", "spectrum", "pooled_spectrum")


def _at_ranks(projection: Projection, ranks: Sequence[int]) -> RankNumbers:
    at = torch.tensor(ranks) - 1

    def read(curve: Tensor | None) -> Tensor | None:
        return None if curve is None else curve[..., at]

    λ = torch.full((*projection.eigenvalues.shape[:-1], max(ranks) + 1), torch.nan, dtype=torch.float64)
    there = projection.eigenvalues[..., : λ.shape[-1]]
    λ[..., : there.shape[-1]] = there
    existing = torch.as_tensor(projection.existing).unsqueeze(-1)

    def inside(energies: Tensor) -> Tensor:
        return torch.stack([energies[..., :k].sum(-1) for k in ranks], -1)

    twin = projection.unshrunk
    return RankNumbers(
        inside=inside(projection.energies),
        exists=(torch.tensor(ranks) <= existing).double(),
        noise=projection.noise[..., at],
        activation_replicates=read(projection.reference_replicates),
        tails=None if projection.tails is None else projection.tails[..., : len(ranks)],
        expected={null: projection.references[null][..., at] for null in MATCHED if null in projection.references},
        unshrunk_inside=None if twin is None else inside(twin.energies),
        unshrunk_tails=None if twin is None or twin.tails is None else twin.tails[..., : len(ranks)],
        eigenvalues=torch.stack([λ[..., k - 1 : k + 1] for k in ranks], -2),
        activation=read(projection.activation_reference),
        gradient=read(projection.gradient_reference),
        permuted=read(projection.permuted),
        replicates=None if projection.replicates is None else projection.replicates.double(),
    )


Numbers = TypeVar("Numbers", DeltaNumbers, RankNumbers)


def _joined(parts: Sequence[Numbers]) -> Numbers:
    """Field by field; None where none has it. Where weight decay makes no difference ΔW − sW is ΔW."""
    joined: dict[str, Any] = {}
    for field in fields(parts[0]):
        held = [getattr(part, field.name) for part in parts]
        if field.name == "expected":
            joined[field.name] = {null: torch.cat([of[null] for of in held]) for null in held[0]}
            continue
        if all(value is None for value in held):
            joined[field.name] = None
            continue
        own = field.name.replace(_UNSHRUNK, "")
        values = [getattr(part, own) if value is None else value for part, value in zip(parts, held, strict=True)]
        joined[field.name] = None if values[0] is None else torch.cat(values)
    return type(parts[0])(**joined)
