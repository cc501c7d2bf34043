"""The share of planted directions found, against their size."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading

_SYMBOLS = ("circle", "diamond", "square")


@checked
def power_figure(
    table: pd.DataFrame,
    *,
    null: str = "isotropic",
    subspace: str | None = None,
    power: float = 0.8,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw how many plants of each size were found, with binomial intervals.

    Args:
        table: `PowerAnalysis.table`.
        null: which of them.
        subspace: None: a read matrix's own input, "prediction" for a write matrix.
        power: where to draw the line.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column, a null or subspace that was not tested.

    Example:
        >>> found.plot().write_html("power.html")  # doctest: +SKIP
    """
    columns = ("matrix", "pathway", "subspace", "null", "size", "plants", "found", "share", "low", "high")
    pick.require(table, columns, "PowerAnalysis.table")
    style.one_of("null", null, [str(name) for name in table["null"].unique()], "null")
    rows = table[table["null"] == null]
    if subspace is not None:
        style.one_of("subspace", subspace, [str(name) for name in rows["subspace"].unique()], "subspace")
    figure = Drawing()
    for i, matrix in enumerate(rows["matrix"].unique()):
        held = pick.default_subspace(table, matrix) if subspace is None else subspace
        one = rows[(rows["matrix"] == matrix) & (rows["subspace"] == held)]
        if one.empty:
            continue
        figure.add_trace(
            scatter(
                x=one["size"], y=one["share"], mode="lines+markers", name=f"{matrix} in {held}",
                line={"color": style.SERIES[i % len(style.SERIES)], "width": 2},
                marker={"symbol": _SYMBOLS[i // len(style.SERIES) % len(_SYMBOLS)], "size": 7},
                error_y={
                    "type": "data", "symmetric": False, "array": one["high"] - one["share"],
                    "arrayminus": one["share"] - one["low"], "width": 2, "thickness": 1,
                },
                customdata=one[["found", "plants"]],
                hovertemplate=f"<b>{matrix}</b> in {held}<br>a share of %{{x}}: %{{customdata[0]}} of "
                "%{customdata[1]} found<extra></extra>",
            )
        )  # fmt: skip
    figure.add_hline(y=power, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="share of the change planted in one direction")
    figure.update_yaxes(title="share of plants found", range=[-0.05, 1.05])
    against = "a random subspace" if null == "isotropic" else f"what training by {null} gives on these inputs"
    words = heading(
        "How large must a mark be to be found?", f"Found above {against}; bars are binomial 95 % intervals.", **layout
    )
    return finish(figure, words, plot_height=380, **layout)
