"""Layer × head maps: one cell per head, coloured by how far it is from chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.names import ROUNDING_DOMINATED, ROUNDING_FLAGGED, SIGNIFICANT, SMALL_EIGENGAP
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style


@dataclass(frozen=True)
class Value:
    """One quantity a map can show."""

    label: str
    """Its name in the menu and the title."""
    meaning: str
    """What its centre stands for, in the title."""
    ratio: bool
    """True: a ratio, coloured by log2 and centred on 1; False: coloured as it is and centred on 0."""
    bar: str
    """Heading of the colour bar."""
    absent: str = "no value"
    """Said in place of a map whose matrix has no such value."""


VALUES = {
    "relative": Value(
        "relative fraction over the isotropic null",
        "1 = chance: what a random subspace of the same rank holds.", True, "× chance"
    ),
    "excess": Value(
        "excess over the activation-matched reference",
        "1 = what a plain sum of gradients on these inputs would hold.", True, "× reference",
        "no activation-matched reference:<br>the residual side of a write<br>matrix is its output",
    ),
    "gradient_excess": Value(
        "excess over the gradient-matched reference",
        "1 = what the named objective's gradients would hold.", True, "× reference",
        "no gradient-matched reference",
    ),
    "unrounded": Value(
        "relative fraction over the isotropic null, rounding removed",
        "1 = chance: what a random subspace of the same rank holds.", True, "× chance",
    ),
    "z": Value(
        "isotropic z", "0 = chance: standard deviations of a random subspace from its mean.", False, "z"
    ),
}  # fmt: skip

HOVER = (
    "<b>%{customdata[0]}</b> · {matrix}<br>relative %{customdata[1]} (fraction %{customdata[2]})"
    "<br>95 % interval over texts: %{customdata[3]}<br>isotropic null: %{customdata[4]}"
    "<br>activation-matched: %{customdata[5]}, excess %{customdata[6]}%{customdata[7]}"
    "<br>rounding share %{customdata[8]}, without it %{customdata[9]}"
    "<br>eigengap %{customdata[10]}<br>‖ΔW‖/‖W‖ %{customdata[11]}<extra></extra>"
)


def heads_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    subspace: str | None = None,
    rank: int | None = None,
    value: str = "relative",
    default_rank: int | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    title: str | None = None,
    template: Any = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """Map one matrix over layers and heads, with a menu of values and a slider of ranks inside the figure.

    Colour is the distance from chance: blue below, neutral at it, orange above; ratios are coloured by their log2,
    so that 2 and 1/2 are equally strong. A dot marks q < 0.05, a white diamond a rounding share from 0.1, and a
    grey cell with a cross one from 0.5, where storage rather than training explains the delta. The colour range
    belongs to the rank shown. The hover gives the value, its interval, both nulls, and what weakens it.

    Args:
        table: `PairAnalysis.table`.
        matrix: one of the table's matrices; an MLP matrix gives a single column.
        subspace: one of the table's for that matrix; None: its own input for a read matrix, "prediction" for a
            write matrix, where the table has it.
        rank: show this rank only; None gives a slider over all of them.
        value: shown first: "relative", "excess", "gradient_excess", "unrounded" (relative with the rounding share
            removed) or "z".
        default_rank: first rank of the slider; None: `d // 16`, or the middle one.
        d_model: width of the residual stream; None reads it off the table.
        kv: whether the heads of W_K and W_V are KV heads; None infers it from their number.
        title: first line of the title; None says what is shown. Plain text.
        template: None or "light", "dark", or any plotly template.
        width, height: pixels; None follows page and content.

    Raises:
        ValueError: for an unknown matrix, subspace, rank or value, or a value this matrix has nowhere.

    Example:
        >>> heads_figure(result.table, "W_Q", value="excess").write_html("w_q.html")
    """
    chosen, space = pick.select(table, matrix, subspace)
    style.one_of("value", value, list(VALUES), "value")
    d = pick.d_model_of(table, d_model)
    ranks, start = pick.pick_ranks(chosen, rank, default_rank, d)
    layers, heads = pick.layers_of(chosen), pick.heads_of(chosen)
    shared, group = pick.kv_group(table, matrix, kv)
    by_rank = [chosen[chosen["rank"] == k] for k in ranks]
    # value -> [rank][layer, head]
    grids = {
        name: [pick.grid(r, column(r, name, d), layers, heads) for r in by_rank]
        for name in VALUES
    }  # fmt: skip
    shown = [n for n in VALUES if n == "relative" or any(np.isfinite(g).any() for g in grids[n])]
    if value not in shown:
        raise ValueError(
            f"expected a value that {matrix} against {space} has, got {value!r}, which is NaN in every row; "
            f"pass value={shown[0]!r}"
        )

    x = list(range(len(heads)))
    scale = style.diverging(template)
    figure = go.Figure()
    for name in shown:
        first = look(grids[name][start], VALUES[name])
        figure.add_trace(
            go.Heatmap(
                x=x, y=layers, z=first["z"], zmin=-first["limit"], zmax=first["limit"], zmid=0, colorscale=scale,
                xgap=1, ygap=1, hoverinfo="skip", visible=name == value, name=name, meta="diverging",
                colorbar={
                    "thickness": 12, "len": 0.94, "y": 0, "yanchor": "bottom", "outlinewidth": 0, "x": 1.01, "xpad": 4,
                    "title": {"text": VALUES[name].bar, "side": "top", "font": {"size": 11}},
                    "tickmode": "array", "tickvals": first["tickvals"], "ticktext": first["ticktext"],
                },
            )
        )  # fmt: skip

    size = mark_size(layers, heads)
    rounding = pick.grid(by_rank[start], by_rank[start]["rounding_share"], layers, heads)
    figure.add_traces(rounding_marks(rounding, layers, size))
    dots = [_where(_significant(r, layers, heads), layers) for r in by_rank]
    figure.add_trace(marks(*dots[start], "circle", 0.75 * size, f"q < {SIGNIFICANT} (isotropic null)"))
    q_trace = len(figure.data) - 1
    hovers = [hover_cells(r, space, layers, heads, d, shared, group) for r in by_rank]
    # One transparent map on top carries every hover, so that the texts are stored once and not once per value.
    figure.add_trace(
        go.Heatmap(
            x=x, y=layers, z=[[0] * len(heads) for _ in layers], showscale=False, name="hover",
            colorscale=[(0, "rgba(0,0,0,0)"), (1, "rgba(0,0,0,0)")], customdata=hovers[start],
            hovertemplate=HOVER.replace("{matrix}", style.text(matrix)),
        )
    )  # fmt: skip
    hover_trace = len(figure.data) - 1

    def words(name: str) -> str:
        at = f" at rank {ranks[0]}" if len(ranks) == 1 else ""
        first = style.text(title) if title is not None else f"{style.text(matrix)}: {VALUES[name].label}"
        return style.heading(first, f"Against {style.text(space)}{at}. {VALUES[name].meaning}")

    if len(shown) > 1:
        steady = [True] * (len(figure.data) - len(shown))
        figure.update_layout(
            updatemenus=[
                {
                    "name": "value", "active": shown.index(value), "direction": "down",
                    "buttons": [
                        {
                            "label": VALUES[n].label, "method": "update",
                            "args": [{"visible": [m == n for m in shown] + steady}, {"title.text": words(n)}],
                        }
                        for n in shown
                    ],
                }
            ]
        )  # fmt: skip
    if len(ranks) > 1:
        # The menu shows and hides traces, the slider refills them: so each works whatever the other stands at.
        targets = [*range(len(shown)), q_trace, hover_trace]
        steps = []
        for at in range(len(ranks)):
            looks = [look(grids[n][at], VALUES[n]) for n in shown]
            steps.append(
                [
                    {
                        "x": [x] * len(shown) + [dots[at][0], x],
                        "y": [layers] * len(shown) + [dots[at][1], layers],
                        "z": [k["z"] for k in looks] + [None, [[0] * len(heads) for _ in layers]],
                        "zmin": [-k["limit"] for k in looks] + [None, None],
                        "zmax": [k["limit"] for k in looks] + [None, None],
                        "colorbar.tickvals": [k["tickvals"] for k in looks] + [None, None],
                        "colorbar.ticktext": [k["ticktext"] for k in looks] + [None, None],
                        "customdata": [None] * (len(shown) + 1) + [hovers[at]],
                    },
                    targets,
                ]
            )
        figure.update_layout(sliders=[style.rank_slider(ranks, start, steps)])

    if not any(np.isfinite(g).any() for g in grids["relative"]):
        style.note(figure, "No value: the delta is zero, so its fractions are undefined.")
    single = heads == [None]
    ticks = style.integer_ticks(x)
    figure.update_xaxes(
        title=None if single else ("KV head" if shared else "head"), showgrid=False, constrain="domain",
        tickmode="array", tickvals=ticks["tickvals"], range=[-0.5, len(heads) - 0.5],
        ticktext=["MLP"] if single else [str(heads[i]) for i in ticks["tickvals"]],
    )  # fmt: skip
    figure.update_yaxes(
        title="layer", showgrid=False, range=[layers[-1] + 0.5, layers[0] - 0.5], **style.integer_ticks(layers, 24)
    )
    return style.finish(
        figure, title=words(value), template_name=template, width=width, height=height, right=64,
        plot_height=int(np.clip(26 * len(layers), 220, 620)),
    )  # fmt: skip


def column(rows: pd.DataFrame, value: str, d: int | None) -> np.ndarray:
    """A value of some rows. [rows]"""
    if value == "unrounded":
        return pick.in_relative_units(rows, "fraction_unrounded", d)
    column = "isotropic_z" if value == "z" else value
    if column not in rows.columns:
        return np.full(len(rows), np.nan)
    return rows[column].to_numpy(float, na_value=np.nan)


def look(values: np.ndarray, value: Value, limit: float | None = None) -> dict[str, Any]:
    """What a map of these values sets: cells, symmetric colour limit (given, or theirs), ticks of the colour bar."""
    if not value.ratio:
        finite = np.abs(values[np.isfinite(values)])
        limit = limit or float(max(finite.max(initial=0.0), 2.0))
        tick = 10 ** math.floor(math.log10(limit))
        tick *= 1 if limit / tick < 2 else 2 if limit / tick < 5 else 4
        ticks = [-tick, 0, tick]
        return {
            "z": lists(values), "limit": limit, "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]
        }  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        # Zero, and what a correction took below it, is as far under chance as the scale goes.
        logs = np.where(values <= 0, -np.inf, np.log2(values))
    finite = np.abs(logs[np.isfinite(logs)])
    limit = limit or float(max(1, math.ceil(finite.max(initial=0.0))))
    exponents, labels = style.ratio_ticks(-limit, limit)
    return {
        "z": lists(np.where(np.isneginf(logs), -limit, logs)), "limit": limit,
        "tickvals": exponents, "ticktext": labels,
    }  # fmt: skip


def lists(values: np.ndarray) -> list[list[float | None]]:
    """Nested lists with None for NaN, three decimals: what menus and sliders can carry."""
    return [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in values]


def _where(mask: np.ndarray, layers: list[int], offset: float = 0.0) -> tuple[list[float], list[float]]:
    """Coordinates of the cells of a mask [layer, head], moved towards the upper right by `offset` of a cell."""
    i, j = np.nonzero(mask)
    return [float(v) + offset for v in j], [float(layers[v]) - offset for v in i]


def _significant(rows: pd.DataFrame, layers: list[int], heads: list[int | None]) -> np.ndarray:
    return pick.grid(rows, rows["isotropic_q"], layers, heads) < SIGNIFICANT


def mark_size(layers: list[int], heads: list[int | None]) -> float:
    """Pixels of a mark that fits the cells of a map."""
    return float(np.clip(180 / max(len(layers), len(heads)), 5, 11))


def rounding_marks(rounding: np.ndarray, layers: list[int], size: float) -> list[go.Heatmap | go.Scatter]:
    """Grey and a cross over cells whose delta is mostly rounding, a diamond where part of it is.

    Args:
        rounding: rounding shares [layer, head]; NaN has no mark.
        layers: the map's.
        size: of a mark, pixels.
    """
    dominated = rounding >= ROUNDING_DOMINATED
    grey = go.Heatmap(
        x=list(range(rounding.shape[1])), y=layers, z=lists(np.where(dominated, 1.0, np.nan)), zmin=0, zmax=1,
        showscale=False, opacity=0.85, colorscale=[(0, "#8d949c"), (1, "#8d949c")], xgap=1, ygap=1, hoverinfo="skip",
        name="greyed",
    )  # fmt: skip
    crossed = _where(dominated, layers)
    partly = _where((rounding >= ROUNDING_FLAGGED) & ~dominated, layers, offset=0.28)
    return [
        grey,
        marks(*crossed, "x", 1.5 * size, f"rounding share ≥ {ROUNDING_DOMINATED} (mostly storage)"),
        marks(*partly, "diamond", 0.9 * size, f"rounding share ≥ {ROUNDING_FLAGGED}", light=True),
    ]


def marks(x: list[float], y: list[float], symbol: str, size: float, name: str, *, light: bool = False) -> go.Scatter:
    """Marks over cells: dark with a light rim or the reverse, which shows on every colour and on both pages."""
    dark, bright = "#14181f", "#ffffff"
    marker = {
        "symbol": symbol, "size": size, "color": bright if light else dark,
        "line": {"width": 1.4, "color": dark if light else bright},
    }  # fmt: skip
    # A trace without a point has no legend entry, so an unused mark keeps one point that is not drawn.
    at: dict[str, list[Any]] = {"x": [*x] or [None], "y": [*y] or [None]}
    return go.Scatter(**at, mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=True)


def hover_cells(
    rows: pd.DataFrame, space: str, layers: list[int], heads: list[int | None],
    d: int | None, shared: bool, group: int | None,
) -> list[list[list[str]]]:  # fmt: skip
    """What the hover says, cell by cell: [layer][head][field], in the order of `HOVER`."""
    empty = [style.MISSING] * 12
    cells = [[list(empty) for _ in heads] for _ in layers]
    for i, layer in enumerate(layers):
        for j, head in enumerate(heads):
            cells[i][j][0] = pick.head_name(layer, head, kv=shared, group=group)
            cells[i][j][7] = ""
    at_layer, at_head = {v: i for i, v in enumerate(layers)}, {v: i for i, v in enumerate(heads)}
    matched = pick.in_relative_units(rows, "activation_matched", d)
    by_gradient = pick.in_relative_units(rows, "gradient_matched", d)
    unrounded = pick.in_relative_units(rows, "fraction_unrounded", d)
    for n, row in enumerate(rows.to_dict("records")):
        cell = cells[at_layer[int(row["layer"])]][at_head[None if pd.isna(row["head"]) else int(row["head"])]]
        gap = style.as_float(row["eigengap"])
        share = style.as_float(row["rounding_share"])
        cell[1:] = [
            style.number(row["relative"]),
            f"{style.number(row['fraction'])} at k = {row['rank']}",
            pick.interval(row["ci_low"], row["ci_high"], space),
            pick.isotropic(row),
            style.number(matched[n]),
            style.number(row["excess"]),
            ""
            if math.isnan(by_gradient[n])
            else f"<br>gradient-matched: {style.number(by_gradient[n])}, "
            f"excess {style.number(row.get('gradient_excess'))}",
            style.number(share) + (", mostly storage" if share >= ROUNDING_DOMINATED else ""),
            style.number(unrounded[n]),
            style.number(gap) + (", too small to trust the edge" if gap < SMALL_EIGENGAP else ""),
            style.number(row["delta_relative_norm"]),
        ]
    return cells
