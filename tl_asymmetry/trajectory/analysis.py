"""Fractions and spectra of weight deltas over the checkpoints of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.processes import ALONE, present_processes, together
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import Weights, weights_from
from tl_asymmetry.notes import Notes
from tl_asymmetry.settings import GradientMoments, PairSettings
from tl_asymmetry.trajectory.checkpoints import Checkpoint, checkpoints_of
from tl_asymmetry.trajectory.measurements import WeightsSnapshot
from tl_asymmetry.trajectory.result import TrajectoryAnalysis
from tl_asymmetry.trajectory.run import TrajectoryRun, TrajectorySettings


@checked
@together
@with_fresh_settings
def analyze_trajectory(
    checkpoints: str | Path | Iterable[Any] | Mapping[int, Any],
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    base: Any = None,
    tokenizer: Any = None,
    store: str | Path | None = None,
    reference: str = "first",
    subspaces_from: Any = "base",
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    optimizer: str = "adam",
    exclude_first: bool = True,
    centered: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    gradient: Callable[[Any], GradientMoments] | None = None,
    duplicates: str = "refuse",
    distributed: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrajectoryAnalysis:
    """Where a training run has moved its weights so far, checkpoint by checkpoint, and is that more than chance.

    For every checkpoint what `analyze_pair` measures of a pair: the cumulative delta W_t − W_first, the interval delta
    W_t − W_previous, or both, against the subspaces of the residual stream, beside both nulls. arXiv 2605.16600
    follows a checkpoint trajectory; the definitions are ours, since the paper's are not public.

    At most one checkpoint's model is held at a time (at the beginning also that of `subspaces_from`), besides copies
    on CPU of the analysed matrices of the first and, for interval deltas, of the previous one. With a `store`, every
    finished checkpoint is kept at once: a run that was killed at any moment goes on after the last finished one and
    ends with the same table.

    Where torch.distributed is set up (torchrun), all processes must make the same call: checkpoints are shared out
    and every process returns the same result. The first process keeps the store, after every round of one checkpoint
    for each. For interval deltas a process also opens the checkpoint before its own.

    Args:
        checkpoints: a training's output folder with its `checkpoint-500`, …; or in the order of their steps
            directories (`checkpoint-500`, `step500`), pairs `(step, model)` as a mapping, a list or a generator (which
            may change and yield the same model again), or what `pythia_checkpoints` returns. A model is a
            HookedTransformer or TransformerBridge with raw weights, anything `weights_from` reads (a directory, a name
            on the hub, an adapter, shards, a state dict), or a function that makes one. The first is what all others
            are compared with, and is loaded; of the later ones in files one tensor is read at a time, and an adapter's
            change is taken from its factors.
        base: what the run started from, where it is not among the checkpoints (a Trainer writes no checkpoint-0): it
            becomes step 0. Of a run of adapters, by default the model that the first of them names.
        tokenizer: for `texts`, where the first checkpoint has none (a Trainer without `processing_class` writes none).
        texts: as in `analyze_pair`.
        tokens, mask: as in `analyze_pair`.
        store: folder for the finished checkpoints; made if need be. One process at a time may write to it; another
            run's store, or one made with other settings, is refused.
        reference: "first", "previous" or "both": what a checkpoint's weights are subtracted from.
        subspaces_from: "base" takes weights and activations of the first checkpoint; "each" those of the checkpoint at
            hand; a model, directory or hub name takes that model's for all checkpoints (the last one's, say).
        matrices, ranks, subspaces, optimizer, exclude_first, centered, batch_size, max_tokens, groups, seed, progress:
            as in `analyze_pair`.
        gradient: a function of a model that returns its gradient covariance, for the matched reference of W_O and
            W_out; called once for each checkpoint.
        duplicates: "refuse" a checkpoint whose weights an earlier step has already shown (a wrong branch on the hub, a
            copied directory), or "keep" it.
        distributed: share the checkpoints with the other processes of torch.distributed, if there are any; False
            where one of them calls this alone.

    Returns:
        A frozen `TrajectoryAnalysis`.

    Raises:
        ValueError: checkpoints that cannot be read, are not of one run, hold NaN or the weights of another step; a
            store of another run, or in use; else as `analyze_pair`. What was finished before is kept.
        OSError: the store's disk is full or fails; what was finished before is kept.

    Example:
        >>> from tl_asymmetry.demo import demo_model, demo_texts
        >>> run = ((step, demo_model(f"step{step}")) for step in (0, 50, 150))
        >>> result = analyze_trajectory(run, demo_texts(20, seed=1), ranks=[1, 4], progress=False)
        >>> result.table["step"].unique().tolist()
        [50, 150]
    """
    settings = TrajectorySettings(
        pair=PairSettings(
            matrices=matrices, ranks=ranks, subspaces=subspaces, optimizer=optimizer, exclude_first=exclude_first,
            centered=centered, batch_size=batch_size, max_tokens=max_tokens, groups=groups, distributed=distributed,
            seed=seed, progress=progress,
        ),
        reference=reference, subspaces_from=subspaces_from, gradient=gradient, duplicates=duplicates,
    )  # fmt: skip
    notes = Notes()
    processes = present_processes() if distributed else ALONE
    rest = checkpoints_of(checkpoints, base=base, tokenizer=tokenizer)
    first = next(rest, None)
    if first is None:
        raise ValueError("expected two checkpoints at least, got none; pass the first of the run and later ones")
    with first.open() as model:
        run = TrajectoryRun(
            ModelView(model), first.step, first.name, settings,
            texts=texts, tokens=tokens, mask=mask, store=store, notes=notes, processes=processes,
        )  # fmt: skip
        del model
    try:
        sweep = _Sweep(run, first)
        known = len(checkpoints) - 1 if isinstance(checkpoints, Sized) else None
        for checkpoint in tqdm(rest, desc="checkpoints", total=known, disable=not (progress and processes.is_first)):
            sweep.take(checkpoint)
        sweep.commit()
        if not sweep.steps:
            raise ValueError("expected two checkpoints at least, got one; pass the first of the run and later ones")
        return TrajectoryAnalysis.assemble(
            run.store, sweep.steps, settings=run.settings, about=run.about, notes=notes.lines
        )
    finally:
        run.close()


@dataclass(frozen=True)
class _Outcome:
    """What one process has to say of one checkpoint."""

    checkpoint: tuple[int, str]
    """Its step and name."""
    weights: str = ""
    """`weights_hash`."""
    fingerprint: str | None = None
    """Of its files."""
    numbers: dict[str, Tensor] | None = None
    """What was measured; None where the store has it."""
    error: Exception | None = None
    """What went wrong instead, where other processes must hear of it."""


class _Sweep:
    """One checkpoint after another; what is finished is not opened again unless its weights are needed.

    With several processes each takes every n-th one. After every n of them all hear what was found, in the order of
    the steps, and the first process puts it into the store.
    """

    def __init__(self, run: TrajectoryRun, first: Checkpoint) -> None:
        self.run, self.processes = run, run.processes
        self.steps: list[int] = []
        self.whole = {step: run.store.entry(step) for step in run.store.steps}
        self.index = 0
        self.own: list[_Outcome] = []
        self.committed = run.start.step, run.start.hash
        # the checkpoint before the one at hand: its weights as far as this process needs them, or how to get them
        self.base = first.source  # what adapters and state dicts are added to
        self.last_step = first.step
        self.last_hash: str | None = run.start.hash
        self.snapshot: WeightsSnapshot | None = run.start
        self.reopen: Checkpoint | None = None

    def take(self, checkpoint: Checkpoint) -> None:
        """Measure a checkpoint, or find it finished, or leave it to the process whose turn it is."""
        step = checkpoint.step
        if step <= self.last_step:
            raise ValueError(
                f"expected checkpoints in the order of their steps, got {step} after {self.last_step}; pass them sorted"
            )
        turn = self.index % self.processes.count
        self.index += 1
        mine, next_is_mine = turn == self.processes.rank, (turn + 1) % self.processes.count == self.processes.rank
        keep = next_is_mine and "previous" in self.run.references
        snapshot, known = None, None
        if mine:
            outcome, snapshot = self._outcome(checkpoint, keep)
            self.own.append(outcome)
            known = outcome.weights
        elif keep and not checkpoint.again:  # a generator shows it only now
            snapshot = self._snapshot(checkpoint)
            known = snapshot.hash
        self.last_step, self.last_hash = step, known
        self.snapshot, self.reopen = snapshot, checkpoint
        if turn == self.processes.count - 1:
            self.commit()

    def commit(self) -> None:
        """Put what all processes have measured since the last time into the store, in order."""
        run = self.run
        found, self.own = self.processes.gathered(self.own), []
        for outcome in found:
            if outcome.error is not None:
                raise outcome.error
            step, name = outcome.checkpoint
            run.refuse_duplicate(step, name, outcome.weights)
            if outcome.numbers is not None:
                run.append(
                    step, outcome.numbers,
                    name=name, weights=outcome.weights, previous=self.committed, fingerprint=outcome.fingerprint,
                )  # fmt: skip
            self.committed = step, outcome.weights
            self.steps.append(step)

    def _outcome(self, checkpoint: Checkpoint, keep: bool) -> tuple[_Outcome, WeightsSnapshot | None]:
        """What there is to say of a checkpoint of this process, and its weights if they are to be kept."""
        try:
            return self._measured(checkpoint, keep)
        except (ValueError, OSError) as error:
            if self.processes.count == 1:
                raise
            return _Outcome((checkpoint.step, checkpoint.name), error=error), None

    def _measured(self, checkpoint: Checkpoint, keep: bool) -> tuple[_Outcome, WeightsSnapshot | None]:
        run, step = self.run, checkpoint.step
        fingerprint = None if checkpoint.fingerprint is None else checkpoint.fingerprint()
        entry = self.whole.get(step)
        label = step, checkpoint.name
        if entry is not None and fingerprint is not None and entry["fingerprint"] == fingerprint:
            weights: str = entry["weights_xxh3"]
            if run.is_that(entry, step, weights, (self.last_step, self.last_hash)):
                return _Outcome(label, weights, fingerprint), None
        before = self._before()
        with self._opened(checkpoint) as view:
            weights = run.checked(view, step)
            if self.processes.count == 1 and run.options.duplicates == "refuse":
                run.refuse_duplicate(step, checkpoint.name, weights)  # before the work is done
            numbers = None
            if entry is None or not run.is_that(entry, step, weights, (before.step, before.hash)):
                numbers = run.measured(view, before)
            snapshot = WeightsSnapshot.of(view, run.plan.matrices, step, weights) if keep else None
            del view
        return _Outcome(label, weights, fingerprint, numbers), snapshot

    def _before(self) -> WeightsSnapshot:
        """The previous checkpoint's weights, read again where they were not kept; none where none are needed."""
        if "previous" not in self.run.references:
            return WeightsSnapshot(self.last_step, self.last_hash or "", {})
        if self.snapshot is None:
            if self.reopen is None:
                raise RuntimeError("no previous checkpoint")
            self.snapshot = self._snapshot(self.reopen)
        return self.snapshot

    def _snapshot(self, checkpoint: Checkpoint) -> WeightsSnapshot:
        run = self.run
        with self._opened(checkpoint) as view:
            snapshot = WeightsSnapshot.of(view, run.plan.matrices, checkpoint.step, run.checked(view, checkpoint.step))
            del view
        return snapshot

    @contextmanager
    def _opened(self, checkpoint: Checkpoint) -> Iterator[Weights]:
        """A checkpoint's weights: of files one tensor at a time where no model of it is needed."""
        if checkpoint.weights is not None and not self.run.options.runs_each:
            yield weights_from(checkpoint.weights, base=self.base)
            return
        with checkpoint.open() as model:
            yield ModelView(model)
            del model
