"""What hovers say of a head: its name, its numbers, what they are held against and what weakens them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from tl_asymmetry.names import ROUNDING_DOMINATED, SMALL_EIGENGAP, reads_latent
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.held import ISOTROPIC, NUMBERS, Held
from tl_asymmetry.plots.style import MISSING, as_float, number, text

FIELDS = 8
"""Fields of every head's hover, before those of its nulls."""
_ISOTROPIC_FIELDS = ("p_method", "isotropic_z", "isotropic_p", "isotropic_q")
_HEAD_FIELDS = (
    "relative", "fraction", "rank", "ci_low", "ci_high", "rounding_share", "eigengap", "delta_relative_norm",
)  # fmt: skip


def head_name(layer: int, head: int | None, *, kv: bool = False, group: int | None = None, expert: bool = False) -> str:
    """L7H3, of an expert L7E3, of an MLP matrix L7; under grouped-query attention the KV head and the heads it serves.

    Example:
        >>> head_name(7, 1, kv=True, group=4)
        'L7 KV head 1 (query heads 4–7)'
    """
    if head is None:
        return f"L{layer}"
    if not kv:
        return f"L{layer}{'E' if expert else 'H'}{head}"
    serves = f" (query heads {head * group}–{head * group + group - 1})" if group and group > 1 else ""
    return f"L{layer} KV head {head}{serves}"


def interval(low: Any, high: Any, subspace: str) -> str:
    """The 95 % interval in words; why there is none when it is NaN."""
    if math.isnan(as_float(low)) or math.isnan(as_float(high)):
        return "none (weights only)" if subspace == "prediction" else "none"
    return f"{number(low)} to {number(high)}"


def isotropic_words(row: Mapping[Any, Any]) -> str:
    """The isotropic null of one row of a table."""
    method = row["p_method"]
    by = "" if not isinstance(method, str) or not method else f" ({text(method)})"
    return (
        f"1; z {number(row['isotropic_z'])}, p {number(row['isotropic_p'], 2)}{by}, q {number(row['isotropic_q'], 2)}"
    )


def excess_words(row: Mapping[Any, Any]) -> str:
    """Another null of one row: what it expects in relative units, the excess over it with its interval, its test."""
    parts = [] if math.isnan(as_float(row["expected"])) else [number(row["expected"])]
    told = not math.isnan(as_float(row["low"]))
    span = f" ({number(row['low'])} to {number(row['high'])})" if told else ""
    if told or not math.isnan(as_float(row["excess"])):
        parts.append(f"excess {number(row['excess'])}{span}")
    parts += [f"{name} {number(row[name], 2)}" for name in ("p", "q") if not math.isnan(as_float(row[name]))]
    return ", ".join(parts) or MISSING


def held_words(held: Held, rows: pd.DataFrame, d: int | None) -> list[str]:
    """What a hover says of a null, row by row."""
    if held.key == ISOTROPIC:
        return [isotropic_words(row) for row in _records(rows, _ISOTROPIC_FIELDS)]
    numbers = held.numbers.loc[rows.index]
    scale = pick.widths(rows, d) / rows["rank"].to_numpy(float)
    return [excess_words(row) for row in _records(numbers.assign(expected=numbers["expected"] * scale), NUMBERS)]


def _records(frame: pd.DataFrame, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns row by row; `to_dict` takes a millisecond for each column."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*(frame[c].tolist() for c in columns), strict=True)]


def head_template(matrix: str, helds: Sequence[Held], *, verdict: bool, experts: bool = False) -> str:
    """The hover of a head, or of an expert, for fields in the order of `head_fields`."""
    routed = f"<br>routed to it: %{{customdata[{FIELDS + len(helds) + verdict}]}}" if experts else ""
    reads = "<br>reads a latent, not the residual stream" if reads_latent(matrix) else ""
    against = "".join(f"<br>{text(held.label)}: %{{customdata[{FIELDS + i}]}}" for i, held in enumerate(helds))
    verdicts = f"<br>verdict: %{{customdata[{FIELDS + len(helds)}]}}" if verdict else ""
    return (
        f"<b>%{{customdata[0]}}</b> · {text(matrix)}{routed}{reads}"
        "<br>relative %{customdata[1]} (fraction %{customdata[2]})"
        f"<br>95 % interval over texts: %{{customdata[3]}}{against}{verdicts}"
        "<br>rounding share %{customdata[4]}, without it %{customdata[5]}"
        "<br>eigengap %{customdata[6]}<br>‖ΔW‖/‖W‖ %{customdata[7]}<extra></extra>"
    )


def head_fields(
    rows: pd.DataFrame, names: Sequence[str], space: str, d: int | None, helds: Sequence[Held]
) -> list[list[str]]:
    """What the hover says, row by row.

    Args:
        rows: of a pair's table.
        names: of each row's head.
        space: the subspace.
        d: width of the residual stream, for relative units.
        helds: what to say besides, of these rows or more.
    """
    unrounded = pick.in_relative_units(rows, "fraction_unrounded", d)
    against = [held_words(held, rows, d) for held in helds]
    fields = []
    told = [c for c in (*_HEAD_FIELDS, "verdict") if c in rows]
    given = routed_words(rows) if pick.has_experts(rows) else None
    for n, row in enumerate(_records(rows, told)):
        gap, share = as_float(row["eigengap"]), as_float(row["rounding_share"])
        fields.append(
            [
                names[n],
                number(row["relative"]),
                f"{number(row['fraction'])} at k = {row['rank']}",
                interval(row["ci_low"], row["ci_high"], space),
                number(share) + (", mostly storage" if share >= ROUNDING_DOMINATED else ""),
                number(unrounded[n]),
                number(gap) + (", too small to trust the edge" if gap < SMALL_EIGENGAP else ""),
                number(row["delta_relative_norm"]),
                *(words[n] for words in against),
                *([text(row["verdict"])] if "verdict" in row else []),
                *([given[n]] if given else []),
            ]
        )
    return fields


def routed_words(rows: pd.DataFrame) -> list[str]:
    """Of each row's expert what its router gave it."""
    if "tokens_routed" not in rows:
        return [MISSING] * len(rows)
    return [
        "all tokens: no experts in this layer" if pd.isna(expert) else MISSING if pd.isna(tokens)
        else f"{int(tokens):,} tokens" + (f", mean weight {number(weight)}" if tokens else "")
        for expert, tokens, weight in zip(rows["expert"], rows["tokens_routed"], rows["routing_weight"], strict=True)
    ]  # fmt: skip


def head_cells(
    rows: pd.DataFrame, fields: Iterable[Sequence[str]], layers: Sequence[int], heads: Sequence[int | None],
    *, kv: bool, group: int | None, expert: bool = False, why: Callable[[int, int | None], str] | None = None,
) -> list[list[list[str]]]:  # fmt: skip
    """Fields of rows laid out as [layer][head]; a cell without a row has a name only, and why it is empty."""
    fields = list(fields)
    width = len(fields[0]) if fields else FIELDS
    there = set(zip(rows["layer"].astype(int), rows["head"].fillna(-1).astype(int), strict=True))

    def empty(layer: int, head: int | None) -> list[str]:
        name = head_name(layer, head, kv=kv, group=group, expert=expert)
        if why is not None and (layer, -1 if head is None else head) not in there:
            name = f"{name}: {text(why(layer, head))}"
        return [name, *[MISSING] * (width - 1)]

    cells = [[empty(layer, head) for head in heads] for layer in layers]
    at_layer, at_head = {v: i for i, v in enumerate(layers)}, {v: i for i, v in enumerate(heads)}
    for layer, head, field in zip(rows["layer"], rows["head"], fields, strict=True):
        cells[at_layer[int(layer)]][at_head[None if pd.isna(head) else int(head)]] = list(field)
    return cells


def cell_name(layer: int, head: int | None, matrix: str, kv: bool, group: int | None) -> str:
    """A head and its matrix.

    Example:
        >>> cell_name(7, 3, "W_Q", False, None)
        'L7H3 · W_Q'
    """
    return f"{head_name(layer, head, kv=kv, group=group)} · {text(matrix)}"


def row_names(rows: pd.DataFrame, kv: bool, group: int | None) -> list[str]:
    """`head_name` of each row; the one MLP of a layer without experts has no number beside experts."""
    experts = pick.has_experts(rows)
    units = rows["expert"] if experts else rows["head"]
    return [
        head_name(int(layer), None if pd.isna(unit) else int(unit), kv=kv, group=group, expert=experts)
        for layer, unit in zip(rows["layer"], units, strict=True)
    ]
