"""Jacobians: singular value profiles, gains along subspaces, how subspaces of different layers overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, heatmap, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, rank_slider

MOST_RANKS = 96
"""Ranks in a gain map, at most."""
_MOST_WRITTEN = 14
"""Up to so many subspaces, their overlaps are written into the cells."""


@checked
def singular_values_figure(
    values: Any,
    layers: Sequence[int],
    *,
    what: str = "",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw singular values in descending order, one line per layer, on a log axis with 1 marked.

    A value of 1 keeps the length of a direction. Values of zero have no place on the axis; those beyond twelve decades
    under the largest are rounding and are cut off, and the title says so.

    Args:
        values: singular values [layer, d], descending.
        layers: the layers' numbers.
        what: what the matrices are of, for the title.
        layout: as in `heads_figure`.

    Raises:
        ValueError: values that are no [layer, d] array of that many layers.

    Example:
        >>> values = np.array([[2.0, 1.0, 0.5], [1.5, 1.0, 0.9]])
        >>> len(singular_values_figure(values, [0, 1]).data)
        2
    """
    σ = np.asarray(values, dtype=float)
    if σ.ndim != 2 or len(σ) != len(layers) or σ.shape[1] == 0:
        raise ValueError(
            f"expected singular values of shape [{len(layers)}, d], got {list(σ.shape)}; pass result.singular_values()"
        )
    floor = np.nanmax(σ) * 1e-12
    cut = int((σ <= floor).sum())
    figure = Drawing()
    colours = style.sequential(len(layers))
    index = np.arange(1, σ.shape[1] + 1)
    for colour, layer, row in zip(colours, layers, σ, strict=True):
        shown = np.where(row > floor, row, np.nan)
        figure.add_trace(
            scatter(
                x=index, y=shown, mode="lines", name=f"layer {layer}", line={"color": colour, "width": 1.8},
                customdata=[[style.number(v, 4)] for v in row],
                hovertemplate=f"<b>layer {layer}</b>, index %{{x}}<br>singular value %{{customdata[0]}}<extra></extra>",
            )
        )  # fmt: skip
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="index (largest first)")
    figure.update_yaxes(title="singular value", **style.ratio_axis(σ.ravel().tolist()))
    lines = ["Dotted: 1, a direction's length kept."]
    if cut:
        lines.append(f"{cut} values under a 1e-12th of the largest are left out.")
    words = heading(
        "Singular values of the mean Jacobians", f"Of {style.text(what)}." if what else "", " ".join(lines), **layout
    )
    return finish(figure, words, plot_height=380, legend=len(layers) <= 12, **layout)


@checked
def gain_figure(
    table: pd.DataFrame,
    *,
    value: str = "gain",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map the gain along a subspace's directions over layers and ranks: blue shortens, orange lengthens, 1 is neutral.

    Args:
        table: `LayerJacobians.gain(subspace)`: `layer, rank, gain, direction_gain`.
        value: "gain" of the first k directions together, or "direction_gain" of the k-th alone.
        layout: as in `heads_figure`.

    Raises:
        ValueError: an unknown value, or a table without rows.

    Example:
        >>> rows = {"layer": [0, 0], "rank": [1, 2], "gain": [2.0, 1.5], "direction_gain": [2.0, 0.7], "name": "x"}
        >>> gain_figure(pd.DataFrame(rows)).data[0].type
        'heatmap'
    """
    style.one_of("value", value, ["gain", "direction_gain"], "value")
    if not len(table):
        raise ValueError("expected a table with rows, got an empty one; pass result.gain(subspace)")
    ranks = _some([int(k) for k in sorted(table["rank"].unique())])
    layers = sorted(int(i) for i in table["layer"].unique())
    grid = table.pivot(index="layer", columns="rank", values=value).reindex(index=layers, columns=ranks).to_numpy(float)
    with np.errstate(divide="ignore"):
        logs = np.log2(grid)
    finite = np.abs(logs[np.isfinite(logs)])
    limit = max(0.25, float(finite.max()) if len(finite) else 0.25)
    exponents, labels = style.ratio_ticks(-limit, limit, most=5)
    hover = [[[layer, k, style.number(v, 4)] for k, v in zip(ranks, row, strict=True)]
             for layer, row in zip(layers, grid, strict=True)]  # fmt: skip
    of = "the first %{customdata[1]} directions" if value == "gain" else "direction %{customdata[1]}"
    cells = heatmap(
        x=[str(k) for k in ranks], y=layers, z=np.clip(logs, -limit, limit), zmin=-limit, zmax=limit, zmid=0,
        colorscale=style.diverging(layout.get("template")), xgap=1 if len(ranks) < 48 else 0, ygap=1,
        customdata=hover,
        hovertemplate=f"<b>layer %{{customdata[0]}}</b>, {of}<br>gain %{{customdata[2]}}<extra></extra>",
        colorbar={
            "thickness": 12, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 4,
            "title": {"text": "gain", "side": "top", "font": {"size": 11}},
            "tickmode": "array", "tickvals": exponents, "ticktext": labels,
        },
    )  # fmt: skip
    figure = Drawing([cells])
    distinct = list(dict.fromkeys(style.text(name) for name in table["name"] if name))
    names = " … ".join([distinct[0], distinct[-1]] if len(distinct) > 1 else distinct)
    figure.update_xaxes(title="rank k" if value == "gain" else "direction", type="category", nticks=16)
    figure.update_yaxes(title="layer", autorange="reversed", **style.integer_ticks(layers))
    words = heading(
        f"Gain along {names or 'a subspace'}",
        "‖J̄ Q‖ / √k: how much longer the mean Jacobian makes the first k directions. 1 keeps lengths."
        if value == "gain"
        else "‖J̄ q‖ of one direction at a time. 1 keeps its length.",
        **layout,
    )
    return finish(figure, words, plot_height=max(160, 26 * len(layers)), legend=False, right=90, **layout)


@checked
def overlap_figure(
    table: pd.DataFrame,
    *,
    rank: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map how much the subspaces of any two layers overlap, with a slider of ranks.

    1 is the same subspace, 0 an orthogonal one; the hover sets chance, k/d, beside each.

    Args:
        table: `PredictionPullback.overlaps`: `a, b, rank, overlap, chance`, a and b labels of subspaces.
        rank: shown first; None takes the middle one.
        layout: as in `heads_figure`.

    Raises:
        ValueError: an unknown rank, or a table without rows.

    Example:
        >>> rows = {"a": list("0011"), "b": list("0101"), "rank": 2, "overlap": [1, 0.4, 0.4, 1], "chance": 0.1}
        >>> overlap_figure(pd.DataFrame(rows)).data[0].type
        'heatmap'
    """
    if not len(table):
        raise ValueError("expected a table with rows, got an empty one; pass result.overlaps")
    ranks = sorted(int(k) for k in table["rank"].unique())
    first = ranks[len(ranks) // 2] if rank is None else style.one_of("rank", rank, ranks, "rank")
    names = list(dict.fromkeys(table["a"]))
    labels = [style.text(name) for name in names]
    grids, hovers = [], []
    for k in ranks:
        rows = table[table["rank"] == k]
        grid = rows.pivot(index="a", columns="b", values="overlap").reindex(index=names, columns=names).to_numpy(float)
        chance = float(rows["chance"].iloc[0])
        grids.append(grid)
        hovers.append(
            [[[labels[i], labels[j], style.number(grid[i, j]), style.number(chance), k] for j in range(len(names))]
             for i in range(len(names))]
        )  # fmt: skip
    start = ranks.index(first)
    page = "dark" if style.is_dark(layout.get("template")) else "light"
    cells = heatmap(
        x=labels, y=labels, z=grids[start], zmin=0, zmax=1, customdata=hovers[start],
        colorscale=[(0, style.PAPER[page]), (1, style.SERIES[0])],
        xgap=1, ygap=1, text=_texts(hovers[start]), textfont={"size": 11},
        texttemplate="%{text}" if len(names) <= _MOST_WRITTEN else None,
        hovertemplate=(
            "<b>%{customdata[0]}</b> and <b>%{customdata[1]}</b>, rank %{customdata[4]}"
            "<br>overlap %{customdata[2]} (chance %{customdata[3]})<extra></extra>"
        ),
        colorbar={
            "thickness": 12, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 4,
            "title": {"text": "overlap", "side": "top", "font": {"size": 11}},
        },
    )  # fmt: skip
    figure = Drawing([cells])
    if len(ranks) > 1:
        steps = [
            [{"z": [grid], "customdata": [hover], "text": [_texts(hover)]}, [0]]
            for grid, hover in zip(grids, hovers, strict=True)
        ]
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])
    figure.update_xaxes(title="", type="category")
    figure.update_yaxes(title="", type="category", autorange="reversed")
    words = heading(
        "Prediction subspaces of the layers, compared",
        "Share of one layer's first k directions that lies in another's: 1 = the same, chance = k/d.",
        **layout,
    )
    return finish(figure, words, plot_height=max(220, 40 * len(names)), legend=False, right=90, **layout)


def _texts(hover: list[list[list[Any]]]) -> list[list[str]]:
    """What is written into the cells: the overlaps."""
    return [[cell[2] for cell in row] for row in hover]


def _some(ranks: list[int]) -> list[int]:
    """All ranks, or log-spaced ones where there are too many to tell apart."""
    if len(ranks) <= MOST_RANKS:
        return ranks
    at = np.unique(np.round(np.geomspace(1, len(ranks), MOST_RANKS)).astype(int)) - 1
    return [ranks[i] for i in at]
