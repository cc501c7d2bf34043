"""Many deltas against each other: a model × model map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, Trace, heatmap
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu

_CELL_PX, _LEAST_PX = 34, 220
_WRITTEN = 12


@checked
def deltas_figure(
    cosines: pd.DataFrame,
    overlaps: Mapping[str, pd.DataFrame] | None = None,
    *,
    what: str = "",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw how alike every two deltas are; a menu picks the cosine, or the overlap of their directions over chance.

    Args:
        cosines: `DeltaComparison.cosines()`, in the order in which the models shall stand.
        overlaps: label → `DeltaComparison.overlaps(side)`, in the same order.
        what: which matrices, for the title.
        layout: as in `heads_figure`.

    Raises:
        ValueError: tables of other models.

    Example:
        >>> cosines = pd.DataFrame([[1, 0.3], [0.3, 1]], index=["dpo", "kto"], columns=["dpo", "kto"])
        >>> deltas_figure(cosines, what="W_Q").write_html("deltas.html")
    """
    grids = {"cosine": cosines, **{f"overlap × chance, {side}": table for side, table in (overlaps or {}).items()}}
    names = list(cosines.index)
    for label, grid in grids.items():
        if list(grid.index) != names or list(grid.columns) != names:
            raise ValueError(f"expected a square table of {', '.join(names)}, got another for {label}; pass such one")
    shown = [style.text(name) for name in names]
    figure = Drawing()
    for i, (label, grid) in enumerate(grids.items()):
        figure.add_trace(_map(label, grid.to_numpy(float), shown, ratio=i > 0, visible=i == 0, **layout))
    lines = {
        label: "Cosine of the whole change; 0: at right angles."
        if label == "cosine"
        else "Leading singular directions, over random spaces; medians over heads. 1 = chance."
        for label in grids
    }

    def words(label: str) -> str:
        return heading(f"How alike the deltas are: {style.text(what)}", lines[label], **layout)

    if len(grids) > 1:
        options: list[tuple[str, list[Any]]] = [
            (label, [{"visible": [label == other for other in grids]}, {"title.text": words(label)}]) for label in grids
        ]
        figure.update_layout(updatemenus=[menu("value", options, method="update")])
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", automargin=True)
    height = max(_LEAST_PX, _CELL_PX * len(names))
    return finish(figure, words("cosine"), plot_height=height, legend=False, right=64, **layout)


def _map(label: str, z: np.ndarray, names: list[str], *, ratio: bool, visible: bool, **layout: Any) -> Trace:
    with np.errstate(divide="ignore"):
        colour = np.log2(z) if ratio else z
    limit = float(max(1, np.ceil(np.abs(colour[np.isfinite(colour)]).max(initial=0)))) if ratio else 1.0
    ticks = style.ratio_ticks(-limit, limit) if ratio else ([-1, -0.5, 0, 0.5, 1], ["−1", "−0.5", "0", "0.5", "1"])
    said = [[style.number(value) for value in row] for row in z]
    return heatmap(
        x=names, y=names, z=[[None if not np.isfinite(v) else float(v) for v in row] for row in colour], zmin=-limit,
        zmax=limit, zmid=0, xgap=1, ygap=1, colorscale=style.diverging(layout.get("template")), meta="diverging",
        name=style.text(label), visible=visible, customdata=said,
        text=said if len(names) <= _WRITTEN else None, texttemplate="%{text}" if len(names) <= _WRITTEN else None,
        hovertemplate=f"%{{y}} and %{{x}}<br>{style.text(label)} %{{customdata}}<extra></extra>",
        colorbar={"thickness": 12, "len": 1, "outlinewidth": 0, "x": 1.01, "tickmode": "array", "tickvals": ticks[0],
                  "ticktext": ticks[1]},
    )  # fmt: skip
