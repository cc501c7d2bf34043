"""The main numbers of a pair in words: every count is of tests, over what changed and exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tl_asymmetry._lazy import pd
from tl_asymmetry.models.strangers import strangers
from tl_asymmetry.names import EXPERT_INPUT, FOUND, PREDICTION, ROUNDING_DOMINATED, counted, kind_of, reads_latent
from tl_asymmetry.pair.asymmetry import READ_ONLY, READ_SIDE, WRITE_SIDE
from tl_asymmetry.pair.data import PairData
from tl_asymmetry.pair.plan import SEQUENCES, TOKENS_PER_DIMENSION
from tl_asymmetry.results.nulls import ISOTROPIC, NULLS
from tl_asymmetry.results.top import at_rank

_NAMED = 6
_PLACE = ["matrix", "layer", "head", "expert"]
_ASKED = ("above", "below", "not told apart")


def summary_table(result: PairData) -> pd.DataFrame:
    """One row per matrix and subspace at the shown rank, over the heads that changed: medians, and what tests found.

    Where own directions have another number, each row says of which rank it is.
    """
    rows = at_rank(result.table, result.config["shown_rank"])
    thin, few = result.config["low_rank"], rows["flags"].str.contains("few_tokens").any()
    weighted = set(result.nulls.loc[result.nulls["null"] == "weighted", "matrix"])
    summary = []
    for (matrix, subspace), block in rows.groupby(["matrix", "subspace"], sort=False):
        changed = block[block["delta_norm"] > 0]
        chance, reference = (_counts(changed[column]) for column in ("vs_chance", "vs_reference"))
        summary.append(
            {
                "matrix": matrix,
                "pathway": block["pathway"].iloc[0],
                "subspace": subspace,
                **({"rank": block["rank"].iloc[0]} if rows["rank"].nunique() > 1 else {}),
                "changed": f"{len(changed)}/{len(block)}",
                "relative": changed["relative"].median(),
                "min": changed["relative"].min(),
                "max": changed["relative"].max(),
                "vs chance": _found(chance),
                "expected": (_matched(changed) * changed["relative"] / changed["fraction"]).median(),
                "excess": (changed["fraction"] / _matched(changed)).median(),
                # Where what training gives is not known, or only from above, see `_reading`, so much is not said.
                "vs expected": "" if matrix in thin else _found(reference, below=not (few or matrix in weighted)),
                "|ΔW|/|W|": changed["delta_relative_norm"].median(),
                "rounding": changed["rounding_share"].median(),
            }
        )
    return pd.DataFrame(summary)


def _matched(rows: pd.DataFrame) -> pd.Series:
    """The fraction that training gives by chance: from a read matrix's inputs, from a write matrix's gradients."""
    return rows["activation_matched"].fillna(rows["gradient_matched"])


def against_gradients(result: PairData) -> list[str]:
    """Where gradients are known, a sentence on what is written beside what they give by chance."""
    rows = result.table[(result.table["rank"] == result.config["shown_rank"]) & (result.table["delta_norm"] > 0)]
    rows = rows[~rows["matrix"].isin(result.config["unrelated"])]
    held = rows[(rows["pathway"] == "write") & (rows["subspace"] == PREDICTION) & rows["gradient_excess"].notna()]
    if held.empty:
        return []
    excess = held["gradient_excess"]
    return [
        f"Writing, held against what the output's gradients give there ({NULLS['gradient'].label}, median "
        f"{(held['relative'] / excess).median():.2f} times chance): the median excess is {excess.median():.2f}, from "
        f"{excess.min():.2f} to {excess.max():.2f} over {len(held)} heads and matrices. No test stands behind these "
        "numbers."
    ]


def headline(result: PairData) -> list[str]:
    """Sentences on what the tests found at the shown rank."""
    k = result.config["shown_rank"]
    rows = at_rank(result.table, k)
    changed = rows[rows["delta_norm"] > 0]
    if changed.empty:
        return ["No matrix differs between the two models: nothing to be located."]
    related = changed[~changed["matrix"].isin(result.config["unrelated"])]
    tested = [*_reading(result, related, k), *_writing(related, k)]
    return [
        *_strangers(result),
        *_where(rows),
        *tested,
        *_asymmetry(result, k),
        *(_MEANT if tested else ()),
        *_warnings(result, related),
    ]


def _strangers(result: PairData) -> Iterator[str]:
    if unlike := result.config["unrelated"]:
        yield strangers(unlike)


def _where(rows: pd.DataFrame) -> Iterator[str]:
    """Where a matrix changed in some of its heads: which ones; and which matrices did not change."""
    places = rows.drop_duplicates(_PLACE)
    still = []
    for matrix, block in places.groupby("matrix", sort=False):
        changed = block["delta_norm"] > 0
        if not changed.any():
            still.append(str(matrix))
        elif not changed.all():
            several = [axis for axis in ("head", "expert") if block[axis].notna().any()]
            few = 2 * changed.sum() <= len(block)
            named = [_place(row.layer, row.head, row.expert) for row in block[changed == few].itertuples()]
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            yield (
                f"{matrix} changed in {changed.sum()} of {len(block)} {several[0] if several else 'layer'}s: "
                f"{'' if few else 'all but '}{', '.join(named[:_NAMED])}{more}."
            )
    if still:
        yield f"{', '.join(still)} did not change."


def _place(layer: Any, head: Any, expert: Any) -> str:
    """As a place is spelled: "L7H3", "L7E12", "L7"."""
    spelled = "" if pd.isna(head) else f"H{head}"
    return f"L{layer}{spelled}" if pd.isna(expert) else f"L{layer}E{expert}"


def _reading(result: PairData, changed: pd.DataFrame, k: int) -> Iterator[str]:
    own = changed[(changed["pathway"] == "read") & (changed["subspace"] == changed["matrix"].map(_input_of))]
    latent = own["matrix"].map(reads_latent).astype(bool)
    yield from _latents(own[latent])
    own = own[~latent]
    if own.empty:
        return
    yield (
        f"Reading, in the {counted(k, 'leading direction')} of each matrix's own input "
        f"({tested_count(own['vs_chance'])}): "
        f"{told(own['vs_chance'], 'a random subspace')}; median {own['relative'].median():.2f} times chance."
    )
    thin = result.config["low_rank"]
    whole = own[~own["matrix"].isin(thin)]
    # Neither on few texts nor with gradients is anything said to be less than training gives: see `tables`.
    nulls = set(result.nulls["null"])
    below = not (whole["flags"].str.contains("few_tokens").any() or "weighted" in nulls)
    if (whole["vs_reference"] != "").any():
        yield (
            f"Held against what training gives on these inputs by chance ({_reference(result, whole, k)}; "
            f"{tested_count(whole['vs_reference'])}): {told(whole['vs_reference'], 'that', below=below)}; median "
            f"{whole['excess'].median():.2f} times it."
        )
        if "weighted" in nulls:
            yield "Where gradients weigh the inputs, whether a head holds less than that was not tested."
        elif (whole["vs_reference"] == "above").any():
            yield (
                "That reference takes gradients to be as large on one input as on another; where they grow with the "
                "input it is beaten by chance as well: pass gradient=."
            )
    if thin:
        listed = ", ".join(f"{matrix} (rank {rank})" for matrix, rank in thin.items())
        yield (
            f"The change of {listed} has a rank as low as a merged adapter's, or that of very few tokens: what "
            "training gives by chance is known for whole matrices, not for an adapter whose A is unknown, so the "
            "table's reference does not hold there; pass the adapter itself."
        )


def _latents(own: pd.DataFrame) -> Iterator[str]:
    """A sentence for each latent, which has a width and ranks of its own."""
    for latent, rows in own.groupby("subspace", sort=False):
        k, reference = int(rows["rank"].iloc[0]), ""
        if (rows["vs_reference"] != "").any():
            reference = (
                f", {rows['excess'].median():.2f} times what training gives on these inputs by chance "
                f"({told(rows['vs_reference'], 'that')})"
            )
        matrices = " and ".join(dict.fromkeys(rows["matrix"]))
        yield (
            f"Reading from a latent, {matrices} in the {counted(k, 'leading direction')} of {latent} "
            f"({tested_count(rows['vs_chance'])}): {told(rows['vs_chance'], 'a random subspace of it')}; median "
            f"{rows['relative'].median():.2f} times chance{reference}."
        )


def _reference(result: PairData, rows: pd.DataFrame, k: int) -> str:
    """Whose reference these rows are tested against."""
    nulls = result.nulls
    nulls = nulls[(nulls["rank"] == k) & (nulls["null"] != ISOTROPIC) & nulls["p"].notna()]
    keys = list(dict.fromkeys(nulls.loc[nulls["matrix"].isin(rows["matrix"].unique()), "null"]))
    return " and ".join(NULLS[key].label for key in keys)


def _writing(changed: pd.DataFrame, k: int) -> Iterator[str]:
    written = changed[(changed["pathway"] == "write") & (changed["subspace"] == PREDICTION)]
    if len(written):
        yield (
            f"Writing, in the {counted(k, 'leading prediction direction')} ({tested_count(written['vs_chance'])}): "
            f"{told(written['vs_chance'], 'a random subspace')}; median {written['relative'].median():.2f} times "
            f"chance{'' if written['gradient_excess'].notna().any() else _UNKNOWN}."
        )
    held = changed[changed["pathway"] == "write"].drop_duplicates(["matrix", "subspace"])
    circular = [
        f"{matrix} in {subspace}"
        for matrix, subspace in held[["matrix", "subspace"]].to_numpy()
        if subspace == "resid_post" or (subspace == "resid_mid" and kind_of(matrix, "write").part == "attn")
    ]
    if circular:
        *most, last = circular
        listed = f"{', '.join(most)} and {last}" if most else last
        yield (
            f"{listed} describe{'' if most else 's'}: that stream contains what these matrices write, whatever they "
            "learned."
        )


def _asymmetry(result: PairData, k: int) -> Iterator[str]:
    table = result.asymmetry
    whole = table[table["head"].isna() & (table["rank"] == k)]
    known = whole[np.isfinite(whole[["log2_ratio", "log2_expected"]].astype(float)).all(axis=1)]
    sides = {matrix for matrix, _ in (*READ_SIDE, *WRITE_SIDE)}
    if known.empty or sides & {*result.config["unrelated"], *result.config["low_rank"]}:
        return
    ratio, expected = known["log2_ratio"].mean(), known["log2_expected"].mean()
    source = (
        f"the read side's reference alone gives {expected:+.2f} by chance (for the write side's pass gradient=)"
        if (known["expected_from"] == READ_ONLY).all()
        else f"both sides' references give {expected:+.2f} by chance"
    )
    count = result.config["shape"]["n_layers"]
    layers = "layers" if len(known) == count else f"{len(known)} of {count} layers"
    yield (
        f"Asymmetry: mean log2(read / write) over {layers} is {ratio:+.2f}; {source}, which leaves "
        f"{ratio - expected:+.2f}. No test stands behind these numbers."
    )


_UNKNOWN = "; what training gives there by chance is not known without gradient="

_MEANT = (
    f"{FOUND} bounds the expected share of false findings among the families found (a matrix and a subspace) "
    "and, on average, inside them, for each null and side by itself. Heads and matrices that share inputs are no "
    "independent findings; what is not told apart is not shown to be equal: detection_power tells how large a mark "
    "would have to be. The tests are of these weights: another training run may differ.",
)


def _warnings(result: PairData, changed: pd.DataFrame) -> Iterator[str]:
    places = changed.drop_duplicates(_PLACE)
    stored = int((places["rounding_share"] >= ROUNDING_DOMINATED).sum())
    if stored:
        yield (
            f"Storage explains half or more of the change in {stored} of {len(places)} heads and matrices: their tests "
            "are weaker, and still tests."
        )
    decayed = changed[changed["flags"].str.contains("decay")].drop_duplicates(_PLACE)
    if len(decayed):
        yield (
            f"In {len(decayed)} of {len(places)} heads and matrices a finding goes away once weight decay is taken out "
            "of the change: it is counted as not told apart."
        )
    few, own = changed["flags"].str.contains("few_tokens"), changed["subspace"] == EXPERT_INPUT
    if (few & ~own).any():
        config, d = result.config, result.config["shape"]["d_model"]
        yield (
            f"{config['tokens']} tokens in {config['sequences']} sequence{'s' if config['sequences'] > 1 else ''} are "
            f"too few to trust subspaces, references and intervals, which want {TOKENS_PER_DIMENSION * d:,} tokens "
            f"({TOKENS_PER_DIMENSION} for each of the {d} dimensions) and {SEQUENCES} sequences; whether a head "
            "holds less than training gives was not tested. Use more texts."
        )
    if (few & own).any():
        experts = changed[own].drop_duplicates(["layer", "expert"])
        d = result.config["shape"]["d_model"]
        yield (
            f"{(few & own)[experts.index].sum()} of {len(experts)} experts were given under "
            f"{TOKENS_PER_DIMENSION * d:,} tokens ({TOKENS_PER_DIMENSION} for each of the {d} dimensions): too few to "
            "trust the subspace of their own inputs, its reference and its intervals; whether they hold less than "
            "training gives was not tested there."
        )


def tested_count(versus: pd.Series) -> str:
    """How many heads and matrices have a test."""
    return f"{sum(_counts(versus).values())} tested"


def told(versus: pd.Series, than: str, *, below: bool = True) -> str:
    """How many stand above this, below it, or are not told apart; whether below was tested."""
    counts = _counts(versus)
    if not sum(counts.values()):
        return f"none could be held against {than}"
    less = f"{counts['below']} below, " if below else ""
    return f"{counts['above']} above {than} ({FOUND}), {less}{counts['not told apart']} not told apart from it"


def _counts(versus: pd.Series) -> dict[str, int]:
    return {answer: int((versus == answer).sum()) for answer in _ASKED}


def _found(counts: dict[str, int], *, below: bool = True) -> str:
    """How many tests say above, how many below if that was asked, of how many."""
    tested = sum(counts.values())
    less = f" {counts['below']}↓" if below else ""
    return f"{counts['above']}↑{less} of {tested}" if tested else ""


def _input_of(matrix: str) -> str:
    return kind_of(matrix).point
