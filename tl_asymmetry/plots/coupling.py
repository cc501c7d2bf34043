"""Couplings of training directions with centroids, along a run and across arms."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note, slider

ESTIMATOR_STYLE = {
    "update": {"color": style.SERIES[1], "symbol": "square", "name": "update directions"},
    "gradient": {"color": style.SERIES[0], "symbol": "circle", "name": "gradient directions"},
}
DASHES = {"backward": "solid", "forward": "dash"}
ACCURACY = {"train_accuracy": ("train", "dot"), "test_accuracy": ("held out", "solid")}
LINES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@checked
def coupling_figure(
    means: pd.DataFrame,
    accuracy: pd.DataFrame,
    *,
    objective: str | None = None,
    window: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw accuracy above and the mean ratio R̄ of each estimator below, on one axis of steps.

    A forward window is dashed, a backward one solid; 1, a random direction, is marked. With several objectives a slider
    picks one.

    Args:
        means: `CouplingStudy.mean_ratios`.
        accuracy: `CouplingStudy.accuracy`; may be empty, then the upper panel is left out.
        objective: draw this one alone.
        window: the window drawn; default the first of the table that is not 1.
        layout: as in `heads_figure`.

    Raises:
        ValueError: an unknown objective or window.

    Example:
        >>> coupling_figure(study.mean_ratios, study.accuracy).write_html("coupling.html")  # doctest: +SKIP
    """
    objectives = list(dict.fromkeys(means["objective"]))
    windows = [int(w) for w in dict.fromkeys(means["window"])]
    if objective is not None:
        style.one_of("objective", objective, objectives, "objective")
        objectives = [objective]
    shown = next((w for w in windows if w > 1), windows[0]) if window is None else window
    style.one_of("window", shown, windows, "window")
    both = len(accuracy) > 0
    grid: dict[str, Any] = {"rows": 2, "shared_xaxes": True, "vertical_spacing": 0.06, "row_heights": [0.36, 0.64]}
    figure = Drawing(**grid) if both else Drawing(rows=1)
    owners: list[str] = []
    lower = 2 if both else 1
    for name in objectives:
        first = name == objectives[0]
        if both:
            rows = accuracy[accuracy["op"] == name]
            for column, (words, dash) in ACCURACY.items():
                figure.add_trace(
                    scatter(
                        x=rows["step"].tolist(), y=rows[column].tolist(), mode="lines", name=f"{words} accuracy",
                        line={"color": style.SERIES[2], "dash": dash, "width": 1.8}, visible=first,
                        hovertemplate=f"{style.text(name)}, {words} accuracy %{{y:.3f}} at step %{{x}}<extra></extra>",
                    ),
                    row=1, col=1,
                )  # fmt: skip
                owners.append(name)
        curves = means[(means["objective"] == name) & (means["window"] == shown)]
        for (estimator, alignment), curve in curves.groupby(["estimator", "alignment"], sort=False):
            look = ESTIMATOR_STYLE[estimator]
            several = means["alignment"].nunique() > 1
            figure.add_trace(
                scatter(
                    x=curve["step"].tolist(), y=curve["mean_ratio"].tolist(), mode="lines+markers",
                    name=look["name"] + (f", {alignment} window" if several else ""), visible=first,
                    line={"color": look["color"], "dash": DASHES[alignment], "width": 2},
                    marker={"symbol": look["symbol"], "size": 6},
                    customdata=[
                        [style.number(r["mean_ratio"]), style.number(r["ratio_1"]), r["rows"], r["directions"]]
                        for r in curve.to_dict("records")
                    ],
                    hovertemplate=(
                        f"<b>{style.text(name)}</b>, {look['name']}, {alignment} window<br>step %{{x}}<br>mean ratio "
                        "%{customdata[0]} over %{customdata[3]} directions<br>leading direction %{customdata[1]}"
                        "<br>%{customdata[2]} rows in the window<br>1 = a random direction<extra></extra>"
                    ),
                ),
                row=lower, col=1,
            )  # fmt: skip
            owners.append(name)
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5}, row=lower, col=1)
    if len(objectives) > 1:
        figure.update_layout(
            sliders=[
                slider("objective", [(style.text(n), [{"visible": [o == n for o in owners]}]) for n in objectives])
            ]
        )
    figure.update_xaxes(title="training step", row=lower, col=1)
    ratios = means.loc[means["window"] == shown, "mean_ratio"]
    figure.update_yaxes(title="mean ratio R̄", row=lower, col=1, **style.ratio_axis(ratios, pad=0.4))
    if both:
        figure.update_yaxes(title="accuracy", range=[-0.03, 1.03], row=1, col=1)
    if not len(ratios):
        note(figure, "No window holds a row yet.")
    words = heading(
        "How strongly training directions move centroids",
        f"Mean response over k of the leading directions of {shown} rows, over that of a random direction (dashed: 1).",
        **layout,
    )
    return finish(figure, words, plot_height=460 if both else 330, **layout)


@checked
def windows_figure(
    peaks: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the peak of R_1 and of R̄ against the number of rows in the window.

    Args:
        peaks: `CouplingStudy.peaks`.
        layout: as in `heads_figure`.

    Example:
        >>> windows_figure(study.peaks).write_html("windows.html")  # doctest: +SKIP
    """
    figure = Drawing()
    many = peaks["objective"].nunique() > 1
    for (objective, estimator, alignment), rows in peaks.groupby(["objective", "estimator", "alignment"], sort=False):
        look = ESTIMATOR_STYLE[str(estimator)]
        rows = rows.sort_values("window")
        for column, words, hollow in (("ratio_1", "R₁", False), ("mean_ratio", "R̄", True)):
            who = f"{objective}, " if many else ""
            which = f", {alignment}" if peaks["alignment"].nunique() > 1 else ""
            figure.add_trace(
                scatter(
                    x=rows["window"].tolist(), y=rows[column].tolist(), mode="lines+markers",
                    name=style.text(f"{who}{words} {look['name']}{which}"),
                    line={"color": look["color"], "dash": DASHES[str(alignment)], "width": 1.3 if hollow else 2},
                    marker={"symbol": look["symbol"] + ("-open" if hollow else ""), "size": 8},
                    customdata=[[style.number(v), int(s)] for v, s in
                                zip(rows[column], rows["step_1" if column == "ratio_1" else "step"], strict=True)],
                    hovertemplate=(
                        f"{style.text(who)}{words}, {look['name']}, {alignment} window of %{{x}} rows<br>"
                        "peak %{customdata[0]} at step %{customdata[1]}<br>1 = a random direction<extra></extra>"
                    ),
                )
            )  # fmt: skip
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    ticks = sorted({int(w) for w in peaks["window"]})
    figure.update_xaxes(title="rows in the window W", tickmode="array", tickvals=ticks)
    figure.update_yaxes(
        title="peak over checkpoints", **style.ratio_axis([*peaks["ratio_1"], *peaks["mean_ratio"]], pad=0.4)
    )
    words = heading(
        "Does the window matter?",
        "Filled: the leading direction alone (R₁). Open: the mean over the leading directions (R̄).",
        **layout,
    )
    return finish(figure, words, plot_height=330, **layout)


@checked
def accuracy_figure(
    table: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw train and held-out accuracy over steps, one colour for each operation.

    Args:
        table: `GrokRun.table`.
        layout: as in `heads_figure`.

    Example:
        >>> accuracy_figure(run.table).write_html("accuracy.html")  # doctest: +SKIP
    """
    figure = Drawing()
    for i, (op, rows) in enumerate(table.groupby("op", sort=False)):
        for column, (words, dash) in ACCURACY.items():
            figure.add_trace(
                scatter(
                    x=rows["step"].tolist(), y=rows[column].tolist(), mode="lines", name=style.text(f"{op}, {words}"),
                    line={"color": style.SERIES[i % len(style.SERIES)], "dash": dash, "width": 2},
                    hovertemplate=f"{style.text(op)}, {words}: %{{y:.3f}} at step %{{x}}<extra></extra>",
                )
            )  # fmt: skip
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.03])
    words = heading("Accuracy along training", **layout)
    return finish(figure, words, plot_height=300, **layout)


@checked
def arms_figure(
    table: pd.DataFrame,
    *,
    accuracy: float = 0.98,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw held-out accuracy of every arm, one line for each seed, with the first step at `accuracy` marked.

    Arms differ in colour, dash and symbol. A seed that never reaches the accuracy has no mark.

    Args:
        table: of `grokking.arms`: `arm, seed, step, op, test_accuracy`; with several operations the lowest counts.
        accuracy: what is marked.
        layout: as in `heads_figure`.

    Example:
        >>> arms_figure(arms_table).write_html("arms.html")  # doctest: +SKIP
    """
    lowest = table.groupby(["arm", "seed", "step"], sort=False)["test_accuracy"].min().reset_index()
    names = list(dict.fromkeys(lowest["arm"]))
    figure = Drawing()
    for i, arm in enumerate(names):
        colour = style.SERIES[i % len(style.SERIES)]
        symbol = style.SYMBOLS[(i + i // len(style.SERIES)) % len(style.SYMBOLS)]
        dash = LINES[(i // len(style.SERIES)) % len(LINES)]
        marks: list[tuple[int, float, int]] = []
        for j, (seed, rows) in enumerate(lowest[lowest["arm"] == arm].groupby("seed", sort=False)):
            rows = rows.sort_values("step")
            figure.add_trace(
                scatter(
                    x=rows["step"].tolist(), y=rows["test_accuracy"].tolist(), mode="lines", legendgroup=arm,
                    name=style.text(arm), showlegend=j == 0, line={"color": colour, "dash": dash, "width": 1.5},
                    hovertemplate=f"<b>{style.text(arm)}</b>, seed {seed}<br>%{{y:.3f}} at step %{{x}}<extra></extra>",
                )
            )  # fmt: skip
            reached = rows[rows["test_accuracy"] >= accuracy]
            if len(reached):
                marks.append((int(reached["step"].iloc[0]), float(reached["test_accuracy"].iloc[0]), int(seed)))
        figure.add_trace(
            scatter(
                x=[m[0] for m in marks], y=[m[1] for m in marks], mode="markers", legendgroup=arm, showlegend=False,
                name=style.text(arm), marker={"color": colour, "symbol": symbol, "size": 10},
                customdata=[[m[2]] for m in marks],
                hovertemplate=f"<b>{style.text(arm)}</b>, seed %{{customdata[0]}}<br>first at {accuracy:g}: step %{{x}}"
                "<extra></extra>",
            )
        )  # fmt: skip
    figure.add_hline(y=accuracy, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    figure.update_xaxes(title="training step")
    figure.update_yaxes(title="held-out accuracy", range=[-0.03, 1.06])
    words = heading(
        "What the attention gradient is needed for",
        f"One line a seed; a mark where held-out accuracy first reaches {accuracy:g}.",
        **layout,
    )
    return finish(figure, words, plot_height=360, **layout)
