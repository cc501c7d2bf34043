"""What is measured of one checkpoint, small enough to keep for every one, and the tables made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.geometry.nulls import adjusted_p
from tl_asymmetry.models.side_by_side import side_by_side
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.asymmetry import READ_SIDE, WRITE_SIDE, asymmetry_table
from tl_asymmetry.pair.deltas import Delta, LiveDelta, measure_delta
from tl_asymmetry.pair.plan import Plan
from tl_asymmetry.pair.projections import Projection, project
from tl_asymmetry.pair.tables import pair_tables
from tl_asymmetry.settings import GradientMoments, PermutedGradients
from tl_asymmetry.trajectory.held_bases import HeldBases

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

_HEADS_AT_ONCE = 4096
_NUMBERS = ("energy", "base_energy", "shrink", "rounding", "spectrum")


@runtime_checkable
class EarlierWeights(Protocol):
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
    n_layers: int
    """Layers."""
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
    references: Mapping[str, EarlierWeights],
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
        if gradient is not None:
            numbers |= _gradient_spectra(layer, measuring, gradient)
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


def _gradient_spectra(layer: int, measuring: Measuring, gradient: GradientMoments) -> dict[str, Tensor]:
    """Eigenvalues of the upstream gradient's second moment of each write matrix `[head, d]`, descending."""
    numbers = {}
    for matrix in measuring.plan.matrices:
        if kind_of(matrix).writes:
            heads = range(measuring.n_heads) if measuring.headed[matrix] else [None]
            moments = torch.stack([gradient.gradient_moment(layer, matrix, head).double().cpu() for head in heads])
            numbers[f"gradients/{matrix}"] = torch.linalg.eigvalsh(moments).flip(-1).clamp(min=0)
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
            if kind_of(projection.matrix).reads:
                numbers[f"{here}/activation"] = projection.activation_reference[at]
                if isinstance(gradient, PermutedGradients):
                    numbers[f"{here}/permuted"] = projection.permuted[..., at]
            elif gradient is not None:
                numbers[f"{here}/gradient"] = projection.gradient_reference[:, at]
            if projection.replicates is not None:
                numbers[f"{here}/replicates"] = projection.replicates.double()
    return numbers


@dataclass(frozen=True)
class Measured:
    """The numbers of one checkpoint against one reference."""

    step: int
    """The checkpoint's step."""
    reference: str
    """ "first" or "previous"."""
    numbers: Mapping[str, Tensor]
    """As `measure` returns them."""

    def of(self, name: str) -> Tensor | None:
        """One of the numbers, layers first; None where it was not measured."""
        shared = name.startswith("eigenvalues/")
        return self.numbers.get(name if shared else f"{self.reference}/{name}")


@dataclass(frozen=True)
class CheckpointTables:
    """The tables of some checkpoints."""

    table: pd.DataFrame
    """As `PairAnalysis.table`, with `step` and `reference`."""
    asymmetry: pd.DataFrame
    """As `PairAnalysis.asymmetry`, with `step` and `reference`."""
    curves: pd.DataFrame
    """Layers and heads pooled by energy, with `step` and `reference`; see `CURVE_COLUMNS`."""


def batches_of(measured: Iterable[Measured], measuring: Measuring) -> Iterator[list[Measured]]:
    """As many at a time as make tables of a few thousand rows at a rank: nulls cost less for many heads at once."""
    batch: list[Measured] = []
    for one in measured:
        batch.append(one)
        if len(batch) * measuring.n_layers * measuring.n_heads >= _HEADS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def checkpoint_tables(batch: Sequence[Measured], measuring: Measuring) -> CheckpointTables:
    """From the numbers of some checkpoints to their tables; both nulls are made here.

    The layers of all checkpoints go through the pair's own tables as if they were layers of one deep model; only q is
    made again, for each checkpoint by itself.
    """
    plan = measuring.plan
    deltas = {matrix: _deltas(batch, matrix) for matrix in plan.matrices}
    projections = {
        (matrix, subspace): _projections(batch, matrix, subspace, measuring)
        for subspace in plan.subspaces
        for matrix in plan.matrices
        if subspace in plan.targets[matrix]
    }
    table, _ = pair_tables(deltas, projections, plan.ranks, d=measuring.d, headed=measuring.headed, seed=measuring.seed)
    table = _apart(table, batch, measuring)
    tests = table.groupby(["step", "reference", "matrix", "subspace", "rank"], sort=False).indices.values()
    p, q = table["isotropic_p"].to_numpy(), table["isotropic_q"].to_numpy(copy=True)
    for rows in tests:
        q[rows] = adjusted_p(p[rows])
    asymmetry = asymmetry_table(deltas, projections, plan.ranks, d=measuring.d, n_heads=measuring.n_heads)
    return CheckpointTables(
        table=table.assign(isotropic_q=q),
        asymmetry=_apart(asymmetry, batch, measuring),
        curves=pd.concat([_curves(one, measuring) for one in batch], ignore_index=True),
    )


def _apart(table: pd.DataFrame, batch: Sequence[Measured], measuring: Measuring) -> pd.DataFrame:
    """Rows of the layers of all checkpoints, told apart again and in the order of the checkpoints."""
    if not len(table):
        return table.assign(step=[], reference=[])[["step", "reference", *table.columns]]
    deep = table["layer"].to_numpy(int)
    which = deep // measuring.n_layers
    columns = {
        "step": np.array([one.step for one in batch])[which],
        "reference": np.array([one.reference for one in batch], dtype=object)[which],
        "layer": pd.array(deep % measuring.n_layers, dtype="Int64"),
    }
    table = table.assign(**columns)[["step", "reference", *table.columns]]
    return table.iloc[np.argsort(which, kind="stable")].reset_index(drop=True)


def _all(batch: Sequence[Measured], name: str) -> Tensor | None:
    """One of the numbers, the layers of all checkpoints one after the other."""
    parts = [value for one in batch if (value := one.of(name)) is not None]
    return torch.cat(parts) if parts else None


def _deltas(batch: Sequence[Measured], matrix: str) -> list[Delta]:
    held = {name: _there(_all(batch, f"{matrix}/{name}")) for name in _NUMBERS}
    nothing = torch.zeros(held["energy"].shape[1], 0, 1)  # directions are not kept
    return [
        Delta(matrix=matrix, directions=nothing, partners=nothing, **{name: of[layer] for name, of in held.items()})
        for layer in range(len(held["energy"]))
    ]


def _projections(batch: Sequence[Measured], matrix: str, subspace: str, measuring: Measuring) -> list[Projection]:
    """Projections that give the same numbers at every rank: all energy between two ranks stands at the upper one."""
    here = f"{matrix}/{subspace}"
    inside = _there(_all(batch, f"{here}/inside"))
    layers, heads, count = inside.shape
    ranks = list(measuring.plan.ranks[:count])
    at, top = torch.tensor(ranks) - 1, ranks[-1]
    # one direction more, for the eigengap, unless that would pass for a rank the subspace does not have
    width = top + (top + 1 not in measuring.plan.ranks)

    def laid_out(values: Tensor | None, *shape: int) -> Tensor:
        spread = torch.full((layers, *shape, top), torch.nan, dtype=torch.float64)
        if values is not None:
            spread[..., at] = values
        return spread

    energies = torch.zeros(layers, heads, width, dtype=torch.float64)
    energies[..., at] = inside.diff(dim=-1, prepend=torch.zeros(layers, heads, 1, dtype=torch.float64))
    activation = laid_out(_all(batch, f"{here}/activation"))
    gradient = laid_out(_all(batch, f"{here}/gradient"), heads)
    permuted = laid_out(_all(batch, f"{here}/permuted"), 2, heads)
    pairs = _there(_all(batch, f"eigenvalues/{subspace}"))
    λ = torch.full((layers, top + 1), torch.nan, dtype=torch.float64)
    λ[:, at], λ[:, at + 1] = pairs[..., 0], pairs[..., 1]
    replicates = _all(batch, f"{here}/replicates")
    return [
        Projection(
            matrix=matrix, subspace=subspace, energies=energies[layer], eigenvalues=λ[layer, :width],
            activation_reference=activation[layer], gradient_reference=gradient[layer], permuted=permuted[layer],
            replicates=None if replicates is None else replicates[layer],
        )
        for layer in range(layers)
    ]  # fmt: skip


def _curves(one: Measured, measuring: Measuring) -> pd.DataFrame:
    plan = measuring.plan
    groups: list[tuple[tuple[str, ...], str]] = [((m,), name) for m in plan.matrices for name in plan.targets[m]]
    for side in (READ_SIDE, WRITE_SIDE):
        pooled = tuple(matrix for matrix, name in side if name in plan.targets.get(matrix, ()))
        if len(pooled) > 1:
            groups.append((pooled, side[0][1]))
    rows = [row for matrices, name in groups for row in _pooled(one, matrices, name, measuring)]
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS)).assign(step=one.step, reference=one.reference)
    return frame[["step", "reference", *CURVE_COLUMNS]]


def _pooled(one: Measured, matrices: Sequence[str], subspace: str, measuring: Measuring) -> list[dict[str, Any]]:
    """One row for each rank of all layers and heads of some matrices against one subspace."""

    def total(name: str, *, by_energy: bool = False) -> Tensor | None:
        """Sum over matrices, layers and heads, weighted by ‖ΔW‖² if asked; None where a matrix does not have it."""
        parts = []
        for matrix in matrices:
            value = one.of(f"{matrix}/{name}")
            if value is None:
                return None
            if by_energy:
                value = _there(one.of(f"{matrix}/energy")).unsqueeze(-1) * (
                    value.unsqueeze(1) if value.ndim == 2 else value
                )
            # heads are the last axis of norms, the one before ranks elsewhere
            parts.append(value.sum() if value.ndim == 2 else value.sum(-2).sum(0))
        return torch.stack(parts).sum(0)

    energy, base_energy, inside = (_there(total(name)) for name in ("energy", "base_energy", f"{subspace}/inside"))
    ranks = measuring.plan.ranks[: len(inside)]
    scale = measuring.d / torch.tensor(ranks, dtype=torch.float64) / energy
    nan = torch.full_like(inside, torch.nan)
    relative, low, high = inside * scale, nan, nan
    replicates = total(f"{subspace}/replicates")
    if replicates is not None:
        interval = log_jackknife_interval(relative, replicates * scale, corrected=True)
        low, high = interval.low, interval.high
    matched = []
    for kind in ("activation", "gradient"):
        pooled = total(f"{subspace}/{kind}", by_energy=True)
        matched.append(nan if pooled is None else pooled * scale)
    norm, relative_norm = energy.sqrt().item(), (energy / base_energy).sqrt().item()
    return [
        {
            "matrix": "+".join(matrices),
            "pathway": kind_of(matrices[0]).side,
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
