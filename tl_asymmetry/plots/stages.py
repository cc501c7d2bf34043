"""Chains of training stages: what became of each, layer by layer, and how alike they are."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, bar, scatter
from tl_asymmetry.plots.hover import head_name
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note

FATES = {"kept": "kept by the whole way", "undone": "taken back later", "turned": "gone beside it later"}


@checked
def stage_flow_figure(
    pooled: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw what became of a stage's delta in each layer, bars side by side; a menu picks the stage.

    Args:
        pooled: `StageAnalysis.pooled("layer")`.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column.

    Example:
        >>> stages.plot_flow().write_html("flow.html")  # doctest: +SKIP
    """
    pick.require(pooled, ("layer", "stage", "norm", *FATES), 'StageAnalysis.pooled("layer")')
    stages = list(dict.fromkeys(pooled["stage"]))
    figure, owners = Drawing(), []
    for stage in stages:
        block = pooled[pooled["stage"] == stage]
        for i, (fate, words) in enumerate(FATES.items()):
            figure.add_trace(
                bar(
                    x=block["layer"], y=block[fate], name=words, visible=stage == stages[0],
                    marker={"color": style.SERIES[i]},
                    customdata=[[style.number(r[fate]), style.number(r["norm"])] for r in block.to_dict("records")],
                    hovertemplate=f"<b>{style.text(stage)}</b>, layer %{{x}}<br>{words}: %{{customdata[0]}} of ‖Δ‖ "
                    "%{customdata[1]}<extra></extra>",
                )
            )  # fmt: skip
            owners.append(stage)
    if len(stages) > 1:
        options = [(style.text(stage), [{"visible": [owner == stage for owner in owners]}]) for stage in stages]
        figure.update_layout(updatemenus=[menu("stage", options)])
    if not pooled["kept"].notna().any():
        note(figure, "No value: no stage changed a weight.")
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1})
    figure.update_xaxes(title="layer", dtick=max(1, pooled["layer"].nunique() // 16))
    figure.update_yaxes(title="share of the stage's own delta")
    words = heading(
        "What became of each stage",
        "Dashed: 1, all of it. Kept and undone are shares of ‖Δ‖², beside is a length over ‖Δ‖.",
        **layout,
    )
    return finish(figure, words, plot_height=380, **layout)


@checked
def stage_cosines_figure(
    pairs: pd.DataFrame,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the cosine of two stages' deltas over layers, each head a point, in units of its spread by chance.

    Storage noise is taken out. A menu picks the two stages.

    Args:
        pairs: `StageAnalysis.pairs`.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a missing column, or no row.

    Example:
        >>> stages.plot_cosines().write_html("cosines.html")  # doctest: +SKIP
    """
    columns = ("layer", "head", "matrix", "first", "second", "cosine", "cosine_sd", "cosine_unrounded", "overlap")
    pick.require(pairs, columns, "StageAnalysis.pairs")
    if pairs.empty:
        raise ValueError("expected two stages or more, got one; pass three checkpoints or more to analyze_stages")
    labels = [f"{first} and {second}" for first, second in zip(pairs["first"], pairs["second"], strict=True)]
    figure, owners = Drawing(), []
    for label, of_two in pairs.assign(label=labels).groupby("label", sort=False):
        for matrix, block in of_two.groupby("matrix", sort=False):
            look = style.MATRIX_STYLE.get(str(matrix), style.OTHER_STYLE)
            figure.add_trace(
                scatter(
                    x=block["layer"], y=block["cosine_unrounded"] / block["cosine_sd"], mode="markers",
                    name=style.text(matrix), visible=label == labels[0],
                    marker={"symbol": look["symbol"], "color": look["color"], "size": 7},
                    customdata=[
                        [
                            head_name(int(r["layer"]), None if pd.isna(r["head"]) else int(r["head"])),
                            style.number(r["cosine"]), style.number(r["cosine_sd"]), style.number(r["overlap"]),
                        ]
                        for r in block.to_dict("records")
                    ],
                    hovertemplate=f"<b>%{{customdata[0]}} {style.text(matrix)}</b><br>cosine %{{customdata[1]}} "
                    "(chance: 0 ± %{customdata[2]})<br>overlap of leading directions %{customdata[3]}<extra></extra>",
                )
            )  # fmt: skip
            owners.append(label)
    shown = list(dict.fromkeys(labels))
    if len(shown) > 1:
        options = [(style.text(label), [{"visible": [owner == label for owner in owners]}]) for label in shown]
        figure.update_layout(updatemenus=[menu("stages", options)])
    figure.add_hline(y=0, line={"color": style.GUIDE, "dash": "dash", "width": 1})
    figure.update_xaxes(title="layer", dtick=max(1, pairs["layer"].nunique() // 16))
    figure.update_yaxes(title="cosine over its spread by chance")
    words = heading(
        "How alike two stages' deltas are",
        "Each head a point. Below 0: the later stage goes against the earlier one.",
        **layout,
    )
    return finish(figure, words, plot_height=380, **layout)
