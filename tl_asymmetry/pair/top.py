"""The heads of a pair that stand out, in a short list."""

from __future__ import annotations

import pandas as pd

from tl_asymmetry.names import Place, kind_of

_SHOWN = (
    "relative", "ci_low", "ci_high", "isotropic_q", "excess", "excess_low", "excess_high", "excess_q", "verdict",
    "delta_relative_norm", "flags",
)  # fmt: skip
_KEYS = ["layer", "head", "matrix", "subspace", "rank"]
_PROBABILITIES = ("_p", "_q")


def top_heads(table: pd.DataFrame, rank: int, n: int, by: str, matrix: str | None) -> pd.DataFrame:
    """One line per head; see `PairAnalysis.top`."""
    if n < 1:
        raise ValueError(f"expected n >= 1, got {n}; pass the number of heads to list")
    numbers = [c for c in table.columns if c not in _KEYS and pd.api.types.is_float_dtype(table[c])]
    if by not in numbers:
        raise ValueError(f"expected by among {', '.join(numbers)}, got {by!r}; pass one of these columns")
    there = list(dict.fromkeys(table["matrix"]))
    if matrix is not None and matrix not in there:
        raise ValueError(f"expected a matrix among {', '.join(there)}, got {matrix!r}; pass one that was analysed")
    rows = _usual(table[table["rank"] == rank])
    rows = rows[rows["matrix"] == matrix] if matrix is not None else rows
    rows = rows[rows[by].notna()]
    if not len(rows):
        raise ValueError(
            f'expected numbers in {by!r} for {matrix or "some matrix"}, got none; pass by="relative", or another matrix'
        )
    # Under grouped-query attention a key-value head is not the query head of its number.
    heads = rows["matrix"].map(table.groupby("matrix")["head"].max())
    ordered = rows.assign(heads=heads).sort_values(by, ascending=by.endswith(_PROBABILITIES), kind="stable")
    short = ordered.drop_duplicates(["layer", "head", "heads"]).head(n).reset_index(drop=True)
    places = [
        str(Place(int(layer), str(m), None if pd.isna(head) else int(head)))
        for layer, head, m in zip(short["layer"], short["head"], short["matrix"], strict=True)
    ]
    columns = [*_KEYS, *dict.fromkeys([*(c for c in _SHOWN if c in table.columns), by])]
    listed = short[columns]
    listed.insert(0, "place", places)
    return listed


def _usual(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each matrix the rows against the subspace that it is first held against; all where it was not."""
    usual = [kind_of(str(m), side).subspace for m, side in zip(rows["matrix"], rows["pathway"], strict=True)]
    own = rows["subspace"] == usual
    return rows[own | ~own.groupby(rows["matrix"]).transform("any")]
