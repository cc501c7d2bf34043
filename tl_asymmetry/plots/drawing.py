"""A figure in the making: plain traces and a plain layout, which plotly checks once, when the figure is whole.

plotly's own setters check, copy and look up names at every call, which took most of the time of writing a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

Trace = dict[str, Any]
"""One trace, as plotly's JSON has it."""


def scatter(**attributes: Any) -> Trace:
    """Points or a line, with the attributes of `plotly.graph_objects.Scatter`."""
    return {"type": "scatter", **attributes}


def bar(**attributes: Any) -> Trace:
    """Bars, with the attributes of `plotly.graph_objects.Bar`."""
    return {"type": "bar", **attributes}


def heatmap(**attributes: Any) -> Trace:
    """Coloured cells, with the attributes of `plotly.graph_objects.Heatmap`."""
    return {"type": "heatmap", **attributes}


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One over the other, dicts inside them as well.

    Example:
        >>> merged({"line": {"width": 1}, "name": "a"}, {"line": {"dash": "dot"}})
        {'line': {'width': 1, 'dash': 'dot'}, 'name': 'a'}
    """
    both = dict(old)
    for name, value in new.items():
        there = both.get(name)
        both[name] = merged(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return both


class Drawing:
    """What a `plotly.graph_objects.Figure` is while it is filled, with those of its methods that our figures use.

    Args:
        traces: first ones.
        grid: as `plotly.subplots.make_subplots` takes it, where there is more than one plot.

    Example:
        >>> drawing = Drawing([scatter(x=[1, 2], y=[3, 4])])
        >>> drawing.update_xaxes(title="rank")
        >>> drawing.figure().layout.xaxis.title.text
        'rank'
    """

    def __init__(self, traces: Iterable[Trace] = (), **grid: Any) -> None:
        self.data: list[Trace] = list(traces)
        self.frames: list[dict[str, Any]] = []
        self.layout: dict[str, Any] = make_subplots(**grid).layout.to_plotly_json() if grid else {}
        self._columns: int = grid.get("cols", 1) if grid else 0

    def add_trace(self, trace: Trace, row: int = 1, col: int = 1) -> None:
        """Add a trace to one of the plots."""
        at = self._number(row, col)
        self.data.append({**trace, "xaxis": f"x{at}", "yaxis": f"y{at}"} if self._columns else trace)

    def add_traces(self, traces: Iterable[Trace]) -> None:
        """Add traces to the first plot."""
        self.data += traces

    def update_layout(self, **attributes: Any) -> None:
        """Set parts of the layout; dicts are merged, lists replaced."""
        self.layout = merged(self.layout, attributes)

    def update_xaxes(self, row: int | None = None, col: int | None = None, **attributes: Any) -> None:
        """Set parts of one plot's horizontal axis, or of all plots'."""
        self._update_axes("xaxis", row, col, attributes)

    def update_yaxes(self, row: int | None = None, col: int | None = None, **attributes: Any) -> None:
        """Set parts of one plot's vertical axis, or of all plots'."""
        self._update_axes("yaxis", row, col, attributes)

    def add_hline(self, y: float, line: Mapping[str, Any], row: int = 1, col: int = 1) -> None:
        """A line across one of the plots."""
        at = self._number(row, col)
        self._add_shape(x0=0, x1=1, xref=f"x{at} domain", y0=y, y1=y, yref=f"y{at}", line=line)

    def add_vline(self, x: float, line: Mapping[str, Any], row: int = 1, col: int = 1) -> None:
        """A line up one of the plots."""
        at = self._number(row, col)
        self._add_shape(x0=x, x1=x, xref=f"x{at}", y0=0, y1=1, yref=f"y{at} domain", line=line)

    def add_annotation(self, **attributes: Any) -> None:
        """Words somewhere on the figure."""
        self.layout["annotations"] = [*self.layout.get("annotations", ()), attributes]

    def figure(self) -> go.Figure:
        """The whole, checked by plotly.

        Raises:
            ValueError: an attribute that plotly does not know, or a value it does not take.
        """
        return go.Figure(self.data, self.layout, self.frames)

    def _add_shape(self, **attributes: Any) -> None:
        self.layout["shapes"] = [*self.layout.get("shapes", ()), {"type": "line", **attributes}]

    def _update_axes(self, kind: str, row: int | None, col: int | None, attributes: Mapping[str, Any]) -> None:
        if isinstance(attributes.get("title"), str):
            attributes = {**attributes, "title": {"text": attributes["title"]}}
        there = [name for name in self.layout if name.startswith(kind)] or [kind]
        names = there if row is None or col is None else [f"{kind}{self._number(row, col)}"]
        for name in names:
            self.layout[name] = merged(self.layout.get(name, {}), attributes)

    def _number(self, row: int, col: int) -> str:
        """What plotly adds to the names of a plot's axes: nothing for the first."""
        at = (row - 1) * self._columns + col
        return "" if at == 1 else str(at)
