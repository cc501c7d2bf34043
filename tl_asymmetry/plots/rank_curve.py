"""Rank curves: how a delta's concentration depends on how many directions are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, SIGNIFICANT, reads_latent
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.held import ISOTROPIC, Held, held_against
from tl_asymmetry.plots.hover import head_fields, head_name, head_template, row_names
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note

MOST_NAMED = 12
"""With more heads than this the legend would outgrow the plot, and the hover names them."""
REFERENCE_DASHES = ("dash", "dashdot", "longdash", "longdashdot", "dot")


@checked
def rank_curve_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    nulls: pd.DataFrame | None = None,
    curves: pd.DataFrame | None = None,
    layer: int,
    head: int | None = None,
    subspace: str | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw relative against rank k for one head, or for all heads of a layer.

    The line goes through every k where `curves` has them, else through the ranks of the table. A point stands at each
    rank of the table, filled where q ≤ 0.05, with the 95 % interval as a whisker (one head only). Drawn with it: chance
    at 1, what each null that expects a number expects, and the most that is possible, `d / k`.

    Args:
        table, nulls: as in `heads_figure`.
        matrix: one of the table's.
        curves: of this matrix, subspace and layer at every k: columns `head, rank, relative`, and by the keys of nulls
            the relative fraction that they expect.
        layer: the layer.
        head: the head (the KV head for W_K and W_V under grouped-query attention) or expert; None: all of an attention
            matrix's heads or a mixture's experts, and the only choice for an MLP matrix.
        subspace, d_model, kv, layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, layer or head.

    Example:
        >>> rank_curve_figure(result.table, "W_Q", layer=2, head=3).write_html("curve.html")
    """
    chosen, space = pick.select(table, matrix, subspace)
    style.one_of("layer", layer, pick.layers_of(chosen), "layer")
    chosen = chosen[chosen["layer"] == layer].sort_values("rank")
    heads = pick.heads_of(chosen)
    if head is not None:
        style.one_of(f"head of {matrix}", head, heads, "head")
        heads = [head]
    shared, group = pick.kv_group(table, matrix, kv)
    experts = pick.has_experts(chosen)
    d = pick.d_model_of(chosen, None) if reads_latent(matrix) else pick.d_model_of(table, d_model)
    chosen = chosen[_is_of(chosen, heads)]
    single, many = len(heads) == 1, len(heads) > MOST_NAMED
    ranks = sorted(int(k) for k in chosen["rank"].unique())
    if curves is None:
        curves = chosen[["head", "rank", "relative"]]
    if nulls is not None:
        nulls = nulls[(nulls["matrix"] == matrix) & (nulls["subspace"] == space)]
    helds = [held for held in held_against(chosen, nulls) if held.there or held.key == ISOTROPIC]
    fields = head_fields(chosen, row_names(chosen, shared, group), space, d, helds)
    figure = Drawing()
    seen: list[Any] = []
    for n, held in enumerate(held for held in helds if held.key != ISOTROPIC):
        level = _expected(held, chosen, curves, heads, d)
        if len(level):
            seen += level.tolist()
            name, dash = style.text(held.label), REFERENCE_DASHES[n % len(REFERENCE_DASHES)]
            figure.add_trace(
                scatter(
                    x=[int(k) for k in level.index], y=level.tolist(), mode="lines", name=name,
                    line={"color": style.SERIES[1], "dash": dash, "width": 2},
                    hovertemplate=f"{name} %{{y:.3g}} at k = %{{x}}<extra></extra>",
                )
            )  # fmt: skip
    if d is not None:
        figure.add_trace(
            scatter(
                x=ranks, y=[d / k for k in ranks], mode="lines", name="most possible, d/k",
                line={"color": style.GUIDE, "dash": "dot", "width": 1.5},
                hovertemplate="at most %{y:.4g} at k = %{x}<extra></extra>",
            )
        )  # fmt: skip
    others = [c for i, c in enumerate(style.SERIES) if i != 1]  # that one is the reference's
    colours = {h: style.SERIES[0] if single else others[n % len(others)] for n, h in enumerate(heads)}
    drawn = curves.sort_values("rank")
    at, height = drawn["rank"].to_numpy(int), drawn["relative"].to_numpy(float, na_value=np.nan)
    for h in heads:
        name, own = head_name(layer, h, kv=shared, group=group, expert=experts), _is_of(drawn, [h])
        seen += height[own].tolist()
        figure.add_trace(
            scatter(
                x=at[own].tolist(), y=height[own], mode="lines",
                name=f"{name}, every k", showlegend=False, legendgroup=name,
                line={"color": colours[h], "width": 2 if single else 1.3},
                hovertemplate=f"<b>{name}</b><br>relative %{{y:.3g}} at k = %{{x}}<extra></extra>",
            )
        )  # fmt: skip
    columns = ("rank", "relative", "ci_low", "ci_high", "isotropic_q")
    measured = chosen[list(columns)].to_numpy(float, na_value=np.nan)
    for n, h in enumerate(heads):
        name = head_name(layer, h, kv=shared, group=group, expert=experts)
        own = np.flatnonzero(_is_of(chosen, [h]))
        symbol = "circle" if single else style.SYMBOLS[n % len(style.SYMBOLS)]
        at, relative, low, high, q = measured[own].T
        whiskers = None
        if single and np.isfinite(low).any():
            seen += [*low, *high]
            whiskers = {
                "type": "data", "symmetric": False, "array": high - relative, "arrayminus": relative - low,
                "color": colours[h], "thickness": 1.5, "width": 4,
            }  # fmt: skip
        figure.add_trace(
            scatter(
                x=at.astype(int).tolist(), y=relative, mode="markers", name=name, showlegend=not many,
                legendgroup=name, error_y=whiskers,
                marker={
                    "size": 8 if single else 6, "color": colours[h], "line": {"color": colours[h], "width": 1.5},
                    "symbol": [symbol if s else f"{symbol}-open" for s in q <= SIGNIFICANT],
                },
                customdata=[fields[i] for i in own],
                hovertemplate=head_template(matrix, helds, verdict="verdict" in chosen.columns, experts=experts),
            )
        )  # fmt: skip

    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    figure.update_xaxes(
        title="rank k", type="log", tickmode="array", tickvals=ranks, ticktext=[str(k) for k in ranks],
        minor={"ticks": ""},
    )  # fmt: skip
    # The bound sets no range: at k = 1 it is d, and would press everything else to the floor.
    figure.update_yaxes(title="relative", **style.ratio_axis(seen, pad=0.5))
    if not np.isfinite(chosen["relative"].to_numpy(float, na_value=np.nan)).any():
        note(figure, "No value: the delta is zero, so its fractions are undefined.")
    who = f"L{layer}, all {'experts' if experts else 'heads'}"
    if single:
        who = head_name(layer, heads[0], kv=shared, group=group, expert=experts)
    words = heading(
        f"{who} · {style.text(matrix)}: concentration by rank",
        f"Against {style.text(space)}. Dashed grey: 1 = chance (isotropic null). Filled point: {FOUND}."
        + (" Whiskers: 95 % interval over texts." if single else "")
        + (f" Hover names the {'expert' if experts else 'head'}." if many else ""),
        **layout,
    )
    return finish(figure, words, plot_height=330, **layout)


def _is_of(rows: pd.DataFrame, heads: Sequence[int | None]) -> np.ndarray:
    """Which rows are of one of these heads."""
    there = rows["head"].to_numpy(float, na_value=np.nan)
    return np.isin(there, [h for h in heads if h is not None]) | (np.isnan(there) if None in heads else False)


def _expected(
    held: Held, rows: pd.DataFrame, curves: pd.DataFrame, heads: list[int | None], d: int | None
) -> pd.Series:  # fmt: skip
    """What a null expects, relative, by rank: of the median head, which for what all heads share is each of them."""
    if held.key in curves.columns:
        drawn = curves[_is_of(curves, heads)]
        return drawn.groupby("rank")[held.key].median().dropna()
    scale = (np.nan if d is None else d) / rows["rank"].astype(float)
    return (held.numbers.loc[rows.index, "expected"] * scale).groupby(rows["rank"]).median().dropna()
