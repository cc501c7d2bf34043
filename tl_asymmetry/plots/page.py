"""How figures live in a page of their own: plotly's code, a figure as data, and the script that draws it.

The script (`assets/page.js`) draws a figure when it comes near the screen, follows the reader's light or dark
preference, and turns plotly's menus and sliders, which are pictures a keyboard cannot reach, into HTML controls above
the plot.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import math
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_asymmetry.disk import replace_file
from tl_asymmetry.names import thresholds
from tl_asymmetry.plots import layout, style

PACK_ABOVE = 100_000
"""Characters of JSON above which a figure is packed: a map of 32 × 32 heads shrinks to a third."""
FORMATS = ("svg", "pdf", "png", "jpg", "jpeg", "webp")
MOST_SCALE = 100
COLUMNS = {"single": 312, "double": 648}
"""Pixels (96 to an inch) of one and of two columns of a paper: 3.25 and 6.75 inches."""
VECTOR = ("svg", "pdf")
_BARE_TOP = 12
"""Pixels above a plot without a title."""
_AXIS, _ENTRY, _LETTER, _ITEM = 50, 20, 6.8, 46
"""Pixels of an image: of an axis under its plot, of a legend's entry (height), of a letter in it, of its mark."""
_FACTORY = ', () => {\n"use strict"'
"""How the function that holds plotly.js 4 begins."""
_ASSETS = files("tl_asymmetry.plots") / "assets"
CSS = (_ASSETS / "page.css").read_text(encoding="utf-8")
"""Style of all pages."""
UNPACK = (_ASSETS / "unpack.js").read_text(encoding="utf-8")
"""Script every page begins with: reads packed elements, starts plotly.js."""
SCRIPT = (_ASSETS / "page.js").read_text(encoding="utf-8")
"""Script of a report's figures and downloads."""


def safe_json(text: str) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def figure_json(figure: go.Figure) -> str:
    """A figure as JSON for a `<script type="application/json">`.

    The package's own template is left out (the page sets it, light or dark, once for all figures); another's stays.
    The width is left to the page.

    Raises:
        ValueError: for what is no plotly figure.
    """
    return _json(_content(figure))


def figure_scripts(figure: go.Figure, key: str) -> list[str]:
    """The script elements that hold a figure: plain JSON (`key-data`), or packed where it is large.

    A large figure whose controls leave the hovers' words alone comes in two parts, so that it can be drawn before those
    words, most of its size, are read: they follow as `key-hover`, the arguments of `Plotly.restyle`.

    Args:
        figure: what a plot_* method returns.
        key: id of the element the figure is drawn into.

    Raises:
        ValueError: for what is no plotly figure.
    """
    content = _content(figure)
    whole = _json(content)
    if len(whole) <= PACK_ABOVE:
        return [f'<script type="application/json" id="{key}-data">{whole}</script>']
    if '"customdata"' in json.dumps([content["layout"].get(c) for c in ("updatemenus", "sliders")]):
        return [packed(whole, f"{key}-data")]
    hover = _part_hover(content["data"])
    return [packed(_json(content), f"{key}-data"), packed(_json(hover), f"{key}-hover")]


def packed(content: str | bytes, key: str) -> str:
    """A script element that holds content as gzip in base64, which the page's `unpacked` reads.

    Example:
        >>> element = packed("seven heads", "words")
        >>> gzip.decompress(base64.b64decode(element.split(">")[1].split("<")[0]))
        b'seven heads'
    """
    content = content.encode() if isinstance(content, str) else content
    # mtime fixed: the same content gives the same page, byte for byte.
    held = base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
    return f'<script type="application/gzip" id="{key}">{held}</script>'


def controls_height(figure: go.Figure) -> tuple[int, int]:
    """Pixels the figure keeps for its own menus and slider, which the page cuts off: (menu, slider)."""
    meta = _meta(figure)
    return int(meta.get("menu", 0)), int(meta.get("slider", 0))


def require_image(format: str, width: int | str, scale: float) -> None:
    """Refuse what no image can be, or one that nothing here can draw.

    Raises:
        ValueError: another format, width or scale.
        ImportError: kaleido is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"expected format among {', '.join(FORMATS)}, got {format!r}; pass format='svg'")
    if isinstance(width, str) and width not in COLUMNS:
        raise ValueError(f"expected a width in pixels, 'single' or 'double', got {width!r}; pass width='single'")
    if not 0 < scale <= MOST_SCALE:
        raise ValueError(f"expected scale above 0 and up to {MOST_SCALE}, got {scale}; pass scale=2")
    if not _kaleido_installed():
        raise ImportError("expected kaleido to be installed; pip install kaleido")


def write_image(
    figure: go.Figure, path: Path, *, format: str, width: int | str, scale: float, greyscale: bool = False
) -> Path:
    """Write what a figure shows first as a static image, without the menus and sliders nobody can press on paper.

    Args:
        figure: what a plot_* method returns.
        path: the file.
        format: "svg", "pdf", "png", "jpg" or "webp".
        width: pixels; or a name of `COLUMNS`, where the title is left to the caption.
        scale: pixels of a bitmap for each pixel of the figure; what is made of lines has the figure's size.
        greyscale: colour maps from dark to light, so that they can be read without colours.

    Raises:
        ImportError: kaleido is not installed.
        ValueError: another width.
    """
    require_image(format, width, scale)
    still = go.Figure(figure)
    if greyscale:
        still.update_traces(colorscale=style.GREYSCALE, selector={"meta": "diverging"})
    pixels = COLUMNS[width] if isinstance(width, str) else width
    still.layout.updatemenus = still.layout.sliders = ()
    still.update_layout(width=pixels)
    if _meta(figure):
        _set_for(still, pixels, bare=isinstance(width, str))
    replace_file(path, still.to_image(format=format, scale=1 if format in VECTOR else scale))
    return path


def _set_for(still: go.Figure, pixels: int, *, bare: bool) -> None:
    """Title, plot and legend of one of our figures for an image's width, the plot as high as it was; bare: no title."""
    menu, _ = controls_height(still)
    height, before = still.layout.height or 450, still.layout.margin
    plot, top, title = height - before.t - before.b, before.t - menu, still.layout.title.text
    if bare and title:
        above = any(words.yanchor == "bottom" and (words.y or 0) > 0.99 for words in still.layout.annotations)
        still.layout.title.text, top = None, _BARE_TOP + (layout.LINE_PX if above else 0)
    elif title:
        still.layout.title.text = layout.reset(title, pixels)
        top -= layout.LINE_PX * (title.count("<br>") - still.layout.title.text.count("<br>"))
    still.for_each_trace(lambda trace: trace.update(showlegend=False), lambda trace: not _marks_anything(trace))
    words = [len(trace.name or "") for trace in still.data if _in_legend(trace)] if still.layout.showlegend else []
    bottom = _AXIS
    if words:
        # Beside the plot plotly would make room for a legend wider than it, and leave the plot the rest.
        entry = _LETTER * max(words)
        bottom += _ENTRY * math.ceil(len(words) / max(1, int((pixels - 16) / (entry + _ITEM)))) + 8
        still.update_traces(legendgroup="")
        still.layout.legend.update(
            xref="container", x=8 / pixels, xanchor="left", yref="container", y=4 / (top + plot + bottom),
            yanchor="bottom", entrywidth=entry, entrywidthmode="pixels", tracegroupgap=0,
        )  # fmt: skip
    still.update_layout(height=top + plot + bottom, margin={"t": top, "b": bottom})


def _in_legend(trace: Any) -> bool:
    drawn = trace.visible is not False and trace.showlegend is not False
    return drawn and (trace.type != "heatmap" or bool(trace.showlegend))


def _marks_anything(trace: Any) -> bool:
    """Whether a trace of marks over cells has any; a page keeps room for them, an image need not name them."""
    return trace.meta != "mark" or any(x is not None for x in trace.x)


def _kaleido_installed() -> bool:
    return importlib.util.find_spec("kaleido") is not None


def page_settings() -> str:
    """The script element of what the scripts need once: both templates and diverging scales, and the thresholds."""
    settings: dict[str, Any] = {
        name: {"template": style.template(name).to_plotly_json(), "diverging": style.DIVERGING[name]}
        for name in style.PAPER
    }
    settings["thresholds"] = thresholds()
    return f'<script type="application/json" id="page-settings">{_json(settings)}</script>'


@cache
def plotly_script() -> str:
    """The script element of plotly.js, packed: it is most of a small page."""
    return packed(_called_at_once(get_plotlyjs()), "plotly-code")


def script(*parts: str) -> str:
    """A script element of parts of JavaScript in one scope, after what every page begins with."""
    body = "\n".join((UNPACK, *parts))
    return f'<script>(() => {{\n"use strict";\n{body}\n}})();</script>'


def _called_at_once(code: str) -> str:
    """plotly.js with parentheses around the function that holds it all, where it has the form `(…, () => {…}));`.

    Browsers skim functions they do not expect to be called at once, and read them again when they are. Parentheses tell
    them; for these five megabytes that is a sixth of the time to start.
    """
    before, opening, after = code.partition(_FACTORY)
    body, closing, rest = after.rpartition("}));")
    return f"{before}{opening[:2]}({opening[2:]}{body}}})));{rest}" if opening and closing else code


def _content(figure: go.Figure) -> dict[str, Any]:
    """A figure's data, layout and frames, as the page takes them."""
    if not isinstance(figure, go.Figure):
        raise ValueError(f"expected a plotly Figure, got {type(figure).__name__}; pass what a plot_* method returns")
    content = json.loads(figure.to_json())
    layout = content["layout"]
    layout.pop("width", None)
    if _own(figure):
        layout.pop("template", None)
    parts = {"data": content["data"], "layout": layout}
    if figure.frames:
        parts["frames"] = content["frames"]
    return parts


def _part_hover(traces: list[dict[str, Any]]) -> dict[str, Any]:
    """Take the hovers' words out of traces; the arguments of `Plotly.restyle` that put them back."""
    told = [i for i, trace in enumerate(traces) if "customdata" in trace]
    words = {name: [traces[i].pop(name, None) for i in told] for name in ("customdata", "hovertemplate")}
    for i in told:
        traces[i]["hoverinfo"] = "skip"
    return {"traces": told, **words, "hoverinfo": "all"}


def _json(content: Any) -> str:
    return safe_json(json.dumps(content, separators=(",", ":")))


def _meta(figure: go.Figure) -> dict[str, Any]:
    meta = figure.layout.meta
    return meta.get("tl_asymmetry", {}) if isinstance(meta, dict) else {}


def _own(figure: go.Figure) -> bool:
    return _meta(figure).get("template") is not None
