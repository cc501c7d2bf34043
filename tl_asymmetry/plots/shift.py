"""The shift of mean activations over the layers, and what the change of the weights foretells of it."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note

LINES = {"direct_explained": "direct writes of ΔW", "first_order_explained": "first order in all parameters"}


@checked
def shift_figure(
    table: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw how much of the shift of mean activations is foretold at each point, and its cosine with what ΔW writes.

    Args:
        table: `ActivationShift.table`.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column.

    Example:
        >>> shift.plot().write_html("shift.html")  # doctest: +SKIP
    """
    pick.require(
        table, ("layer", "point", "relative", *LINES, "leading_cosine", "leading_expected"), "the shift's table"
    )
    names = [
        f"L{layer} {point.removeprefix('resid_')}" for layer, point in zip(table["layer"], table["point"], strict=True)
    ]
    figure = Drawing()
    for i, (column, words) in enumerate(LINES.items()):
        figure.add_trace(
            scatter(
                x=names, y=table[column], mode="lines+markers", name=words,
                line={"color": style.SERIES[i], "width": 2},
                customdata=[[style.number(r[column]), style.number(r["relative"])] for r in table.to_dict("records")],
                hovertemplate=f"<b>%{{x}}</b>, moved by %{{customdata[1]}} of its length<br>{words} explain "
                "%{customdata[0]}<extra></extra>",
            )
        )  # fmt: skip
    figure.add_trace(
        scatter(
            x=names, y=table["leading_cosine"], mode="markers", name="|cosine| with the leading direction written",
            marker={"color": style.SERIES[2], "symbol": "diamond", "size": 8},
            customdata=[[style.number(v), style.number(e)] for v, e in
                        zip(table["leading_cosine"], table["leading_expected"], strict=True)],
            hovertemplate="<b>%{x}</b><br>|cosine| %{customdata[0]}, of a random direction %{customdata[1]}"
            "<extra></extra>",
        )
    )  # fmt: skip
    figure.add_trace(
        scatter(
            x=names, y=table["leading_expected"], mode="lines", name="of a random direction", hoverinfo="skip",
            line={"color": style.GUIDE, "dash": "dash", "width": 1.5},
        )
    )  # fmt: skip
    if not table["relative"].gt(0).any():
        note(figure, "No value: the mean activations do not differ.")
    figure.add_hline(y=0, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="point of the stream")
    figure.update_yaxes(title="share of the shift explained, |cosine|", range=[-1.05, 1.05])
    words = heading(
        "Does the weight explain the shift?",
        "1: all of the shift. Below 0: worse than predicting none (cut at −1).",
        **layout,
    )
    return finish(figure, words, plot_height=380, **layout)
