"""Over training: read and write curves, heads one by one, the map of heads in motion, and when heads emerged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, ROUNDING_FLAGGED, SIGNIFICANT
from tl_asymmetry.plots import maps, style
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.drawing import Drawing, heatmap, scatter
from tl_asymmetry.plots.held import Held, held_against
from tl_asymmetry.plots.hover import cell_name, head_cells, head_fields, head_name, head_template, interval, row_names
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note, rank_slider, slider

WORDS = {"first": "since the first checkpoint", "previous": "since the previous checkpoint"}
"""What the two references are called in titles."""
SOURCE = "TrajectoryAnalysis.table"

CURVE_HOVER = (
    "<b>%{customdata[0]}</b><br>step %{x}<br>relative %{customdata[1]} (all heads pooled by energy)"
    "<br>95 % interval over texts: %{customdata[2]}<br>isotropic null: 1<br>%{customdata[3]}"
    "<br>‖ΔW‖/‖W‖ %{customdata[4]}<extra></extra>"
)


@checked
def curves_figure(
    curves: pd.DataFrame,
    *,
    matrices: str | Sequence[str] | None = None,
    subspace: str | None = None,
    reference: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw read and write over training: relative fractions of all heads pooled by energy, with their intervals.

    The band is the 95 % interval over texts, the dotted line of the same colour the matched reference, the dashed grey
    line chance.

    Args:
        curves: `TrajectoryAnalysis.curves`.
        matrices: which to draw; None: all single matrices.
        subspace: hold every matrix against this one; None: reads against their own input, writes against "prediction".
        reference: "first" or "previous"; None: the first one the table has.
        rank, default_rank: one rank, or the first of the slider; None: all, first the middle one.
        layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, reference or rank.

    Example:
        >>> from tl_asymmetry.plots import curves_figure
        >>> curves_figure(trajectory.curves, rank=4).write_html("curves.html")
    """
    pick.require(curves, ("step", "reference", "matrix", "subspace", "rank", "relative", "ci_low", "ci_high"),
                 "TrajectoryAnalysis.curves")  # fmt: skip
    curves, reference = _of_reference(curves, reference)
    there = list(dict.fromkeys(curves["matrix"]))
    wanted = [m for m in there if "+" not in m] if matrices is None else style.some_of("matrices", matrices, there)
    picked = {m: _against(curves, m, subspace) for m in wanted}
    every = pd.concat([rows for rows, _ in picked.values()])
    held = every.groupby("rank")["matrix"].nunique()  # inputs may have fewer directions than predictions
    every = every[every["rank"].isin(held.index[held == len(picked)])]
    ranks, start = pick.pick_ranks(every, rank, default_rank, None)
    sides = [s for s in ("read", "write") if any(rows["pathway"].iloc[0] == s for rows, _ in picked.values())]
    figure = Drawing(rows=len(sides), cols=1, shared_xaxes=True, vertical_spacing=0.09)
    frames = {m: [_curve(rows[rows["rank"] == k], m, space) for k in ranks] for m, (rows, space) in picked.items()}
    drawn: list[tuple[str, str]] = []
    for matrix, (rows, space) in picked.items():
        at = sides.index(rows["pathway"].iloc[0]) + 1
        look = style.MATRIX_STYLE.get(matrix, style.OTHER_STYLE)
        shown = frames[matrix][start]
        figure.add_trace(
            scatter(
                x=shown["band_x"], y=shown["band_y"], fill="toself", mode="none", opacity=0.25,
                fillcolor=look["color"], hoverinfo="skip", showlegend=False, legendgroup=matrix,
                name=f"{matrix} interval",
            ),
            row=at, col=1,
        )  # fmt: skip
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["reference"], mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": look["color"], "dash": "dot", "width": 1.5}, legendgroup=matrix,
                name=f"{matrix} matched reference",
            ),
            row=at, col=1,
        )  # fmt: skip
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["y"], mode="lines+markers", name=f"{style.text(matrix)} · {style.text(space)}",
                line={"color": look["color"], "dash": look["dash"], "width": 2}, legendgroup=matrix,
                marker={"symbol": look["symbol"], "size": 8, "color": look["color"]},
                customdata=shown["hover"], hovertemplate=CURVE_HOVER,
            ),
            row=at, col=1,
        )  # fmt: skip
        drawn += [(matrix, "band"), (matrix, "reference"), (matrix, "line")]
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
    values = [
        v for per_rank in frames.values() for f in per_rank for v in (*f["y"], *f["reference"], *f["band_y"]) if v
    ]
    axis = style.ratio_axis(values)
    for at, side in enumerate(sides, start=1):
        figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5}, row=at, col=1)
        figure.update_yaxes(title=f"{side}: relative", row=at, col=1, **axis)
        figure.update_xaxes(row=at, col=1, **_step_axis(curves["step"]))
    figure.update_xaxes(title="training step", row=len(sides), col=1)
    if not values:
        note(figure, "No value: the deltas are zero, so their fractions are undefined.")
    at_rank = f" at rank {ranks[0]}" if len(ranks) == 1 else ""
    words = heading(
        "Read and write over training",
        f"Relative subspace fraction{at_rank} of the change {WORDS.get(reference, style.text(reference))}, heads and "
        "layers pooled by energy. Band: 95 % interval over texts (none on prediction, which is weights only). Dashed: "
        "1 = chance. Dotted: matched reference.",
        **layout,
    )
    return finish(figure, words, plot_height=230 * len(sides) + 20, **layout)


@checked
def head_curves_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    layer: int,
    subspace: str | None = None,
    reference: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw each head of a layer over training, with its 95 % interval as an error bar; filled where q ≤ 0.05.

    Args:
        table: `TrajectoryAnalysis.table`.
        matrix: one of the table's.
        layer: the layer.
        subspace: None: own input for a read matrix, "prediction" for a write matrix.
        reference, rank, default_rank: as in `curves_figure`.
        kv, layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, layer, reference or rank.

    Example:
        >>> from tl_asymmetry.plots import head_curves_figure
        >>> head_curves_figure(trajectory.table, "W_Q", layer=2).write_html("heads.html")
    """
    rows, space, reference = _select(table, matrix, subspace, reference)
    style.one_of("layer", layer, pick.layers_of(rows), "layer")
    rows = rows[rows["layer"] == layer].sort_values("step")
    d = pick.d_model_of(table, None)
    ranks, start = pick.pick_ranks(rows, rank, default_rank, d)
    heads = pick.heads_of(rows)
    shared, group = pick.kv_group(table, matrix, kv)
    helds = [held for held in held_against(rows, None) if held.there]
    figure, frames = Drawing(), []
    for k in ranks:
        at_rank = rows[rows["rank"] == k]
        of_heads = [
            at_rank[at_rank["head"].isna() if h is None else (at_rank["head"] == h).fillna(False)] for h in heads
        ]
        frames.append(
            [
                _head_curve(here, n, _fields(here, space, d, helds, shared, group), len(heads) == 1)
                for n, here in enumerate(of_heads)
            ]
        )
    for curve, h in zip(frames[start], heads, strict=True):
        figure.add_trace(
            scatter(
                **curve, mode="lines+markers", name=head_name(layer, h, kv=shared, group=group),
                hovertemplate=head_template(matrix, helds, verdict="verdict" in rows.columns),
                showlegend=len(heads) <= 12,
            )
        )  # fmt: skip
    if len(ranks) > 1:
        steps = [
            [
                {
                    "y": [c["y"] for c in curves],
                    "customdata": [c["customdata"] for c in curves],
                    "marker.symbol": [c["marker"]["symbol"] for c in curves],
                    "error_y.array": [c["error_y"]["array"] for c in curves],
                    "error_y.arrayminus": [c["error_y"]["arrayminus"] for c in curves],
                },
                list(range(len(heads))),
            ]
            for curves in frames
        ]
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])
    seen = rows[["relative", "ci_low", "ci_high"]].to_numpy(float, na_value=np.nan).ravel()
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    figure.update_yaxes(title="relative", **style.ratio_axis(seen))
    figure.update_xaxes(title="training step", **_step_axis(rows["step"]))
    if not np.isfinite(rows["relative"].to_numpy(float, na_value=np.nan)).any():
        note(figure, "No value: the deltas are zero, so their fractions are undefined.")
    words = heading(
        f"L{layer} · {style.text(matrix)} over training",
        f"Relative fraction in {style.text(space)} of the change {WORDS.get(reference, style.text(reference))}. Bars: "
        f"95 % interval over texts. Dashed: 1 = chance. Filled point: {FOUND}.",
        **layout,
    )
    return finish(figure, words, plot_height=330, **layout)


@checked
def animation_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    subspace: str | None = None,
    reference: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map one matrix over layers and heads, a frame for each checkpoint: a slider of steps, and Play.

    Colour is the log2 distance from chance, on one scale over all checkpoints; a dot marks q ≤ 0.05, grey with a cross
    a change that is mostly rounding, a diamond one that is in part, as in `heads_figure`.

    Args:
        table: `TrajectoryAnalysis.table`.
        matrix: one of the table's.
        subspace: None: own input for a read matrix, "prediction" for a write matrix.
        reference: "first" or "previous"; None: the first one the table has.
        rank, default_rank: the rank to show; None: `d // 16`, or the middle one.
        kv, layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, reference or rank.

    Example:
        >>> from tl_asymmetry.plots import animation_figure
        >>> len(animation_figure(trajectory.table, "W_Q").frames)
        3
    """
    rows, space, reference = _select(table, matrix, subspace, reference)
    d = pick.d_model_of(table, None)
    ranks, start = pick.pick_ranks(rows, rank, default_rank, d)
    rows = rows[rows["rank"] == ranks[start]]
    layers, heads = pick.layers_of(rows), pick.heads_of(rows)
    shared, group = pick.kv_group(table, matrix, kv)
    x = list(range(len(heads)))
    steps = sorted(int(s) for s in rows["step"].unique())
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log2(rows["relative"].to_numpy(float, na_value=np.nan))
    limit = float(max(1, math.ceil(np.abs(logs[np.isfinite(logs)]).max(initial=0.0))))
    exponents, labels = style.ratio_ticks(-limit, limit)
    rounded = bool((rows["rounding_share"] >= ROUNDING_FLAGGED).any())
    helds = [held for held in held_against(rows, None) if held.there]
    template = head_template(matrix, helds, verdict="verdict" in rows.columns)

    def titled(step: int) -> str:
        return heading(
            f"{style.text(matrix)} at step {step}",
            f"Relative fraction in {style.text(space)} at rank {ranks[start]} of the change "
            f"{WORDS.get(reference, style.text(reference))}; 1 = chance. Dot: {FOUND}. One scale for "
            "all steps.",
            **layout,
        )

    def drawn(step: int) -> list[Any]:
        here = rows[rows["step"] == step]
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.log2(pick.grid(here, here["relative"], layers, heads)).clip(-limit, limit)
        below = pick.grid(here, here["isotropic_q"], layers, heads) <= SIGNIFICANT
        fields = _fields(here, space, d, helds, shared, group)
        hover = head_cells(here, fields, layers, heads, kv=shared, group=group)
        i, j = np.nonzero(below)
        dots: dict[str, list[Any]] = {"x": [int(v) for v in j] or [None], "y": [layers[v] for v in i] or [None]}
        rounding = pick.grid(here, here["rounding_share"], layers, heads)
        return [
            heatmap(
                x=x, y=layers, z=[[None if math.isnan(v) else round(float(v), 3) for v in r] for r in z],
                zmin=-limit, zmax=limit, zmid=0, colorscale=style.diverging(layout.get("template")), xgap=1, ygap=1,
                meta="diverging", customdata=hover, hovertemplate=template, name=matrix,
                colorbar={
                    "thickness": 12, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 4, "tickmode": "array",
                    "tickvals": exponents, "ticktext": labels,
                    "title": {"text": "× chance", "side": "top", "font": {"size": 11}},
                },
            ),
            scatter(
                **dots, mode="markers",
                marker={"symbol": "circle", "size": 6, "color": "#14181f", "line": {"width": 1.4, "color": "#ffffff"}},
                name=FOUND, hoverinfo="skip", showlegend=True,
            ),
            *(maps.rounding_marks(rounding, layers, maps.mark_size(layers, heads)) if rounded else []),
        ]  # fmt: skip

    last = steps[-1]
    data = {step: drawn(step) for step in steps}
    figure = Drawing(data[last])
    figure.frames = [
        {
            "data": data[step], "name": str(step), "layout": {"title": {"text": titled(step)}},
            "traces": list(range(len(data[step]))),
        }
        for step in steps
    ]  # fmt: skip
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    moving = {"fromcurrent": False, "frame": {"duration": 700, "redraw": True}, "transition": {"duration": 0}}
    if len(steps) > 1:
        figure.update_layout(
            sliders=[
                slider(
                    "step",
                    [(str(s), [[str(s)], still]) for s in steps],
                    active=len(steps) - 1,
                    method="animate",
                    prefix="step ",
                )
            ],
            updatemenus=[
                {
                    "type": "buttons", "direction": "left", "showactive": False,
                    "buttons": [
                        {"label": "Play", "method": "animate", "args": [None, moving]},
                        {"label": "Pause", "method": "animate", "args": [[None], still]},
                    ],
                }
            ],
        )  # fmt: skip
    maps.head_axes(figure, layers, heads, shared)
    return finish(figure, titled(last), right=64, plot_height=maps.map_height(layers), **layout)


@checked
def emergence_figure(
    emergence: pd.DataFrame,
    matrix: str,
    *,
    subspace: str | None = None,
    reference: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    level: float = SIGNIFICANT,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map the step from which each head's q stays at or below a level; a cross where it never does.

    Args:
        emergence: `TrajectoryAnalysis.emergence()`.
        matrix: one of the table's.
        subspace: None: own input for a read matrix, "prediction" for a write matrix.
        reference, rank, default_rank: as in `animation_figure`.
        level: the level the table was made with, for the title.
        kv, layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, reference or rank.

    Example:
        >>> from tl_asymmetry.plots import emergence_figure
        >>> emergence_figure(trajectory.emergence(), "W_Q").write_html("emergence.html")
    """
    pick.require(emergence, ("reference", *pick.KEYS, "step", "significant", "checkpoints"),
                 "TrajectoryAnalysis.emergence()")  # fmt: skip
    emergence, reference = _of_reference(emergence, reference)
    style.one_of("matrix", matrix, list(dict.fromkeys(emergence["matrix"])), "matrix")
    rows, space = _against(emergence, matrix, subspace)
    ranks, start = pick.pick_ranks(rows, rank, default_rank, None)
    layers, heads = pick.layers_of(rows), pick.heads_of(rows)
    shared, group = pick.kv_group(emergence, matrix, kv)
    x = list(range(len(heads)))
    since = rows["step"].dropna().astype(int)
    low, high = (int(since.min()), int(since.max())) if len(since) else (1, 1)
    spread = _is_wide(low, high)

    def shade(step: Any) -> float:
        return math.log10(step) if spread else float(step)

    def drawn(k: int) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        here = rows[rows["rank"] == k]
        z: list[list[float | None]] = [[None for _ in heads] for _ in layers]
        words = [[[""] * 3 for _ in heads] for _ in layers]
        never: tuple[list[int], list[int]] = ([], [])
        for row in here.to_dict("records"):
            i = layers.index(int(row["layer"]))
            j = heads.index(None if pd.isna(row["head"]) else int(row["head"]))
            name = cell_name(layers[i], heads[j], matrix, shared, group)
            count = f"{row['significant']} of {row['checkpoints']} checkpoints"
            if pd.isna(row["step"]):
                never[0].append(j)
                never[1].append(layers[i])
                words[i][j] = [name, "not at the last checkpoint", count]
            else:
                z[i][j] = shade(int(row["step"]))
                words[i][j] = [name, f"from step {int(row['step'])} on", count]
        return z, words, never[0] or [None], never[1] or [None]

    z, words, nx, ny = drawn(ranks[start])
    ticks = sorted({*since.tolist()}) or [1]
    ticks = [ticks[i] for i in np.unique(np.linspace(0, len(ticks) - 1, min(6, len(ticks))).round().astype(int))]
    figure = Drawing(
        [
            heatmap(
                x=x, y=layers, z=z, zmin=shade(low), zmax=shade(high) + (low == high), colorscale=style.SEQUENTIAL,
                xgap=1, ygap=1, customdata=words, name=matrix,
                hovertemplate=(
                    f"<b>%{{customdata[0]}}</b><br>q ≤ {level:g}: %{{customdata[1]}}"
                    "<br>so at %{customdata[2]}<extra></extra>"
                ),
                colorbar={
                    "thickness": 12, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 4, "tickmode": "array",
                    "tickvals": [shade(t) for t in ticks], "ticktext": [str(t) for t in ticks],
                    "title": {"text": "from step", "side": "top", "font": {"size": 11}},
                },
            ),
            scatter(
                x=nx, y=ny, mode="markers", name="not at the last checkpoint", hoverinfo="skip", showlegend=True,
                marker={"symbol": "x-thin", "size": 9, "line": {"width": 2, "color": style.GUIDE}},
            ),
        ]
    )  # fmt: skip
    if len(ranks) > 1:
        changes = []
        for k in ranks:
            z, hovers, nx, ny = drawn(k)
            changes.append([{"z": [z, None], "customdata": [hovers, None], "x": [x, nx], "y": [layers, ny]}, [0, 1]])
        figure.update_layout(sliders=[rank_slider(ranks, start, changes)])
    maps.head_axes(figure, layers, heads, shared)
    title = heading(
        f"{style.text(matrix)}: since when more concentrated than chance",
        f"First step from which on q ≤ {level:g} in {style.text(space)}, for the change "
        f"{WORDS.get(reference, style.text(reference))}. Not corrected for the number of checkpoints.",
        **layout,
    )
    return finish(figure, title, right=72, plot_height=maps.map_height(layers), **layout)


def _of_reference(table: pd.DataFrame, reference: str | None) -> tuple[pd.DataFrame, str]:
    pick.require(table, ("reference",), SOURCE)
    there = list(dict.fromkeys(table["reference"]))
    chosen = there[0] if reference is None else style.one_of("reference", reference, there, "reference")
    return table[table["reference"] == chosen], str(chosen)


def _against(table: pd.DataFrame, matrix: str, subspace: str | None) -> tuple[pd.DataFrame, str]:
    rows = table[table["matrix"] == matrix]
    there = [str(s) for s in dict.fromkeys(rows["subspace"])]
    space = pick.default_subspace(table, matrix) if subspace is None else subspace
    style.one_of(f"subspace of {matrix}", space, there, "subspace")
    return rows[rows["subspace"] == space], space


def _select(
    table: pd.DataFrame, matrix: str, subspace: str | None, reference: str | None
) -> tuple[pd.DataFrame, str, str]:
    pick.require(table, ("step", "reference", *pick.COLUMNS), SOURCE)
    table, chosen = _of_reference(table, reference)
    style.one_of("matrix", matrix, list(dict.fromkeys(table["matrix"])), "matrix")
    rows, space = _against(table, matrix, subspace)
    return rows, space, chosen


def _curve(rows: pd.DataFrame, matrix: str, space: str) -> dict[str, Any]:
    """What one matrix draws at one rank: lists over steps (None for NaN)."""
    rows = rows.sort_values("step")
    write = rows["pathway"].iloc[0] == "write"
    matched = rows["gradient_matched" if write else "activation_matched"].to_numpy(float, na_value=np.nan)
    low, high = (rows[c].to_numpy(float, na_value=np.nan) for c in ("ci_low", "ci_high"))
    x = [int(s) for s in rows["step"]]
    told = [i for i in range(len(x)) if np.isfinite(low[i]) and np.isfinite(high[i])]
    kind = "gradient-matched" if write else "activation-matched"
    return {
        "x": x,
        "y": [_or_none(v) for v in rows["relative"]],
        "reference": [_or_none(v) for v in matched],
        "band_x": [x[i] for i in told] + [x[i] for i in reversed(told)],
        "band_y": [float(low[i]) for i in told] + [float(high[i]) for i in reversed(told)],
        "hover": [
            [
                f"{style.text(matrix)} against {style.text(space)}",
                style.number(row["relative"]),
                interval(row["ci_low"], row["ci_high"], space),
                f"{kind}: {style.number(m)}",
                style.number(row["delta_relative_norm"]),
            ]
            for row, m in zip(rows.to_dict("records"), matched, strict=True)
        ],
    }


def _head_curve(rows: pd.DataFrame, n: int, fields: list[list[str]], single: bool) -> dict[str, Any]:
    relative, low, high = (rows[c].to_numpy(float, na_value=np.nan) for c in ("relative", "ci_low", "ci_high"))
    colour = style.SERIES[0] if single else style.SERIES[n % len(style.SERIES)]
    symbol = "circle" if single else style.SYMBOLS[n % len(style.SYMBOLS)]
    significant = rows["isotropic_q"].to_numpy(float, na_value=np.nan) <= SIGNIFICANT
    return {
        "x": [int(s) for s in rows["step"]],
        "y": [_or_none(v) for v in relative],
        "error_y": {
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": colour,
            "array": [_or_none(v) for v in high - relative], "arrayminus": [_or_none(v) for v in relative - low],
        },
        "line": {"color": colour, "width": 1.6},
        "marker": {
            "size": 7, "color": colour, "line": {"color": colour, "width": 1.5},
            "symbol": [symbol if s else f"{symbol}-open" for s in significant],
        },
        "customdata": fields,
    }  # fmt: skip


def _fields(
    rows: pd.DataFrame, space: str, d: int | None, helds: Sequence[Held], shared: bool, group: int | None
) -> list[list[str]]:
    """What the hover says of each row: that of a pair's table, the step beside the head."""
    names = [
        f"{name}, step {int(step)}" for name, step in zip(row_names(rows, shared, group), rows["step"], strict=True)
    ]
    return head_fields(rows, names, space, d, helds)


def _step_axis(steps: pd.Series) -> dict[str, Any]:
    """Steps as they are, or by their logarithm where a run's first ones would be pressed together."""
    values = sorted(int(s) for s in steps.unique())
    if not _is_wide(values[0], values[-1]):
        return {"type": "linear"}
    ticks = _apart(values)
    return {
        "type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [str(v) for v in ticks],
        "minor": {"ticks": ""},
    }  # fmt: skip


def _is_wide(low: int, high: int) -> bool:
    return low > 0 and high / low > 10


def _apart(values: Sequence[int]) -> list[int]:
    """Steps to put ticks at: those a seventh of a decade apart at least, from the last one down."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if math.log10(kept[-1] / value) > 0.15:
            kept.append(value)
    return kept[::-1]


def _or_none(value: Any) -> float | None:
    value = style.as_float(value)
    return None if math.isnan(value) else value
