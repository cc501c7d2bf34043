"""The rows of a table that stand out, as a short list, whatever the analysis."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from tl_asymmetry._lazy import pd
from tl_asymmetry.names import kind_of, nearest

_PROBABILITIES = ("_p", "_q")


def labels_of(table: pd.DataFrame) -> list[str]:
    """The leading columns without measured numbers: what tells the rows apart.

    Example:
        >>> labels_of(pd.DataFrame({"layer": [0], "matrix": ["W_Q"], "ratio": [1.0], "verdict": ["above"]}))
        ['layer', 'matrix']
    """
    return [str(name) for name in takewhile(lambda c: not pd.api.types.is_float_dtype(table[c]), table.columns)]


def at_rank(table: pd.DataFrame, rank: int) -> pd.DataFrame:
    """The rows at a rank; of a subspace that was not measured there, those at the nearest rank that it has.

    Example:
        >>> table = pd.DataFrame({"subspace": ["attn_in", "attn_in", "refusal"], "rank": [4, 16, 1]})
        >>> at_rank(table, 4)["rank"].tolist()
        [4, 1]
    """
    ranks = {name: rows.unique() for name, rows in table.groupby("subspace", sort=False)["rank"]}
    nearest_to = {name: min(own, key=lambda k: (abs(k - rank), k)) for name, own in ranks.items()}
    return table[table["rank"] == table["subspace"].map(nearest_to)]


def shown_rows(table: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """The rows at the rank that is shown, each matrix against the subspace that it is first held against.

    All rows of a matrix stay where it was not held against that one, and all ranks where none is shown.
    """
    rank = config.get("shown_rank")
    if isinstance(rank, Mapping):
        table = table[table["rank"] == table["matrix"].map(rank)]
    elif rank is not None and "rank" in table:
        table = at_rank(table, rank) if "subspace" in table else table[table["rank"] == rank]
    if not {"matrix", "pathway", "subspace"} <= {*table.columns}:
        return table
    usual = [kind_of(str(m), side).subspace for m, side in zip(table["matrix"], table["pathway"], strict=True)]
    own = table["subspace"] == usual
    return table[own | ~own.groupby(table["matrix"]).transform("any")]


def in_order(rows: pd.DataFrame, by: str, shown: Sequence[str] = (), *, signed: Collection[str] = ()) -> pd.DataFrame:
    """Rows in the order of a column, those without a number last: what tells them apart, the column, what is shown.

    Args:
        rows: labels first.
        by: of p and q the smallest come first, of others the largest.
        shown: further columns, those that are there.
        signed: columns of which both signs count: what is farthest from 0 comes first.
    """
    smallest = by in ("p", "q") or by.endswith(_PROBABILITIES)
    order = rows[by].abs() if by in signed else rows[by]
    columns = [*(c for c in labels_of(rows) if rows[c].notna().any()), by, *(c for c in shown if c in rows)]
    return rows.loc[order.sort_values(ascending=smallest, kind="stable").index, list(dict.fromkeys(columns))]


def top_rows(
    rows: pd.DataFrame,
    n: int,
    by: str,
    matrix: str | None,
    shown: Sequence[str] = (),
    *,
    signed: Collection[str] = (),
    unit: str | None = None,
) -> pd.DataFrame:
    """The first rows of a table in the order of a column; see `Result.top`.

    Args:
        rows: to choose from, labels first.
        n: how many at most.
        by: the column.
        matrix: only this one.
        shown: further columns, those that are there.
        signed: columns of which both signs count.
        unit: a column of which every value has one line, that of its first row.

    Raises:
        ValueError: no such column or matrix, or one without numbers.

    Example:
        >>> table = pd.DataFrame({"layer": [0, 1, 2], "matrix": "W_Q", "ratio": [1.0, 3.0, 2.0], "q": [0.5, 0.1, 0.2]})
        >>> top_rows(table, 2, "ratio", None, ["q"])["layer"].tolist()
        [1, 2]
    """
    if n < 1:
        raise ValueError(f"expected n >= 1, got {n}; pass the number of rows to list")
    labels = labels_of(rows)
    numbers = [str(c) for c in rows.columns if c not in labels and pd.api.types.is_numeric_dtype(rows[c])]
    if by not in numbers:
        raise ValueError(f"expected by among {', '.join(numbers)}, got {by!r}; pass {nearest(by, numbers)}")
    if matrix is not None:
        there = [str(name) for name in dict.fromkeys(rows["matrix"])] if "matrix" in rows else []
        if not there:
            raise ValueError(f"expected no matrix, since no row is of one alone, got {matrix!r}; leave it out")
        if matrix not in there:
            raise ValueError(
                f"expected a matrix among {', '.join(there)}, got {matrix!r}; pass {nearest(matrix, there)}"
            )
        rows = rows[rows["matrix"] == matrix]
    known = rows[rows[by].notna()]
    if known.empty:
        others = [name for name in numbers if rows[name].notna().any()]
        instead = f"by={others[0]!r}" if others else "another matrix"
        raise ValueError(f"expected numbers in {by!r} for {matrix or 'some matrix'}, got none; pass {instead}")
    found = in_order(known, by, shown, signed=signed)
    if unit is not None:
        found = found[~known.loc[found.index, unit].duplicated()]
    return found.head(n).reset_index(drop=True)
