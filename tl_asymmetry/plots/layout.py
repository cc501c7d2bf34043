"""What every figure shares: title, controls, plot and legend in their places; menus and sliders.

A figure function takes its table and its own choices, and `**layout`, which it hands to `heading` and `finish`. A menu
or slider is a list of what it sets, in plotly's terms; here is where it gets its form.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import plotly.graph_objects as go
import plotly.io as pio
from typing_extensions import Unpack  # noqa: F401 - every figure's signature takes it from here

from tl_asymmetry.arguments import shown
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing

LINE_PX = 17
MENU_PX = 42
SLIDER_PX = 74
LEGEND_PX = 52
_SMALLEST, _LARGEST = 10, 20_000
NOTEBOOK_PX = 760
"""Width that titles are set for where a figure has none of its own; a page sets them anew for its own."""
_HEAD_PX, _SMALL_PX = 8.3, 6.5
"""Pixels of a letter in the bold line of a title, and in the lines under it."""
_SMALL = "<span style='font-size:12px'>"


class Layout(TypedDict, total=False):
    """How a figure looks, whatever it shows."""

    title: str | None
    """First line of the title; None says what is shown. Plain text."""
    template: Any
    """None or "light", "dark", or any plotly template."""
    width: int | None
    """Pixels; None follows the page."""
    height: int | None
    """Pixels; None follows the content."""


def heading(first: str, *lines: str, title: str | None = None, width: int | None = None, **_: Any) -> str:
    """A title: one bold line and smaller ones under it, wrapped by hand since plotly does not wrap.

    Args:
        first, lines: already escaped (`style.text`) where they carry foreign words.
        title: stands in place of the first line, plain text; what else a `Layout` holds is for `finish`.
        width: of the figure, pixels; None: of a notebook.
    """
    first = first if title is None else style.text(title)
    pixels = (width or NOTEBOOK_PX) - 24
    head = "<br>".join(f"<b>{part}</b>" for part in _wrapped(first, pixels / _HEAD_PX))
    small = [part for line in lines if line for part in _wrapped(line, pixels / _SMALL_PX)]
    return head + "".join(f"<br>{_SMALL}{part}</span>" for part in small)


def reset(words: str, width: int) -> str:
    """A title made by `heading`, set for another width."""
    head, *small = words.replace("</b><br><b>", " ").split("<br>")
    first = head.removeprefix("<b>").removesuffix("</b>")
    return heading(first, " ".join(line.removeprefix(_SMALL).removesuffix("</span>") for line in small), width=width)


def _wrapped(words: str, columns: float) -> list[str]:
    return textwrap.wrap(words, max(20, int(columns)), break_long_words=False, break_on_hyphens=False)


def finish(
    drawing: Drawing,
    words: str,
    *,
    plot_height: int,
    legend: bool = True,
    legend_px: int = LEGEND_PX,
    right: int = 24,
    title: str | None = None,
    template: Any = None,
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """Put title, controls, plot and legend in their places; the last step of every figure.

    From the top: title, menus, plot, axis title, legend, slider. The title hangs from the figure's top and all else
    from the plot, so that a page which draws its own controls (the report) can cut the space of menu and slider off
    the margins without moving anything; `layout.meta["tl_asymmetry"]` tells it how much, and how high a line of the
    title is, so that a wide page can set the title on fewer.

    Args:
        drawing: traces, axes, menus and sliders set.
        words: the title, from `heading`, where `title` has its place.
        plot_height: pixels of the plot itself when `height` is None.
        legend: whether the figure has one, under the plot.
        legend_px: pixels kept for it.
        right: pixels on the right (more where a colour bar stands).
        title, template, width, height: as in `Layout`.
    """
    if isinstance(template, str) and not {*template.split("+")} <= {*style.PAPER, *pio.templates}:
        known = ", ".join([*style.PAPER, *pio.templates])
        raise ValueError(f"expected template among {known}, got {template!r}; pass template='light'")
    if not (template is None or isinstance(template, str | Mapping | go.layout.Template)):
        raise ValueError(f"expected template as a name or a template of plotly, got {shown(template)}; pass None")
    if isinstance(template, Mapping) and not template.keys() <= {"data", "layout"}:
        raise ValueError(f"expected template with keys data and layout, got {', '.join(map(str, template))}; pass None")
    for side, pixels in (("width", width), ("height", height)):
        if pixels is not None and not _SMALLEST <= pixels <= _LARGEST:
            raise ValueError(f"expected {side} from {_SMALLEST} to {_LARGEST} pixels, got {pixels}; pass {side}=None")
    own = template is None or (isinstance(template, str) and template in style.PAPER)
    name: Any = template or "light"
    menus, sliders = (drawing.layout.get(kind, []) for kind in ("updatemenus", "sliders"))
    menu = MENU_PX * len(menus)
    slider = SLIDER_PX if sliders else 0
    top = 16 + LINE_PX * (words.count("<br>") + 1) + 10 + menu
    bottom = 50 + (legend_px if legend else 0) + slider
    total = height if height is not None else top + plot_height + bottom
    plot = max(80, total - top - bottom)
    below = 50 + (legend_px if legend else 0)
    under_title = {"x": 0, "xanchor": "left", "yanchor": "bottom", "pad": {"t": 0, "b": 0}}
    drawing.update_layout(
        template=style.template(name) if own else template,
        title={
            "text": words, "x": 0, "xref": "container", "xanchor": "left",
            "y": 1, "yref": "container", "yanchor": "top", "pad": {"l": 12, "t": 14}, "font": {"size": 15},
        },
        margin={"l": 56, "r": right, "t": top, "b": bottom},
        width=width,
        height=total,
        showlegend=legend,
        legend={
            "orientation": "h", "x": 0, "xanchor": "left", "y": -50 / plot, "yanchor": "top", "font": {"size": 12},
        },
        meta={
            "tl_asymmetry": {"template": name if own else None, "menu": menu, "slider": slider, "line": LINE_PX}
        },
        updatemenus=[
            {**one, **under_title, "y": 1 + (8 + MENU_PX * above) / plot}
            for above, one in zip(reversed(range(len(menus))), menus, strict=True)
        ],
        sliders=[{**one, "y": -below / plot, "yanchor": "top", "pad": {"t": 4, "b": 4}} for one in sliders],
    )  # fmt: skip
    return drawing.figure()


def menu(
    name: str, options: Sequence[tuple[str, Sequence[Any]]], *, active: int = 0, method: str = "restyle"
) -> dict[str, Any]:
    """A menu.

    Args:
        name: what is picked, for the page's label.
        options: for each, its label (already escaped) and the arguments of the method.
        active: index of the one shown first.
        method: of plotly's: "restyle" (traces, indexes), "relayout" (layout) or "update" (traces, layout, indexes).
    """
    buttons = [{"label": label, "method": method, "args": list(args)} for label, args in options]
    return {"name": name, "active": active, "direction": "down", "buttons": buttons}


def slider(
    name: str,
    options: Sequence[tuple[str, Sequence[Any]]],
    *,
    active: int = 0,
    method: str = "restyle",
    prefix: str | None = None,
) -> dict[str, Any]:
    """A slider.

    Args:
        name: what is picked, for the page's label.
        options: as of `menu`.
        active: index of the one shown first.
        method: as of `menu`, or "animate".
        prefix: said before the value; None: the name and a colon.
    """
    return {
        "name": name,
        "active": active,
        "currentvalue": {"prefix": f"{name}: " if prefix is None else prefix, "font": {"size": 12}},
        "steps": [{"label": label, "method": method, "args": list(args)} for label, args in options],
    }


def rank_slider(ranks: Sequence[int], start: int, steps: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A slider over ranks.

    Args:
        ranks: the ranks, ascending.
        start: index of the one shown first.
        steps: for each rank what "restyle" takes (traces, indexes), or "update" where the layout changes too.
    """
    options = [(str(rank), args) for rank, args in zip(ranks, steps, strict=True)]
    method = "update" if len(options[0][1]) == 3 else "restyle"
    return slider("rank k", options, active=start, method=method, prefix="rank k = ")


def note(drawing: Drawing, words: str) -> None:
    """Say in the middle of the plot why it is empty."""
    drawing.add_annotation(
        text="<br>".join(textwrap.wrap(words, 40)), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False
    )
