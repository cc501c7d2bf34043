"""What the tables read: every matrix's deltas in numbers, by themselves and, at each rank, against each subspace.

Small enough to keep for every checkpoint of a run: sizes are set by heads, ranks and groups of texts, not by widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.deltas import Delta
from tl_asymmetry.pair.plan import Plan
from tl_asymmetry.pair.projections import Projection


@dataclass(frozen=True)
class Layout:
    """Which numbers there are."""

    d: int
    """d_model."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Query heads."""
    headed: Mapping[str, bool]
    """Whether a matrix has heads."""
    targets: Mapping[str, tuple[str, ...]]
    """For each matrix, in order, the subspaces it is held against."""
    ranks: tuple[int, ...]
    """Ascending; a subspace with fewer directions has the first of them."""
    measured: Mapping[str, tuple[int, ...]]
    """For each subspace those ranks that tables show."""

    @classmethod
    def of(cls, view: ModelView, plan: Plan) -> Layout:
        """Of an analysis that begins."""
        headed = {matrix: view.heads(matrix) is not None for matrix in plan.matrices}
        targets = {matrix: plan.targets[matrix] for matrix in plan.matrices}
        return cls(view.d_model, view.n_layers, view.n_heads, headed, targets, plan.ranks, plan.measured)


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


@dataclass(frozen=True)
class RankNumbers:
    """Of one matrix's deltas against one subspace, at each of its ranks; float64 on CPU."""

    inside: Float64[Tensor, "*place head rank"]
    """‖Q_kᵀ ΔW‖²."""
    eigenvalues: Float64[Tensor, "*place rank 2"]
    """λ_k and λ_{k+1}; NaN where there is none."""
    activation: Float64[Tensor, "*place rank"] | None
    """Share of the matrix's own input variance in the subspace; None for write matrices."""
    gradient: Float64[Tensor, "*place head rank"] | None
    """Share of the output gradient's variance; None for read matrices and without gradients."""
    permuted: Float64[Tensor, "*place 2 head rank"] | None
    """95 % range of the fraction of gradients with δ permuted within sequences; None without such draws."""
    replicates: Float64[Tensor, "*place group head rank"] | None
    """‖Q_kᵀ ΔW‖² with one group of texts left out; None for a subspace that needs no texts."""


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
        deltas = {m: DeltaNumbers(**{f.name: tensors[f"{delta}{m}/{f.name}"] for f in fields(DeltaNumbers)})
                  for m in layout.targets}  # fmt: skip
        held = {
            (m, name): RankNumbers(
                eigenvalues=tensors[f"eigenvalues/{name}"],
                **_one_delta(tensors, f"{delta}{m}/{name}"),
            )
            for m, names in layout.targets.items()
            for name in names
        }
        return cls(pd.DataFrame({"layer": pd.array(range(layout.n_layers), dtype="Int64")}), layout, deltas, held)

    @classmethod
    def of_layers(cls, layout: Layout, layers: Sequence[Mapping[str, Tensor]]) -> Measurements:
        """From `layer_tensors` of every layer."""
        return cls.read(layout, {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})

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

    def rows(self, heads: int, *, headed: bool) -> pd.DataFrame:
        """Labels, layer and head (NA for a matrix without) of a column's entries, which are places × heads."""
        frame = self.places.loc[np.repeat(self.places.index, heads)].reset_index(drop=True)
        numbers = np.tile(np.arange(heads), len(self.places)) if headed else [pd.NA] * len(frame)
        return frame.assign(head=pd.array(numbers, dtype="Int64"), run=np.repeat(self.runs, heads))


_OF_ONE_DELTA = tuple(field.name for field in fields(RankNumbers) if field.name != "eigenvalues")


def _one_delta(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Of the numbers of one delta against one subspace those that there are."""
    return {field: tensors.get(f"{name}/{field}") for field in _OF_ONE_DELTA}


def layer_tensors(
    deltas: Mapping[str, Delta], projections: Sequence[Projection], ranks: Sequence[int], *, delta: str = ""
) -> dict[str, Tensor]:
    """What `Measurements.read` reads, of one layer.

    Args:
        deltas: numbers by matrix.
        projections: of these matrices, each against its subspaces.
        ranks: ranks to read; those that a subspace is too small for are left out for it.
        delta: what to put in front of the names that belong to one delta of several.
    """
    tensors = {f"{delta}{m}/{f.name}": getattr(of, f.name).double() for m, of in deltas.items()
               for f in fields(DeltaNumbers)}  # fmt: skip
    for projection in projections:
        numbers = _at_ranks(projection, [k for k in ranks if k <= projection.energies.shape[-1]])
        tensors[f"eigenvalues/{projection.subspace}"] = numbers.eigenvalues
        for field in _OF_ONE_DELTA:
            value = getattr(numbers, field)
            if value is not None:
                tensors[f"{delta}{projection.matrix}/{projection.subspace}/{field}"] = value
    return tensors


def _at_ranks(projection: Projection, ranks: Sequence[int]) -> RankNumbers:
    at = torch.tensor(ranks) - 1

    def read(curve: Tensor | None) -> Tensor | None:
        return None if curve is None else curve[..., at]

    λ = torch.full((max(ranks) + 1,), torch.nan, dtype=torch.float64)
    there = projection.eigenvalues[: len(λ)]
    λ[: len(there)] = there
    return RankNumbers(
        inside=torch.stack([projection.energies[..., :k].sum(-1) for k in ranks], -1),
        eigenvalues=torch.stack([λ[k - 1 : k + 1] for k in ranks]),
        activation=read(projection.activation_reference),
        gradient=read(projection.gradient_reference),
        permuted=read(projection.permuted),
        replicates=None if projection.replicates is None else projection.replicates.double(),
    )


Numbers = TypeVar("Numbers", DeltaNumbers, RankNumbers)


def _joined(parts: Sequence[Numbers]) -> Numbers:
    """Field by field; None where the first has none."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(parts[0])}
    joined: dict[str, Any] = {name: None if held[0] is None else torch.cat(held) for name, held in columns.items()}
    return type(parts[0])(**joined)
