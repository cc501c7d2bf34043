"""Rank-1 interventions on a pair: what one direction of one head does, against controls equal in all but direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.memory import free_memory
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.gradients.analysis import data_fingerprint
from tl_asymmetry.interventions.planner import (
    Cell,
    Directions,
    EditPlanner,
    EditSite,
    check_choices,
    chosen_sites,
    given_directions,
    study_moments,
)
from tl_asymmetry.interventions.result import RankOneStudy
from tl_asymmetry.interventions.runs import (
    MEASURED,
    Baseline,
    EvaluationBatch,
    evaluation_batches,
    measure,
    memory_needed,
)
from tl_asymmetry.interventions.tables import OUTCOMES, baseline_row, edit_table, outcomes_of, study_table
from tl_asymmetry.models.checks import check_finite, check_pair, check_raw
from tl_asymmetry.models.resume import resumes
from tl_asymmetry.models.strangers import warn_of_strangers
from tl_asymmetry.models.texts import check_tokens, token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import SIGNIFICANT, Place, PlaceLike, kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.results.provenance import described, pair_names, pair_record, shape_record, versions, weights_hash
from tl_asymmetry.store import Parts, open_store
from tl_asymmetry.training.batches import PreferenceBatch
from tl_asymmetry.training.data import as_batches, rebatched

KIND = "rank-one study"
_CHECK_TOKENS = 16
_EDITS_AT_A_TIME = 512
_BYTES_AT_A_TIME = 1 << 27
_DEGENERATE = 0.5


@checked
@with_fresh_settings
def rank_one_study(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    preferences: Any = None,
    sites: PlaceLike | Sequence[PlaceLike] | None = None,
    matrices: Sequence[str] | None = None,
    directions: Directions = ("delta",),
    n_directions: int = 1,
    interventions: Sequence[str] = ("removal",),
    controls: Sequence[str] = ("undo_matched", "random"),
    draws: int = 20,
    scales: Sequence[float | int] = (1.0,),
    outcomes: Sequence[str] | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    max_tokens: int | None = None,
    names: Sequence[str] | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RankOneStudy:
    """Which directions of which heads carry the alignment of a pair, by taking them out or putting them in one by one.

    For every site (a head's matrix) and direction q of the residual stream the part of ΔW = W_aligned − W_base along q
    is removed from the aligned model, or inserted into the base, in place; the effect on predictions is held against
    those of control edits that keep all but the direction (`matched_controls`). What lies below the edited block is
    computed once for all edits of it. The intervention is named by arXiv 2605.16600; its definitions here are ours,
    since the paper's are not public.

    An effect above the controls says that this direction matters more than others the edit could have taken, for what
    training changed here. That it was alignment and no other training which uses such directions, only a pair made by
    other training can tell: study that too.

    Args:
        model_base: a HookedTransformer, TransformerBridge or transformers model with raw weights, or its folder or name
            on the Hub.
        model_aligned: the same.
        texts: strings or lists of chat messages on which predictions are compared; without texts and tokens the
            package's calibration texts.
        tokens: token ids instead of texts: `[batch, pos]`, or a list of sequences.
        mask: which tokens are real, of the shape of `tokens`: False at padding.
        preferences: chosen and rejected continuations, for the preference margin: a `PreferenceBatch`, or rows with the
            columns prompt, chosen, rejected, such as a Hugging Face dataset: see `training.data.as_batches`.
        sites: places such as "L7H3.W_Q", "L7.W_in" or `(layer, matrix, head)`, one or a list; all heads of W_Q, W_K,
            W_V, W_O by default.
        matrices: all heads of these matrices instead.
        directions: names out of "delta" (top singular directions of that head's ΔW on the residual axis), "activation"
            (top eigenvectors of the second moment of the matrix's own input; for W_O and W_out of the stream it writes
            into; of the base), "prediction" (top prediction directions of the base), or a mapping from names to
            columns `[d_model, n]`, one for all layers or one for each.
        n_directions: how many of each kind.
        interventions: "removal" from the aligned model, "insertion" into the base, or both.
        controls: kinds of `matched_controls`. A p comes from "undo_matched" alone: the others undo nothing, so that a
            rank among them describes and tests nothing.
        draws: controls of each kind; there are never more of "permuted_heads" than other heads.
        scales: doses of the edit itself; 1 is always done, and is what the controls are given.
        outcomes: names out of "kl", "ce", "shift", "margin", "margin_shift" (see `RankOneStudy.table`); all by
            default, those of the margin with preferences only, "ce" only where the models can predict the tokens.
        exclude_first: leave the first position of each sequence out of the moments that directions and controls are
            made from. Predictions are compared at every position.
        batch_size: sequences per pass. Of each edit the stream after the last block is kept and predictions are made
            in pieces, so that some 0.4 GB are held beside the models and a pass, whatever the vocabulary.
        max_tokens: use no more tokens of the texts than this.
        names: what to call the two models, such as `("base", "dpo")`; by default what they call themselves.
        store: a folder in which every finished site is kept at once; a study with the same settings goes on from there.
        seed: of the controls.
        progress: show progress bars.

    Returns:
        A frozen `RankOneStudy`.

    Raises:
        ValueError: models that cannot be compared, a site, direction, control or outcome that does not exist, cross-
            entropy of tokens that the models cannot predict, too little memory, a store of another study: before
            anything heavy runs, saying what to pass instead.

    Example:
        >>> from tl_asymmetry.demo import demo_texts
        >>> study = rank_one_study(
        ...     base, aligned, demo_texts(4, seed=1), sites=[(2, "W_O", 1), (3, "W_O", 0)], draws=3, progress=False
        ... )
        >>> study.top(1)["matrix"].item(), bool((study.table["effect"] != 0).all())
        ('W_O', True)
    """
    arguments = described(
        texts=texts, tokens=tokens, mask=mask, preferences=preferences, sites=sites, matrices=matrices,
        directions=directions, n_directions=n_directions, interventions=interventions, controls=controls, draws=draws,
        scales=scales, outcomes=outcomes, exclude_first=exclude_first, batch_size=batch_size, max_tokens=max_tokens,
        names=names, store=store, seed=seed, progress=progress,
    )  # fmt: skip
    named, base, notes = pair_names(names), ModelView(model_base), Notes()
    check_choices(controls, interventions, scales, draws)
    placed = chosen_sites(base, sites, matrices)
    given = given_directions(directions, base, n_directions)
    pairs = _preference_pairs(base, preferences, notes)
    sequences = token_sequences(base, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
    sequences = predictable(sequences, notes)
    for half in () if pairs is None else (pairs.chosen, pairs.rejected):
        check_tokens(base, half.tokens)
    aligned = ModelView(model_aligned, like=base)
    outputs = common_outputs(base, aligned)
    wanted = chosen_outcomes(outcomes, pairs, sequences, outputs, notes)
    hashes = check_models(base, aligned, sequences, notes)
    evaluated = evaluation_batches(sequences, pairs, batch_size)
    layers = sorted({layer for layer, _, _ in placed})
    whole = any([whole_passes(view, sequences, layers, notes) for view in (base, aligned)])
    check_memory(base, evaluated, outputs, whole=whole)
    config = {
        "arguments": arguments,
        "versions": versions(),
        "models": pair_record(base, aligned, hashes, named),
        "shape": shape_record(base),
        "outcomes": list(wanted),
        "directions": list(directions),
        "tokens": sum(map(len, sequences)),
        "sequences": len(sequences),
        "sites": len(placed),
        "preferences_xxh3": None if pairs is None else data_fingerprint([pairs]),
    }
    asked = {**arguments, **described(directions=given or list(directions))}
    about = {"versions": versions(), "models": config["models"]}
    _describe(placed, controls, base, notes)
    rows: list[dict[str, Any]] = []
    baselines: list[dict[str, Any]] = []
    with open_store(store, KIND, _settings(asked, hashes, sequences, pairs), about) as kept:
        moments = study_moments(
            base, sequences, placed, directions, controls,
            exclude_first=exclude_first, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        maker = EditPlanner(
            base, aligned, moments, directions, n_directions=n_directions, controls=controls, draws=draws, seed=seed
        )
        doses = tuple(sorted({1.0, *map(float, scales)}))
        for intervention in interventions:
            view, other = (aligned, base) if intervention == "removal" else (base, aligned)
            study = _Study(view, other, maker, evaluated, outputs, doses, intervention, kept, whole)
            found, baseline = study.run(placed, progress=progress)
            rows += found
            baselines.append(baseline_row(intervention, {"base": base.name, "aligned": aligned.name}, baseline))
    edits = edit_table(rows)
    table, lacking = study_table(edits, wanted)
    if lacking:
        notes.warn(
            f"q is NaN: with {draws} draws p cannot get below {1 / (draws + 1):.3g}, too much for {len(placed)} sites "
            f"at {SIGNIFICANT}; pass draws={lacking}, or fewer sites, for q"
        )
    note_controls(edits, notes)
    return RankOneStudy.assemble(table, edits, baselines, config, notes.lines)


@dataclass
class _Study:
    """One intervention on one model."""

    view: ModelView
    other: ModelView
    maker: EditPlanner
    evaluated: Sequence[EvaluationBatch]
    outputs: int
    doses: tuple[float, ...]
    intervention: str
    store: Parts
    whole: bool

    def run(self, sites: Sequence[EditSite], *, progress: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of single edits in the order of sites, and sums of the unedited models."""
        records = {site: self.store.entry(part) for site in sites if (part := self._part(site)) in self.store}
        todo = [site for site in sites if site not in records]
        passes = len(self.evaluated) * sum(self._edits(site) for site in todo)
        with tqdm(total=passes, desc=self.intervention, unit="pass", disable=not progress) as bar:
            for group in self._groups(todo):
                before = bar.n
                planned = [(site, list(self._planned(site))) for site in group]
                edits = [entry["edit"] for _, entries in planned for entry in entries if entry["edit"] is not None]
                sums, baseline = measure(
                    self.view, self.other, edits, self.evaluated, outputs=self.outputs, whole=self.whole,
                    advance=bar.update,
                )  # fmt: skip
                unedited = _baseline_sums(baseline)
                measured = iter(sums.tolist())
                for site, entries in planned:
                    effects = [self._effects(entry, measured, unedited) for entry in entries]
                    records[site] = {"rows": effects, "baseline": unedited}
                    self.store.put(self._part(site), {}, records[site])
                # Sites without a delta need no pass.
                bar.update(before + len(self.evaluated) * sum(map(self._edits, group)) - bar.n)
        rows = [row for site in sites for row in records[site]["rows"]]
        return rows, records[sites[0]]["baseline"]

    def _part(self, site: EditSite) -> str:
        return f"{self.intervention}-{Place(*site)}"

    def _edits(self, site: EditSite) -> int:
        """How many edits a site has where its delta is not zero."""
        controls = sum(self.maker.draws(kind, site[1]) for kind in self.maker.kinds)
        return (controls + len(self.doses)) * self.maker.directions_at_a_site

    def _groups(self, sites: Sequence[EditSite]) -> Iterator[list[EditSite]]:
        """Sites together in one sweep over the texts: many, so that the unedited models run seldom."""
        group: list[EditSite] = []
        edits = size = 0
        for site in sites:
            layer, matrix, _ = site
            count = self._edits(site)
            rows, columns = self.view.weight(layer, matrix).shape[-2:]
            matrices = self.maker.draws("undo_matched", matrix) if "undo_matched" in self.maker.kinds else 0
            # A control that is a subspace is a whole matrix.
            needed = 8 * (count * (rows + columns) + matrices * self.maker.directions_at_a_site * rows * columns)
            if group and (edits + count > _EDITS_AT_A_TIME or size + needed > _BYTES_AT_A_TIME):
                yield group
                group, edits, size = [], 0, 0
            group.append(site)
            edits, size = edits + count, size + needed
        if group:
            yield group

    def _planned(self, site: EditSite) -> Iterator[dict[str, Any]]:
        """Every edit of a site with its part of the row; `edit` None where there is nothing to change."""
        for cell in self.maker.cells(site, self.intervention):
            target = {"control": "target", "draw": None, "norm_ratio": 1.0, "norm_matched": True, "overlap": math.nan}
            for dose in self.doses:
                edit = None if cell.target is None else cell.target.scaled(dose)
                yield {"edit": edit, "row": {**_identity(cell), **target, "dose": dose}}
            if cell.target is None:
                for kind, draws in cell.draws.items():
                    for draw in range(draws):
                        row = {**target, "control": kind, "draw": draw, "dose": 1.0}
                        yield {"edit": None, "row": {**_identity(cell), **row}}
            counted: dict[str, int] = {}
            for control in cell.controls:
                draw = counted[control.kind] = counted.get(control.kind, -1) + 1
                row = {
                    "control": control.kind, "draw": draw, "dose": 1.0, "norm_ratio": control.norm_ratio,
                    "norm_matched": control.norm_matched, "overlap": control.overlap,
                }  # fmt: skip
                yield {"edit": control.edit, "row": {**_identity(cell), **row}}

    def _effects(
        self, entry: Mapping[str, Any], measured: Iterator[list[float]], baseline: Mapping[str, Any]
    ) -> dict[str, Any]:
        edit = entry["edit"]
        # No change of weights is no change of anything: exactly, whatever rounding two runs would differ by.
        nothing = {"kl": 0.0, "gain": 0.0, "kl_other": baseline["kl_other"], "margin": 0.0}
        sums = nothing if edit is None else dict(zip(MEASURED, next(measured), strict=True))
        return {**entry["row"], "norm": 0.0 if edit is None else edit.norm, **outcomes_of(sums, baseline)}


def _identity(cell: Cell) -> dict[str, Any]:
    layer, matrix, head = cell.site
    return {
        "layer": layer, "head": head, "matrix": matrix, "pathway": kind_of(matrix).side,
        "intervention": cell.intervention, "direction": cell.direction, "index": cell.index,
        "delta_share": cell.delta_share,
    }  # fmt: skip


def _baseline_sums(baseline: Baseline) -> dict[str, Any]:
    return {"places": baseline.places, "pairs": baseline.pairs, **baseline.sums}


# --- before anything runs ---------------------------------------------------------------------------------------


def _preference_pairs(view: ModelView, preferences: Any, notes: Notes) -> PreferenceBatch | None:
    """All pairs as one batch, whatever holds them."""
    if preferences is None or isinstance(preferences, PreferenceBatch):
        return preferences
    read = as_batches(view, preferences, PreferenceBatch, note=notes.add, warn=notes.warn)
    (whole,) = rebatched(read, sum(map(len, read)))
    assert isinstance(whole, PreferenceBatch)
    return whole


def common_outputs(base: ModelView, aligned: ModelView) -> int:
    """How many tokens both models predict: an aligned vocabulary may have more."""
    return min(view.unembedding()[0].shape[1] for view in (base, aligned))


def chosen_outcomes(
    outcomes: Sequence[str] | None,
    preferences: PreferenceBatch | None,
    sequences: Sequence[Tensor],
    outputs: int,
    notes: Notes,
) -> tuple[str, ...]:
    """Outcomes in their own order, without those that cannot be measured.

    Raises:
        ValueError: one that is unknown, of a margin without preferences, or of tokens that the models cannot predict.
    """
    halves = () if preferences is None else (preferences.chosen.tokens, preferences.rejected.tokens)
    largest = [max(int(tokens.max()) for tokens in some) for some in (sequences, halves) if len(some)]
    needs = {"ce": largest[:1], "margin": largest[1:], "margin_shift": largest[1:]}
    beyond = {name: of[0] for name, of in needs.items() if of and of[0] >= outputs}
    available = [name for name in OUTCOMES if preferences is not None or not name.startswith("margin")]
    if outcomes is not None and not isinstance(outcomes, Sequence):
        raise ValueError(f"expected outcomes among {', '.join(available)}, got {shown(outcomes)}; pass a list of those")
    asked = available if outcomes is None else outcomes
    unknown = [name for name in asked if name not in available]
    if isinstance(outcomes, str) or unknown or not asked:
        margins = "" if preferences is not None else " (those of the margin need preferences=)"
        raise ValueError(
            f"expected outcomes among {', '.join(available)}{margins}, got {outcomes!r}; pass a list of those"
        )
    impossible = [name for name in asked if name in beyond]
    if impossible:
        why = (
            f"tokens up to {beyond[impossible[0]]} as targets of {' and '.join(impossible)} where the models predict "
            f"the first {outputs}"
        )
        if outcomes is not None:
            raise ValueError(
                f"expected targets that the models can predict, got {why}; pass outcomes that need none: kl, shift"
            )
        notes.add(f"{' and '.join(impossible)} left out: the texts have {why}")
    return tuple(name for name in available if name in asked and name not in beyond)


def check_memory(view: ModelView, evaluated: Sequence[EvaluationBatch], outputs: int, *, whole: bool) -> None:
    """Refuse batches that do not fit.

    Raises:
        ValueError: saying what is needed and what there is.
    """
    needed = max(memory_needed(view, batch, outputs, whole=whole) for batch in evaluated)
    free = free_memory(view.device)
    if free is not None and needed > free:
        raise ValueError(
            f"expected {needed / 1e9:.2g} GB of free memory on {view.device} for predictions at a time, got "
            f"{free / 1e9:.2g}; pass a smaller batch_size"
        )


def predictable(sequences: Sequence[Tensor], notes: Notes) -> list[Tensor]:
    """Sequences of two tokens or more: a single one predicts nothing that is known."""
    kept = [sequence for sequence in sequences if len(sequence) > 1]
    if not kept:
        raise ValueError("expected sequences of two tokens or more, got none; pass longer texts")
    if len(kept) < len(sequences):
        notes.warn(f"{len(sequences) - len(kept)} sequences of a single token were left out: nothing follows it")
    return kept


def check_models(base: ModelView, aligned: ModelView, sequences: Sequence[Tensor], notes: Notes) -> dict[str, str]:
    for warning in check_pair(base, aligned):
        notes.warn(warning)
    if not base.causal:
        raise ValueError("expected a causal language model, got one that sees the tokens it predicts; pass another")
    for view, role in ((base, "base model"), (aligned, "aligned model")):
        check_finite(view, role)
        for warning in check_raw(view):
            notes.warn(warning)
        view.self_check(sequences[0][:_CHECK_TOKENS].unsqueeze(0))
        if view.dtype.itemsize < 4:
            notes.warn(
                f"the {role}'s weights are {view.dtype}: edits are rounded to their spacing, so that small ones change "
                "less than they say; load it in float32 for exact doses"
            )
    for note in base.notes:
        notes.add(note)
    hashes = {"base": weights_hash(base), "aligned": weights_hash(aligned)}
    if hashes["base"] == hashes["aligned"]:
        notes.warn("the two models are identical, weight for weight: there is nothing to remove or insert")
    warn_of_strangers(base, aligned, notes)
    return hashes


def whole_passes(view: ModelView, sequences: Sequence[Tensor], layers: Sequence[int], notes: Notes) -> bool:
    """Whether every edit needs a pass of the whole model, because running on from a block gives something else."""
    fine, why = resumes(view, sequences[0][:_CHECK_TOKENS].unsqueeze(0), layers)
    if not fine:
        notes.warn(
            f"{view.name} cannot be resumed above an edited block ({why}): every edit runs the whole model, which is "
            "slower and as exact"
        )
    return not fine


def _settings(
    arguments: Mapping[str, Any],
    hashes: Mapping[str, str],
    sequences: Sequence[Tensor],
    preferences: PreferenceBatch | None,
) -> dict[str, Any]:
    """All that the numbers of one site depend on."""
    names = ("directions", "n_directions", "controls", "draws", "scales", "exclude_first", "seed")
    halves = () if preferences is None else (preferences.chosen, preferences.rejected)
    preferred = [part for half in halves for part in (half.tokens, half.mask)]
    data = described(texts=torch.cat(list(sequences)), lengths=[len(s) for s in sequences], preferences=preferred)
    return {**{name: arguments[name] for name in names}, **data, "weights": dict(hashes)}


def _describe(sites: Sequence[EditSite], controls: Sequence[str], view: ModelView, notes: Notes) -> None:
    if "permuted_heads" in controls and any(view.heads(matrix) in (None, 1) for _, matrix, _ in sites):
        notes.add("matrices without other heads have no permuted_heads controls")
    if view.n_kv_heads < view.n_heads and any(kind_of(matrix).heads == "kv" for _, matrix, _ in sites):
        notes.add("heads of W_K and W_V are key-value heads, each of which serves several query heads")


def note_controls(edits: Any, notes: Notes) -> None:
    controls = edits[(edits["control"] != "target") & (edits["norm"] > 0)]
    unmatched = controls[~controls["norm_matched"]]
    if len(unmatched):
        cells = len(unmatched.drop_duplicates(["layer", "head", "matrix", "intervention", "direction", "index"]))
        ratios = unmatched["norm_ratio"]
        notes.add(
            f"equal_variance controls of {cells} cells are not norm-matched: no orthogonal direction varies as much "
            f"(or as little), so they were scaled to, by {ratios.min():.2g} to {ratios.max():.2g}"
        )
    if bool((controls["overlap"] > _DEGENERATE).any()):
        notes.add(
            f"some controls are almost one direction (overlap above {_DEGENERATE}): their p says less than their number"
        )
