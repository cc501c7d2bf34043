"""Per-layer summaries: the median head of each matrix, reads over writes, with both nulls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, SIGNIFICANT, MatrixKind, kind_of
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note, rank_slider

HOVER = (
    "<b>%{customdata[0]}</b><br>median %{customdata[1]}<br>middle half %{customdata[2]}<br>range %{customdata[3]}"
    f"<br>isotropic null: 1, {FOUND} in %{{customdata[4]}}<br>%{{customdata[5]}}"
    "<br>rounding share %{customdata[6]} (median)<extra></extra>"
)


@checked
def layers_figure(
    table: pd.DataFrame,
    *,
    matrices: str | Sequence[str] | None = None,
    subspace: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    d_model: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw each matrix's relative fraction over layers: reads above, writes below, on one scale.

    A line is the median head, its band the middle half of the heads; an MLP matrix has one value per layer. The
    dotted line of the same colour is the matched reference (activations for reads, gradients for writes where they
    were captured), the dashed grey line chance.

    Args:
        table: `PairAnalysis.table`.
        matrices: which to draw; None: all of the table.
        subspace: hold every matrix against this one; None: reads against their own input, writes against
            "prediction", where the table has it.
        rank, default_rank: one rank, or the first of the slider; None: all, first `d // 16` or the middle one.
        d_model: width of the residual stream; None reads it off the table.
        layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace or rank.

    Example:
        >>> layers_figure(result.table, rank=16).write_html("layers.html")
    """
    pick.require(table, pick.COLUMNS)
    there = list(dict.fromkeys(table["matrix"]))
    wanted = style.some_of("matrices", matrices, there)
    d = pick.d_model_of(table, d_model)
    picked = {m: pick.select(table, m, subspace) for m in wanted}
    ranks, start = pick.pick_ranks(
        pd.concat([rows for rows, _ in picked.values()]), rank, default_rank, d
    )  # fmt: skip
    kinds = {m: kind_of(m, rows["pathway"].iloc[0]) for m, (rows, _) in picked.items()}
    sides = [s for s in ("read", "write") if any(kind.side == s for kind in kinds.values())]
    figure = Drawing(rows=len(sides), cols=1, shared_xaxes=True, vertical_spacing=0.09)

    drawn: list[tuple[str, str]] = []  # (matrix, part) of each trace
    frames = {
        m: [_summary(rows[rows["rank"] == k], kinds[m], space, d) for k in ranks] for m, (rows, space) in picked.items()
    }
    for matrix, (_, space) in picked.items():
        at = sides.index(kinds[matrix].side) + 1
        look = style.MATRIX_STYLE.get(matrix, style.OTHER_STYLE)
        shown = frames[matrix][start]
        if len(shown["high"]) and kinds[matrix].heads:
            figure.add_trace(
                scatter(
                    x=shown["band_x"], y=shown["band_y"], fill="toself", mode="none", opacity=0.18,
                    fillcolor=look["color"], hoverinfo="skip", showlegend=False, legendgroup=matrix,
                    name=f"{matrix} middle half",
                ),
                row=at, col=1,
            )  # fmt: skip
            drawn.append((matrix, "band"))
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["reference"], mode="lines",
                line={"color": look["color"], "dash": "dot", "width": 1.5},
                hoverinfo="skip", showlegend=False, legendgroup=matrix, name=f"{matrix} matched reference",
            ),
            row=at, col=1,
        )  # fmt: skip
        drawn.append((matrix, "reference"))
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["y"], mode="lines+markers", name=f"{style.text(matrix)} · {style.text(space)}",
                line={"color": look["color"], "dash": look["dash"], "width": 2},
                marker={"symbol": look["symbol"], "size": 8, "color": look["color"]},
                customdata=shown["hover"], hovertemplate=HOVER, legendgroup=matrix,
            ),
            row=at, col=1,
        )  # fmt: skip
        drawn.append((matrix, "line"))

    if len(ranks) > 1:
        keys = {"band": ("band_x", "band_y"), "reference": ("x", "reference"), "line": ("x", "y")}
        steps = []
        for at in range(len(ranks)):
            parts = [(frames[m][at], *keys[part], part) for m, part in drawn]
            steps.append(
                [
                    {
                        "x": [f[x] for f, x, _, _ in parts],
                        "y": [f[y] for f, _, y, _ in parts],
                        "customdata": [f["hover"] if part == "line" else None for f, _, _, part in parts],
                    },
                    list(range(len(drawn))),
                ]
            )
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])

    # One scale for both panels and all ranks offered, so that read and write, and ranks, can be compared by eye.
    parts_drawn = ("y", "reference", "low", "high")
    everything = [v for per_rank in frames.values() for f in per_rank for part in parts_drawn for v in f[part]]
    axis = style.ratio_axis(v for v in everything if v is not None)
    layers = pick.layers_of(table)
    for at, side in enumerate(sides, start=1):
        figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5}, row=at, col=1)
        figure.update_yaxes(title=f"{side}: relative", row=at, col=1, **axis)
        figure.update_xaxes(row=at, col=1, range=[layers[0] - 0.5, layers[-1] + 0.5], **style.integer_ticks(layers))
    figure.update_xaxes(title="layer", row=len(sides), col=1)
    if not any(v is not None for fs in frames.values() for f in fs for v in f["y"]):
        note(figure, "No value: the delta is zero, so its fractions are undefined.")

    at_rank = f" at rank {ranks[0]}" if len(ranks) == 1 else ""
    gradients = any(v is not None for m in wanted if kinds[m].writes for f in frames[m] for v in f["reference"])
    writes = "" if "write" not in sides or gradients else " Writes have none without gradients."
    words = heading(
        "Read and write over layers",
        f"Relative subspace fraction{at_rank}, median head and middle half. Dashed: 1 = chance (isotropic null). "
        f"Dotted: matched reference.{writes}",
        **layout,
    )
    return finish(figure, words, plot_height=240 * len(sides) + 20, **layout)


def _summary(rows: pd.DataFrame, matrix: MatrixKind, space: str, d: int | None) -> dict[str, Any]:
    """What one matrix draws at one rank: lists over layers (None for NaN)."""
    reference = pick.in_relative_units(rows, "gradient_matched" if matrix.writes else "activation_matched", d)
    kind = "gradient-matched" if matrix.writes else "activation-matched"
    out: dict[str, Any] = {k: [] for k in ("x", "y", "low", "high", "reference", "hover")}
    for label, here in rows.assign(_reference=reference).groupby("layer", sort=True):
        layer = int(str(label))
        values = here["relative"].to_numpy(float, na_value=np.nan)
        values = values[np.isfinite(values)]
        known = here["_reference"].dropna()
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else [np.nan] * 3
        spread = len(values) > 1
        out["x"].append(layer)
        out["y"].append(_or_none(middle))
        out["low"].append(_or_none(low))
        out["high"].append(_or_none(high))
        out["reference"].append(_or_none(known.median()) if len(known) else None)
        q = here["isotropic_q"].to_numpy(float, na_value=np.nan)
        out["hover"].append(
            [
                f"L{layer} · {style.text(matrix.name)} against {style.text(space)}",
                style.number(middle),
                f"{style.number(low)} to {style.number(high)}" if spread else style.MISSING,
                f"{style.number(values.min())} to {style.number(values.max())}" if spread else style.MISSING,
                f"{int((q <= SIGNIFICANT).sum())} of {len(here)}",
                f"{kind}: {style.number(known.median() if len(known) else None)}",
                style.number(here["rounding_share"].median()),
            ]
        )
    told = [i for i, v in enumerate(out["low"]) if v is not None and v > 0]
    out["band_x"] = [out["x"][i] for i in told] + [out["x"][i] for i in reversed(told)]
    out["band_y"] = [out["low"][i] for i in told] + [out["high"][i] for i in reversed(told)]
    return out


def _or_none(value: Any) -> float | None:
    value = style.as_float(value)
    return None if np.isnan(value) else value
