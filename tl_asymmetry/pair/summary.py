"""The main numbers of a pair in words, built from the tables and claiming no more than the nulls allow."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tl_asymmetry.names import ROUNDING_DOMINATED, SIGNIFICANT, kind_of
from tl_asymmetry.pair.data import PairData


def summary_table(result: PairData) -> pd.DataFrame:
    """One row per matrix and subspace at the shown rank: medians over layers and heads, and how many beat chance."""
    rows = result.table[result.table["rank"] == result.config["shown_rank"]]
    summary = []
    for (matrix, subspace), block in rows.groupby(["matrix", "subspace"], sort=False):
        summary.append(
            {
                "matrix": matrix,
                "pathway": block["pathway"].iloc[0],
                "subspace": subspace,
                "relative": block["relative"].median(),
                "min": block["relative"].min(),
                "max": block["relative"].max(),
                "q<0.05": f"{int((block['isotropic_q'] < SIGNIFICANT).sum())}/{len(block)}",
                "matched": (block["activation_matched"] * block["relative"] / block["fraction"]).median(),
                "excess": block["excess"].median(),
                "|ΔW|/|W|": block["delta_relative_norm"].median(),
                "rounding": block["rounding_share"].median(),
            }
        )
    return pd.DataFrame(summary)


def headline(result: PairData) -> list[str]:
    """Sentences on what the table shows, at the shown rank."""
    k = result.config["shown_rank"]
    at_rank = result.table[result.table["rank"] == k]
    if at_rank["fraction"].isna().all():
        return ["No matrix differs between the two models: nothing to be located."]
    sentences = []
    own = at_rank[
        (at_rank["pathway"] == "read")
        & (at_rank["subspace"] == at_rank["matrix"].map(lambda matrix: kind_of(matrix).point))
    ]
    if len(own):
        sentences.append(
            f"Reading: at rank {k} the median relative fraction in the inputs' own leading directions is "
            f"{own['relative'].median():.2f} (1 = isotropic); {_share(own['isotropic_q'] < SIGNIFICANT)} of the heads "
            f"and matrices are more concentrated than a random subspace (q < {SIGNIFICANT}), and "
            f"{_share(own['excess'] > 1)} exceed what the inputs' variance alone would give (median excess "
            f"{own['excess'].median():.2f})."
        )
    written = at_rank[(at_rank["pathway"] == "write") & (at_rank["subspace"] == "prediction")]
    if len(written):
        sentences.append(
            f"Writing: the median relative fraction in the leading prediction directions is "
            f"{written['relative'].median():.2f}; {_share(written['isotropic_q'] < SIGNIFICANT)} are more concentrated "
            "than a random subspace."
        )
    whole = result.asymmetry[result.asymmetry["head"].isna() & (result.asymmetry["rank"] == k)]
    if len(whole):
        mean = whole["log2_ratio"].mean()
        expected = whole["log2_expected"].mean()
        chance = (
            "what chance would give is unknown without gradients (pass gradient=)"
            if np.isnan(expected)
            else f"{expected:+.2f} is what plain gradients would give"
        )
        sentences.append(f"Asymmetry: mean log2(read / write) over layers is {mean:+.2f}; {chance}.")
    rounded = (at_rank["rounding_share"] >= ROUNDING_DOMINATED).mean()
    if rounded > 0:
        sentences.append(
            f"Rounding explains half or more of the change in {rounded:.0%} of the rows: noise, not signal."
        )
    return sentences


def _share(condition: pd.Series) -> str:
    return f"{int(condition.sum())} of {len(condition)}"
