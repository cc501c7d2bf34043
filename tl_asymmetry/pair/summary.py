"""The main numbers of a pair in words: every count is of tests, over what changed and exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from tl_asymmetry.names import PREDICTION, ROUNDING_DOMINATED, SIGNIFICANT, kind_of
from tl_asymmetry.pair.asymmetry import READ_ONLY
from tl_asymmetry.pair.data import PairData
from tl_asymmetry.results.nulls import NULLS

_NAMED = 6
_ASKED = ("above", "below", "not told apart")


def summary_table(result: PairData) -> pd.DataFrame:
    """One row per matrix and subspace at the shown rank, over the heads that changed: medians, and what tests found."""
    rows = result.table[result.table["rank"] == result.config["shown_rank"]]
    summary = []
    for (matrix, subspace), block in rows.groupby(["matrix", "subspace"], sort=False):
        changed = block[block["delta_norm"] > 0]
        chance, reference = (_counts(changed[column]) for column in ("vs_chance", "vs_reference"))
        summary.append(
            {
                "matrix": matrix,
                "pathway": block["pathway"].iloc[0],
                "subspace": subspace,
                "changed": f"{len(changed)}/{len(block)}",
                "relative": changed["relative"].median(),
                "min": changed["relative"].min(),
                "max": changed["relative"].max(),
                "above chance": _of_tested(chance, "above"),
                "below chance": _of_tested(chance, "below"),
                "expected": (changed["activation_matched"] * changed["relative"] / changed["fraction"]).median(),
                "excess": changed["excess"].median(),
                "above expected": _of_tested(reference, "above"),
                "below expected": _of_tested(reference, "below"),
                "|ΔW|/|W|": changed["delta_relative_norm"].median(),
                "rounding": changed["rounding_share"].median(),
            }
        )
    return pd.DataFrame(summary)


def headline(result: PairData) -> list[str]:
    """Sentences on what the tests found at the shown rank."""
    k = result.config["shown_rank"]
    at_rank = result.table[result.table["rank"] == k]
    changed = at_rank[at_rank["delta_norm"] > 0]
    if changed.empty:
        return ["No matrix differs between the two models: nothing to be located."]
    return [
        *_strangers(result),
        *_where(at_rank),
        *_reading(changed, k, result.config["arguments"]["optimizer"]),
        *_writing(changed, k),
        *_asymmetry(result, k),
        *_warnings(changed),
    ]


def _strangers(result: PairData) -> Iterator[str]:
    if unlike := result.config["unrelated"]:
        yield (
            f"{', '.join(unlike)} point elsewhere than the base's: these are two models, not one before and after "
            "training, and nothing below is about what training changed."
        )


def _where(at_rank: pd.DataFrame) -> Iterator[str]:
    """Where fewer than half of a matrix's heads changed: which ones."""
    places = at_rank.drop_duplicates(["matrix", "layer", "head", "expert"])
    for matrix, block in places.groupby("matrix", sort=False):
        changed = block[block["delta_norm"] > 0]
        if 0 < 2 * len(changed) <= len(block):
            several = [axis for axis in ("head", "expert") if block[axis].notna().any()]
            unit = several[0] if several else "layer"
            named = [_place(row.layer, row.head, row.expert) for row in changed.itertuples()]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            yield (f"{matrix} changed in {len(changed)} of {len(block)} {unit}s: {', '.join(named[:_NAMED])}{more}.")


def _place(layer: Any, head: Any, expert: Any) -> str:
    """As a place is spelled: "L7H3", "L7E12", "L7"."""
    spelled = "" if pd.isna(head) else f"H{head}"
    return f"L{layer}{spelled}" if pd.isna(expert) else f"L{layer}E{expert}"


def _reading(changed: pd.DataFrame, k: int, optimizer: str) -> Iterator[str]:
    own = changed[(changed["pathway"] == "read") & (changed["subspace"] == changed["matrix"].map(_input_of))]
    if own.empty:
        return
    yield (
        f"Reading, in the {k} leading directions of each matrix's own input: {_told(own['vs_chance'])} a random "
        f"subspace holds (median {own['relative'].median():.2f} times chance)."
    )
    if (own["vs_reference"] != "").any():
        yield (
            f"Held against what training gives on these inputs by chance ({NULLS[optimizer].label}): "
            f"{_told(own['vs_reference'])} that gives (median {own['excess'].median():.2f} times it)."
        )


def _writing(changed: pd.DataFrame, k: int) -> Iterator[str]:
    written = changed[(changed["pathway"] == "write") & (changed["subspace"] == PREDICTION)]
    if len(written):
        yield (
            f"Writing, in the {k} leading prediction directions: {_told(written['vs_chance'])} a random subspace holds "
            f"(median {written['relative'].median():.2f} times chance)."
        )


def _asymmetry(result: PairData, k: int) -> Iterator[str]:
    table = result.asymmetry
    whole = table[table["head"].isna() & (table["rank"] == k)]
    whole = whole[whole[["log2_ratio", "log2_expected"]].notna().all(axis=1)]
    if whole.empty:
        return
    ratio, expected = whole["log2_ratio"].mean(), whole["log2_expected"].mean()
    source = (
        "the read side's reference alone gives by chance (for the write side pass gradient=)"
        if (whole["expected_from"] == READ_ONLY).all()
        else "both sides' references give by chance"
    )
    yield (
        f"Asymmetry: mean log2(read / write) over layers is {ratio:+.2f}, of which {expected:+.2f} is what {source}; "
        f"{ratio - expected:+.2f} is left. No test stands behind this number."
    )


def _warnings(changed: pd.DataFrame) -> Iterator[str]:
    places = changed.drop_duplicates(["matrix", "layer", "head"])
    stored = int((places["rounding_share"] >= ROUNDING_DOMINATED).sum())
    if stored:
        yield (
            f"Storage explains half or more of the change in {stored} of {len(places)} heads and matrices: their tests "
            "are weaker, and still tests."
        )
    decayed = changed[changed["flags"].str.contains("decay")].drop_duplicates(["matrix", "layer", "head"])
    if len(decayed):
        yield (
            f"In {len(decayed)} of {len(places)} heads and matrices a finding goes away once weight decay is taken out "
            "of the change: it is counted as not told apart."
        )
    if changed["flags"].str.contains("few_tokens").any():
        yield "There were too few tokens or sequences for the intervals and references to be trusted; use more texts."


def _told(versus: pd.Series) -> str:
    """How many hold more, less, or are not told apart, up to "from what"."""
    counts = _counts(versus)
    tested = sum(counts.values())
    if not tested:
        return "none could be tested against what"
    return (
        f"of {tested} heads and matrices that could be tested {counts['above']} hold more (q < {SIGNIFICANT}), "
        f"{counts['below']} less, and {counts['not told apart']} are not told apart from what"
    )


def _counts(versus: pd.Series) -> dict[str, int]:
    return {answer: int((versus == answer).sum()) for answer in _ASKED}


def _of_tested(counts: dict[str, int], answer: str) -> str:
    tested = sum(counts.values())
    return f"{counts[answer]}/{tested}" if tested else ""


def _input_of(matrix: str) -> str:
    return kind_of(matrix).point
