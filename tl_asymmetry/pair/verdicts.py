"""From p-values to verdicts: one hierarchy for each null, side and shown rank, and what its q's say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.hierarchy import Tree, hierarchy
from tl_asymmetry.names import SIGNIFICANT

Family = tuple[str, str]
"""A matrix and a subspace."""
Question = tuple[str, str]
"""A null and a side of it, "above" or "below"."""

TEST_COLUMNS = {
    "level": '"family" (a matrix, subspace and rank) or "layer" (of a family)',
    "matrix": "W_Q … W_out",
    "subspace": "the subspace it is held against",
    "rank": "k",
    "layer": "layer; NA for a family",
    "null": "isotropic, the optimizer whose reference is tested, or weighted",
    "side": '"above" (more concentrated than the null) or "below"',
    "p": "family: Simes over layers; layer: heads pooled or Simes over heads, the smaller one doubled",
    "q": "at most 0.05: found, at a false-discovery rate of 5 % over families and, on average, inside those found",
    "heads": "heads found in it",
    "tested": "heads tested in it",
    "fraction": "layer: share of ΔW in the subspace, of its heads or experts together as one delta; family: NaN",
    "relative": "fraction · d/k",
}
"""Columns of `PairAnalysis.tests`, in this order, and what they mean."""

VERDICTS = {
    "beyond": "above chance and above what training gives on these inputs",
    "as trained": "above chance, not told apart from what training gives on these inputs",
    "less than trained": "above chance, below what training gives on these inputs",
    "more than its inputs give": "above what training gives on these inputs, not above chance",
    "concentrated": "above chance; nothing is known of what training gives here",
    "depleted": "below chance",
    "no evidence": "not told apart from chance",
    "unchanged": "the delta is zero",
    "not measurable": "the delta's spectrum is flat, or there is no test",
}
"""What the column `verdict` can say, and what is meant."""


@dataclass(frozen=True)
class Evidence:
    """p of every head of one matrix, subspace and rank for one question."""

    heads: Float[np.ndarray, "layer head"]
    """Of each head."""
    pooled: Float[np.ndarray, " layer"]
    """Of each layer's heads as one delta; NaN where there is one head."""


@dataclass(frozen=True)
class Tested:
    """One matrix, subspace and rank: its evidence as it is, and without what weight decay explains."""

    family: Family
    """Matrix and subspace."""
    rank: int
    """k."""
    evidence: Mapping[Question, Evidence]
    """Of ΔW."""
    unshrunk: Mapping[Question, Evidence]
    """Of ΔW − sW."""
    pooled: Float[np.ndarray, " layer"]
    """Fraction of each layer's heads as one delta."""
    chance: float
    """k/d, the fraction of an isotropic delta."""


@dataclass(frozen=True)
class Judged:
    """What the hierarchies say of one matrix, subspace and rank; arrays of layers × heads."""

    q: Mapping[Question, Float[np.ndarray, "layer head"]]
    """Of ΔW."""
    versus: Mapping[str, np.ndarray]
    """By null: "above", "below", "not told apart", or "" without a test."""
    decay: np.ndarray
    """Where something is found in ΔW that is not there without weight decay."""


def judge(tested: Sequence[Tested]) -> tuple[list[Judged], list[dict[str, object]]]:
    """Run every hierarchy: one for each null, side and rank, over all families of that rank.

    Returns:
        What is found of each, in the order given, and rows for `tests_table`.
    """
    verdicts: dict[int, dict[Question, tuple[Tree[Family], Tree[Family]]]] = {}
    for rank in dict.fromkeys(one.rank for one in tested):
        here = [one for one in tested if one.rank == rank]
        questions = dict.fromkeys(question for one in here for question in one.evidence)
        verdicts[rank] = {
            question: (_tree(here, question), _tree(here, question, unshrunk=True)) for question in questions
        }
    judged = [_judged(one, verdicts[one.rank]) for one in tested]
    pooled = {(one.family, one.rank): (one.pooled, one.chance) for one in tested}
    rows = [
        row
        for rank, trees in verdicts.items()
        for (null, side), (tree, _) in trees.items()
        for row in _rows(tree, rank, null, side, pooled)
    ]
    return judged, rows


def tests_table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """`PairAnalysis.tests`, from what `judge` says of one run of layers or more."""
    types = {"layer": "Int64", "rank": "int64", "heads": "int64", "tested": "int64"}
    return pd.DataFrame({
        name: pd.Series([row[name] for row in rows], dtype=types.get(name)) for name in TEST_COLUMNS
    })  # fmt: skip


def joined(runs: Sequence[Judged]) -> Judged:
    """What is found in several runs of layers, one after the other."""
    first = runs[0]
    return Judged(
        {question: np.concatenate([run.q[question] for run in runs]) for question in first.q},
        {null: np.concatenate([run.versus[null] for run in runs]) for null in first.versus},
        np.concatenate([run.decay for run in runs]),
    )


def verdict(chance: np.ndarray, reference: np.ndarray, *, changed: np.ndarray, measurable: np.ndarray) -> np.ndarray:
    """One of `VERDICTS` for each row.

    Args:
        chance: `vs_chance`.
        reference: `vs_reference`.
        changed: whether the delta is not zero.
        measurable: whether it has a fraction and a test.
    """
    above, over = chance == "above", reference == "above"
    conditions = {
        "unchanged": ~changed,
        "not measurable": ~measurable,
        "beyond": above & over,
        "less than trained": above & (reference == "below"),
        "concentrated": above & (reference == ""),
        "as trained": above,
        "more than its inputs give": over,
        "depleted": chance == "below",
    }
    return np.select(list(conditions.values()), list(conditions), "no evidence").astype(object)


def _tree(tested: Sequence[Tested], question: Question, *, unshrunk: bool = False) -> Tree[Family]:
    evidence = {one.family: one.unshrunk if unshrunk else one.evidence for one in tested}
    asked = {family: of[question] for family, of in evidence.items() if question in of}
    return hierarchy({f: e.heads for f, e in asked.items()}, {f: e.pooled for f, e in asked.items()})


def _judged(one: Tested, trees: Mapping[Question, tuple[Tree[Family], Tree[Family]]]) -> Judged:
    q = {question: trees[question][0].head_q[one.family] for question in one.evidence}
    without = {question: trees[question][1].head_q[one.family] for question in one.evidence}
    versus = {}
    decay = np.zeros(next(iter(q.values())).shape, dtype=bool)
    for null in dict.fromkeys(null for null, _ in one.evidence):
        found = {side: q[null, side] <= SIGNIFICANT for side in ("above", "below")}
        holds = {side: found[side] & (without[null, side] <= SIGNIFICANT) for side in found}
        decay |= (found["above"] ^ holds["above"]) | (found["below"] ^ holds["below"])
        tested = np.isfinite(q[null, "above"])
        versus[null] = np.select(
            [~tested, holds["above"], holds["below"]], ["", "above", "below"], "not told apart"
        ).astype(object)
    return Judged(q, versus, decay)


def _rows(
    tree: Tree[Family],
    rank: int,
    null: str,
    side: str,
    pooled: Mapping[tuple[Family, int], tuple[Float[np.ndarray, " layer"], float]],
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for (matrix, subspace), q in tree.head_q.items():
        if not np.isfinite(q).any():
            continue
        shared = {"matrix": matrix, "subspace": subspace, "rank": rank, "null": null, "side": side}
        family = matrix, subspace
        fraction, chance = pooled[family, rank]
        found, tested = q <= SIGNIFICANT, np.isfinite(q)
        rows.append(
            {"level": "family", **shared, "layer": pd.NA, "p": tree.family_p[family], "q": tree.family_q[family],
             "heads": int(found.sum()), "tested": int(tested.sum()), "fraction": np.nan, "relative": np.nan}
        )  # fmt: skip
        rows += [
            {"level": "layer", **shared, "layer": layer, "p": tree.layer_p[family][layer],
             "q": tree.layer_q[family][layer], "heads": int(found[layer].sum()), "tested": int(tested[layer].sum()),
             "fraction": fraction[layer], "relative": fraction[layer] / chance}
            for layer in range(len(q))
            if tested[layer].any()
        ]  # fmt: skip
    return rows
