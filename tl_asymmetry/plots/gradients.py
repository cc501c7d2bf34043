"""How many directions the two sides of a gradient have, layer by layer and objective by objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, Trace, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note

HOVER = (
    "<b>%{customdata[0]}</b>, layer %{x}<br>effective rank %{customdata[1]} of %{customdata[2]} (median head)"
    "<br>heads from %{customdata[3]} to %{customdata[4]}<br>95 % interval over texts: %{customdata[5]}"
    "<br>tokens with a gradient: %{customdata[6]}<extra></extra>"
)
SIDES = {"gradient": "δ", "input": "a"}
DASHES = ("solid", "dash", "dot", "dashdot")


@checked
def effective_rank_figure(
    tables: Mapping[str, pd.DataFrame] | pd.DataFrame,
    *,
    matrices: str | Sequence[str] | None = None,
    side: str = "gradient",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the effective rank of one side of a matrix over layers, one line for each objective.

    The rank is shown as a share of the side's dimension, so that matrices compare: 1 is a flat spectrum. A line is the
    median head, the bars of a matrix with one row per layer its 95 % interval over texts. A menu picks matrix and side;
    sides without an effective rank (sketched ones) are left out.

    Args:
        tables: `GradientCovariance.table`, one for each objective by name, or a single one.
        matrices: which to offer; None: all.
        side: the side shown first, "gradient" (δ) or "input" (a).
        layout: as in `heads_figure`.

    Raises:
        ValueError: no table, an unknown matrix or side.

    Example:
        >>> from tl_asymmetry import gradient_covariance
        >>> from tl_asymmetry.objectives import CrossEntropy
        >>> covariance = gradient_covariance(model, CrossEntropy(), ["Mira was happy."] * 4, progress=False)
        >>> effective_rank_figure({"cross-entropy": covariance.table}).write_html("ranks.html")
    """
    named = {"": tables} if isinstance(tables, pd.DataFrame) else dict(tables)
    if not named:
        raise ValueError("expected at least one table, got none; pass {'name': covariance.table}")
    style.one_of("side", side, tuple(SIDES), "side")
    rows = {name: t[(t["half"] == "all") & t["effective_rank"].notna()] for name, t in named.items()}
    there = list(dict.fromkeys(m for t in named.values() for m in t["matrix"]))
    wanted = style.some_of("matrices", matrices, there)
    views = [
        (matrix, which)
        for which in sorted(SIDES, key=lambda which: which != side)
        for matrix in wanted
        if any(((t["matrix"] == matrix) & (t["side"] == which)).any() for t in rows.values())
    ]
    figure = Drawing()
    owners = []
    colours = list(style.SERIES) if len(named) <= len(style.SERIES) else style.sequential(len(named))
    for view in views:
        for i, (name, table) in enumerate(rows.items()):
            block = table[(table["matrix"] == view[0]) & (table["side"] == view[1])]
            if block.empty:
                continue
            figure.add_trace(
                _line(block, name or "effective rank", colours[i], DASHES[i % len(DASHES)], view == views[0])
            )
            owners.append(view)
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    if len(views) > 1:
        figure.update_layout(
            updatemenus=[
                menu(
                    "matrix and side",
                    [
                        (f"{SIDES[which]} of {matrix}", [{"visible": [owner == (matrix, which) for owner in owners]}])
                        for matrix, which in views
                    ],
                )
            ]
        )
    if not views:
        note(figure, "No effective rank: no gradient reached these matrices, or their axis was sketched.")
    layers = sorted({int(layer) for t in named.values() for layer in t["layer"]})
    figure.update_xaxes(title="layer", **style.integer_ticks(layers))
    figure.update_yaxes(title="effective rank / dimension", range=[0, 1.05])
    words = heading(
        "How many directions the gradient's sides have",
        "Effective rank of the second moment as a share of its dimension; dashed grey: a flat spectrum.",
        **layout,
    )
    return finish(figure, words, plot_height=340, **layout)


def _line(block: pd.DataFrame, name: str, colour: str, dash: str, visible: bool) -> Trace:
    block = block[~block["shared"] | (block["head"].fillna(0) == 0)]  # heads that share a side have one value
    groups = block.groupby("layer")
    dimension = groups["dimension"].first().astype(float)
    median, low, high = (groups["effective_rank"].agg(how) for how in ("median", "min", "max"))
    single = bool((groups.size() == 1).all())
    ends = [groups[f"effective_rank_{end}"].first() for end in ("low", "high")]
    bars = {}
    if single and all(end.notna().all() for end in ends):
        bars = {
            "error_y": {
                "type": "data", "symmetric": False, "thickness": 1,
                "array": ((ends[1] - median) / dimension).tolist(),
                "arrayminus": ((median - ends[0]) / dimension).tolist(),
            }
        }  # fmt: skip
    interval = [
        f"{style.number(a)} – {style.number(b)}" if single and np.isfinite(a) and np.isfinite(b) else style.MISSING
        for a, b in zip(*ends, strict=True)
    ]
    tokens = groups["tokens"].first()
    hover = [
        [style.text(name), style.number(m), style.number(d), style.number(lo), style.number(hi), text, str(n)]
        for m, d, lo, hi, text, n in zip(median, dimension, low, high, interval, tokens, strict=True)
    ]
    return scatter(
        x=[int(layer) for layer in median.index], y=(median / dimension).tolist(), mode="lines+markers",
        name=style.text(name), visible=visible, line={"color": colour, "dash": dash, "width": 2},
        marker={"size": 8, "color": colour}, customdata=hover, hovertemplate=HOVER, **bars,
    )  # fmt: skip
