"""Heads set back to the base: curves of what that undoes, each head alone, the whole model by degrees."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.hover import head_name
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note

ORDERS = {
    "importance": "by importance",
    "norm": "by ‖ΔW‖",
    "random": "at random",
    "matched": "others that changed as much",
}
DASHES = {"importance": "solid", "norm": "dash", "random": "solid", "matched": "dot"}


@checked
def rewind_curve_figure(
    curve: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the share of the shift undone over the share of heads set back, a line for each order.

    Args:
        curve: `RewindStudy.curve`.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column.

    Example:
        >>> rewound.plot_curve().write_html("curve.html")  # doctest: +SKIP
    """
    pick.require(curve, ("order", "draw", "count", "share", "delta_share", "shift"), "RewindStudy.curve")
    figure = Drawing()
    others = iter(style.SERIES)
    colours = {order: style.GUIDE if order == "random" else next(others) for order in dict.fromkeys(curve["order"])}
    for (order, draw), block in curve.groupby(["order", "draw"], sort=False):
        block = block.sort_values("count")
        figure.add_trace(
            scatter(
                x=block["share"], y=block["shift"], name=ORDERS[str(order)], legendgroup=str(order),
                showlegend=bool(draw == 0), mode="lines" if order == "random" else "lines+markers",
                line={"color": colours[order], "dash": DASHES[str(order)], "width": 1 if order == "random" else 2},
                opacity=0.6 if order == "random" else 1.0,
                customdata=[
                    [int(r["count"]), style.number(r["shift"]), f"{r['delta_share']:.1%}"]
                    for r in block.to_dict("records")
                ],
                hovertemplate=f"<b>{ORDERS[str(order)]}</b><br>%{{customdata[0]}} set back, %{{customdata[2]}} of ‖ΔW‖²"
                "<br>undone: %{customdata[1]}<extra></extra>",
            )
        )  # fmt: skip
    if not curve["shift"].notna().any():
        note(figure, "No value: the models predict the same.")
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1})
    figure.update_xaxes(title="share of heads set back", tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(title="share of the shift undone", tickformat=".0%")
    words = heading(
        "Heads set back to the base",
        "The order of importance was found on the same texts. Dashed: all of it.",
        **layout,
    )
    return finish(figure, words, plot_height=400, **layout)


@checked
def rewind_heads_figure(
    table: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw what each unit undoes alone against ‖ΔW‖, coloured by layer: equal changes lie above each other.

    Args:
        table: `RewindStudy.table`.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column.

    Example:
        >>> rewound.plot_heads().write_html("heads.html")  # doctest: +SKIP
    """
    columns = ("layer", "head", "part", "matrices", "delta_norm", "shift", "matched_mean", "matched_percentile")
    pick.require(table, columns, "RewindStudy.table")
    figure = Drawing()
    for i, (part, block) in enumerate(table.groupby("part", sort=False)):
        figure.add_trace(
            scatter(
                x=block["delta_norm"], y=block["shift"], mode="markers", name=style.text(part),
                marker={
                    "size": 9, "symbol": style.SYMBOLS[i % len(style.SYMBOLS)], "color": block["layer"],
                    "colorscale": "Viridis", "cmin": int(table["layer"].min()), "cmax": int(table["layer"].max()),
                    "colorbar": {"title": {"text": "layer"}, "thickness": 12, "outlinewidth": 0}, "showscale": i == 0,
                },
                customdata=[
                    [
                        head_name(int(r["layer"]), None if pd.isna(r["head"]) else int(r["head"])),
                        style.text(r["matrices"]), style.number(r["shift"]), style.number(r["matched_mean"]),
                        style.number(r["matched_percentile"]),
                    ]
                    for r in block.to_dict("records")
                ],
                hovertemplate="<b>%{customdata[0]}</b> %{customdata[1]}<br>‖ΔW‖ %{x:.3g}<br>undone alone: "
                "%{customdata[2]}; those that changed as much: %{customdata[3]} on average (percentile "
                "%{customdata[4]})<extra></extra>",
            )
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="‖ΔW‖")
    figure.update_yaxes(title="share of the shift undone", tickformat=".1%")
    words = heading(
        "Each set back alone",
        "Above others of the same ‖ΔW‖: it carries more than its change tells.",
        **layout,
    )
    return finish(figure, words, plot_height=380, right=70, **layout)


@checked
def rewind_path_figure(
    path: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw cross-entropy with the whole model moved to the base by degrees, above the straight line between its ends.

    Args:
        path: `RewindStudy.path`.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column, or no row.

    Example:
        >>> rewound.plot_path().write_html("path.html")  # doctest: +SKIP
    """
    pick.require(path, ("share", "shift", "ce", "ce_straight", "barrier"), "RewindStudy.path")
    if path.empty:
        raise ValueError("expected a path, got none; pass shares= to rewind_study, and two models of one kind")
    figure = Drawing(
        [
            scatter(
                x=path["share"], y=path["ce"], mode="lines+markers", name="cross-entropy",
                line={"color": style.SERIES[0], "width": 2},
                customdata=[
                    [style.number(r["ce"], 4), style.number(r["barrier"]), f"{r['shift']:.1%}"]
                    for r in path.to_dict("records")
                ],
                hovertemplate="moved %{x:.0%}: %{customdata[0]} nats, %{customdata[1]} above the line<br>"
                "%{customdata[2]} of the shift undone<extra></extra>",
            ),
            scatter(
                x=path["share"], y=path["ce_straight"], mode="lines", name="straight line", hoverinfo="skip",
                line={"color": style.GUIDE, "dash": "dash", "width": 1.5},
            ),
        ]
    )  # fmt: skip
    if not path["ce"].notna().any():
        note(figure, "No value: the models cannot predict these tokens.")
    figure.update_xaxes(title="how far all parameters are moved to the base", tickformat=".0%")
    figure.update_yaxes(title="cross-entropy, nats per token")
    words = heading(
        "The whole model by degrees",
        "Above the dashed line: a barrier between the two models.",
        **layout,
    )
    return finish(figure, words, plot_height=340, **layout)
