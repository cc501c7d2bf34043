"""All layer × head maps of a table in one figure: a menu of matrices, one of values and their nulls, a slider of ranks.

plotly's controls know nothing of each other: each can only set attributes to what was written into it beforehand. So
that any combination works, every control owns attributes of its own. All maps are laid out on one sheet, matrices
below each other and ranks side by side: the menu of matrices moves the window's vertical range, the slider of ranks
its horizontal one (and the colour limits), the menu of values shows and hides traces. Nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.names import ROUNDING_DOMINATED, ROUNDING_FLAGGED, SIGNIFICANT
from tl_asymmetry.plots import heads as one
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style

MOST_MARKS = 1_000_000
"""A limit no figure reaches: with one set, plotly draws only the marks inside the window."""


def head_maps_figure(
    table: pd.DataFrame,
    *,
    matrix: str | None = None,
    subspace: str | None = None,
    value: str = "relative",
    default_rank: int | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    title: str | None = None,
    template: Any = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """Map every matrix over layers and heads, with menus of matrices and values and a slider of ranks that combine.

    Colours and marks are those of `heads_figure`. The colour range belongs to the value and rank shown and is the
    same for all matrices, so that maps can be compared. A value comes with the null it is held against: the
    isotropic one (as a ratio or in standard deviations), or a matched reference. A KV head spans the query heads it
    serves, an MLP matrix the whole width.

    Args:
        table: `PairAnalysis.table`.
        matrix, subspace: shown first; None: the table's first matrix, against its usual subspace.
        value: shown first, as in `heads_figure`.
        default_rank: shown first; None: `d // 16`, or the middle one.
        d_model, kv, title, template, width, height: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, rank or value, or a value no matrix has.

    Example:
        >>> head_maps_figure(result.table, matrix="W_O").write_html("maps.html")
    """
    pick.require(table, pick.COLUMNS)
    style.one_of("value", value, list(one.VALUES), "value")
    first = str(table["matrix"].iloc[0]) if matrix is None else matrix
    first_space = pick.select(table, first, subspace)[1]
    d = pick.d_model_of(table, d_model)
    ranks, start = pick.pick_ranks(table, None, default_rank, d)
    layers = pick.layers_of(table)
    pairs = list(dict.fromkeys(zip(table["matrix"], table["subspace"], strict=True)))
    blocks = [_block(table, m, s, n, ranks=ranks, layers=layers, d=d, kv=kv) for n, (m, s) in enumerate(pairs)]
    columns = max(len(b.heads) for b in blocks)
    shown = [
        v for v in one.VALUES if v == "relative" or any(np.isfinite(g).any() for b in blocks for g in b.grids[v])
    ]  # fmt: skip
    if value not in shown:
        raise ValueError(f"expected a value that some matrix has, got {value!r}, which is NaN in every row; "
                         f"pass value={shown[0]!r}")  # fmt: skip
    at_first = pairs.index((first, first_space))

    figure = go.Figure()
    # One colour limit for each value and rank.
    looks = {v: [one.look(np.concatenate([b.grids[v][r].ravel() for b in blocks])[None], one.VALUES[v])
                 for r in range(len(ranks))] for v in shown}  # fmt: skip
    owners: list[str] = []  # the value each of the first traces belongs to
    for name in shown:
        bar = True
        for block in blocks:
            if not any(np.isfinite(g).any() for g in block.grids[name]):
                figure.add_trace(_absent(block, one.VALUES[name].absent, columns, len(ranks), visible=name == value))
            else:
                cells = [one.look(g, one.VALUES[name], look["limit"])["z"]
                         for g, look in zip(block.grids[name], looks[name], strict=True)]  # fmt: skip
                figure.add_trace(_map(block, name, cells, columns, looks[name][start], template,
                                      bar=bar, visible=name == value))  # fmt: skip
                bar = False
            owners.append(name)
    maps = [i for i, trace in enumerate(figure.data) if trace.type == "heatmap"]

    for block in blocks:
        if any(mask.any() for mask in block.masks["dominated"]):
            figure.add_trace(_grey(block, columns, len(ranks)))
    size = float(np.clip(180 / max(len(layers), columns), 5, 11))
    for mark in (
        one.marks(*_places(blocks, columns, "dominated"), "x", 1.5 * size,
                  f"rounding share ≥ {ROUNDING_DOMINATED} (mostly storage)"),
        one.marks(*_places(blocks, columns, "rounded", 0.28), "diamond", 0.9 * size,
                  f"rounding share ≥ {ROUNDING_FLAGGED}", light=True),
        one.marks(*_places(blocks, columns, "significant"), "circle", 0.75 * size,
                  f"q < {SIGNIFICANT} (isotropic null)"),
    ):  # fmt: skip
        figure.add_trace(mark.update(marker={"maxdisplayed": MOST_MARKS}))
    for block in blocks:
        figure.add_trace(_hover(block, columns, len(ranks)))

    def words(name: str) -> str:
        head = style.text(title) if title is not None else one.VALUES[name].label
        return style.heading(head[:1].upper() + head[1:], one.VALUES[name].meaning)

    menus = []
    if len(blocks) > 1:
        menus.append(
            {
                "name": "matrix", "active": at_first, "direction": "down",
                "buttons": [
                    {"label": b.label, "method": "relayout", "args": [_window(b, columns, len(ranks))]} for b in blocks
                ],
            }
        )  # fmt: skip
    if len(shown) > 1:
        menus.append(
            {
                "name": "value and its null", "active": shown.index(value), "direction": "down",
                "buttons": [
                    {
                        "label": one.VALUES[v].label, "method": "update",
                        "args": [
                            {"visible": [o == v for o in owners]}, {"title.text": words(v)}, list(range(len(owners)))
                        ],
                    }
                    for v in shown
                ],
            }
        )  # fmt: skip
    ranges = [[r * (columns + 1) - 0.5, r * (columns + 1) + columns - 0.5] for r in range(len(ranks))]
    if len(ranks) > 1:
        steps = []
        for r in range(len(ranks)):
            of_maps = [looks[owners[i]][r] for i in maps]
            limits = {
                "zmin": [-k["limit"] for k in of_maps], "zmax": [k["limit"] for k in of_maps],
                "colorbar.tickvals": [k["tickvals"] for k in of_maps],
                "colorbar.ticktext": [k["ticktext"] for k in of_maps],
            }  # fmt: skip
            steps.append([limits, {"xaxis.range": ranges[r]}, maps])
        figure.update_layout(sliders=[style.rank_slider(ranks, start, steps)])
    figure.update_layout(updatemenus=menus, dragmode=False)

    window = _window(blocks[at_first], columns, len(ranks))
    figure.update_xaxes(
        title=window["xaxis.title.text"], showgrid=False, range=ranges[start], fixedrange=True, tickmode="array",
        tickvals=window["xaxis.tickvals"], ticktext=window["xaxis.ticktext"],
    )  # fmt: skip
    ticks = style.integer_ticks(range(len(layers)), 24)["tickvals"]
    figure.update_yaxes(
        title="layer", showgrid=False, range=window["yaxis.range"], fixedrange=True, tickmode="array",
        tickvals=[b.top + i for b in blocks for i in ticks], ticktext=[str(layers[i]) for _ in blocks for i in ticks],
    )  # fmt: skip
    if not any(np.isfinite(g).any() for b in blocks for g in b.grids["relative"]):
        style.note(figure, "No value: the delta is zero, so its fractions are undefined.")
    return style.finish(
        figure, title=words(value), template_name=template, width=width, height=height, right=64,
        plot_height=int(np.clip(26 * len(layers), 220, 620)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """The maps of one matrix against one subspace, on the sheet."""

    label: str
    """In the menu."""
    axis: str
    """Title of the horizontal axis."""
    top: int
    """Vertical position of the first layer."""
    heads: list[int | None]
    """Its own heads."""
    hovertemplate: str
    """Of its cells."""
    grids: dict[str, list[np.ndarray]]
    """Numbers [layer, head] by value and rank."""
    masks: dict[str, list[np.ndarray]]
    """Which cells carry which mark, by rank."""
    hovers: list[list[list[list[str]]]]
    """Fields of each cell's hover, by rank."""

    @property
    def layers(self) -> int:
        return len(self.grids["relative"][0])

    def edges(self, columns: int, ranks: int) -> list[float]:
        """Horizontal edges of all its cells, and of an empty column between ranks."""
        wide = columns / len(self.heads)
        return [
            round(r * (columns + 1) - 0.5 + n * wide, 4) for r in range(ranks) for n in range(len(self.heads) + 1)
        ]  # fmt: skip


def _block(
    table: pd.DataFrame, matrix: str, space: str, number: int, *,
    ranks: Sequence[int], layers: list[int], d: int | None, kv: bool | None,
) -> _Block:  # fmt: skip
    rows, _ = pick.select(table, matrix, space)
    heads = pick.heads_of(rows)
    shared, group = pick.kv_group(table, matrix, kv)
    by_rank = [rows[rows["rank"] == k] for k in ranks]
    rounding = [pick.grid(r, r["rounding_share"], layers, heads) for r in by_rank]
    name, against = style.text(matrix), style.text(space)
    what = "head" if heads != [None] else "no heads, one value a layer"
    return _Block(
        label=f"{name} in {against}",
        axis=f"{'KV head' if shared else what} · {name} against {against}",
        top=number * (len(layers) + 1),
        heads=heads,
        hovertemplate=one.HOVER.replace("{matrix}", name),
        grids={v: [pick.grid(r, one.column(r, v, d), layers, heads) for r in by_rank] for v in one.VALUES},
        masks={
            "dominated": [g >= ROUNDING_DOMINATED for g in rounding],
            "rounded": [(g >= ROUNDING_FLAGGED) & (g < ROUNDING_DOMINATED) for g in rounding],
            "significant": [pick.grid(r, r["isotropic_q"], layers, heads) < SIGNIFICANT for r in by_rank],
        },
        hovers=[one.hover_cells(r, space, layers, heads, d, shared, group) for r in by_rank],
    )


def _window(block: _Block, columns: int, ranks: int) -> dict[str, Any]:
    """What the menu of matrices sets: which layers, and the names of the heads under every rank."""
    wide = columns / len(block.heads)
    ticks = style.integer_ticks(range(len(block.heads)))["tickvals"] if block.heads != [None] else []
    return {
        "yaxis.range": [block.top + block.layers - 0.5, block.top - 0.5],
        "xaxis.title.text": block.axis,
        "xaxis.tickvals": [r * (columns + 1) - 0.5 + (i + 0.5) * wide for r in range(ranks) for i in ticks],
        "xaxis.ticktext": [str(block.heads[i]) for _ in range(ranks) for i in ticks],
    }


def _sheet(parts: Sequence[Sequence[Sequence[Any]]], empty: Any) -> list[list[Any]]:
    """Maps [layer][head] of all ranks side by side, an empty column between two."""
    return [
        [cell for r, part in enumerate(parts) for cell in ([empty] if r else []) + list(part[i])]
        for i in range(len(parts[0]))
    ]  # fmt: skip


def _axes(block: _Block, columns: int, ranks: int) -> dict[str, Any]:
    return {"x": block.edges(columns, ranks), "y": [block.top + i for i in range(block.layers)], "xgap": 1, "ygap": 1}


def _map(
    block: _Block, name: str, cells: list[list[list[float | None]]], columns: int, look: dict[str, Any],
    template: Any, *, bar: bool, visible: bool,
) -> go.Heatmap:  # fmt: skip
    return go.Heatmap(
        **_axes(block, columns, len(cells)), z=_sheet(cells, None), zmin=-look["limit"], zmax=look["limit"], zmid=0,
        colorscale=style.diverging(template), hoverinfo="skip", visible=visible, name=name, meta="diverging",
        showscale=bar,
        colorbar={
            "thickness": 12, "len": 0.94, "y": 0, "yanchor": "bottom", "outlinewidth": 0, "x": 1.01, "xpad": 4,
            "title": {"text": one.VALUES[name].bar, "side": "top", "font": {"size": 11}},
            "tickmode": "array", "tickvals": look["tickvals"], "ticktext": look["ticktext"],
        },
    )  # fmt: skip


def _absent(block: _Block, why: str, columns: int, ranks: int, *, visible: bool) -> go.Scatter:
    """Words in the middle of an empty map."""
    middle = [r * (columns + 1) + (columns - 1) / 2 for r in range(ranks)]
    return go.Scatter(
        x=middle, y=[block.top + (block.layers - 1) / 2] * ranks, text=[why] * ranks, mode="text", hoverinfo="skip",
        showlegend=False, visible=visible, cliponaxis=True, name="absent",
    )  # fmt: skip


def _grey(block: _Block, columns: int, ranks: int) -> go.Heatmap:
    cells = [np.where(mask, 1.0, np.nan) for mask in block.masks["dominated"]]
    return go.Heatmap(
        **_axes(block, columns, ranks), z=_sheet([one.lists(c) for c in cells], None), zmin=0, zmax=1,
        showscale=False, opacity=0.85, colorscale=[(0, "#8d949c"), (1, "#8d949c")], hoverinfo="skip", name="greyed",
    )  # fmt: skip


def _hover(block: _Block, columns: int, ranks: int) -> go.Heatmap:
    """A transparent map that carries the words of every cell, stored once and not once for each value."""
    axes = _axes(block, columns, ranks)
    return go.Heatmap(
        **axes, z=[[0] * (len(axes["x"]) - 1) for _ in axes["y"]], showscale=False, name="hover",
        colorscale=[(0, "rgba(0,0,0,0)"), (1, "rgba(0,0,0,0)")], customdata=_sheet(block.hovers, []),
        hovertemplate=block.hovertemplate,
    )  # fmt: skip


def _places(
    blocks: Sequence[_Block], columns: int, mark: str, offset: float = 0.0
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Where the marked cells of all maps lie on the sheet."""
    xs: list[float] = []
    ys: list[float] = []
    for block in blocks:
        wide = columns / len(block.heads)
        for r, mask in enumerate(block.masks[mark]):
            i, j = np.nonzero(mask)
            xs += [round(r * (columns + 1) - 0.5 + (n + 0.5) * wide + offset, 3) for n in j.tolist()]
            ys += [block.top + n - offset for n in i.tolist()]
    return xs, ys
