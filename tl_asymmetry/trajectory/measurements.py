"""What is measured of one checkpoint, small enough to keep for every one, and the tables made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.models.effective import EffectiveView
from tl_asymmetry.models.readers.adapter import AdapterWeights
from tl_asymmetry.models.readers.base import Factors, Weights
from tl_asymmetry.models.side_by_side import side_by_side
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.asymmetry import READ_SIDE, WRITE_SIDE, asymmetry_table
from tl_asymmetry.pair.deltas import AnyDelta, measure_delta, measure_factors
from tl_asymmetry.pair.numbers import Layout, Measurements, layer_tensors, stacked_layers
from tl_asymmetry.pair.plan import Plan
from tl_asymmetry.pair.projections import project
from tl_asymmetry.pair.tables import pair_tables
from tl_asymmetry.settings import GradientMoments
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


@dataclass(frozen=True)
class WeightsSnapshot:
    """Copies of a model's matrices on CPU, in its own dtype: what is left of a checkpoint when its model goes on.

    A matrix with an adapter of two factors is kept as these and the frozen weights.
    """

    step: int
    """Its step."""
    hash: str
    """`weights_hash` of the whole model."""
    tensors: Mapping[str, Tensor]
    """By "layer/matrix"; of an adapted one "…/residual" and "…/other" besides, and there the frozen weights."""

    @classmethod
    def of(cls, view: Weights, matrices: Sequence[str], step: int, weights: str) -> WeightsSnapshot:
        """Copy the matrices at issue."""
        tensors = {}
        for layer in range(view.n_layers):
            for matrix in matrices:
                name, adapted = f"{layer}/{matrix}", _adapted(view, layer, matrix)
                held = {name: view.weight(layer, matrix)}
                if adapted is not None:
                    frozen, factors = adapted
                    held = {name: frozen, f"{name}/residual": factors.residual, f"{name}/other": factors.other}
                for key, tensor in held.items():
                    tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return cls(step, weights, tensors)

    def weight(self, layer: int, matrix: str) -> Tensor:
        """A matrix in TransformerLens orientation, what an adapter adds included."""
        frozen, factors = self.frozen(layer, matrix), self.factors(layer, matrix)
        return frozen if factors is None else frozen + factors.product(matrix).to(frozen.dtype)

    def frozen(self, layer: int, matrix: str) -> Tensor:
        """The same without what an adapter adds."""
        return self.tensors[f"{layer}/{matrix}"]

    def factors(self, layer: int, matrix: str) -> Factors | None:
        """What an adapter adds; None where there is none."""
        name = f"{layer}/{matrix}"
        if f"{name}/residual" not in self.tensors:
            return None
        return Factors(self.tensors[f"{name}/residual"], self.tensors[f"{name}/other"])


@dataclass(frozen=True)
class Measuring:
    """What stays the same over all checkpoints of a run."""

    plan: Plan
    """Matrices, ranks, subspaces."""
    layout: Layout
    """Which numbers that makes."""
    intervals: bool
    """Whether replicates are made."""
    softmax_centres_keys: bool
    """Whether W_K's gradient sees its input about each sequence's mean."""
    seed: int
    """Of the nulls and the rounding calibration."""


def measure(
    view: Weights,
    references: Mapping[str, WeightsSnapshot],
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
        Float64 tensors on CPU, layers first, by the names that `Measurements.read` knows with the reference in front.
    """
    plan = measuring.plan

    def of_layer(layer: int) -> dict[str, Tensor]:
        held = bases(layer)
        tensors: dict[str, Tensor] = {}
        for reference, earlier in references.items():
            deltas = {m: _change(earlier, view, layer, m, seed=measuring.seed) for m in plan.matrices}
            projections = project(
                list(deltas.values()), plan.targets, held, plan.ranks, intervals=measuring.intervals, gradient=gradient
            )
            numbers = {matrix: delta.numbers for matrix, delta in deltas.items()}
            tensors |= layer_tensors(numbers, projections, plan.ranks, delta=f"{reference}/")
        if gradient is not None:
            tensors |= _gradient_spectra(layer, measuring.layout, gradient)
        return tensors

    layers = side_by_side(of_layer, view.n_layers, device=view.device, description="layers", progress=progress)
    return stacked_layers(layers)


def _change(earlier: WeightsSnapshot, view: Weights, layer: int, matrix: str, *, seed: int) -> AnyDelta:
    """What a matrix has changed by: in factors where only an adapter moved, else by subtraction."""
    weight = view.weight(layer, matrix)
    before = earlier.weight(layer, matrix).to(weight.device)
    adapted = _adapted(view, layer, matrix)
    if adapted is None or not torch.equal(adapted[0], earlier.frozen(layer, matrix).to(adapted[0])):
        return measure_delta(matrix, before, weight, seed=seed)
    now, then = adapted[1], earlier.factors(layer, matrix)
    if then is not None:  # R Sᵀ − R' S'ᵀ as one product
        then = Factors(then.residual.to(weight.device), then.other.to(weight.device))
        now = Factors(torch.cat([now.residual, then.residual], -1), torch.cat([now.other, -then.other], -1))
    return measure_factors(matrix, before, now)


def _adapted(view: Weights, layer: int, matrix: str) -> tuple[Tensor, Factors] | None:
    return view.factored(layer, matrix) if isinstance(view, EffectiveView | AdapterWeights) else None


def _gradient_spectra(layer: int, layout: Layout, gradient: GradientMoments) -> dict[str, Tensor]:
    """Eigenvalues of the upstream gradient's second moment of each write matrix `[head, d]`, descending."""
    numbers = {}
    for matrix, units in layout.units.items():
        if kind_of(matrix).writes:
            heads = range(layout.n_heads) if units[layer] else [None]
            moments = torch.stack([gradient.gradient_moment(layer, matrix, head).double().cpu() for head in heads])
            numbers[f"gradients/{matrix}"] = torch.linalg.eigvalsh(moments).flip(-1).clamp(min=0)
    return numbers


@dataclass(frozen=True)
class CheckpointTables:
    """The tables of some checkpoints, in their order."""

    table: pd.DataFrame
    """As `PairAnalysis.table`, with `step` and `reference`."""
    asymmetry: pd.DataFrame
    """As `PairAnalysis.asymmetry`, with `step` and `reference`."""
    curves: pd.DataFrame
    """Layers and heads pooled by energy, with `step` and `reference`; see `CURVE_COLUMNS`."""


def trajectory_tables(
    checkpoints: Iterable[tuple[int, str, Measurements]], layout: Layout, *, optimizer: str, few: bool, seed: int
) -> CheckpointTables:
    """From the numbers of checkpoints, each with its step and reference, to their tables; the nulls are made here."""
    made = [_tables(batch, optimizer, few, seed) for batch in _batches(checkpoints, layout)]
    return CheckpointTables(*(_joined([getattr(part, field.name) for part in made]) for field in fields(made[0])))


def record_of(numbers: Mapping[str, Tensor], references: Sequence[str], layout: Layout, rank: int) -> dict[str, float]:
    """One checkpoint in a few plain numbers, for a logger: its pooled curves at one rank.

    Returns:
        By "W_Q/attn_in/relative", "W_Q/attn_in/activation_matched" and so on, "W_Q/delta_relative_norm"; with several
        references the reference in front. What is NaN is left out.
    """
    record: dict[str, float] = {}
    for reference in references:
        front = f"{reference}/" if len(references) > 1 else ""
        curves = _curves(0, reference, Measurements.read(layout, numbers, delta=f"{reference}/"))
        for row in curves[curves["rank"] == rank].to_dict("records"):
            record[f"{front}{row['matrix']}/delta_relative_norm"] = row["delta_relative_norm"]
            for column in ("relative", "ci_low", "ci_high", "activation_matched", "gradient_matched"):
                record[f"{front}{row['matrix']}/{row['subspace']}/{column}"] = row[column]
    return {name: value for name, value in record.items() if not math.isnan(value)}


def _batches(
    checkpoints: Iterable[tuple[int, str, Measurements]], layout: Layout
) -> Iterator[list[tuple[int, str, Measurements]]]:
    """As many at a time as make tables of a few thousand rows at a rank: nulls cost less for many heads at once."""
    batch: list[tuple[int, str, Measurements]] = []
    for one in checkpoints:
        batch.append(one)
        if len(batch) * layout.n_layers * layout.n_heads >= _HEADS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _tables(batch: Sequence[tuple[int, str, Measurements]], optimizer: str, few: bool, seed: int) -> CheckpointTables:
    numbers = Measurements.joined([({"step": step, "reference": name}, one) for step, name, one in batch])
    return CheckpointTables(
        table=pair_tables(numbers, optimizer=optimizer, few=few, seed=seed).table,
        asymmetry=asymmetry_table(numbers),
        curves=pd.concat([_curves(step, name, one) for step, name, one in batch], ignore_index=True),
    )


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One after the other; without those that have no rows, whose columns have no type."""
    return pd.concat([frame for frame in frames if len(frame)] or list(frames[:1]), ignore_index=True)


def _curves(step: int, reference: str, numbers: Measurements) -> pd.DataFrame:
    targets = numbers.layout.targets
    groups: list[tuple[tuple[str, ...], str]] = [((m,), name) for m, names in targets.items() for name in names]
    for side in (READ_SIDE, WRITE_SIDE):
        pooled = tuple(matrix for matrix, name in side if name in targets.get(matrix, ()))
        if len(pooled) > 1:
            groups.append((pooled, side[0][1]))
    rows = [row for matrices, name in groups for row in _pooled(numbers, matrices, name)]
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS)).assign(step=step, reference=reference)
    return frame[["step", "reference", *CURVE_COLUMNS]]


def _pooled(numbers: Measurements, matrices: Sequence[str], subspace: str) -> list[dict[str, Any]]:
    """One row for each rank of all layers and heads of some matrices against one subspace."""
    deltas = [numbers.deltas[matrix] for matrix in matrices]
    held = [numbers.held[matrix, subspace] for matrix in matrices]

    def total(parts: Iterable[Tensor]) -> Tensor:
        """Sum over matrices, layers and heads; of what has ranks, for each."""
        return torch.stack([part.sum() if part.ndim == 2 else part.sum(-2).sum(0) for part in parts]).sum(0)

    def matched(shares: Sequence[Tensor | None]) -> Tensor:
        """References pooled by energy, in units of relative; NaN where a matrix has none."""
        there = [share for share in shares if share is not None]
        if len(there) < len(shares):
            return torch.full_like(inside, torch.nan)
        wide = [share.unsqueeze(1) if share.ndim == 2 else share for share in there]
        return total(d.energy.unsqueeze(-1) * share for d, share in zip(deltas, wide, strict=True)) * scale

    energy, base_energy = total(d.energy for d in deltas), total(d.base_energy for d in deltas)
    inside = total(h.inside for h in held)
    ranks = numbers.ranks_of(matrices[0], subspace)
    scale = numbers.layout.d / torch.tensor(ranks, dtype=torch.float64) / energy
    relative, low, high = inside * scale, *[torch.full_like(inside, torch.nan)] * 2
    replicates = [h.replicates for h in held if h.replicates is not None]
    if replicates:
        interval = log_jackknife_interval(relative, total(replicates) * scale, corrected=True)
        low, high = interval.low, interval.high
    activation, gradient = matched([h.activation for h in held]), matched([h.gradient for h in held])
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
            "activation_matched": activation[i].item(),
            "gradient_matched": gradient[i].item(),
            "delta_norm": norm,
            "delta_relative_norm": relative_norm,
        }
        for i, k in enumerate(ranks)
        if k in numbers.layout.measured[subspace] and bool((held[0].exists[:, i] > 0).all())
    ]
