"""Picking what a figure shows from a result's table, and saying what is there when it is not.

The tables are those of `PairAnalysis`; the only arithmetic is a change of units: a reference held as a fraction
becomes relative by `d / k`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tl_asymmetry.names import MATRICES, kind_of, reads_latent
from tl_asymmetry.plots.style import one_of

KEYS = ("layer", "head", "matrix", "subspace", "rank")
COLUMNS = (
    *KEYS, "pathway", "fraction", "relative", "isotropic_z", "isotropic_p", "p_method", "isotropic_q",
    "activation_matched", "excess", "ci_low", "ci_high", "eigengap", "delta_relative_norm", "rounding_share",
    "fraction_unrounded",
)  # fmt: skip


def require(table: pd.DataFrame, columns: Sequence[str], source: str = "PairAnalysis.table") -> None:
    """Check that a table has the columns a figure reads.

    Raises:
        ValueError: naming the missing ones.
    """
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"expected a pandas DataFrame, got {type(table).__name__}; pass {source}")
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise ValueError(f"expected a table with the columns {', '.join(missing)}, got one without; pass {source}")


def default_subspace(table: pd.DataFrame, matrix: str) -> str:
    """The subspace a matrix is first held against: its own input (read), the prediction subspace (write)."""
    rows = table[table["matrix"] == matrix]
    there = [str(s) for s in rows["subspace"].unique()]
    wanted = kind_of(matrix, rows["pathway"].iloc[0]).subspace
    return wanted if wanted in there else there[0]


def units(rows: pd.DataFrame) -> pd.Series:
    """Which head or expert of its layer each row is about, NA for a matrix of one piece.

    A mixture's experts stand where heads do, and beside them the one MLP of a layer without experts stands first.
    """
    heads = rows["head"].astype("Int64")
    if not has_experts(rows):
        return heads
    experts = rows["expert"].astype("Int64")
    mixed = rows["matrix"].isin(rows.loc[experts.notna(), "matrix"])
    return heads.where(~mixed, experts.fillna(0))


def has_experts(rows: pd.DataFrame) -> bool:
    """Whether some rows are about experts, which then stand where heads do."""
    return "expert" in rows and bool(rows["expert"].notna().any())


def absence(rows: pd.DataFrame, table: pd.DataFrame, layer: int, head: int | None) -> str:
    """Why a map of some rows has none in a cell.

    Args:
        rows: of one matrix against one subspace, at all ranks, from `select`.
        table: that they are of.
        layer, head: of the cell.
    """
    matrix, space = str(rows["matrix"].iloc[0]), str(rows["subspace"].iloc[0])
    there = rows[rows["layer"] == layer]
    if there.empty:
        elsewhere = (table["matrix"] == matrix) & (table["layer"] == layer)
        return f"layer {layer} has no {f'{space} for it' if elsewhere.any() else matrix}"
    heads = there["head"].dropna().unique()
    if head is None or head in heads:
        return "the subspace has fewer directions than the rank there"
    if has_experts(rows):
        one = there["expert"].isna().all()
        return f"layer {layer} has {'one MLP and no experts' if one else f'{len(heads)} experts'}"
    return f"layer {layer} has {len(heads)} heads"


def select(table: pd.DataFrame, matrix: str, subspace: str | None) -> tuple[pd.DataFrame, str]:
    """The rows of one matrix against one subspace, and that subspace's name.

    Raises:
        ValueError: for a missing column, an unknown matrix or subspace, or two rows for one layer, head and rank.
    """
    require(table, COLUMNS)
    one_of("matrix", matrix, table["matrix"].unique().tolist(), "matrix")
    chosen = default_subspace(table, matrix) if subspace is None else subspace
    of_matrix = table[table["matrix"] == matrix]
    one_of(f"subspace of {matrix}", chosen, of_matrix["subspace"].unique().tolist(), "subspace")
    rows = of_matrix[of_matrix["subspace"] == chosen]
    rows = rows.assign(head=units(rows))
    if rows.duplicated(["layer", "head", "rank"]).any():
        raise ValueError(
            f"expected one row per layer, head and rank of {matrix} against {chosen}, got several; "
            "pass the table of one result"
        )
    return rows, chosen


def pick_ranks(
    rows: pd.DataFrame, rank: int | None, default_rank: int | None, d_model: int | None
) -> tuple[list[int], int]:
    """The ranks a figure offers, and the index of the one it shows first.

    One rank when `rank` is given; else all, first `default_rank`, or `d // 16`, or the middle one.

    Raises:
        ValueError: for a rank the rows do not have.
    """
    ranks = sorted(int(r) for r in rows["rank"].unique())
    if rank is not None:
        one_of("rank", rank, ranks, "rank")
        return [rank], 0
    if default_rank is not None:
        one_of("default_rank", default_rank, ranks, "default_rank")
        return ranks, ranks.index(default_rank)
    if d_model is not None and d_model // 16 in ranks:
        return ranks, ranks.index(d_model // 16)
    return ranks, len(ranks) // 2


def d_model_of(table: pd.DataFrame, d_model: int | None) -> int | None:
    """The width of the residual stream: given, or read off `relative = fraction * d / k`; None if no row tells.

    Raises:
        ValueError: for a width that is no positive integer.
    """
    if d_model is not None:
        if d_model < 1:
            raise ValueError(f"expected d_model >= 1, got {d_model}; pass the model's d_model or None")
        return int(d_model)
    fraction = table["fraction"].to_numpy(float, na_value=np.nan)
    relative = table["relative"].to_numpy(float, na_value=np.nan)
    rank = table["rank"].to_numpy(float)
    told = np.isfinite(fraction) & np.isfinite(relative) & (fraction > 0)
    return round(float(np.median((relative * rank / np.where(told, fraction, 1))[told]))) if told.any() else None


def in_relative_units(rows: pd.DataFrame, column: str, d_model: int | None) -> np.ndarray:
    """A column of fractions as relative: times `d / k`. [rows]; NaN where the column is missing or d unknown."""
    if column not in rows.columns:
        return np.full(len(rows), np.nan)
    return rows[column].to_numpy(float, na_value=np.nan) * widths(rows, d_model) / rows["rank"].to_numpy(float)


def widths(rows: pd.DataFrame, d_model: int | None) -> np.ndarray:
    """d of each row: of a matrix that reads a latent its width, told by its own rows; else d_model, NaN if unknown."""
    found = np.full(len(rows), np.nan if d_model is None else float(d_model))
    for matrix, at in rows.groupby("matrix", sort=False).indices.items():
        if reads_latent(str(matrix)):
            told = d_model_of(rows.iloc[at], None)
            found[at] = np.nan if told is None else told
    return found


def heads_of(rows: pd.DataFrame) -> list[int | None]:
    """The heads of some rows, ascending; `[None]` for an MLP matrix."""
    heads = sorted(int(h) for h in rows["head"].dropna().unique())
    return list(heads) if heads else [None]


def layers_of(rows: pd.DataFrame) -> list[int]:
    """The layers of some rows, ascending."""
    return sorted(int(x) for x in rows["layer"].unique())


def grid(rows: pd.DataFrame, column: Any, layers: Sequence[int], heads: Sequence[int | None]) -> np.ndarray:
    """Numbers of rows laid out as [layer, head]; NaN where there is no row."""
    return laid_out(places(rows, layers, heads), column, (len(layers), len(heads)))


def places(
    rows: pd.DataFrame, layers: Sequence[int], heads: Sequence[int | None], ranks: Sequence[int] | None = None
) -> tuple[list[int], ...]:  # fmt: skip
    """Where each row stands in a grid [layer, head], or [rank, layer, head]."""
    at_layer = {layer: i for i, layer in enumerate(layers)}
    at_head = {head: i for i, head in enumerate(heads)}
    i = [at_layer[int(x)] for x in rows["layer"].tolist()]
    j = [at_head[None if pd.isna(x) else int(x)] for x in rows["head"].tolist()]
    if ranks is None:
        return i, j
    at_rank = {rank: i for i, rank in enumerate(ranks)}
    return [at_rank[int(k)] for k in rows["rank"].tolist()], i, j


def laid_out(where: tuple[list[int], ...], column: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of rows at their `places`; NaN where there is no row."""
    grid = np.full(shape, np.nan)
    grid[where] = pd.Series(column).to_numpy(float, na_value=np.nan)
    return grid


def query_heads(table: pd.DataFrame) -> int | None:
    """The number of query heads, read off W_Q or W_O; None when the table has neither."""
    heads = table.loc[table["matrix"].isin(["W_Q", "W_O"]), "head"].dropna()
    return int(heads.max()) + 1 if len(heads) else None


def kv_group(table: pd.DataFrame, matrix: str, kv: bool | None) -> tuple[bool, int | None]:
    """Whether a matrix's heads are KV heads shared by several query heads, and by how many.

    Args:
        table: with W_Q or W_O rows when `kv` is to be inferred.
        matrix: "W_K" and "W_V" only can have KV heads.
        kv: None infers it: fewer heads than the queries have.
    """
    if matrix in MATRICES and MATRICES[matrix].heads != "kv":
        return False, None
    queries = query_heads(table)
    own = table.loc[table["matrix"] == matrix, "head"].dropna()
    keys = int(own.max()) + 1 if len(own) else None
    shared = queries is not None and keys is not None and keys < queries
    group = queries // keys if shared and queries and keys else None
    return (shared if kv is None else kv), group
