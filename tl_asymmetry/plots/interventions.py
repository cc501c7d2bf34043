"""Rank-1 interventions: effects on a map of heads, against their clouds of controls, and over doses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, heatmap, scatter
from tl_asymmetry.plots.hover import head_name
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note

CELL = ("layer", "head", "matrix", "intervention", "direction", "index")
EDITS = (*CELL, "control", "draw", "dose", "norm_ratio", "norm_matched")
EFFECTS = (*CELL, "outcome", "control", "effect", "control_median", "control_high", "percentile", "p", "q", "draws")
SOURCE = "RankOneStudy.edits"
NAMES = {
    "kl": "KL(original ‖ edited), nats per token",
    "ce": "change of cross-entropy, nats per token",
    "shift": "share of the shift undone or installed",
    "margin": "change of the preference margin, nats",
    "margin_shift": "share of the margin undone or installed",
}
CONTROL_SYMBOLS = {
    "undo_matched": "hexagon", "random": "circle", "complement": "square", "low_variance": "triangle-down",
    "equal_variance": "diamond", "permuted_heads": "cross",
}  # fmt: skip
CONTROL_COLOURS = dict(
    zip(CONTROL_SYMBOLS, ("#b03060", "#6f7b88", "#2f7fc1", "#94801a", "#0f8a68", "#a55fb0"), strict=True)
)
TARGET_COLOUR = "#c2602a"


@checked
def controls_figure(
    edits: pd.DataFrame,
    matrix: str | None = None,
    *,
    outcome: str = "kl",
    direction: str | None = None,
    intervention: str | None = None,
    index: int = 1,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw each head's effect over the cloud of its controls, heads side by side from layer to layer.

    A star is the edit itself, small marks its controls, one colour and symbol for each kind; open marks are controls
    that had to be longer or shorter than the edit to vary as much. A menu shows one kind of control alone.

    Args:
        edits: `RankOneStudy.edits`.
        matrix: which matrix; the first of the table by default.
        outcome: a column of outcomes.
        direction, intervention: which; the first of the table by default.
        index: 1 for the leading direction of its kind.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a matrix, direction, intervention, index or outcome that is not in the table.

    Example:
        >>> study.plot_controls("W_O").write_html("controls.html")
    """
    chosen = _chosen(edits, EDITS, matrix, direction, intervention, index, SOURCE)
    outcome = style.one_of("outcome", outcome, [name for name in NAMES if name in edits.columns], "outcome")
    rows = chosen.rows[chosen.rows["dose"] == 1]
    sites = rows[["layer", "head"]].drop_duplicates().sort_values(["layer", "head"])
    place = {(int(s["layer"]), _head(s["head"])): i for i, s in enumerate(sites.to_dict("records"))}
    figure = Drawing()
    kinds = [kind for kind in dict.fromkeys(rows["control"]) if kind != "target"]
    for i, kind in enumerate(kinds):
        of = rows[rows["control"] == kind]
        symbol = CONTROL_SYMBOLS.get(kind, "circle")
        x = [
            place[int(r["layer"]), _head(r["head"])] + _offset(i, len(kinds), int(r["draw"]), len(of) / len(place))
            for r in of.to_dict("records")
        ]
        figure.add_trace(
            scatter(
                x=x, y=of[outcome], mode="markers", name=style.text(kind),
                marker={
                    "size": 5, "opacity": 0.75, "color": CONTROL_COLOURS.get(kind, style.GUIDE),
                    "symbol": [symbol if matched else f"{symbol}-open" for matched in of["norm_matched"]],
                },
                customdata=[
                    [_name(r), style.text(kind), int(r["draw"]) + 1, style.number(r[outcome], 4),
                     style.number(r["norm_ratio"])]
                    for r in of.to_dict("records")
                ],
                hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]} control %{customdata[2]}: %{customdata[3]}"
                "<br>norm %{customdata[4]} of the edit's<extra></extra>",
            )
        )  # fmt: skip
    targets = rows[rows["control"] == "target"]
    figure.add_trace(
        scatter(
            x=[place[int(r["layer"]), _head(r["head"])] for r in targets.to_dict("records")], y=targets[outcome],
            mode="markers", name=f"{style.text(chosen.direction)} direction",
            marker={"size": 12, "symbol": "star", "color": TARGET_COLOUR, "line": {"color": style.GUIDE, "width": 0.8}},
            customdata=[[_name(r), style.number(r[outcome], 4)] for r in targets.to_dict("records")],
            hovertemplate="<b>%{customdata[0]}</b><br>the edit itself: %{customdata[1]}<extra></extra>",
        )
    )  # fmt: skip
    if len(kinds) > 1:
        shown = [("all controls", [True] * (len(kinds) + 1))]
        shown += [(kind, [*(k == kind for k in kinds), True]) for kind in kinds]
        figure.update_layout(updatemenus=[menu("control", [(label, [{"visible": which}]) for label, which in shown])])
    if not targets[outcome].notna().any():
        note(figure, "No value: the models do not differ here.")
    figure.add_hline(y=0, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    labels = [head_name(layer, head) for layer, head in place]
    step = max(1, len(labels) // 24)
    figure.update_xaxes(
        title="layer and head", tickmode="array", tickvals=list(range(0, len(labels), step)), ticktext=labels[::step],
        range=[-0.6, len(labels) - 0.4],
    )  # fmt: skip
    figure.update_yaxes(title=NAMES[outcome], exponentformat="power")
    return finish(
        figure,
        _heading(chosen, outcome, "Star: the edit. Marks: its controls (open: of another norm).", **layout),
        plot_height=400,
        **layout,
    )


@checked
def effects_figure(
    table: pd.DataFrame,
    matrix: str | None = None,
    *,
    outcome: str = "kl",
    direction: str | None = None,
    intervention: str | None = None,
    index: int = 1,
    control: str | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the effect of each head's edit as a map of layers and heads; a dot marks those above all their controls.

    Args:
        table: `RankOneStudy.table`.
        control: the kind of control that decides on the dots; the first of the table by default.
        matrix, outcome, direction, intervention, index, layout: as in `controls_figure`.

    Raises:
        ValueError: what is not in the table.

    Example:
        >>> study.plot_heads("W_O").write_html("heads.html")
    """
    chosen = _chosen(table, EFFECTS, matrix, direction, intervention, index, "RankOneStudy.table")
    style.one_of("outcome", outcome, list(dict.fromkeys(chosen.rows["outcome"])), "outcome")
    rows = chosen.rows[chosen.rows["outcome"] == outcome]
    kinds = list(dict.fromkeys(rows["control"]))
    control = style.one_of("control", kinds[0] if control is None else control, kinds, "control")
    rows = rows[rows["control"] == control]
    layers, heads = pick.layers_of(rows), pick.heads_of(rows)
    values = pick.grid(rows, rows["effect"], layers, heads)
    at = {(int(r["layer"]), _head(r["head"])): r for r in rows.to_dict("records")}
    words = [[_effect_words(at.get((layer, head)), outcome) for head in heads] for layer in layers]
    largest = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 1.0
    signed = bool((values < 0).any())
    cells = heatmap(
        z=values, x=list(range(len(heads))), y=list(range(len(layers))), customdata=words, xgap=1, ygap=1,
        colorscale=style.diverging(layout.get("template")), zmid=0, zmin=-largest, zmax=largest,
        hovertemplate="%{customdata}<extra></extra>",
        colorbar={"title": {"text": outcome, "side": "top", "font": {"size": 11}}, "thickness": 12,
                  "outlinewidth": 0, "exponentformat": "power"},
    )  # fmt: skip
    figure = Drawing([cells])
    above = [
        (j, i) for i, layer in enumerate(layers) for j, head in enumerate(heads)
        if (layer, head) in at and at[layer, head]["percentile"] == 100
    ]  # fmt: skip
    page = "dark" if style.is_dark(layout.get("template")) else "light"
    figure.add_trace(
        scatter(
            x=[x for x, _ in above], y=[y for _, y in above], mode="markers", hoverinfo="skip",
            name=f"above all {style.text(control)} controls",
            marker={"size": 7, "symbol": "circle", "color": style.INK[page],
                    "line": {"color": style.PAPER[page], "width": 1}},
        )
    )  # fmt: skip
    head_ticks: dict[str, Any] = {
        "tickvals": list(range(len(heads))),
        "ticktext": ["" if h is None else str(h) for h in heads],
    }
    layer_ticks: dict[str, Any] = {"tickvals": list(range(len(layers))), "ticktext": [str(layer) for layer in layers]}
    figure.update_xaxes(title="head", range=[-0.5, len(heads) - 0.5], tickmode="array", showgrid=False, **head_ticks)
    figure.update_yaxes(title="layer", range=[len(layers) - 0.5, -0.5], tickmode="array", showgrid=False, **layer_ticks)
    if not np.isfinite(values).any():
        note(figure, "No value: the models do not differ here.")
    sign = " Blue: below zero." if signed else ""
    return finish(
        figure,
        _heading(chosen, outcome, f"Dot: above all {control} controls.{sign}", **layout),
        plot_height=max(160, 34 * len(layers)),
        right=70,
        **layout,
    )


@checked
def doses_figure(
    edits: pd.DataFrame,
    *,
    outcome: str = "kl",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw effect against dose, a line for each cell; at dose 1 the range of all its controls stands beside it.

    Args:
        edits: rows of `RankOneStudy.edits`, of not too many cells.
        outcome: a column of outcomes.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column, or no row.

    Example:
        >>> study.plot_doses(4).write_html("doses.html")
    """
    pick.require(edits, EDITS, SOURCE)
    outcome = style.one_of("outcome", outcome, [name for name in NAMES if name in edits.columns], "outcome")
    if edits.empty:
        raise ValueError("expected rows of at least one cell, got none; pass RankOneStudy.edits")
    figure = Drawing()
    cells = list(edits.groupby(list(CELL), sort=False, dropna=False))
    doses = sorted(edits["dose"].unique())
    span = (doses[-1] - doses[0]) or 1.0
    for i, (_, block) in enumerate(cells):
        line = block[block["control"] == "target"].sort_values("dose")
        first = line.iloc[0].to_dict()
        name = f"{_name(first)} · {style.text(first['direction'])} {first['index']} · {first['intervention']}"
        colour = style.SERIES[i % len(style.SERIES)]
        group = f"cell{i}"
        figure.add_trace(
            scatter(
                x=line["dose"], y=line[outcome], mode="lines+markers", name=name, legendgroup=group,
                line={"color": colour, "width": 2},
                marker={"symbol": style.SYMBOLS[i % len(style.SYMBOLS)], "size": 8, "color": colour},
                customdata=[[style.number(v, 4)] for v in line[outcome]],
                hovertemplate=f"<b>{name}</b><br>dose %{{x}}: %{{customdata[0]}}<extra></extra>",
            )
        )  # fmt: skip
        controls = block.loc[block["control"] != "target", outcome].dropna()
        if len(controls):
            low, middle, high = np.quantile(controls, [0, 0.5, 1])
            figure.add_trace(
                scatter(
                    x=[1 + 0.012 * span * (i + 1)], y=[middle], mode="markers", legendgroup=group, showlegend=False,
                    marker={"symbol": "line-ew-open", "size": 7, "color": colour, "line": {"width": 2}},
                    error_y={"type": "data", "symmetric": False, "array": [high - middle],
                             "arrayminus": [middle - low], "color": colour, "thickness": 1.3, "width": 3},
                    customdata=[[style.number(low, 4), style.number(middle, 4), style.number(high, 4)]],
                    hovertemplate=f"<b>{name}</b><br>{len(controls)} controls at dose 1: %{{customdata[0]}} to "
                    "%{customdata[2]}, median %{customdata[1]}<extra></extra>",
                )
            )  # fmt: skip
    figure.add_hline(y=0, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="dose (1 = all of the direction)")
    figure.update_yaxes(title=NAMES[outcome], exponentformat="power")
    words = heading(
        "Dose and response", "One line per cell. Bar at dose 1: the range of its controls, median marked.", **layout
    )
    return finish(figure, words, plot_height=400, legend=len(cells) <= 12, **layout)


class _Chosen:
    """The rows a figure shows, and what they are of."""

    def __init__(self, rows: pd.DataFrame, matrix: str, direction: str, intervention: str, index: int) -> None:
        self.rows, self.matrix = rows, matrix
        self.direction, self.intervention, self.index = direction, intervention, index


def _chosen(
    table: pd.DataFrame, columns: Sequence[str], matrix: str | None, direction: str | None, intervention: str | None,
    index: int, source: str,
) -> _Chosen:  # fmt: skip
    pick.require(table, columns, source)
    if table.empty:
        raise ValueError(f"expected rows, got an empty table; pass {source}")
    picked: dict[str, Any] = {}
    rows = table
    wanted = (("matrix", matrix), ("intervention", intervention), ("direction", direction), ("index", index))
    for column, value in wanted:
        there = list(dict.fromkeys(rows[column].tolist()))
        picked[column] = style.one_of(column, there[0] if value is None else value, there, column)
        rows = rows[rows[column] == picked[column]]
    return _Chosen(rows, picked["matrix"], picked["direction"], picked["intervention"], picked["index"])


def _heading(chosen: _Chosen, outcome: str, words: str, **layout: Unpack[Layout]) -> str:
    what = {"removal": "Removing", "insertion": "Inserting"}.get(chosen.intervention, chosen.intervention)
    first = f"{what} {chosen.direction} direction {chosen.index} of each {chosen.matrix}"
    name = NAMES[outcome]
    return heading(style.text(first), f"{name[0].upper()}{name[1:]}. {words}", **layout)


def _effect_words(row: dict[Any, Any] | None, outcome: str) -> str:
    if row is None:
        return "not studied"
    return (
        f"<b>{_name(row)}</b><br>{NAMES[outcome]}: {style.number(row['effect'], 4)}"
        f"<br>{style.text(row['control'])} controls: median {style.number(row['control_median'], 4)}, 95 % below "
        f"{style.number(row['control_high'], 4)}<br>percentile {style.number(row['percentile'])}, "
        f"p {style.number(row['p'], 2)}, q {style.number(row['q'], 2)} ({row['draws']} draws)"
    )


def _name(row: dict[Any, Any]) -> str:
    return f"{head_name(int(row['layer']), _head(row['head']))} {style.text(row['matrix'])}"


def _head(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)


def _offset(kind: int, kinds: int, draw: int, draws: float) -> float:
    """Kinds in lanes beside the site's middle, draws spread within, so that points do not hide each other."""
    lane = 0.8 / max(kinds, 1)
    within = (draw + 0.5) / max(draws, 1) - 0.5
    return round((kind - (kinds - 1) / 2) * lane + 0.7 * lane * within, 4)
