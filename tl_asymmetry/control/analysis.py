"""The graded control: one checkpoint, several objectives from sharp to soft, everything else equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked, listed, shown
from tl_asymmetry.control.result import ControlStudy
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.gradients.analysis import data_fingerprint, gradient_covariance
from tl_asymmetry.gradients.result import GradientCovariance
from tl_asymmetry.models.backward import check_differentiable
from tl_asymmetry.models.checks import check_ranks
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.analysis import analyze_pair
from tl_asymmetry.pair.plan import chosen_matrices, note_left_out
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions, weights_hash
from tl_asymmetry.store import Parts, open_store
from tl_asymmetry.training.batches import Batch, PreferenceBatch, TokenBatch
from tl_asymmetry.training.data import as_batches, rebatched, shuffled
from tl_asymmetry.training.objectives import Objective, class_described, is_objective, objective_name
from tl_asymmetry.training.runs import Optimizer, Run, train, trainable_copy

KIND = "control study"
_FULL_MLP = 1024


@checked
@with_fresh_settings
def contrastive_control(
    model: Any,
    objectives: Mapping[str, Objective[Any]] | Sequence[Objective[Any]],
    data: Any,
    steps: int,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    grades: Sequence[float] | None = None,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    match_norm: bool = True,
    batch_size: int = 16,
    optimizer: Optimizer = Optimizer(),  # noqa: B008 - frozen
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    gradient_rows: int = 256,
    store: str | Path | None = None,
    progress: bool = True,
) -> ControlStudy:
    """Train copies of one checkpoint under objectives graded from sharp to soft, and see where their deltas lie.

    Every grade gets the same rows in the same order, the same optimiser and as many steps; nothing is drawn at random
    but the order, once for each seed, and there is no dropout. For each grade: δ at the common checkpoint (a
    `gradient_covariance`), and for each seed the delta's read and write fractions with both nulls (an `analyze_pair`
    with these gradients). The design follows arXiv 2605.16600's graded contrastive-objective control, whose details are
    not public; all settings here are ours.

    With `match_norm` every delta is also taken where it has come equally far: at the first step at which
    √Σ‖ΔW‖² over the analysed matrices reaches what the slowest grade of that seed reaches in all its steps (found by
    training once more up to there). Fractions do not change when a delta is scaled, so this is what matching norms can
    mean: the same distance, not the same number.

    Args:
        model: a HookedTransformer or TransformerBridge in float32 or float64; copies are trained, it stays as it is.
        objectives: from sharp to soft, by name or in a list (then named by their settings). One that reads texts gets
            the chosen halves of preference data.
        data: rows to train on; `PreferenceBatch` or `TokenBatch` objects, texts, or rows of a dataset: see
            `training.data.as_batches`. Preference data if any objective needs them.
        steps: optimiser steps of each run.
        seeds: of the order of the data; the scatter over seeds is the study's error bar.
        grades: a number for each objective, e.g. its temperature; default 0, 1, 2, … in the order given. Only their
            order counts.
        texts: for the activations in `analyze_pair`; default the (chosen) rows of the data.
        match_norm: also compare at equal distance.
        batch_size: rows of a step; for InfoNCE, part of the objective.
        optimizer: settings of AdamW.
        matrices: default all the model has.
        ranks: as in `analyze_pair`.
        gradient_rows: the first so many rows of the data are used for the spectra of δ.
        store: a folder in which finished parts are kept: called again with the same arguments after a kill, the study
            goes on from there. Another study's folder is refused.
        progress: show a progress bar.

    Returns:
        A frozen `ControlStudy`.

    Raises:
        ValueError: fewer than two objectives, data that do not fit them, half-precision weights, a loss that is not
            finite, or a store that holds another study.

    Example:
        >>> from tl_asymmetry import contrastive_control
        >>> from tl_asymmetry.objectives import CrossEntropy
        >>> from tl_asymmetry.demo import demo_texts
        >>> grades = [CrossEntropy(), CrossEntropy(temperature=4.0)]
        >>> options = {"steps": 2, "seeds": [0], "matrices": ["W_O"], "progress": False}
        >>> study = contrastive_control(model, grades, demo_texts(32), **options)
        >>> study.runs["steps"].tolist()
        [2, 2, 2, 2]
    """
    view, notes = ModelView(model), Notes()
    named = _named(objectives)
    graded = _grades(named, grades)
    seeds = list(dict.fromkeys(int(seed) for seed in listed("seeds", seeds, int, instead="seeds=(0, 1, 2)")))
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"expected optimizer as an Optimizer, got {shown(optimizer)}; pass Optimizer(lr=1e-4)")
    if steps < 1 or not seeds:
        raise ValueError(f"expected steps >= 1 and at least one seed, got {steps} and {seeds}; pass such")
    ranks = None if ranks is None else check_ranks(ranks, view.d_model)  # before the training
    check_differentiable(view)
    chosen = chosen_matrices(view, matrices)
    note_left_out(view, notes)
    wanted = [objective.batch_type for objective in named.values()]
    kind = PreferenceBatch if PreferenceBatch in wanted else TokenBatch
    held = as_batches(view, data, kind, batch_size=batch_size, note=notes.add, warn=notes.warn)
    by_type: dict[type[Any], list[Batch]] = {
        wants: as_batches(view, held, wants, note=notes.add, warn=notes.warn) for wants in dict.fromkeys(wanted)
    }
    if texts is not None and not isinstance(texts, Iterator):  # refused before the training that they are read after
        token_sequences(view, texts, notes=lambda note: None)
    sequences = None if texts is not None else _sequences(by_type.get(TokenBatch, [_chosen(b) for b in held]))
    next(shuffled(held, batch_size, seed=0))  # refuses too few rows
    config: dict[str, Any] = {
        "versions": versions(),
        "model": model_record(view, weights_hash(view)),
        "shape": shape_record(view),
        "objectives": {name: objective_name(objective) for name, objective in named.items()},
        "grades": dict(zip(named, graded, strict=True)),
        "references": {name: _reference(objective) for name, objective in named.items()},
        "data_xxh3": data_fingerprint(held),
        "rows": sum(map(len, held)),
        "steps": steps,
        "seeds": seeds,
        "match_norm": match_norm,
        "batch_size": batch_size,
        "optimizer": asdict(optimizer) | {"betas": list(optimizer.betas)},
        "matrices": list(chosen),
        "ranks": None if ranks is None else list(ranks),
        "gradient_rows": gradient_rows,
        **described(texts=texts),
    }
    settings = {name: value for name, value in config.items() if name != "versions"}
    gradients: dict[str, GradientCovariance] = {}
    pairs: dict[tuple[str, int, str], PairAnalysis] = {}
    runs: dict[tuple[str, int, str], Run] = {}
    bar = tqdm(
        total=len(named) * (1 + len(seeds) * (1 + match_norm)), desc="control", unit="part", disable=not progress
    )

    def spectra(objective: Objective[Any]) -> GradientCovariance:
        rows = rebatched(by_type[objective.batch_type], batch_size)[: max(gradient_rows // batch_size, 1)]
        full = view.d_mlp is not None and view.d_mlp <= _FULL_MLP
        return gradient_covariance(model, objective, rows, matrices=chosen, full_mlp=full, progress=False)

    def grade(name: str, seed: int, until: float | None) -> tuple[Run, PairAnalysis]:
        objective, policy = named[name], trainable_copy(model)
        run = train(
            policy, model, objective, shuffled(by_type[objective.batch_type], batch_size, seed=seed),
            steps=steps, optimizer=optimizer, matrices=chosen, until=until,
        )  # fmt: skip
        pair = analyze_pair(
            model, policy, texts, tokens=sequences, matrices=chosen, ranks=ranks, groups=1,
            gradient=gradients[name], progress=False,
        )  # fmt: skip
        return run, pair

    with bar, open_store(store, KIND, settings, {"versions": config["versions"]}) as parts:
        kept = _Kept(parts, list(named))
        for name, objective in named.items():
            gradients[name] = kept.gradients(name, partial(spectra, objective))
            bar.update()
        for seed in seeds:
            for name in named:
                key = (name, seed, "steps")
                runs[key], pairs[key] = kept.grade(key, partial(grade, name, seed, None))
                bar.update()
            if not match_norm:
                continue
            target = min(runs[name, seed, "steps"].distances[-1] for name in named)
            for name in named:
                key, whole = (name, seed, "norm"), (name, seed, "steps")
                if runs[whole].distances[-1] == target:  # the slowest: its whole run
                    runs[key], pairs[key] = runs[whole], pairs[whole]
                else:
                    runs[key], pairs[key] = kept.grade(key, partial(grade, name, seed, target))
                bar.update()
    for note in dict.fromkeys(note for part in (*gradients.values(), *pairs.values()) for note in part.notes):
        notes.add(note)
    return ControlStudy.assemble(
        gradients=gradients, pairs=pairs, runs=runs, grades=config["grades"], config=config, notes=notes.lines
    )


class _Kept:
    """Finished parts, read where they are in the store, else made and put there."""

    def __init__(self, store: Parts, objectives: Sequence[str]) -> None:
        self.store, self.objectives = store, objectives

    def gradients(self, name: str, make: Callable[[], GradientCovariance]) -> GradientCovariance:
        """One objective's gradient covariance."""
        part = f"{self.objectives.index(name):02d}-gradients"
        if part not in self.store:
            document, numbers = make().packed()
            self.store.put(part, numbers, document)
        return GradientCovariance.unpacked(self.store.entry(part), self.store.arrays(part))

    def grade(
        self, key: tuple[str, int, str], make: Callable[[], tuple[Run, PairAnalysis]]
    ) -> tuple[Run, PairAnalysis]:
        """One grade's run and analysis."""
        name, seed, compared = key
        part = f"{self.objectives.index(name):02d}-seed{seed}-{compared}"
        if part not in self.store:
            run, pair = make()
            document, numbers = pair.packed()
            self.store.put(part, numbers, {"run": asdict(run), "pair": document})
        entry = self.store.entry(part)
        run = Run(tuple(entry["run"]["losses"]), tuple(entry["run"]["distances"]))
        return run, PairAnalysis.unpacked(entry["pair"], self.store.arrays(part))


def _named(objectives: Mapping[str, Objective[Any]] | Sequence[Objective[Any]]) -> dict[str, Objective[Any]]:
    if isinstance(objectives, Mapping):
        named = {str(name): objective for name, objective in objectives.items()}
    elif not isinstance(objectives, Sequence):
        raise ValueError(f"expected objectives as a list, got {shown(objectives)}; pass [sharp, ..., soft]")
    else:
        named = {objective_name(objective): objective for objective in objectives}
        if len(named) < len(objectives):
            raise ValueError(
                "expected objectives that differ in their settings, got equal ones; pass a mapping from names"
            )
    if len(named) < 2:
        raise ValueError(f"expected two objectives or more to grade, got {len(named)}; pass [sharp, ..., soft]")
    for name, objective in named.items():
        if not is_objective(objective):
            raise ValueError(
                f"expected objectives, got {class_described(objective)} as {name!r}; pass CrossEntropy(), DPO(model), …"
            )
    return named


def _grades(named: Mapping[str, Any], grades: Sequence[float] | None) -> list[float]:
    if grades is None:
        return [float(i) for i in range(len(named))]
    several = listed("grades", grades, float, instead="a number for each objective")
    if len(several) != len(named):
        raise ValueError(f"expected a grade for each of {len(named)} objectives, got {len(several)}; pass one for each")
    return [float(grade) for grade in several]


def _reference(objective: Any) -> str | None:
    """Hash of the weights of an objective's reference model, if it has one of TransformerLens's."""
    reference = getattr(objective, "reference", None)
    if reference is None:
        return None
    try:
        return weights_hash(reference if isinstance(reference, ModelView) else ModelView(reference))
    except ValueError:  # any callable may be a reference
        return type(reference).__name__


def _chosen(batch: Batch) -> Batch:
    return batch.chosen if isinstance(batch, PreferenceBatch) else batch


def _sequences(batches: Sequence[Any]) -> list[Int[Tensor, " _pos"]]:
    """Every row up to its last target."""
    return [row[: int(n)].cpu() for batch in batches for row, n in zip(batch.tokens, batch.lengths, strict=True)]
