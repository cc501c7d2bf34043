"""The engine of a trajectory: what it is held against, what was measured before, and one checkpoint after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from tl_asymmetry.models.capture import capture
from tl_asymmetry.models.checks import finite_check
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.processes import ALONE, Processes
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.side_by_side import side_by_side
from tl_asymmetry.models.texts import token_sequences, vocabulary_fingerprint
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import Weights
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.numbers import Layout
from tl_asymmetry.pair.plan import counted_tokens, grouped_sequences, make_plan, too_few
from tl_asymmetry.pair.projections import notes_of_kinds
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions, weights_hash
from tl_asymmetry.settings import GradientMoments, PairSettings, check_products, checked_hash
from tl_asymmetry.store import DamagedFile, Parts, PartStore, StoreReader, open_store
from tl_asymmetry.trajectory.held_bases import HeldBases, hold
from tl_asymmetry.trajectory.measurements import Measuring, WeightsSnapshot, measure

KIND = "trajectory"
REFERENCES = {"first": ("first",), "previous": ("previous",), "both": ("first", "previous")}
"""What the argument `reference` stands for."""


@dataclass(frozen=True, kw_only=True)
class TrajectorySettings:
    """What `analyze_trajectory` and `TrajectoryRecorder` are asked to do; see there.

    Raises:
        ValueError: what can be chosen for no run.
    """

    pair: PairSettings
    """What is measured of every checkpoint; its `gradient` is made anew for each."""
    reference: str = "first"
    """ "first", "previous" or "both"."""
    subspaces_from: Any = "base"
    """ "base", "each", or a model, directory or hub name."""
    gradient: Callable[[Any], GradientMoments] | None = None
    """Makes output-gradient second moments of a model."""
    duplicates: str = "refuse"
    """ "refuse" or "keep" checkpoints that hold the same weights."""

    def __post_init__(self) -> None:
        for name, allowed in (("reference", tuple(REFERENCES)), ("duplicates", ("refuse", "keep"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}; pass one of them"
                )
        if self.gradient is not None and (not callable(self.gradient) or isinstance(self.gradient, nn.Module)):
            raise ValueError(
                f"expected gradient as a function of a model, got {type(self.gradient).__name__}; pass e.g. "
                "gradient=lambda model: gradient_covariance(model, objective, batches)"
            )

    @property
    def runs_each(self) -> bool:
        """Whether every checkpoint must be a model that can be run."""
        return self.subspaces_from == "each" or self.gradient is not None

    def described(self) -> dict[str, Any]:
        """Every setting, JSON-ready."""
        source = self.subspaces_from
        own = described(
            reference=self.reference, subspaces_from=public_name(source) if isinstance(source, str) else source,
            gradient=self.gradient, duplicates=self.duplicates,
        )  # fmt: skip
        return self.pair.described() | own


class TrajectoryRun:
    """One run over checkpoints, from the first one on.

    Args:
        view: the first checkpoint's model; for a recorder that goes on with an earlier store, the model as it is.
        step: its step.
        name: what to call it.
        settings: what to do.
        texts, tokens, mask: as in `analyze_pair`.
        store: folder of the store; None keeps everything in memory.
        notes: collects what the result must say.
        recorder: whether weights and bases go into the store too, so that a later process can go on without the first
            checkpoint's model.
        processes: processes that share the checkpoints out; all make the same one of these.

    Raises:
        ValueError: what `analyze_trajectory` refuses of the first checkpoint, the texts and the store.
    """

    def __init__(
        self,
        view: ModelView,
        step: int,
        name: str,
        settings: TrajectorySettings,
        *,
        texts: Any,
        tokens: Any,
        mask: Tensor | None,
        store: str | Path | None,
        notes: Notes,
        recorder: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        self.options, self.notes, self.recorder, self.processes = settings, notes, recorder, processes
        self.references = REFERENCES[settings.reference]
        arguments = described(texts=texts, tokens=tokens, mask=mask) | settings.described()
        pair = settings.pair
        sequences = token_sequences(view, texts, tokens, mask, max_tokens=pair.max_tokens, notes=notes.add)
        self.plan = plan = make_plan(view, pair, sequences, notes)
        self._probe = sequences[0]
        self._grouped, intervals = grouped_sequences(sequences, pair, notes)
        self.measuring = Measuring(
            plan=plan,
            layout=Layout.of(view, plan),
            intervals=intervals,
            softmax_centres_keys=view.key_shift_invariant,
            seed=pair.seed,
        )
        self._outline = _outline(view)
        weights = self.checked(view, step, first=True)
        earlier = _earlier_run(store) if recorder and store is not None else None
        start: dict[str, Any] = {"step": step, "weights_xxh3": weights}
        record = model_record(view, weights)
        if earlier is not None and "start" not in earlier.settings:
            raise ValueError(
                f"expected a store of a training run, got that of something else in {str(store)!r}; pass another"
            )
        if earlier is not None:
            start, name, record = earlier.settings["start"], earlier.about["name"], earlier.about["model"]
        if step < start["step"]:
            raise ValueError(
                f"expected step {start['step']} or later, where the store {str(store)!r} begins, got {step}; pass the "
                "step the model is at"
            )
        if step == start["step"] and weights != start["weights_xxh3"]:
            raise ValueError(
                f"expected the weights that the store {str(store)!r} begins with at step {step}, got others; pass the "
                "step the model is at, or another folder"
            )
        fixed, fixed_hash = self._fixed_model()
        self.settings: dict[str, Any] = {
            "start": start,
            "shape": shape_record(view),
            "targets": {matrix: list(names) for matrix, names in plan.targets.items()},
            "ranks": list(plan.ranks),
            "measured": {name: list(ranks) for name, ranks in plan.measured.items()},
            **described(given=plan.given or None),
            "references": list(self.references),
            "subspaces_from": settings.subspaces_from if fixed is None else {"weights_xxh3": fixed_hash},
            "exclude_first": pair.exclude_first,
            "centered": pair.centered,
            "groups": pair.groups,
            "optimizer": pair.optimizer,
            "seed": pair.seed,
            "tokens": _tokens_hash(sequences),
            "gradient": None if settings.gradient is None else _callable_name(settings.gradient),
        }
        if settings.subspaces_from == "base":
            notes.add(
                f"subspaces come from the first checkpoint ({name}), weights and activations alike; pass "
                'subspaces_from="each" or a later model to see the change in other coordinates'
            )
        elif settings.subspaces_from == "each":
            notes.add(
                "subspaces come from each checkpoint itself: its activations have already seen the change that is "
                "held against them, and a curve mixes the change of the delta with that of the subspace"
            )
        for note in (*view.notes, *notes_of_kinds(view, self.plan.matrices)):
            notes.add(note)
        self.about: dict[str, Any] = {
            "arguments": arguments,
            "versions": versions(),
            "model": record,
            "name": name,
            "shown_rank": plan.shown_rank,
            "intervals": intervals,
            "tokens": counted_tokens(sequences, pair),
            "few_tokens": too_few(counted_tokens(sequences, pair), len(sequences), view.d_model),
            "sequences": len(sequences),
            "notes": list(notes.lines),
        }
        processes.agree({"arguments": arguments, "first checkpoint, texts and settings": self.settings})

        self.store: Parts = open_store(store, KIND, self.settings, self.about, processes=processes)
        try:
            self.first_step: int = start["step"]
            self.seen: dict[str, int] = {start["weights_xxh3"]: self.first_step}
            for finished in self.store.steps:
                self.seen.setdefault(self.store.entry(finished)["weights_xxh3"], finished)
            self.bases: list[HeldBases] | None = None
            self._begin(view, step, weights, fixed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()

    # -- one checkpoint ------------------------------------------------------------------------------------------

    def checked(self, view: Weights, step: int, *, first: bool = False, quick: bool = False) -> str:
        """Refuse weights that cannot be measured, and return their hash.

        Args:
            view: the checkpoint.
            step: for the message.
            first: warn of what concerns the whole run.
            quick: only what training may have broken (NaN, weights that are no longer those it computes with), not
                what the first checkpoint has shown.
        """
        if not first:
            outline = _outline(view)
            for field, ours in self._outline.items():
                theirs = outline[field]
                if ours != theirs and not (field == "vocabulary" and None in (ours, theirs)):
                    raise ValueError(
                        f"expected checkpoints of one run, got {field} {ours} (step {self.first_step}) and {theirs} "
                        f"(step {step}); pass checkpoints of one model"
                    )
        role = f"checkpoint at step {step}"
        if quick:
            weights = weights_hash(view, each=finite_check(view, role))
        else:
            weights = checked_hash(view, role, warn=self.notes.warn if first else lambda line: None)
        if isinstance(view, ModelView):
            check_products(view, self._probe)
        return weights

    def is_that(self, entry: Mapping[str, Any], step: int, weights: str, predecessor: tuple[int, str | None]) -> bool:
        """Whether what the store says of a step is of these weights, measured from the same predecessor.

        Args:
            entry: what it says.
            step: which.
            weights: hash of the checkpoint.
            predecessor: step and hash of the one before.

        Raises:
            ValueError: the store has other weights for that step.
        """
        if entry["weights_xxh3"] != weights:
            raise ValueError(
                f"expected the weights that the store has for step {step} ({entry['name']}), got others; pass the same "
                "checkpoints, or another store"
            )
        return "previous" not in self.references or tuple(entry["previous"]) == predecessor

    def refuse_duplicate(self, step: int, name: str, weights: str) -> None:
        """Refuse weights that another step has already shown.

        Raises:
            ValueError: naming both.
        """
        other = self.seen.setdefault(weights, step)
        if other == step:
            return
        if self.options.duplicates == "refuse":
            raise ValueError(
                f"expected every checkpoint to hold weights of its own, got {name} with exactly those of step {other}; "
                "one of the two is mislabelled: leave it out, or pass duplicates='keep'"
            )
        self.notes.warn(f"step {step} holds exactly the weights of step {other}")

    def measured(self, view: Weights, previous: WeightsSnapshot) -> dict[str, Tensor]:
        """The numbers of one checkpoint."""
        options = self.options
        references = {"first": self.start, "previous": previous}
        gradient = None
        if options.gradient is not None:
            assert isinstance(view, ModelView)  # runs_each
            gradient = options.gradient(view.model)
            if not isinstance(gradient, GradientMoments):
                raise ValueError(
                    "expected gradient to return an object with a method gradient_moment(layer, matrix, head), got "
                    f"{type(gradient).__name__}; return a gradient covariance"
                )
        with torch.no_grad():
            if self.bases is None:
                assert isinstance(view, ModelView)  # runs_each
                held = self._hold(view)
            else:
                held = self.bases.__getitem__
            return measure(
                view, {reference: references[reference] for reference in self.references}, held, self.measuring,
                gradient=gradient, progress=False,
            )  # fmt: skip

    def append(
        self,
        step: int,
        numbers: Mapping[str, Tensor],
        *,
        name: str,
        weights: str,
        previous: tuple[int, str],
        fingerprint: str | None = None,
    ) -> None:
        """Put the numbers of a checkpoint into the store, with its name, its hash and those of the one before."""
        entry = {"name": name, "weights_xxh3": weights, "fingerprint": fingerprint, "previous": list(previous)}
        self.store.put(step, numbers, entry)

    # -- the beginning -------------------------------------------------------------------------------------------

    def _begin(self, view: ModelView, step: int, weights: str, fixed: ModelView | None) -> None:
        """Keep the first checkpoint's weights, and the bases unless each checkpoint brings its own."""
        blobs = self.store if self.recorder and isinstance(self.store, PartStore) else None
        if blobs is not None and step > self.first_step:
            self._resume(blobs)
            return
        self.start = WeightsSnapshot.of(view, self.plan.matrices, step, weights)
        if self.options.subspaces_from != "each":
            bases = self._hold(view if fixed is None else fixed, self.processes)
            shown = self.options.pair.progress and self.processes.is_first
            with torch.no_grad():
                self.bases = side_by_side(
                    bases, view.n_layers, device=view.device, description="subspaces", progress=shown
                )
        if blobs is not None:
            if self.bases is not None:
                blobs.put("bases", {f"{b.layer}/{n}": t for b in self.bases for n, t in b.tensors.items()}, {})
            blobs.put("start", self.start.tensors, {})

    def _resume(self, store: PartStore) -> None:
        """Take the first checkpoint's weights and bases from the store."""
        each = self.options.subspaces_from == "each"
        if "start" not in store or ("bases" not in store and not each):
            raise ValueError(
                f"expected a store that a recorder began, got {str(store.folder)!r} without the weights it began with; "
                "pass a folder of its own"
            )
        weights = store.settings["start"]["weights_xxh3"]
        self.start = WeightsSnapshot(self.first_step, weights, store.arrays("start"))
        if not each:
            layers: list[dict[str, Tensor]] = [{} for _ in range(store.settings["shape"]["n_layers"])]
            for name, tensor in store.arrays("bases").items():
                layer, _, rest = name.partition("/")
                layers[int(layer)][rest] = tensor
            optimizer = self.options.pair.optimizer
            self.bases = [HeldBases(layer, tensors, optimizer=optimizer) for layer, tensors in enumerate(layers)]

    def _fixed_model(self) -> tuple[ModelView | None, str | None]:
        source = self.options.subspaces_from
        if isinstance(source, str) and source in ("base", "each"):
            return None, None
        view = ModelView(open_model(source) if isinstance(source, str | Path) else source)
        for field, ours in self._outline.items():
            theirs = _outline(view)[field]
            if ours != theirs:
                raise ValueError(
                    f"expected subspaces_from as a model like the checkpoints, got {field} {theirs}, theirs is {ours}; "
                    'pass "base", "each", or a model of this run'
                )
        weights = checked_hash(view, "model of subspaces_from", warn=self.notes.warn)
        check_products(view, self._probe)
        return view, weights

    def _hold(self, view: ModelView, processes: Processes = ALONE) -> Callable[[int], HeldBases]:
        """The bases of a model, a layer at a time: its activations are captured now, by all `processes` together."""
        plan, pair, measuring = self.plan, self.options.pair, self.measuring
        sites = [(point, layer) for point in plan.points for layer in range(view.n_layers)]
        captured = capture(
            view, self._grouped, sites, exclude_first=pair.exclude_first,
            beside=plan.beside, batch_size=pair.batch_size,
            progress=pair.progress and self.processes.is_first, processes=processes,
        )  # fmt: skip
        given = dict(plan.given)
        if "prediction" in plan.subspaces and "prediction" not in given:
            top = min(max(plan.ranks) + 1, view.d_model)
            prediction = prediction_subspace(view).truncate(top)
            # one contiguous basis for all layers
            prediction = replace(prediction, basis=prediction.basis.contiguous())
            given["prediction"] = [prediction] * view.n_layers

        def of_layer(layer: int) -> HeldBases:
            bases = LayerBases(
                layer, captured.groups, given, centered=pair.centered, exact=view.dtype == torch.float64,
                softmax_centres_keys=measuring.softmax_centres_keys, optimizer=pair.optimizer,
            )  # fmt: skip
            columns = {matrix: view.weight(layer, matrix).numel() // view.d_model for matrix in plan.matrices}
            return hold(bases, plan, columns, intervals=measuring.intervals)

        return of_layer


def _outline(view: Weights) -> dict[str, Any]:
    """What all checkpoints of a run have in common."""
    tokenizer = view.tokenizer
    return shape_record(view) | {
        "norm": view.norm,
        "positional": view.positional,
        "parallel": view.parallel,
        "matrices": view.matrices,
        "vocabulary": None if tokenizer is None else vocabulary_fingerprint(tokenizer),
    }


def _earlier_run(store: str | Path) -> StoreReader | None:
    try:
        return StoreReader(store)
    except DamagedFile:
        raise
    except ValueError:  # no store there yet
        return None


def _tokens_hash(sequences: Sequence[Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for sequence in sequences:
        digest.update(f"{len(sequence)}\n".encode())
        digest.update(sequence.to(torch.int64).contiguous().numpy().data)
    return digest.hexdigest()


def _callable_name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__name__)
