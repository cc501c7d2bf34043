"""A drawing is the figure that plotly's own methods would have made."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

from tl_asymmetry.plots.drawing import Drawing, bar, heatmap, scatter

pytestmark = pytest.mark.quick

TRACES: list[dict[str, Any]] = [
    scatter(x=np.arange(3), y=[1.0, np.nan, 2.0], mode="lines", error_y=None, line={"dash": "dot"}),
    heatmap(
        z=[[1, None], [0.5, 2]], colorscale=[(0, "#ffffff"), (1, "#000000")], customdata=[[["a"], []], [[], ["b"]]]
    ),
    bar(x=["a", "b"], y=[1, 2], marker={"color": "#8d949c"}),
]
LINE = {"color": "#828a94", "dash": "dash", "width": 1.5}


def fill(figure: Any, places: list[dict[str, int]]) -> None:
    """The calls that drawings and plotly's figures have in common."""
    for trace, place in zip(TRACES, places, strict=True):
        figure.add_trace(trace, **place)
    figure.add_hline(y=1, line=LINE, **places[-1])
    figure.add_vline(x=0.5, line=LINE, **places[0])
    figure.add_annotation(text="k = 1", x=0, y=1, yref="paper", showarrow=False)
    figure.update_xaxes(title="rank k", type="log", minor={"ticks": ""})
    figure.update_yaxes(title="relative", tickvals=[1, 2], ticktext=["1", "2"], **places[-1])
    figure.update_yaxes(title={"font": {"size": 11}}, range=None, **places[0])
    figure.update_layout(margin={"l": 1, "r": 2}, meta={"own": {"menu": 1}}, sliders=[{"active": 0, "steps": []}])
    figure.update_layout(margin={"r": 3}, width=None, height=400)


@pytest.mark.parametrize(
    "grid",
    [{}, {"rows": 2, "cols": 2, "shared_yaxes": True, "subplot_titles": ["a", "b", "c", "d"]}, {"rows": 1}],
    ids=["one plot", "a grid", "a grid of one"],
)
def test_a_drawing_is_what_plotly_makes(grid: dict[str, Any]) -> None:
    several = grid.get("rows", 1) > 1
    places = [{"row": 1, "col": 1}, {"row": 1, "col": 2}, {"row": 2, "col": 2}] if several else [{}] * len(TRACES)
    drawing = Drawing(**grid)
    theirs = make_subplots(**grid) if grid else go.Figure()
    fill(drawing, places)
    fill(theirs, places if not grid or several else [{"row": 1, "col": 1}] * len(TRACES))
    assert json.loads(drawing.figure().to_json()) == json.loads(theirs.to_json())


def test_plotly_still_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="Invalid property specified for object of type plotly.graph_objs.Scatter"):
        Drawing([scatter(colour="red")]).figure()
    drawing = Drawing()
    drawing.update_layout(width="wide")
    with pytest.raises(ValueError, match="Invalid value of type 'builtins.str' received for the 'width' property"):
        drawing.figure()
