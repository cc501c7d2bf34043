"""The layer × head maps of all matrices side by side, one value at one rank: a figure that needs no controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import maps, style
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.drawing import Drawing, Trace, heatmap, scatter
from tl_asymmetry.plots.held import held_against
from tl_asymmetry.plots.hover import row_names
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading

_BETWEEN_PX = 52
"""Pixels between two rows of maps: the heads' numbers, and the next title."""


@checked
def head_sheet_figure(
    table: pd.DataFrame,
    *,
    nulls: pd.DataFrame | None = None,
    subspace: str | None = None,
    rank: int | None = None,
    value: str = "verdict",
    default_rank: int | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    across: int = 4,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map every matrix over layers and heads, all at once, each against its usual subspace and on one scale.

    Colours and marks are those of `heads_figure`. Nothing has to be pressed, so it prints as it is.

    Args:
        table, nulls: as in `heads_figure`.
        subspace: hold every matrix against this one; None: reads against their own input, writes against "prediction".
        rank: which; None: `default_rank`, or as in `heads_figure`.
        value: what is shown, as in `heads_figure`.
        default_rank, d_model, kv, layout: as in `heads_figure`.
        across: maps in a row.

    Raises:
        ValueError: for an unknown subspace, rank or value, or a value that no matrix has.

    Example:
        >>> head_sheet_figure(result.table, value="relative").write_html("sheet.html")
    """
    pick.require(table, pick.COLUMNS)
    if across < 1:
        raise ValueError(f"expected across >= 1, got {across}; pass how many maps stand in a row")
    d = pick.d_model_of(table, d_model)
    ranks, at = pick.pick_ranks(table, rank, default_rank, d)
    helds = held_against(table, nulls)
    values = maps.values_of(table, helds, d)
    key = maps.key_of(table, values, helds, value)
    shown = values[key]
    chosen = {}
    for matrix in dict.fromkeys(table["matrix"].astype(str)):
        rows, space = pick.select(table, matrix, subspace)
        chosen[matrix, space] = rows[rows["rank"] == ranks[at]]
    if not any(shown.numbers.loc[rows.index].notna().any() for rows in chosen.values()):
        raise ValueError(
            f"expected a value that some matrix has, got {value!r}, which is NaN everywhere; pass value='relative'"
        )
    layers, across = pick.layers_of(table), min(across, len(chosen))
    down = math.ceil(len(chosen) / across)
    figure = Drawing(
        rows=down, cols=across, shared_yaxes=True, horizontal_spacing=0.03,
        vertical_spacing=_BETWEEN_PX / (down * maps.map_height(layers) + (down - 1) * _BETWEEN_PX) if down > 1 else 0,
        subplot_titles=[f"{style.text(m)} · {style.text(space)}" for m, space in chosen],
    )  # fmt: skip
    kinds = maps.tested(values, [key])
    everything = [shown.grid(rows, layers, pick.heads_of(rows)) for rows in chosen.values()]
    scale = maps.look(np.concatenate([numbers.ravel() for numbers in everything])[None], shown)
    size = 0.6 * maps.mark_size(layers, [*range(max(numbers.shape[1] for numbers in everything))])
    for n, ((matrix, space), rows) in enumerate(chosen.items()):
        place, first = {"row": n // across + 1, "col": n % across + 1}, n == 0
        heads, numbers = pick.heads_of(rows), everything[n]
        shared, group = pick.kv_group(table, matrix, kv)
        cells = {**scale, **{k: v for k, v in maps.look(numbers, shown, scale["zmax"]).items() if k in ("z", "text")}}
        x = list(range(len(heads)))
        bar = first and shown.kind != "verdict"  # verdicts are words, which have room under the maps
        coloured = maps.cells(shown, key, cells, layout.get("template"), x=x, y=layers, showscale=bar)
        figure.add_trace(coloured, **place)
        marks = maps.rounding_marks(pick.grid(rows, rows["rounding_share"], layers, heads), layers, size)
        for name, relation, held, _ in kinds:
            mask = pick.grid(rows, held.relation.loc[rows.index], layers, heads) == relation
            marks.append(maps.dots(*maps.where(mask, layers), relation, size, name))
        for mark in marks:
            shown_once = {"legendgroup": mark["name"], "showlegend": first and mark["type"] == "scatter"}
            figure.add_trace(mark | shown_once, **place)
        every, _ = pick.select(table, matrix, space)
        why = partial(pick.absence, every, table)
        figure.add_trace(_hover(rows, shown, row_names(rows, shared, group), layers, heads, why), **place)
        ticks = style.integer_ticks(x)["tickvals"] if heads != [None] else []
        figure.update_xaxes(
            showgrid=False, tickmode="array", tickvals=ticks, ticktext=[str(heads[i]) for i in ticks],
            range=[-0.5, len(heads) - 0.5], **place,
        )  # fmt: skip
        figure.update_yaxes(
            showgrid=False, range=[layers[-1] + 0.5, layers[0] - 0.5], title="layer" if n % across == 0 else None,
            **style.integer_ticks(layers, 24), **place,
        )  # fmt: skip
    there = []
    if shown.kind == "verdict":
        codes = np.concatenate([numbers.ravel() for numbers in everything])
        there = [v for i, v in enumerate(maps.VERDICTS.items()) if (codes == i).any()]
    for verdict, (sign, color) in there:
        sample = {"symbol": "square", "size": 12, "color": color, "line": {"width": 1, "color": style.GUIDE}}
        figure.add_trace(
            scatter(x=[None], y=[None], mode="markers", marker=sample, name=f"{sign} {verdict}"), row=1, col=1
        )
    for title in figure.layout["annotations"]:
        title["font"] = {"size": 12}
    words = heading(
        style.text(f"{shown.label[:1].upper()}{shown.label[1:]} of all matrices at rank {ranks[at]}"),
        style.text(f"Layers down, heads{' and experts' if pick.has_experts(table) else ''} across. {shown.meaning}"),
        **layout,
    )
    return finish(
        figure,
        words,
        plot_height=down * maps.map_height(layers) + (down - 1) * _BETWEEN_PX + 20,
        right=24 if there else maps.bar_width(shown),
        legend_px=maps.legend_height(kinds) + 20 * len(there),
        **layout,
    )


def _hover(
    rows: pd.DataFrame,
    value: maps.Value,
    names: Sequence[str],
    layers: Sequence[int],
    heads: Sequence[int | None],
    why: Callable[[int, int | None], str],
) -> Trace:
    """A transparent map that carries each cell's name and number, or why it has none."""
    there = set(zip(rows["layer"].astype(int), rows["head"].fillna(-1).astype(int), strict=True))
    words = [
        ["" if (layer, -1 if head is None else head) in there else style.text(why(layer, head)) for head in heads]
        for layer in layers
    ]
    verdicts = list(maps.VERDICTS)

    def said(number: float) -> str:
        if math.isnan(number):
            return style.MISSING
        return verdicts[int(number)] if value.kind == "verdict" else f"{number:.3g}"

    numbers = value.numbers.loc[rows.index]
    for name, layer, head, number in zip(names, rows["layer"], rows["head"], numbers, strict=True):
        words[layers.index(layer)][heads.index(None if pd.isna(head) else int(head))] = f"{name}: {said(number)}"
    return heatmap(
        x=list(range(len(heads))), y=layers, z=[[0] * len(heads) for _ in layers], showscale=False, name="hover",
        colorscale=[(0, "rgba(0,0,0,0)"), (1, "rgba(0,0,0,0)")], customdata=words,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
