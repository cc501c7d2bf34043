"""How stable each head's verdict is: the range of its fraction over all variants of the subspace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.hover import head_name
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note, rank_slider

COLUMNS = (
    "layer", "head", "matrix", "subspace", "rank", "relative", "isotropic_q", "variants", "low", "median", "high",
    "low_variant", "high_variant", "significant", "verdict",
)  # fmt: skip
LOOKS = {
    "concentrated": {"symbol": "circle", "color": style.SERIES[1]},
    "depends": {"symbol": "diamond-open", "color": style.SERIES[3]},
    "not": {"symbol": "circle-open", "color": style.SERIES[0]},
    "none": {"symbol": "x-thin-open", "color": style.GUIDE},
}
WORDS = {
    "concentrated": f"{FOUND} in every variant", "depends": "in some variants", "not": "in none", "none": "no test",
}  # fmt: skip
HOVER = (
    "<b>%{customdata[0]}</b><br>relative here %{customdata[1]} (q %{customdata[2]})"
    "<br>over %{customdata[3]} variants: %{customdata[4]} to %{customdata[5]}"
    "<br>lowest: %{customdata[6]}<br>highest: %{customdata[7]}"
    f"<br>{FOUND} in %{{customdata[8]}} of them<extra></extra>"
)


@checked
def stability_figure(
    stability: pd.DataFrame,
    *,
    matrix: str | None = None,
    subspace: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the range of every head's relative fraction over all variants of the subspace, ordered by their median.

    A bar reaches from the lowest to the highest variant, the point is the analysis itself. Its symbol is the
    verdict: filled, q ≤ 0.05 in every variant; open diamond, it depends on the choice; open circle, in none.

    Args:
        stability: `PairAnalysis.stability()`.
        matrix, subspace: shown first; None: the table's first.
        rank, default_rank: one rank, or the first of the slider.
        layout: as in `heads_figure`.

    Raises:
        ValueError: for a missing column, or an unknown matrix, subspace or rank.

    Example:
        >>> from tl_asymmetry import analyze_pair
        >>> from tl_asymmetry.demo import demo_texts
        >>> texts = demo_texts(10, seed=0)
        >>> options = {"sensitivity": True, "groups": 1, "ranks": [4], "progress": False}
        >>> stability_figure(analyze_pair(base, aligned, texts, **options).stability()).write_html("stability.html")
    """
    pick.require(stability, COLUMNS, "PairAnalysis.stability()")
    pairs = list(dict.fromkeys(zip(stability["matrix"], stability["subspace"], strict=True)))
    first_matrix = style.one_of("matrix", matrix or pairs[0][0], [m for m, _ in pairs], "matrix")
    spaces = [s for m, s in pairs if m == first_matrix]
    first = (first_matrix, style.one_of(f"subspace of {first_matrix}", subspace or spaces[0], spaces, "subspace"))
    ranks, start = pick.pick_ranks(stability, rank, default_rank, None)
    frames = {
        pair: [
            _points(rows[rows["rank"] == k])
            for k in ranks
            for rows in [stability[(stability["matrix"] == pair[0]) & (stability["subspace"] == pair[1])]]
        ]
        for pair in pairs
    }
    figure = Drawing()
    for pair in pairs:
        shown = frames[pair][start]
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["y"], mode="markers", name=" in ".join(map(style.text, pair)), showlegend=False,
                visible=pair == first, customdata=shown["hover"], hovertemplate=HOVER,
                marker={"size": 8, "symbol": shown["symbol"], "color": shown["color"], "line": {"width": 1.6}},
                error_y={
                    "type": "data", "symmetric": False, "array": shown["above"], "arrayminus": shown["below"],
                    "color": style.GUIDE, "thickness": 2, "width": 0,
                },
            )
        )  # fmt: skip
    for verdict, look in LOOKS.items():
        if (stability["verdict"] == verdict).any():
            figure.add_trace(
                scatter(
                    x=[None], y=[None], mode="markers", marker={**look, "size": 8, "line": {"width": 1.6}},
                    name=WORDS[verdict].replace("<", "&lt;"),
                )
            )  # fmt: skip
    targets = list(range(len(pairs)))
    if len(pairs) > 1:
        figure.update_layout(
            updatemenus=[
                menu(
                    "matrix",
                    [
                        (" in ".join(map(style.text, pair)), [{"visible": [p == pair for p in pairs]}, targets])
                        for pair in pairs
                    ],
                    active=pairs.index(first),
                )
            ]
        )
    if len(ranks) > 1:
        steps = []
        for at in range(len(ranks)):
            parts = [frames[pair][at] for pair in pairs]
            keys = {
                "x": "x", "y": "y", "customdata": "hover", "marker.symbol": "symbol", "marker.color": "color",
                "error_y.array": "above", "error_y.arrayminus": "below",
            }  # fmt: skip
            steps.append([{name: [part[key] for part in parts] for name, key in keys.items()}, targets])
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    figure.update_xaxes(title="heads, by median over the variants", showgrid=False, rangemode="tozero")
    bounds = [*stability["low"], *stability["high"], *stability["relative"]]
    figure.update_yaxes(title="relative", **style.ratio_axis(bounds))
    if stability["relative"].isna().all():
        note(figure, "No value: the delta is zero, so its fractions are undefined.")
    words = heading(
        "Does the verdict depend on the choice of subspace?",
        "Point: this analysis. Bar: lowest to highest over whose activations, centring, first position and final norm. "
        "Dashed: 1 = chance (isotropic null).",
        **layout,
    )
    return finish(figure, words, plot_height=340, **layout)


def _points(rows: pd.DataFrame) -> dict[str, list[Any]]:
    """What one matrix draws at one rank: lists over heads."""
    rows = rows.sort_values(["median", "layer"])
    own = rows["relative"].to_numpy(float, na_value=np.nan)
    low, high = (rows[c].to_numpy(float, na_value=np.nan) for c in ("low", "high"))
    return {
        "x": list(range(1, len(rows) + 1)),
        "y": _plain(own),
        "above": _plain(np.maximum(high - own, 0)),
        "below": _plain(np.maximum(own - low, 0)),
        "symbol": [LOOKS[v]["symbol"] for v in rows["verdict"]],
        "color": [LOOKS[v]["color"] for v in rows["verdict"]],
        "hover": [
            [
                head_name(int(row["layer"]), None if pd.isna(row["head"]) else int(row["head"])),
                style.number(row["relative"]), style.number(row["isotropic_q"], 2), str(row["variants"]),
                style.number(row["low"]), style.number(row["high"]),
                style.text(row["low_variant"]), style.text(row["high_variant"]),
                style.MISSING if pd.isna(row["significant"]) else f"{round(row['significant'] * row['variants'])}",
            ]
            for row in rows.to_dict("records")
        ],
    }  # fmt: skip


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(f"{v:.6g}") for v in values]
