"""Heads of the aligned model set back to the base: singly, together in several orders, the whole model by degrees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.interventions.analysis import (
    check_memory,
    check_models,
    common_outputs,
    predictable,
    whole_passes,
)
from tl_asymmetry.interventions.runs import MEASURED, EvaluationBatch, evaluation_batches, measure
from tl_asymmetry.interventions.tables import outcomes_of
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import ATTENTION
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.plan import chosen_matrices
from tl_asymmetry.results.provenance import described, pair_names, pair_record, shape_record, versions
from tl_asymmetry.rewinding.result import CURVE_COLUMNS, PATH_COLUMNS, UNIT_COLUMNS, RewindStudy
from tl_asymmetry.rewinding.units import (
    Unit,
    matched_order,
    moved,
    nearest_in_norm,
    same_parameters,
    units_of,
)
from tl_asymmetry.store import Parts, open_store

KIND = "rewind study"
_OUTCOMES = ("kl", "ce", "shift")
_NOTHING = dict.fromkeys(_OUTCOMES, 0.0)
_UNITS_AT_A_TIME = 64


@checked
@with_fresh_settings
def rewind_study(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    matrices: Sequence[str] | str | None = None,
    steps: int = 10,
    orders: int = 10,
    matched: int = 5,
    shares: Sequence[float | int] = (0.0, 0.25, 0.5, 0.75, 1.0),
    batch_size: int = 8,
    max_tokens: int | None = None,
    names: Sequence[str] | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RewindStudy:
    """How much of a pair's alignment is undone when heads of the aligned model are set back to the base.

    Each head is set back alone; then more and more of them together, in order of what each did alone, of ‖ΔW‖, at
    random, and, in place of each head of the first half of the first order, one of the second half that changed as
    much; then the whole model is moved to the base by degrees. What is undone is 1 − KL(base ‖ edited) /
    KL(base ‖ aligned) of next-token predictions. (Rewinding is named by arXiv 2608.10850; the definitions are ours.)

    The order of importance is found on the texts that its curve is drawn from, so that its lead over random orders is
    no test. Heads are compared with heads that changed as much (`matched_percentile`), which describes and gives no p.

    Args:
        model_base: a HookedTransformer, TransformerBridge or transformers model with raw weights, or its folder or name
            on the Hub.
        model_aligned: the same.
        texts: strings or chats on which predictions are compared; the package's calibration texts without texts and
            tokens.
        tokens, mask: token ids instead of texts, and which of them count.
        matrices: what is set back; default W_Q, W_K, W_V, W_O. A head's matrices go together; under grouped-query
            attention a key-value head's W_K and W_V are a unit of their own, matrices of an MLP one for each layer.
        steps: points of each curve.
        orders: random orders.
        matched: how many heads nearest in ‖ΔW‖ each is held against.
        shares: how far the whole model is moved to the base; needs memory for a copy of its parameters.
        batch_size: sequences per pass.
        max_tokens: use no more tokens of the texts than this.
        names: what to call the two models, such as `("base", "dpo")`; by default what they call themselves.
        store: a folder in which finished parts are kept; a study with the same settings goes on from there.
        seed: of the random orders.
        progress: show progress bars.

    Returns:
        A frozen `RewindStudy`.

    Raises:
        ValueError: models that cannot be compared, matrices or shares that do not exist, too little memory, a store of
            another study: before anything heavy runs.

    Example:
        >>> from tl_asymmetry.demo import demo_texts
        >>> study = rewind_study(
        ...     base, aligned, demo_texts(4, seed=1), steps=2, orders=2, shares=(0, 1), progress=False
        ... )
        >>> study.path["shift"].tolist()
        [0.0, 1.0]
    """
    arguments = described(
        texts=texts, tokens=tokens, mask=mask, matrices=matrices, steps=steps, orders=orders, matched=matched,
        shares=list(shares), batch_size=batch_size, max_tokens=max_tokens, names=names, store=store, seed=seed,
        progress=progress,
    )  # fmt: skip
    for name, value in (("steps", steps), ("orders", orders), ("matched", matched)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}; pass e.g. {name}=10")
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"expected shares from 0 to 1, got {list(shares)}; pass e.g. shares=(0, 0.5, 1)")
    named, base, notes = pair_names(names), ModelView(model_base), Notes()
    names = list(chosen_matrices(base, _attention(base) if matrices is None else matrices))
    sequences = token_sequences(base, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
    sequences = predictable(sequences, notes)
    aligned = ModelView(model_aligned, like=base)
    hashes = check_models(base, aligned, sequences, notes)
    outputs = common_outputs(base, aligned)
    evaluated = evaluation_batches(sequences, None, batch_size)
    whole = any([whole_passes(view, sequences, range(view.n_layers), notes) for view in (base, aligned)])
    check_memory(base, evaluated, outputs, whole=whole)
    units = units_of(base, aligned, names)
    if base.irregular:
        listed = ", ".join(base.irregular)
        notes.add(f"{listed}, which not every layer has in one shape or which read a latent, are not set back")
    if base.n_kv_heads < base.n_heads:
        notes.add("keys and values of a key-value head serve several heads and are set back apart from their queries")
    config = {
        "arguments": arguments,
        "versions": versions(),
        "models": pair_record(base, aligned, hashes, named),
        "shape": shape_record(base),
        "matrices": list(names),
        "tokens": sum(map(len, sequences)),
        "sequences": len(sequences),
        "units": len(units),
    }
    data = described(texts=torch.cat(sequences), lengths=[len(sequence) for sequence in sequences])
    settings = {"matrices": list(names), "weights": hashes, **data}
    about = {"versions": versions(), "models": config["models"]}
    with open_store(store, KIND, settings, about) as kept:
        study = _Study(base, aligned, evaluated, outputs, whole, kept)
        single = study.singles(units, progress=progress)
        table = _unit_table(units, single, matched)
        ranked = [units[i] for i in table["shift"].fillna(0).argsort(kind="stable")[::-1]]
        curve = study.curves(_orders(units, ranked, orders, seed), steps, progress=progress)
        path = _path(study, shares, notes, progress=progress)
        baseline = study.baseline()
    return RewindStudy(
        table=table,
        curve=curve,
        path=path,
        config={**config, "baseline": baseline},
        notes=tuple(notes.lines),
        arrays={},
    )


@dataclass
class _Study:
    """What is measured of the aligned model with parts of it set back."""

    base: ModelView
    aligned: ModelView
    evaluated: Sequence[EvaluationBatch]
    outputs: int
    whole: bool
    store: Parts

    def singles(self, units: Sequence[Unit], *, progress: bool) -> list[dict[str, float]]:
        """Outcomes of each unit set back alone."""
        todo = [unit for unit in units if unit.norm > 0 and f"unit-{unit.name}" not in self.store]
        with self._bar(len(todo), "heads alone", progress) as bar:
            for start in range(0, len(todo), _UNITS_AT_A_TIME):
                some = todo[start : start + _UNITS_AT_A_TIME]
                for unit, found in zip(some, self._outcomes([[unit] for unit in some], bar), strict=True):
                    self.store.put(f"unit-{unit.name}", {}, found)
        # Where nothing changed there is nothing to set back: exactly, whatever rounding two runs would differ by.
        return [self.store.entry(f"unit-{unit.name}") if unit.norm > 0 else dict(_NOTHING) for unit in units]

    def curves(self, orders: Mapping[tuple[str, int], Sequence[Unit]], steps: int, *, progress: bool) -> pd.DataFrame:
        """Outcomes of the first of each order's units set back together."""
        total = len(next(iter(orders.values())))
        energy = sum(unit.norm**2 for unit in next(iter(orders.values())))
        counts = sorted({round(i * total / steps) for i in range(1, steps + 1)} - {0})
        rows = []
        with self._bar(sum(n <= len(o) for o in orders.values() for n in counts), "heads together", progress) as bar:
            for (order, draw), units in orders.items():
                reached = [n for n in counts if n <= len(units)]
                part = "curve-" + _digest(order, draw, units, reached)
                if part not in self.store:
                    found = self._outcomes([units[:n] for n in reached], bar)
                    self.store.put(part, {}, {"outcomes": found})
                for n, outcomes in zip([0, *reached], [_NOTHING, *self.store.entry(part)["outcomes"]], strict=True):
                    changed = sum(unit.norm**2 for unit in units[:n]) / energy if energy else math.nan
                    at = {"order": order, "draw": draw, "count": n, "share": n / total, "delta_share": changed}
                    rows.append({**at, **{name: _number(outcomes[name]) for name in _OUTCOMES}})
        return pd.DataFrame(rows, columns=list(CURVE_COLUMNS)).astype({"draw": "int64", "count": "int64"})

    def at_share(self, share: float) -> dict[str, float]:
        """Cross-entropy, and how far from the base, with the whole model moved."""
        part = f"share-{share:.6f}"
        if part not in self.store:
            with moved(self.aligned, self.base, share):
                _, found = measure(self.aligned, self.base, (), self.evaluated, outputs=self.outputs, whole=self.whole)
            entry = {"ce": -found.sums["log_prob"] / found.places, "kl_other": found.sums["kl_other"] / found.places}
            self.store.put(part, {}, {name: _plain(value) for name, value in entry.items()})
        return self.store.entry(part)

    def baseline(self) -> dict[str, float]:
        """The unedited models: cross-entropies and their distance."""
        return self.store.entry("baseline")

    def _outcomes(self, sets: Sequence[Sequence[Unit]], bar: Any) -> list[dict[str, float | None]]:
        trials = [[edit for unit in units for edit in unit.edits(self.base)] for units in sets]
        sums, baseline = measure(
            self.aligned, self.base, trials, self.evaluated, outputs=self.outputs, whole=self.whole, advance=bar.update
        )
        of_all = {"places": baseline.places, "pairs": 0, **baseline.sums}
        if "baseline" not in self.store:
            ce = -baseline.sums["log_prob"] / baseline.places
            entry = {
                "ce_aligned": ce, "ce_base": ce - baseline.sums["gain"] / baseline.places,
                "kl_other": baseline.sums["kl_other"] / baseline.places,
            }  # fmt: skip
            self.store.put("baseline", {}, {name: _plain(value) for name, value in entry.items()})
        found = (outcomes_of(dict(zip(MEASURED, row, strict=True)), of_all) for row in sums.tolist())
        return [{name: _plain(outcomes[name]) for name in _OUTCOMES} for outcomes in found]

    def _bar(self, trials: int, what: str, progress: bool) -> Any:
        return tqdm(total=trials * len(self.evaluated), desc=what, unit="pass", disable=not progress)


def _attention(view: ModelView) -> list[str] | None:
    """Matrices of attention that every layer has; None where there is none."""
    return [name for name in view.matrices if name in ATTENTION] or None


def _orders(units: Sequence[Unit], ranked: Sequence[Unit], random: int, seed: int) -> dict[tuple[str, int], list[Unit]]:
    """Units in every order, the first complete; each draw of the random ones with its number."""
    orders = {("importance", 0): list(ranked), ("norm", 0): sorted(units, key=lambda unit: -unit.norm)}
    for draw in range(random):
        generator = seeded(seed, "rewinding", draw)
        orders["random", draw] = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
    matched = matched_order(ranked)
    if matched:
        orders["matched", 0] = matched
    return orders


def _unit_table(units: Sequence[Unit], single: Sequence[Mapping[str, float]], matched: int) -> pd.DataFrame:
    shift = {unit: _number(found["shift"]) for unit, found in zip(units, single, strict=True)}
    rows = []
    for unit, found in zip(units, single, strict=True):
        near = [shift[other] for other in nearest_in_norm(unit, units, matched)] if unit.norm else []
        known = bool(near) and not math.isnan(shift[unit])
        below = sum((other < shift[unit]) + 0.5 * (other == shift[unit]) for other in near)
        rows.append(
            {
                "layer": unit.layer, "head": unit.head, "part": unit.part, "matrices": " ".join(unit.matrices),
                "delta_norm": unit.norm, **{name: _number(found[name]) for name in _OUTCOMES},
                "matched_mean": sum(near) / len(near) if known else math.nan,
                "matched_percentile": 100 * below / len(near) if known else math.nan, "matched": len(near),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(UNIT_COLUMNS)).astype({"layer": "int64", "head": "Int64"})


def _path(study: _Study, shares: Sequence[float | int], notes: Notes, *, progress: bool) -> pd.DataFrame:
    """The whole model moved to the base by degrees; cross-entropy beside the straight line between its ends."""
    if not shares or not same_parameters(study.base, study.aligned):
        if shares:
            notes.add("the models' parameters have other names or shapes (two kinds of model), so none is moved whole")
        return pd.DataFrame(columns=list(PATH_COLUMNS)).astype("float64")
    wanted = sorted({0.0, 1.0, *map(float, shares)})
    found = {share: study.at_share(share) for share in tqdm(wanted, desc="whole model", disable=not progress)}
    first, last, apart = found[0.0]["ce"], found[1.0]["ce"], found[0.0]["kl_other"]
    rows = []
    for share in wanted:
        ce, straight = _number(found[share]["ce"]), (1 - share) * _number(first) + share * _number(last)
        shift = 1 - found[share]["kl_other"] / apart if apart > 0 else math.nan
        rows.append({"share": share, "shift": shift, "ce": ce, "ce_straight": straight, "barrier": ce - straight})
    return pd.DataFrame(rows, columns=list(PATH_COLUMNS))


def _digest(order: str, draw: int, units: Sequence[Unit], counts: Sequence[int]) -> str:
    """A part's name: an order found on other texts or drawn by another seed is another part."""
    listed = " ".join(unit.name for unit in units) + str(list(counts))
    return f"{order}-{draw}-{seeded(listed).initial_seed():016x}"


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
