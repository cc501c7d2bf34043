"""The one visual language: colours, templates, text and axes.

Colours are chosen to reach 3:1 against both the light and the dark page (WCAG non-text contrast), and no
statement is carried by colour alone: matrices differ in symbol and dash, significance is a dot, rounding a cross.
Text that comes from a model or a user passes through `text` before it reaches a figure, because plotly renders a
subset of HTML in titles, legends and hovers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tl_asymmetry.arguments import shown
from tl_asymmetry.names import nearest

MISSING = "–"
"""Stands where a table holds NaN."""

PAPER = {"light": "#ffffff", "dark": "#15181d"}
INK = {"light": "#1c2430", "dark": "#e6e9ee"}
GRID = {"light": "#e3e7ec", "dark": "#2d333c"}
GUIDE = "#828a94"
"""Lines that are no data (chance, diagonals): a grey that shows on both pages."""

# Blue through a neutral to orange: the pair of hues that all common colour-vision deficiencies keep apart. The
# neutral is close to, but not, the page, so that "at chance" is told from "no value".
DIVERGING = {
    "light": [
        (0.0, "#1b4f8a"), (0.2, "#4c8cc4"), (0.4, "#b4d2e8"), (0.5, "#f1efe9"),
        (0.6, "#f6cf9d"), (0.8, "#d9812c"), (1.0, "#8f4304"),
    ],
    "dark": [
        (0.0, "#8cc4f5"), (0.2, "#3f86c2"), (0.4, "#24476a"), (0.5, "#353a41"),
        (0.6, "#6e4420"), (0.8, "#c9731f"), (1.0, "#ffc27a"),
    ],
}  # fmt: skip
# The same from dark to light, so that a copy without colours keeps which side of chance a cell is on.
GREYSCALE = [
    (0.0, "#12365e"), (0.2, "#3b6690"), (0.4, "#7a93a8"), (0.5, "#a3a29c"),
    (0.6, "#c4ae8a"), (0.8, "#e8c58d"), (1.0, "#ffe9c2"),
]  # fmt: skip
# Cividis without its darkest and brightest ends, which vanish on one page or the other.
SEQUENTIAL = [(0.0, "#4a6db0"), (0.35, "#7b7f8e"), (0.65, "#a08f5f"), (1.0, "#b59a1f")]

MATRIX_STYLE: dict[str, dict[str, str]] = {
    "W_Q": {"color": "#2f7fc1", "symbol": "circle", "dash": "solid"},
    "W_K": {"color": "#c2602a", "symbol": "square", "dash": "solid"},
    "W_V": {"color": "#0f8a68", "symbol": "diamond", "dash": "solid"},
    "W_O": {"color": "#c43d62", "symbol": "hexagon", "dash": "solid"},
    "W_in": {"color": "#a55fb0", "symbol": "triangle-up", "dash": "dash"},
    "W_gate": {"color": "#94801a", "symbol": "triangle-down", "dash": "dash"},
    "W_out": {"color": "#6d6fd0", "symbol": "triangle-left", "dash": "dash"},
}
OTHER_STYLE = {"color": "#6f7b88", "symbol": "cross", "dash": "dot"}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
SERIES = ("#2f7fc1", "#c2602a", "#0f8a68", "#a55fb0", "#94801a", "#6f7b88")

FINE_TICKS = (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0)
"""Ticks of a ratio axis of less than two octaves."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif"


def template(name: str) -> go.layout.Template:
    """The package's plotly template.

    Args:
        name: "light" or "dark".

    Raises:
        ValueError: for any other name.

    Example:
        >>> template("dark").layout.paper_bgcolor
        '#15181d'
    """
    if name not in PAPER:
        raise ValueError(f"expected one of 'light', 'dark', got {name!r}; pass template='light'")
    axis = {
        "gridcolor": GRID[name], "linecolor": GUIDE, "zeroline": False, "ticks": "outside", "ticklen": 4,
        "tickcolor": GUIDE, "title": {"standoff": 8, "font": {"size": 13}}, "automargin": True,
    }  # fmt: skip
    control = {"bgcolor": PAPER[name], "bordercolor": GUIDE, "font": {"color": INK[name], "size": 12}}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 12, "color": INK[name]},
            "paper_bgcolor": PAPER[name],
            "plot_bgcolor": PAPER[name],
            "colorway": list(SERIES),
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "align": "left", "bgcolor": PAPER[name], "bordercolor": GUIDE,
                "font": {"color": INK[name], "size": 12, "family": FONT},
            },
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "updatemenudefaults": control,
            "sliderdefaults": {**control, "activebgcolor": GUIDE, "bordercolor": GUIDE, "tickcolor": GUIDE},
        }
    )  # fmt: skip


def sequential(count: int) -> list[str]:
    """Colours for `count` ordered things, e.g. layers, as hex."""
    stops = [at for at, _ in SEQUENTIAL]
    channels = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for _, c in SEQUENTIAL], dtype=float)
    where = np.linspace(0, 1, max(2, count))[:count]
    mixed = np.stack([np.interp(where, stops, channels[:, i]) for i in range(3)], axis=1).round().astype(int)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in mixed]


def is_dark(name: Any) -> bool:
    """Whether a template argument asks for a dark page (ours, or one of plotly's with "dark" in its name)."""
    return isinstance(name, str) and "dark" in name


def diverging(name: Any) -> list[tuple[float, str]]:
    """The diverging scale that suits a template argument."""
    return DIVERGING["dark" if is_dark(name) else "light"]


_LONGEST_TEXT = 160


def text(value: object) -> str:
    """A model's or user's text as text: what plotly would read as markup, template or formula is escaped.

    Quotes stay: plotly decodes `&lt;`, `&gt;`, `&amp;` and numbers, but would show `&quot;` as it stands. For `%{`
    it knows no escape; a zero-width space parts it. What no figure is wide enough for is cut in the middle.

    Example:
        >>> text("<b>x</b>"), len(text("x" * 500))
        ('&lt;b&gt;x&lt;/b&gt;', 163)
    """
    words = str(value)
    if len(words) > _LONGEST_TEXT:
        words = f"{words[: _LONGEST_TEXT // 2]} … {words[-_LONGEST_TEXT // 2 :]}"
    return escape(words, quote=False).replace("$", "&#36;").replace("%{", "%\u200b{")


def number(value: Any, digits: int = 3) -> str:
    """A number with that many significant digits; `MISSING` for NaN, None and NA.

    Example:
        >>> number(0.000412), number(float("nan"))
        ('0.000412', '–')
    """
    value = as_float(value)
    return MISSING if math.isnan(value) else f"{value:.{digits}g}"


def as_float(value: Any) -> float:
    """A float; NaN for None and pandas' NA, which `float` refuses."""
    try:
        return float(value)
    except TypeError:
        return math.nan


def alternatives(names: Iterable[object]) -> str:
    """The names a message offers, quoted where they are text."""
    return ", ".join(repr(n) if isinstance(n, str) else str(n) for n in names) or "nothing"


def one_of(what: str, value: Any, allowed: Sequence[Any], keyword: str) -> Any:
    """`value` if it is allowed.

    Raises:
        ValueError: naming what was expected, what was found and what to pass.
    """
    if value not in allowed:
        hint = f"pass {keyword}={allowed[0]!r}" if len(allowed) else "pass a table that has one"
        raise ValueError(f"expected {what} to be one of {alternatives(allowed)}, got {value!r}; {hint}")
    return value


def some_of(keyword: str, given: Any, allowed: Sequence[str]) -> list[str]:
    """One name or several, as a list; None: all that are allowed.

    Raises:
        ValueError: something else than names, or another name.

    Example:
        >>> some_of("matrices", "W_Q", ["W_Q", "W_K"]), some_of("matrices", None, ["W_Q", "W_K"])
        (['W_Q'], ['W_Q', 'W_K'])
    """
    if given is None:
        return list(allowed)
    several = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence | Iterator) else None
    if several is None or not all(isinstance(name, str) for name in several):
        raise ValueError(
            f"expected {keyword} as a name or a list of names, got {shown(given)}; pass {keyword}=None for all"
        )
    if not several:
        raise ValueError(f"expected {keyword} with a name or more, got none; pass {keyword}=None for all")
    unknown = [name for name in several if name not in allowed]
    if unknown:
        raise ValueError(
            f"expected {keyword} among {alternatives(allowed)}, got {alternatives(unknown)}; pass "
            f"{nearest(unknown[0], allowed)}, or {keyword}=None for all"
        )
    return several


def ratio_label(exponent: int) -> str:
    """`2**exponent` as a tick: 1/4, 1/2, 1, 2, 4."""
    return str(2**exponent) if exponent >= 0 else f"1/{2**-exponent}"


def ratio_ticks(low: float, high: float, most: int = 9) -> tuple[list[int], list[str]]:
    """Exponents of two from `low` to `high` (both log2), 0 always among them, with their labels."""
    first, last = math.floor(min(low, 0)), math.ceil(max(high, 0))
    step = max(1, math.ceil((last - first) / (most - 1)))
    exponents = [e for e in range(first, last + 1) if e % step == 0]
    return exponents, [ratio_label(e) for e in exponents]


def ratio_axis(values: Iterable[Any], *, pad: float = 0.15) -> dict[str, Any]:
    """A log axis for ratios, ticked at powers of two, that holds the values and chance (1).

    Args:
        values: positive ratios; NaN, zero and negative ones set no bound.
        pad: octaves of air on either side.
    """
    logs = [math.log2(v) for v in map(as_float, values) if v > 0 and math.isfinite(v)]
    low, high = min([*logs, -0.5]) - pad, max([*logs, 0.5]) + pad
    exponents, labels = ratio_ticks(low, high)
    values_at = [2.0**e for e in exponents]
    if high - low < 2:  # too narrow for powers of two alone
        values_at = [v for v in FINE_TICKS if low <= math.log2(v) <= high]
        labels = [f"{v:g}" for v in values_at]
    to10 = math.log10(2)
    return {
        "type": "log", "range": [low * to10, high * to10], "tickmode": "array",
        "tickvals": values_at, "ticktext": labels, "minor": {"ticks": ""},
    }  # fmt: skip


def integer_ticks(values: Sequence[int], most: int = 16) -> dict[str, Any]:
    """Ticks at every n-th of some integers, so that 32 heads stay readable on a telephone."""
    step = max(1, math.ceil(len(values) / most))
    return {"tickmode": "array", "tickvals": list(values[::step]), "ticktext": [str(v) for v in values[::step]]}
