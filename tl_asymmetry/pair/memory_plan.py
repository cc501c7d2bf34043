"""What an analysis will hold at its peak, how many layers' moments fit at once, a refusal where not even one does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.geometry.memory import free_memory
from tl_asymmetry.models.capture import balanced_groups
from tl_asymmetry.models.processes import ALONE, Processes
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.plan import Plan
from tl_asymmetry.settings import PairSettings

USED_OF_FREE = 0.8
"""Share of the free memory that an analysis may plan to use."""

SIDE_BY_SIDE = 1_000_000_000
"""Bytes that layers may take while they are analysed side by side; one layer alone may take more."""

_VOCABULARY_CHUNK = 16_384
_SQUARES = 37
"""Matrices of d × d in float64 that a layer at work holds at its peak."""


@dataclass(frozen=True)
class Workload:
    """The sizes that memory depends on. Its methods give bytes, beside the models themselves."""

    n_layers: int
    """Blocks of the model."""
    d: int
    """d_model."""
    d_vocab: int
    """Tokens of the vocabulary."""
    matrices: int
    """Entries of a layer's analysed matrices."""
    largest: int
    """Entries of the largest one of them."""
    attention: int
    """Entries of those with heads, whose changes stay until the layer is done."""
    points: int
    """Hook points captured in each layer."""
    beside: int
    """Further moments kept at the attention input: of first positions, of sequence means."""
    heads: int
    """Rows of projections of a layer: heads times subspaces."""
    groups: int
    """Groups of sequences."""
    models: int
    """Models whose activations are captured."""
    sensitivity: bool
    """Whether moments of the first positions are kept as well, and all of them in the result."""
    longest: int
    """Tokens of the longest sequence."""
    rows: int
    """Sequences of a batch."""
    width: int
    """Floats that a forward pass holds for each token of a batch, at its widest."""
    workers: int
    """Layers analysed side by side."""
    device: torch.device
    """Where the base is."""

    def moments(self, layers: int) -> int:
        """Moments of that many layers, all groups, on the host."""
        return layers * self.groups * self.models * self._one_set()

    def capture_device(self, layers: int) -> int:
        """One group's moments, not packed yet, and one batch's activations, on the model's device; a Gram matrix at
        work."""
        return layers * self._one_set() * 5 // 4 + 4 * self.rows * self.longest * self.width + 3 * 8 * self.d**2

    def layers_host(self) -> int:
        """Deltas, bases and eigensolves of the layers at work side by side; one tensor read from files for each.

        A matrix's aligned twin as it is stored and in float32, its change, and the base's entries in another order
        while it is measured; the changes of attention matrices and their projections after that; bases, moments of
        inputs, and what whitens changes, in float64 (all counted by the peak at width 384).
        """
        deltas = 14 * self.largest + 8 * self.attention if self.device.type == "cpu" else 6 * self.largest
        return self.workers * (deltas + 8 * _SQUARES * self.d**2)

    def layers_device(self) -> int:
        """Deltas at work where the base is on a device of its own."""
        return self.workers * (14 * self.largest + 8 * self.attention + 8 * self.d**2)

    def prediction(self) -> int:
        """The Gram matrix of the unembedding, in pieces, and its eigensolve."""
        return 4 * self.d * min(_VOCABULARY_CHUNK, self.d_vocab) + 6 * 8 * self.d**2

    def result(self) -> int:
        """What the finished layers leave behind: profiles and spectra; under `sensitivity` their moments too."""
        kept = 12 * self.heads * self.d * self.n_layers * (13 if self.sensitivity else 1)
        return kept + (self.moments(self.n_layers) if self.sensitivity else 0)

    def peak_host(self, layers: int) -> int:
        """Peak on the host with that many layers a pass."""
        on_cpu = self.device.type == "cpu"
        capturing = self.moments(layers) + (self.capture_device(layers) - layers * self._one_set() if on_cpu else 0)
        return self.result() + max(capturing, self.moments(layers) + self.layers_host(), self.prediction())

    def peak_device(self, layers: int) -> int:
        """Peak on the model's own device; 0 where that is the CPU."""
        return 0 if self.device.type == "cpu" else max(self.capture_device(layers), self.layers_device())

    def _one_set(self) -> int:
        packed = 8 * (self.d * (self.d + 1) // 2)
        return packed * (self.points + self.beside) * (2 if self.sensitivity else 1)


@dataclass(frozen=True)
class MemoryPlan:
    """How an analysis will be run so that it fits."""

    workload: Workload
    """The sizes."""
    layers_per_pass: int
    """Layers whose moments are held at once; `workload.workers` of them are analysed side by side."""
    host_bytes: int
    """Peak on the host, beside the models."""
    device_bytes: int
    """Peak on the model's device, beside the models; 0 on CPU."""

    @property
    def passes(self) -> list[range]:
        """The layers of each pass."""
        step = self.layers_per_pass
        return [range(i, min(i + step, self.workload.n_layers)) for i in range(0, self.workload.n_layers, step)]


def plan_memory(
    base: ModelView,
    plan: Plan,
    sequences: Sequence[Tensor],
    settings: PairSettings,
    processes: Processes = ALONE,
) -> MemoryPlan:
    """Choose how many layers' moments to hold at once, by what is free now.

    Args:
        base: the model.
        plan: what is held against what.
        sequences: what will be run.
        settings: of the analysis; `layers_per_pass`, where one is asked for, must fit.
        processes: processes that share the work; they take what fits all of them.

    Raises:
        ValueError: where not even one layer a pass fits, saying what would; a number that is no number of layers.
    """
    L, layers_per_pass = base.n_layers, settings.layers_per_pass
    if layers_per_pass is not None and not (layers_per_pass == int(layers_per_pass) and 1 <= layers_per_pass <= L):
        raise ValueError(
            f"expected layers_per_pass from 1 to {L}, got {layers_per_pass}; pass None to have it chosen by free memory"
        )
    load = workload(base, plan, sequences, settings)
    room = _Room.now(base.device, processes)
    single = replace(load, workers=1)
    most = processes.least(max((n for n in range(1, L + 1) if room.fits(single, n)), default=0))
    if not most:
        raise ValueError(_refusal(single, 1, room, list(_remedies(single, room))))
    if layers_per_pass is not None and layers_per_pass > most:
        raise ValueError(_refusal(single, layers_per_pass, room, [f"layers_per_pass={most}"]))
    # As many layers side by side as fit, and as many moments at once as then fit: never fewer layers than are at work.
    for workers in range(load.workers, 0, -1):
        load = replace(load, workers=workers)
        fitting = max((n for n in range(1, L + 1) if room.fits(load, n)), default=0)
        if fitting >= (layers_per_pass or workers):
            break
    layers = layers_per_pass or processes.least(fitting)
    return MemoryPlan(load, layers, load.peak_host(layers), load.peak_device(layers))


def workload(base: ModelView, plan: Plan, sequences: Sequence[Tensor], settings: PairSettings) -> Workload:
    """The sizes of one analysis."""
    sizes = [base.entries(matrix) for matrix in plan.matrices]
    longest = max(map(len, sequences))
    load = Workload(
        n_layers=base.n_layers,
        d=base.d_model,
        d_vocab=base.d_vocab,
        matrices=sum(sizes),
        largest=max(sizes),
        attention=sum(
            n for n, matrix in zip(sizes, plan.matrices, strict=True) if base.heads(matrix) or base.experts(matrix)
        ),
        points=len(plan.points),
        beside=len(plan.beside),
        heads=sum((base.heads(m) or base.experts(m) or 1) * len(plan.targets[m]) for m in plan.matrices),
        groups=len(balanced_groups(sequences, settings.groups)),
        models=len(settings.captured),
        sensitivity=settings.sensitivity,
        longest=longest,
        rows=min(settings.batch_size, len(sequences)),
        width=6 * base.d_model + 2 * (base.d_mlp or 0) + 2 * base.n_heads * longest,
        workers=1,
        device=base.device,
    )
    side_by_side = SIDE_BY_SIDE // max(load.layers_host(), load.layers_device() if base.device.type != "cpu" else 0)
    return replace(load, workers=max(1, min(torch.get_num_threads(), base.n_layers, side_by_side)))


@dataclass(frozen=True)
class _Room:
    """Bytes that may be planned with; None where that cannot be known."""

    host: int | None
    device: int | None

    @classmethod
    def now(cls, device: torch.device, processes: Processes) -> _Room:
        host = free_memory(torch.device("cpu"))
        own = None if device.type == "cpu" else free_memory(device)
        return cls(
            None if host is None else int(USED_OF_FREE * host / processes.on_this_machine),
            None if own is None else int(USED_OF_FREE * own),
        )

    def fits(self, load: Workload, layers: int) -> bool:
        host = self.host is None or load.peak_host(layers) <= self.host
        return host and (self.device is None or load.peak_device(layers) <= self.device)


def _remedies(load: Workload, room: _Room) -> Iterator[str]:
    """Changes of the arguments that would make it fit, the mildest first; each by itself, then all together."""
    one_matrix = {
        "matrices": load.largest,
        "attention": min(load.largest, load.attention),
        "points": 1,
        "beside": 2,
    }
    options: dict[str, dict[str, Any]] = {
        "batch_size=1": {"rows": 1},
        "groups=1": {"groups": 1},
        "sensitivity=False": {"sensitivity": False, "models": 1},
        "matrices one at a time": one_matrix,
    }
    fitting = [name for name, change in options.items() if room.fits(replace(load, **change), 1)]
    yield from fitting
    everything = {field: value for change in options.values() for field, value in change.items()}
    if not fitting and room.fits(replace(load, **everything), 1):
        yield "batch_size=1, groups=1, sensitivity=False and matrices one at a time"


def _refusal(load: Workload, layers: int, room: _Room, remedies: list[str]) -> str:
    needs = [(load.peak_host(layers), room.host, "memory"), (load.peak_device(layers), room.device, "GPU memory")]
    short = [
        f"expected {_gigabytes(need)} of free {what} with {layers} layers a pass, got {_gigabytes(there)} to plan with"
        for need, there, what in needs
        if there is not None and need > there
    ]
    return f"{' and '.join(short)}; pass {' or '.join(remedies) or 'shorter texts, or use a larger machine'}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
