"""Read against write: one point per head, and the index over layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.hover import head_name, interval
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note, rank_slider

COLUMNS = ("layer", "head", "rank", "read", "write", "log2_ratio", "log2_expected", "log2_excess", "ci_low", "ci_high")
HOVER = (
    "<b>%{customdata[0]}</b><br>read %{customdata[1]}, write %{customdata[2]} (1 = chance)"
    "<br>log2(read / write) %{customdata[3]}<br>95 % interval over texts: %{customdata[4]}"
    "<br>expected by matched references: %{customdata[5]}<br>excess over it: %{customdata[6]}<extra></extra>"
)


@checked
def asymmetry_figure(
    asymmetry: pd.DataFrame,
    *,
    rank: int | None = None,
    default_rank: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw read against write for each head, and log2(read / write) over layers.

    Above: one point per head, both axes relative fractions at powers of two; on the diagonal a head reads and
    writes alike, above it it reads more; the dashed lines are chance. Below: the index per head (small) and per
    layer with its interval (large), 0 = no asymmetry. Where gradients were captured, a bar shows the index that the
    matched references alone would give; without them chance is unknown and is not 0.

    Args:
        asymmetry: `PairAnalysis.asymmetry`.
        rank, default_rank: one rank, or the first of the slider; None: all, first the middle one.
        layout: as in `heads_figure`.

    Raises:
        ValueError: for a missing column or an unknown rank.

    Example:
        >>> asymmetry_figure(result.asymmetry, default_rank=4).write_html("asymmetry.html")
    """
    pick.require(asymmetry, COLUMNS, "PairAnalysis.asymmetry")
    ranks, start = pick.pick_ranks(asymmetry, rank, default_rank, None)
    layers = pick.layers_of(asymmetry)
    frames = [_points(asymmetry[asymmetry["rank"] == k], layers) for k in ranks]
    shown = frames[start]
    figure = Drawing(rows=2, cols=1, row_heights=[0.56, 0.44], vertical_spacing=0.15)
    # Read and write share one axis, so that the diagonal is where they are equal; each rank has its own, since the
    # bound d/k makes low ranks so much wider.
    axes = [style.ratio_axis(v for v in (*f["read"], *f["write"]) if v is not None) for f in frames]
    widest = max((limit for axis in axes for limit in axis["range"]), key=abs)
    ends = [10 ** -abs(widest), 10 ** abs(widest)]
    guide = {"color": style.GUIDE, "width": 1.5}
    figure.add_trace(
        scatter(
            x=ends, y=ends, mode="lines", line={**guide, "dash": "dot"}, name="read = write", hoverinfo="skip"
        ),
        row=1, col=1,
    )  # fmt: skip
    # A thousand heads need smaller points than a dozen.
    size = float(np.clip(36 / max(len(shown["layer"]), 1) ** 0.25, 6, 10))
    coloured = {
        "colorscale": style.SEQUENTIAL, "cmin": layers[0], "cmax": max(layers[-1], layers[0] + 1),
        "line": {"color": style.GUIDE, "width": 0.8},
    }  # fmt: skip
    figure.add_trace(
        scatter(
            x=shown["write"], y=shown["read"], mode="markers", name="head", customdata=shown["hover"],
            hovertemplate=HOVER,
            marker={
                **coloured, "size": size, "color": shown["layer"], "symbol": shown["symbol"], "showscale": True,
                "colorbar": {
                    "title": {"text": "layer", "side": "top", "font": {"size": 11}}, "thickness": 12, "x": 1.01,
                    "xpad": 4, "y": 1, "yanchor": "top", "len": 0.5, "outlinewidth": 0,
                    **style.integer_ticks(layers, 8),
                },
            },
        ),
        row=1, col=1,
    )  # fmt: skip
    figure.add_trace(
        scatter(
            x=shown["jitter"], y=shown["ratio"], mode="markers", name="head", showlegend=False,
            customdata=shown["hover"], hovertemplate=HOVER,
            marker={**coloured, "size": 0.7 * size, "color": shown["layer"], "symbol": shown["symbol"], "opacity": 0.8},
        ),
        row=2, col=1,
    )  # fmt: skip
    figure.add_trace(
        scatter(
            x=shown["layers"], y=shown["pooled"], mode="markers", name="layer, heads pooled (95 % over texts)",
            customdata=shown["layer_hover"], hovertemplate=HOVER,
            marker={"symbol": "star", "size": 13, "color": style.SERIES[1]},
            error_y={
                "type": "data", "symmetric": False, "array": shown["above"], "arrayminus": shown["below"],
                "color": style.SERIES[1], "thickness": 1.5, "width": 4,
            },
        ),
        row=2, col=1,
    )  # fmt: skip
    expected_known = any(v is not None for f in frames for v in f["expected"])
    if expected_known:
        figure.add_trace(
            scatter(
                x=shown["expected_x"], y=shown["expected"], mode="markers", name="expected by matched references",
                marker={"symbol": "line-ew-open", "size": 22, "color": style.SERIES[2], "line": {"width": 3}},
                hovertemplate="L%{x}: expected %{y:.3g}<extra></extra>",
            ),
            row=2, col=1,
        )  # fmt: skip

    if len(ranks) > 1:
        steps = []
        for f, axis in zip(frames, axes, strict=True):
            args: dict[str, list[Any]] = {
                "x": [f["write"], f["jitter"], f["layers"]],
                "y": [f["read"], f["ratio"], f["pooled"]],
                "customdata": [f["hover"], f["hover"], f["layer_hover"]],
                "marker.color": [f["layer"], f["layer"], style.SERIES[1]],
                "marker.symbol": [f["symbol"], f["symbol"], "star"],
                "error_y.array": [None, None, f["above"]],
                "error_y.arrayminus": [None, None, f["below"]],
            }
            if expected_known:
                args["x"].append(f["expected_x"])
                args["y"].append(f["expected"])
                for key, own in (("marker.color", style.SERIES[2]), ("marker.symbol", "line-ew-open")):
                    args[key].append(own)
                for key in ("customdata", "error_y.array", "error_y.arrayminus"):
                    args[key].append(None)
            scale = {
                f"{which}.{key}": axis[key]
                for which in ("xaxis", "yaxis") for key in ("range", "tickvals", "ticktext")
            }  # fmt: skip
            steps.append([args, scale, list(range(1, 5 if expected_known else 4))])
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])

    dashed = {**guide, "dash": "dash"}
    figure.add_hline(y=1, line=dashed, row=1, col=1)
    figure.add_vline(x=1, line=dashed, row=1, col=1)
    figure.add_hline(y=0, line={**guide, "dash": "dot"}, row=2, col=1)
    figure.update_xaxes(title="write: relative", row=1, col=1, **axes[start])
    figure.update_yaxes(title="read: relative", row=1, col=1, **axes[start])
    figure.update_xaxes(
        title="layer", range=[layers[0] - 0.5, layers[-1] + 0.5], row=2, col=1, **style.integer_ticks(layers)
    )
    figure.update_yaxes(title="log2(read / write)", row=2, col=1)
    if not any(v is not None for f in frames for v in f["ratio"]):
        note(figure, "No value: the delta is zero, so its fractions are undefined.")
    at_rank = f" at rank {ranks[0]}" if len(ranks) == 1 else ""
    chance = (
        "Green bars: the index matched references alone would give."
        if expected_known
        else "What plain gradients would give is unknown here, and need not be 0."
    )
    words = heading(
        "Reading against writing",
        f"Relative fractions{at_rank}; dashed: 1 = chance (isotropic null); above the dotted diagonal a head reads "
        f"more than it writes. {chance}",
        **layout,
    )
    return finish(figure, words, plot_height=640, right=64, **layout)


def _points(rows: pd.DataFrame, layers: list[int]) -> dict[str, list[Any]]:
    """Lists that one rank draws: heads, then layers; None for NaN and for what a log axis cannot hold."""
    per_head = rows[rows["head"].notna()].sort_values(["layer", "head"])
    pooled = rows[rows["head"].isna()].sort_values("layer")
    heads = max(1, int(per_head["head"].max()) + 1 if len(per_head) else 1)
    position = {layer: i for i, layer in enumerate(layers)}
    known = pooled[pooled["log2_expected"].notna()]
    above, below = [], []
    for row in pooled.to_dict("records"):
        ratio, low, high = (style.as_float(row[c]) for c in ("log2_ratio", "ci_low", "ci_high"))
        above.append(None if np.isnan(high) else float(f"{high - ratio:.6g}"))
        below.append(None if np.isnan(low) else float(f"{ratio - low:.6g}"))
    return {
        "layer": [int(x) for x in per_head["layer"]],
        "symbol": [style.SYMBOLS[position[int(x)] % len(style.SYMBOLS)] for x in per_head["layer"]],
        "read": _numbers(per_head["read"], positive=True),
        "write": _numbers(per_head["write"], positive=True),
        "ratio": _numbers(per_head["log2_ratio"]),
        # Heads side by side within their layer's lane, in order, so that they can be told apart.
        "jitter": [
            round(int(x) + 0.6 * ((int(h) + 0.5) / heads - 0.5), 3)
            for x, h in zip(per_head["layer"], per_head["head"], strict=True)
        ],
        "hover": [_words(row) for row in per_head.to_dict("records")],
        "layers": [int(x) for x in pooled["layer"]],
        "pooled": _numbers(pooled["log2_ratio"]),
        "above": above,
        "below": below,
        "layer_hover": [_words(row) for row in pooled.to_dict("records")],
        "expected_x": [int(x) for x in known["layer"]],
        "expected": _numbers(known["log2_expected"]),
    }


def _numbers(column: pd.Series, *, positive: bool = False) -> list[float | None]:
    """Six digits of each number, which is more than a screen shows; None for what cannot be drawn."""
    values = column.to_numpy(float, na_value=np.nan)
    bad = ~np.isfinite(values) | ((values <= 0) if positive else False)
    return [None if b else float(f"{v:.6g}") for v, b in zip(values, bad, strict=True)]


def _words(row: dict[Any, Any]) -> list[str]:
    """What the hover of one row says, in the order of `HOVER`."""
    head = None if pd.isna(row["head"]) else int(row["head"])
    return [
        head_name(int(row["layer"]), head) + ("" if head is not None else ", heads pooled"),
        style.number(row["read"]),
        style.number(row["write"]),
        style.number(row["log2_ratio"]),
        interval(row["ci_low"], row["ci_high"], ""),
        "unknown without gradients" if pd.isna(row["log2_expected"]) else style.number(row["log2_expected"]),
        style.number(row["log2_excess"]),
    ]
