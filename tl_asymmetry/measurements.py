"""What is measured of one checkpoint, small enough to keep for every one, and the tables made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from tl_asymmetry.asymmetry import READ_SIDE, WRITE_SIDE, asymmetry_table
from tl_asymmetry.deltas import Delta, LiveDelta, measure_delta
from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.held_bases import HeldBases
from tl_asymmetry.models.view import READ, WRITE, ModelView
from tl_asymmetry.plan import Plan
from tl_asymmetry.projections import GradientMoments, Projection, project
from tl_asymmetry.side_by_side import side_by_side
from tl_asymmetry.tables import pair_table

CURVE_COLUMNS = {
    "matrix": "W_Q …; W_Q+W_K and W_O+W_out pool the two sides of the asymmetry index",
    "pathway": '"read" or "write"',
    "subspace": "name of the subspace",
    "rank": "k",
    "relative": "of all layers' and heads' deltas together, pooled by energy: Σ ‖Qᵀ ΔW‖² / Σ ‖ΔW‖² · d/k",
    "ci_low": "lower end of its 95 % interval over texts; NaN where the subspace needs no texts",
    "ci_high": "upper end",
    "activation_matched": "the matched reference pooled with the same weights, in units of relative; NaN on write rows",
    "gradient_matched": "the same from the output's gradients; NaN on read rows and without gradients",
    "delta_norm": "‖ΔW‖ of all layers and heads together",
    "delta_relative_norm": "the same over ‖W‖ of the reference",
}
"""Columns of a checkpoint's pooled curves, in this order, and what they mean."""

_NUMBERS = ("energy", "base_energy", "shrink", "rounding", "spectrum")


@runtime_checkable
class Weights(Protocol):
    """Where the matrices of an earlier model are found."""

    def weight(self, layer: int, matrix: str) -> Tensor:
        """A matrix in TransformerLens orientation."""
        ...


@dataclass(frozen=True)
class WeightsSnapshot:
    """Copies of a model's matrices on CPU, in its own dtype: what is left of a checkpoint when its model goes on."""

    step: int
    """Its step."""
    hash: str
    """`weights_hash` of the whole model."""
    tensors: Mapping[str, Tensor]
    """By "layer/matrix"."""

    @classmethod
    def of(cls, view: ModelView, matrices: Sequence[str], step: int, weights: str) -> WeightsSnapshot:
        """Copy the matrices at issue."""
        tensors = {
            f"{layer}/{matrix}": view.weight(layer, matrix).detach().cpu().clone(memory_format=torch.contiguous_format)
            for layer in range(view.n_layers)
            for matrix in matrices
        }
        return cls(step, weights, tensors)

    def weight(self, layer: int, matrix: str) -> Tensor:
        """A matrix in TransformerLens orientation."""
        return self.tensors[f"{layer}/{matrix}"]


@dataclass(frozen=True)
class Measuring:
    """What stays the same over all checkpoints of a run."""

    plan: Plan
    """Matrices, ranks, subspaces."""
    intervals: bool
    """Whether replicates are made."""
    softmax_centres_keys: bool
    """Whether W_K's gradient sees its input about each sequence's mean."""
    d: int
    """d_model."""
    n_heads: int
    """Query heads."""
    headed: Mapping[str, bool]
    """Whether a matrix has heads."""
    seed: int
    """Of the nulls and the rounding calibration."""

    def ranks_of(self, width: int) -> list[int]:
        """The ranks that a basis of `width` directions has."""
        return [k for k in self.plan.ranks if k <= width]


def measure(
    view: ModelView,
    references: Mapping[str, Weights],
    bases: Callable[[int], HeldBases],
    measuring: Measuring,
    *,
    gradient: GradientMoments | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """All numbers of one checkpoint: its deltas from each reference, held against the bases.

    Args:
        view: the checkpoint's model.
        references: earlier weights by name, "first" or "previous".
        bases: of a layer; called once for each.
        measuring: what to measure.
        gradient: output-gradient second moments, for the matched reference of W_O and W_out.
        progress: show a progress bar over layers.

    Returns:
        Float64 tensors on CPU by name, layers first: for each reference and matrix the numbers of `Delta` that have
        no direction, for each subspace what its ranks hold. Their size is set by heads, ranks and groups.
    """
    plan = measuring.plan

    def of_layer(layer: int) -> dict[str, Tensor]:
        held = bases(layer)
        numbers = _eigenvalues(held, measuring)
        for reference, earlier in references.items():
            deltas = {}
            for matrix in plan.matrices:
                weight = view.weight(layer, matrix)
                before = earlier.weight(layer, matrix).to(weight.device)
                deltas[matrix] = measure_delta(matrix, before, weight, seed=measuring.seed)
            for name, value in _layer_numbers(deltas, held, measuring, gradient).items():
                numbers[f"{reference}/{name}"] = value
        return numbers

    layers = side_by_side(of_layer, view.n_layers, device=view.device, description="layers", progress=progress)
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def _eigenvalues(held: HeldBases, measuring: Measuring) -> dict[str, Tensor]:
    """λ_k and λ_{k+1} of each subspace at each rank `[rank, 2]`; NaN where there is none."""
    numbers = {}
    for name in measuring.plan.subspaces:
        subspace = held.subspace(name)
        ranks = measuring.ranks_of(subspace.rank)
        λ = torch.full((max(ranks) + 1,), torch.nan, dtype=torch.float64)
        if subspace.eigenvalues is not None:
            λ[: subspace.rank] = subspace.eigenvalues[: len(λ)].double().cpu()
        numbers[f"eigenvalues/{name}"] = torch.stack([λ[[k - 1, k]] for k in ranks])
    return numbers


def _layer_numbers(
    deltas: Mapping[str, LiveDelta], held: HeldBases, measuring: Measuring, gradient: GradientMoments | None
) -> dict[str, Tensor]:
    plan = measuring.plan
    numbers: dict[str, Tensor] = {}
    for matrix, delta in deltas.items():
        for name in _NUMBERS:
            numbers[f"{matrix}/{name}"] = getattr(delta.numbers, name).double()
    for subspace in plan.subspaces:
        aimed = [delta for matrix, delta in deltas.items() if subspace in plan.targets[matrix]]
        for projection in project(
            aimed, subspace, held, plan.ranks,
            intervals=measuring.intervals, softmax_centres_keys=measuring.softmax_centres_keys, gradient=gradient,
        ):  # fmt: skip
            at = torch.tensor(measuring.ranks_of(projection.energies.shape[-1])) - 1
            here = f"{projection.matrix}/{subspace}"
            numbers[f"{here}/inside"] = projection.energies.cumsum(-1)[:, at]
            if projection.matrix in READ:
                numbers[f"{here}/activation"] = projection.activation_reference[at]
            elif gradient is not None:
                numbers[f"{here}/gradient"] = projection.gradient_reference[:, at]
            if projection.replicates is not None:
                numbers[f"{here}/replicates"] = projection.replicates.double()
    return numbers


@dataclass(frozen=True)
class CheckpointTables:
    """The tables of one checkpoint against one reference."""

    table: pd.DataFrame
    """As `PairAnalysis.table`."""
    asymmetry: pd.DataFrame
    """As `PairAnalysis.asymmetry`."""
    curves: pd.DataFrame
    """Layers and heads pooled by energy, see `CURVE_COLUMNS`."""


def checkpoint_tables(numbers: Mapping[str, Tensor], reference: str, measuring: Measuring) -> CheckpointTables:
    """From one checkpoint's numbers to its tables; both nulls are made here."""
    plan = measuring.plan
    deltas = {matrix: _deltas(numbers, reference, matrix) for matrix in plan.matrices}
    projections = {
        (matrix, subspace): _projections(numbers, reference, matrix, subspace, measuring)
        for subspace in plan.subspaces
        for matrix in plan.matrices
        if subspace in plan.targets[matrix]
    }
    return CheckpointTables(
        table=pair_table(
            deltas, projections, plan.ranks, d=measuring.d, headed=measuring.headed, seed=measuring.seed
        ),
        asymmetry=asymmetry_table(deltas, projections, plan.ranks, d=measuring.d, n_heads=measuring.n_heads),
        curves=_curves(numbers, reference, measuring),
    )  # fmt: skip


def _deltas(numbers: Mapping[str, Tensor], reference: str, matrix: str) -> list[Delta]:
    held = {name: numbers[f"{reference}/{matrix}/{name}"] for name in _NUMBERS}
    heads = held["energy"].shape[1]
    nothing = torch.zeros(heads, 0, 1)  # directions are not kept
    return [
        Delta(
            matrix=matrix, directions=nothing, partners=nothing, **{name: value[layer] for name, value in held.items()}
        )
        for layer in range(len(held["energy"]))
    ]


def _projections(
    numbers: Mapping[str, Tensor], reference: str, matrix: str, subspace: str, measuring: Measuring
) -> list[Projection]:
    """Projections that give the same numbers at every rank: all energy between two ranks stands at the upper one."""
    here = f"{reference}/{matrix}/{subspace}"
    inside = numbers[f"{here}/inside"]
    layers, heads, count = inside.shape
    ranks = list(measuring.plan.ranks[:count])
    at, top = torch.tensor(ranks) - 1, ranks[-1]
    nan = torch.full((top,), torch.nan, dtype=torch.float64)
    replicates = numbers.get(f"{here}/replicates")
    projections = []
    for layer in range(layers):
        energies = torch.zeros(heads, top, dtype=torch.float64)
        energies[:, at] = inside[layer].diff(dim=-1, prepend=torch.zeros(heads, 1, dtype=torch.float64))
        activation, gradient, λ = nan.clone(), nan.expand(heads, -1).clone(), torch.cat([nan, nan[:1]])
        if f"{here}/activation" in numbers:
            activation[at] = numbers[f"{here}/activation"][layer]
        if f"{here}/gradient" in numbers:
            gradient[:, at] = numbers[f"{here}/gradient"][layer]
        pairs = numbers[f"eigenvalues/{subspace}"][layer]
        λ[at], λ[at + 1] = pairs[:, 0], pairs[:, 1]
        projections.append(
            Projection(
                matrix=matrix, subspace=subspace, energies=energies, eigenvalues=λ, activation_reference=activation,
                gradient_reference=gradient, replicates=None if replicates is None else replicates[layer],
            )
        )  # fmt: skip
    return projections


def _curves(numbers: Mapping[str, Tensor], reference: str, measuring: Measuring) -> pd.DataFrame:
    plan = measuring.plan
    groups: list[tuple[tuple[str, ...], str]] = [((m,), name) for m in plan.matrices for name in plan.targets[m]]
    for side in (READ_SIDE, WRITE_SIDE):
        pooled = tuple(matrix for matrix, name in side if name in plan.targets.get(matrix, ()))
        if len(pooled) > 1:
            groups.append((pooled, side[0][1]))
    rows = [row for matrices, name in groups for row in _pooled(numbers, reference, matrices, name, measuring)]
    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))


def _pooled(
    numbers: Mapping[str, Tensor], reference: str, matrices: Sequence[str], subspace: str, measuring: Measuring
) -> list[dict[str, Any]]:
    """One row for each rank of all layers and heads of some matrices against one subspace."""

    def total(name: str, *, by_energy: bool = False) -> Tensor | None:
        """Sum over matrices, layers and heads, weighted by ‖ΔW‖² if asked; None where a matrix does not have it."""
        parts = []
        for matrix in matrices:
            value = numbers.get(f"{reference}/{matrix}/{name}")
            if value is None:
                return None
            if by_energy:
                value = numbers[f"{reference}/{matrix}/energy"].unsqueeze(-1) * (
                    value.unsqueeze(1) if value.ndim == 2 else value
                )
            # heads are the last axis of norms, the one before ranks elsewhere
            parts.append(value.sum() if value.ndim == 2 else value.sum(-2).sum(0))
        return torch.stack(parts).sum(0)

    energy, base_energy, inside = (_there(total(name)) for name in ("energy", "base_energy", f"{subspace}/inside"))
    ranks = measuring.plan.ranks[: len(inside)]
    scale = measuring.d / torch.tensor(ranks) / energy
    nan = torch.full_like(inside, torch.nan)
    relative, low, high = inside * scale, nan, nan
    replicates = total(f"{subspace}/replicates")
    if replicates is not None:
        low, high = log_jackknife_interval(relative, replicates * scale)
    matched = []
    for kind in ("activation", "gradient"):
        pooled = total(f"{subspace}/{kind}", by_energy=True)
        matched.append(nan if pooled is None else pooled * scale)
    norm, relative_norm = energy.sqrt().item(), (energy / base_energy).sqrt().item()
    return [
        {
            "matrix": "+".join(matrices),
            "pathway": "write" if matrices[0] in WRITE else "read",
            "subspace": subspace,
            "rank": k,
            "relative": relative[i].item(),
            "ci_low": low[i].item(),
            "ci_high": high[i].item(),
            "activation_matched": matched[0][i].item(),
            "gradient_matched": matched[1][i].item(),
            "delta_norm": norm,
            "delta_relative_norm": relative_norm,
        }
        for i, k in enumerate(ranks)
    ]


def _there(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("a matrix is without the numbers that every matrix has")
    return value
