"""Rank curves: how a delta's concentration depends on how many directions are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.names import SIGNIFICANT
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style

MOST_NAMED = 12
"""With more heads than this the legend would outgrow the plot, and the hover names them."""
HOVER = (
    "<b>%{customdata[0]}</b><br>relative %{customdata[1]} (fraction %{customdata[2]})"
    "<br>95 % interval over texts: %{customdata[3]}<br>isotropic null: %{customdata[4]}"
    "<br>activation-matched: %{customdata[5]}, excess %{customdata[6]}"
    "<br>rounding share %{customdata[7]}<br>eigengap %{customdata[8]}<extra></extra>"
)


def rank_curve_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    layer: int,
    head: int | None = None,
    subspace: str | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    title: str | None = None,
    template: Any = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """Draw relative against rank k for one head, or for all heads of a layer.

    Drawn with it: the 95 % interval as a band (one head only), chance at 1, the activation-matched reference, the
    gradient-matched one where there is one, and the most that is possible, `d / k`. A filled point has q < 0.05.

    Args:
        table: `PairAnalysis.table`.
        matrix: one of the table's.
        layer: the layer.
        head: the head (the KV head for W_K and W_V under grouped-query attention); None: all of an attention
            matrix's heads, and the only choice for an MLP matrix.
        subspace, d_model, kv, title, template, width, height: as in `heads_figure`.

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
    d = pick.d_model_of(table, d_model)
    curves = {h: chosen[chosen["head"].isna() if h is None else (chosen["head"] == h).fillna(False)] for h in heads}
    single, many = len(heads) == 1, len(heads) > MOST_NAMED
    first = curves[heads[0]]
    ranks = first["rank"].astype(int).tolist()
    figure = go.Figure()

    low, high = (first[c].to_numpy(float, na_value=np.nan) for c in ("ci_low", "ci_high"))
    told = np.isfinite(low) & np.isfinite(high)
    if single and told.any():
        k = np.array(ranks)[told]
        figure.add_trace(
            go.Scatter(
                x=[*k, *k[::-1]], y=[*low[told], *high[told][::-1]], fill="toself", mode="none", opacity=0.22,
                fillcolor=style.SERIES[0], name="95 % interval (over texts)", hoverinfo="skip",
            )
        )  # fmt: skip
    seen: list[Any] = [*low[told], *high[told]] if single else []
    references = (
        ("activation_matched", "activation-matched", "dash"), ("gradient_matched", "gradient-matched", "dashdot")
    )  # fmt: skip
    for column, name, dash in references:
        # All heads of a matrix share its input, so their reference is one line; on the gradients' side it is not,
        # and the median stands for the heads.
        units = pd.Series(pick.in_relative_units(chosen, column, d), index=chosen.index)
        if single:
            units = units[first.index]
        level = units.groupby(chosen["rank"].reindex(units.index)).median().dropna()
        if len(level):
            seen += level.tolist()
            figure.add_trace(
                go.Scatter(
                    x=[int(k) for k in level.index], y=level.tolist(), mode="lines", name=f"{name} reference",
                    line={"color": style.SERIES[1], "dash": dash, "width": 2},
                    hovertemplate=f"{name} reference %{{y:.3g}} at k = %{{x}}<extra></extra>",
                )
            )  # fmt: skip
    if d is not None:
        figure.add_trace(
            go.Scatter(
                x=ranks, y=[d / k for k in ranks], mode="lines", name="most possible, d/k",
                line={"color": style.GUIDE, "dash": "dot", "width": 1.5},
                hovertemplate="at most %{y:.4g} at k = %{x}<extra></extra>",
            )
        )  # fmt: skip
    others = [c for i, c in enumerate(style.SERIES) if i != 1]  # that one is the reference's
    for n, (h, rows) in enumerate(curves.items()):
        colour = style.SERIES[0] if single else others[n % len(others)]
        matched = pick.in_relative_units(rows, "activation_matched", d)
        name = pick.head_name(layer, h, kv=shared, group=group)
        significant = rows["isotropic_q"].to_numpy(float, na_value=np.nan) < SIGNIFICANT
        symbol = "circle" if single else style.SYMBOLS[n % len(style.SYMBOLS)]
        relative = rows["relative"].to_numpy(float, na_value=np.nan)
        seen += relative.tolist()
        figure.add_trace(
            go.Scatter(
                x=rows["rank"].astype(int).tolist(), y=relative, mode="lines+markers", name=name, showlegend=not many,
                line={"color": colour, "width": 2 if single else 1.3},
                marker={
                    "size": 8 if single else 6, "color": colour, "line": {"color": colour, "width": 1.5},
                    "symbol": [symbol if s else f"{symbol}-open" for s in significant],
                },
                customdata=[
                    [
                        f"{name} · {style.text(matrix)}", style.number(row["relative"]),
                        f"{style.number(row['fraction'])} at k = {row['rank']}",
                        pick.interval(row["ci_low"], row["ci_high"], space), pick.isotropic(row),
                        style.number(m), style.number(row["excess"]), style.number(row["rounding_share"]),
                        style.number(row["eigengap"]),
                    ]
                    for row, m in zip(rows.to_dict("records"), matched, strict=True)
                ],
                hovertemplate=HOVER,
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
        style.note(figure, "No value: the delta is zero, so its fractions are undefined.")
    who = pick.head_name(layer, heads[0], kv=shared, group=group) if single else f"L{layer}, all heads"
    words = style.heading(
        style.text(title) if title is not None else f"{who} · {style.text(matrix)}: concentration by rank",
        f"Against {style.text(space)}. Dashed grey: 1 = chance (isotropic null). Filled point: q &lt; {SIGNIFICANT}."
        + (" Hover names the head." if many else ""),
    )
    return style.finish(figure, title=words, template_name=template, width=width, height=height, plot_height=330)
