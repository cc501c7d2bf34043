"""A trajectory recorded while the model trains: in one's own loop, or as a callback of transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.effective import EffectiveView, unwrapped
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.notes import Notes
from tl_asymmetry.settings import GradientMoments, PairSettings
from tl_asymmetry.store import PartStore
from tl_asymmetry.trajectory.measurements import WeightsSnapshot, record_of
from tl_asymmetry.trajectory.result import TrajectoryAnalysis
from tl_asymmetry.trajectory.run import TrajectoryRun, TrajectorySettings


@checked
class TrajectoryRecorder:
    """Records where training moves a model's weights, every so many steps, without writing a checkpoint.

    What is recorded of a step is what `analyze_trajectory` measures of a checkpoint: fractions, spectra, all that both
    nulls need, replicates for the intervals, and the gradients' matched reference if asked for. The nulls themselves
    (20,000 draws in places) are not made while the model trains but by `result()`, all but each head's test against its
    inputs, which needs ΔW itself. A recording costs 2 to 3 % of 100 training steps of the demo, whose steps are cheap
    beside its heads, 4 % with both references, 9 % where texts are run at each; choose `every` by it. With a `store`, a
    training that was killed goes on: make the recorder again with the step the model is at.

    What is recorded is what the model computes with: base weights and what adapters, parametrisations and wrappers
    (PEFT before or after the recorder was made, DistributedDataParallel, torch.compile) make of them; of LoRA the
    change is taken from its factors. At every recording a few tokens are run to see that weights and activations
    belong together. Parameters sharded by FSDP are refused, since no process holds them whole: pass the checkpoints
    that such a training saves to `analyze_trajectory`.

    The model comes out of every recording as it went in. One that is no TransformerLens model is copied for each
    recording, in float32 where it is in half precision (as a checkpoint would be loaded), and the copy wrapped in a
    TransformerBridge: for that moment there are two of it. A Trainer takes the recorder itself,
    `callbacks=[recorder]`: it records at the end of every `every`-th step and of the training, on the main process.

    Args:
        model: the model in training, with the weights that all later ones are compared with; with a `store` that
            exists, the weights of `step`.
        every: record at steps that are multiples of this.
        store: folder to record into, one training at a time; None keeps everything in memory.
        texts: as in `analyze_pair`; they define the subspaces and are no training texts.
        tokens, mask: as in `analyze_pair`.
        step: the step the model is at.
        tokenizer: for `texts`; by default the one that lies where the model was loaded from.
        reference, subspaces_from, matrices, ranks, subspaces, optimizer, exclude_first, centered, batch_size,
            max_tokens, groups, seed: as in `analyze_trajectory`. With subspaces_from="base" or a model, texts go
            through a model once, at the beginning; with "each" at every recording.
        gradient: as in `analyze_trajectory`; called at every recording.
        probes: functions of step and model, a `TangentProbe` for one, called with the TransformerLens model at the
            beginning and at every recording.
        on_error: "raise" what goes wrong in a recording (a NaN, a full disk), or "warn" of it, leave that step out and
            let the training go on.
        log: called with every record as plain numbers by name (`step`, the pooled curves at the shown rank such as
            "W_Q/attn_in/relative", the `seconds` that it took), on the first process alone: `wandb.log`, `trackio.log`,
            a writer of one's own.

    Raises:
        ValueError: as `analyze_trajectory`, for the model and settings, and a store of another training.

    Example:
        >>> from tl_asymmetry.demo import demo_model, demo_texts
        >>> model = demo_model("step400")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> tokens = torch.arange(24).view(2, 12)
        >>> with TrajectoryRecorder(model, 2, texts=demo_texts(9), ranks=[4], groups=1) as recorder:
        ...     for step in range(1, 5):
        ...         loss = -model(tokens).log_softmax(-1)[..., 0].mean()
        ...         loss.backward()
        ...         _ = optimizer.step()
        ...         _ = recorder.step(step)
        ...     result = recorder.result()
        >>> result.steps
        [2, 4]
    """

    @with_fresh_settings
    def __init__(
        self,
        model: Any,
        every: int,
        store: str | Path | None = None,
        texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
        *,
        tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
        mask: Bool[Tensor, "batch pos"] | None = None,
        step: int = 0,
        tokenizer: Any = None,
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
        seed: int = 0,
        probes: Sequence[Callable[[int, Any], None]] = (),
        on_error: str = "raise",
        log: Callable[[dict[str, float]], Any] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"expected every >= 1, got {every}; pass the number of steps between recordings")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"expected on_error to be one of raise, warn, got {on_error!r}; pass one of them")
        if log is not None and not callable(log):
            raise ValueError(f"expected log as a function of a record, got {type(log).__name__}; pass e.g. wandb.log")
        if isinstance(probes, str) or not isinstance(probes, Iterable) or not all(map(callable, probes := [*probes])):
            raise ValueError(f"expected probes as functions of a step and a model, got {shown(probes)}; pass a list")
        if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"expected a tokenizer of transformers, got {shown(tokenizer)}; pass one, or leave it out")
        if tokenizer is None and tokens is None:
            tokenizer = _own_tokenizer(model)
        self.every, self._model, self._tokenizer, self._on_error = every, model, tokenizer, on_error
        self._probes, self._log = tuple(probes), log
        self._notes, self._recorded, self._trusted, self._last = Notes(), set[int](), step, step
        settings = TrajectorySettings(
            pair=PairSettings(
                matrices=matrices, ranks=ranks, subspaces=subspaces, optimizer=optimizer, exclude_first=exclude_first,
                centered=centered, batch_size=batch_size, max_tokens=max_tokens, groups=groups, seed=seed,
                progress=False,
            ),
            reference=reference, subspaces_from=subspaces_from, gradient=gradient, duplicates="keep",
        )  # fmt: skip
        view = self._view()
        self._run = TrajectoryRun(
            view, step, f"step {step}", settings,
            texts=texts, tokens=tokens, mask=mask, store=store, notes=self._notes, recorder=True,
        )  # fmt: skip
        try:
            self._previous = self._run.start
            self._go_on(view, step)
            for probe in self._probes:
                probe(step, view.model)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TrajectoryRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the store; what was recorded can still be read."""
        self._run.close()

    def step(self, step: int) -> bool:
        """Tell that an optimiser step is done; records if it is one to record.

        Args:
            step: how many steps the weights have seen.

        Returns:
            Whether it was recorded.
        """
        self._last = max(self._last, step)
        if step % self.every or step <= self._previous.step or step in self._recorded:
            return False
        return self.record(step)

    @with_fresh_settings
    def record(self, step: int) -> bool:
        """Record this step whatever it is, e.g. the last one.

        Returns:
            True; False where something went wrong and `on_error` is "warn".

        Raises:
            ValueError: a step that is not after the one recorded before; weights with NaN.
            OSError: the store's disk is full or fails.
        """
        if step <= self._previous.step:
            raise ValueError(
                f"expected a step after {self._previous.step}, the one recorded before, got {step}; pass the number of "
                "steps the weights have seen"
            )
        try:
            self._record(step)
        except (ValueError, OSError) as error:
            if self._on_error == "raise":
                raise
            line = f"step {step} was not recorded: {error}"
            self._notes.warn(line)
            return False
        return True

    @with_fresh_settings
    def resume(self, step: int) -> None:
        """Tell that the model has been given the weights of an earlier training's `step`, which goes on from there.

        Recordings of the store up to that step count, later ones are made again.

        Raises:
            ValueError: interval deltas need the weights of the recording before, and these are gone.
        """
        self._go_on(self._view(), step)

    @with_fresh_settings
    def result(self) -> TrajectoryAnalysis:
        """The analysis of everything recorded so far; both nulls are made here.

        Raises:
            ValueError: nothing recorded yet.
        """
        run = self._run
        steps = [s for s in run.store.steps if s in self._recorded or s <= self._trusted]
        if not steps:
            raise ValueError(
                f"expected a recorded step, got none up to step {self._last}; call step() after every optimiser step"
            )
        return TrajectoryAnalysis.assemble(
            run.store, steps, settings=run.settings, about=run.about, notes=self._notes.lines
        )

    # -- as a callback of transformers' Trainer: callbacks=[recorder] ------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on where a Trainer that resumes from a checkpoint does; on the main process only, as all events."""
        if state.is_world_process_zero and state.global_step > self._previous.step:
            self.resume(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record every `every`-th step."""
        if state.is_world_process_zero:
            self.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the last step."""
        if state.is_world_process_zero and state.global_step > self._previous.step:
            self.record(state.global_step)

    def __getattr__(self, name: str) -> Any:
        # A Trainer calls every event of every callback: those above are the ones that matter here.
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- one recording -------------------------------------------------------------------------------------------

    def _record(self, step: int) -> None:
        run, begun = self._run, time.perf_counter()
        view = self._view()
        weights = run.checked(view, step, quick=True)
        now = WeightsSnapshot(step, weights, {})
        if "previous" in run.references:
            now = WeightsSnapshot.of(view, run.plan.matrices, step, weights)
            if isinstance(run.store, PartStore):
                # before the step counts as recorded: whoever finds it recorded finds these too
                run.store.put(_blob(step), now.tensors, {})
        numbers, previous = run.measured(view, self._previous), (self._previous.step, self._previous.hash)
        run.append(step, numbers, name=f"step {step}", weights=weights, previous=previous)
        for probe in self._probes:
            probe(step, view.model)
        if isinstance(run.store, PartStore):
            for earlier in run.store.steps:
                if earlier != step:
                    run.store.drop(_blob(earlier))
        self._previous = now
        self._recorded.add(step)
        self._last = max(self._last, step)
        if self._log is not None and _is_first_process():
            record = record_of(numbers, run.references, run.measuring.layout, run.plan.shown_rank)
            self._log({"step": step, **record, "seconds": time.perf_counter() - begun})

    def _go_on(self, view: ModelView, step: int) -> None:
        """Take the recording before this step as the previous one."""
        run = self._run
        self._trusted = self._last = step
        before = [s for s in run.store.steps if s <= step]
        if not before:
            return
        entry = run.store.entry(before[-1])
        self._previous = WeightsSnapshot(before[-1], entry["weights_xxh3"], {})
        if "previous" not in run.references:
            return
        if _blob(before[-1]) in run.store:
            kept = run.store.arrays(_blob(before[-1]))
            self._previous = WeightsSnapshot(before[-1], entry["weights_xxh3"], kept)
            return
        weights = run.checked(view, step, quick=True)
        if weights != entry["weights_xxh3"]:
            raise ValueError(
                f"expected the weights of step {before[-1]}, the last recording before step {step}, got none: the "
                'store keeps those of its last recording only; resume from there, or pass reference="first"'
            )
        self._previous = WeightsSnapshot.of(view, run.plan.matrices, before[-1], weights)

    def _view(self) -> EffectiveView:
        """The model as it computes now; it goes when the recording is done."""
        return EffectiveView(self._model, self._tokenizer)


def _is_first_process() -> bool:
    """Asked of this process alone: not all of them need record."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0


def _nothing(*_: Any, **__: Any) -> None:
    """What a callback does at an event that does not concern it."""


def _blob(step: int) -> str:
    return f"previous-{step}"


def _own_tokenizer(model: Any) -> Any:
    """The tokenizer that lies where a transformers model was loaded from, or None."""
    model = unwrapped(model)
    if hasattr(model, "cfg") or not getattr(getattr(model, "config", None), "_name_or_path", ""):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError, KeyError):
        return None
