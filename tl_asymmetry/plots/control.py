"""Fractions against the grade of the objective that made the delta, one point per seed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, kind_of
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, Trace, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note

HOVER = (
    "<b>%{customdata[0]}</b> (grade %{customdata[1]}), seed %{customdata[2]}<br>%{customdata[3]} in %{customdata[4]}: "
    "relative %{y:.3g}<br>reference %{customdata[5]}, excess %{customdata[6]}"
    f"<br>more concentrated than a random subspace ({FOUND}): %{{customdata[7]}} of the heads<extra></extra>"
)


@checked
def grades_figure(
    table: pd.DataFrame,
    *,
    rank: int | None = None,
    default_rank: int | None = None,
    compared: str | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw each matrix's relative fraction over the grades: a point for each seed, a line through their means.

    A read matrix is held against its own input, a write matrix against the prediction directions. Dotted in the same
    colour: the matched reference (activations for reads, the objective's own gradients for writes), where there is one;
    dashed grey: chance. A menu picks the comparison (equal norm, equal steps).

    Args:
        table: `ControlStudy.table`.
        rank: the rank shown; None takes `default_rank`, or the middle one.
        default_rank: taken where the table has it.
        compared: "norm" or "steps", shown first; None: "norm" where there is one.
        layout: as in `heads_figure`.

    Raises:
        ValueError: an unknown rank or comparison.

    Example:
        >>> study.plot_grades().write_html("grades.html")  # doctest: +SKIP
    """
    ranks = sorted({int(k) for k in table["rank"]})
    if rank is None:
        rank = default_rank if default_rank in ranks else ranks[len(ranks) // 2]
    style.one_of("rank", rank, ranks, "rank")
    there = [c for c in ("norm", "steps") if (table["compared"] == c).any()]
    first = there[0] if compared is None else style.one_of("compared", compared, there, "compared")
    rows = table[table["rank"] == rank]
    own = [kind_of(matrix, side).subspace for matrix, side in zip(rows["matrix"], rows["pathway"], strict=True)]
    shown = rows[rows["subspace"] == own]
    order = shown.drop_duplicates("objective").sort_values("grade", kind="stable")
    places = {name: i for i, name in enumerate(order["objective"])}
    figure = Drawing()
    owners = []
    for comparison in there:
        for matrix in dict.fromkeys(shown["matrix"]):
            block = shown[(shown["compared"] == comparison) & (shown["matrix"] == matrix)]
            for trace in _traces(block, matrix, places, visible=comparison == first):
                figure.add_trace(trace)
                owners.append(comparison)
    figure.add_hline(y=1, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    if len(there) > 1:
        labels = {"norm": "at equal norm", "steps": "at equal steps"}
        figure.update_layout(
            updatemenus=[
                menu(
                    "comparison",
                    [(labels[c], [{"visible": [o == c for o in owners]}]) for c in there],
                    active=there.index(first),
                )
            ]
        )
    figure.update_xaxes(
        title="objective, from sharp to soft", tickmode="array", tickvals=list(places.values()),
        ticktext=[style.text(name) for name in places], range=[-0.5, len(places) - 0.5],
    )  # fmt: skip
    figure.update_yaxes(title=f"relative at rank {rank}", **style.ratio_axis(shown["relative"]))
    if not np.isfinite(shown["relative"].to_numpy(float)).any():
        note(figure, "No value: the deltas are zero.")
    words = heading(
        "Where the delta lies, by the sharpness of its objective",
        "Reads against their own input, writes against the prediction directions. Dotted: the matched reference. "
        "Dashed grey: 1 = chance.",
        **layout,
    )
    return finish(figure, words, plot_height=380, **layout)


def _traces(block: pd.DataFrame, matrix: str, places: dict[str, int], *, visible: bool) -> list[Trace]:
    """Points of all seeds, the line through their means, and the reference."""
    if block.empty:
        return []
    look = style.MATRIX_STYLE.get(matrix, style.OTHER_STYLE)
    write = bool((block["pathway"] == "write").all())
    reference, excess = ("gradient_matched", "gradient_excess") if write else ("activation_matched", "excess")
    scale = block["relative"] / block["fraction"]  # d/k
    block = block.assign(place=block["objective"].map(places), matched=block[reference] * scale)
    means = block.groupby("place")[["relative", "matched"]].mean()
    seeds = {seed: i for i, seed in enumerate(dict.fromkeys(block["seed"]))}
    spread = 0.06 * (block["seed"].map(seeds).astype(float) - (len(seeds) - 1) / 2)
    hover = [
        [
            style.text(row["objective"]), style.number(row["grade"]), str(row["seed"]), style.text(matrix),
            style.text(row["subspace"]), style.number(row["matched"]), style.number(row[excess]),
            f"{row['significant']:.0%}",
        ]
        for row in block.to_dict("records")
    ]  # fmt: skip
    common = {"legendgroup": matrix, "visible": visible}
    traces = [
        scatter(
            x=list(means.index), y=means["relative"].tolist(), mode="lines", name=style.text(matrix),
            line={"color": look["color"], "dash": look["dash"], "width": 2}, hoverinfo="skip", **common,
        ),
        scatter(
            x=(block["place"] + spread).tolist(), y=block["relative"].tolist(), mode="markers", showlegend=False,
            name=f"{style.text(matrix)}, seeds", customdata=hover, hovertemplate=HOVER,
            marker={"symbol": look["symbol"], "size": 8, "color": look["color"]}, **common,
        ),
    ]  # fmt: skip
    if means["matched"].notna().any():
        traces.append(
            scatter(
                x=list(means.index), y=means["matched"].tolist(), mode="lines", showlegend=False, hoverinfo="skip",
                name=f"{style.text(matrix)} matched reference",
                line={"color": look["color"], "dash": "dot", "width": 1.5}, **common,
            )
        )  # fmt: skip
    return traces
