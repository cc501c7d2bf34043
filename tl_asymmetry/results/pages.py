"""Pages from templates: what stands in them, and the files they become. What is foreign is escaped by the templates."""

from __future__ import annotations

import html
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.disk import replace_file
from tl_asymmetry.results.sections import FigureSection, TableSection

if TYPE_CHECKING:
    from jinja2 import Environment

_LONGEST_TITLE = 140
LONG_TABLE = 12
"""Rows from which a table fills its box, so that the browser may put off what is off the screen."""


class Html(str):
    """Trusted markup. Any other string given to a report is escaped.

    Example:
        >>> Html("<em>seven</em> heads")
        '<em>seven</em> heads'
    """

    __slots__ = ()

    def __html__(self) -> Html:
        """What a template puts in its place: itself."""
        return self


def render(template: str, **values: Any) -> Html:
    """One of the templates of this package, filled.

    Example:
        >>> render("notebook.html", title="a → b", facts="", caption="", table="", sentences=["1 < 2"], notes=())
        '<div><h4>a → b</h4><p></p><p>1 &lt; 2</p></div>'
    """
    return Html(_environment().get_template(template).render(**values))


def title_markup(title: str) -> Html:
    """A title as markup; one that no page is wide enough for is cut in the middle, whole in its tooltip.

    Example:
        >>> title_markup("a < b"), len(title_markup("a" * 300))
        ('a &lt; b', 465)
    """
    if len(title) <= _LONGEST_TITLE:
        return Html(html.escape(title))
    half = _LONGEST_TITLE // 2
    return Html(f'<span title="{html.escape(title)}">{html.escape(f"{title[:half]} … {title[-half:]}")}</span>')


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("tl_asymmetry.results"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters["title_markup"] = title_markup
    return made


def document(title: str, body: Html, scripts: Html, *, css: str = "") -> str:
    """A whole page around a body, with the style all pages share and a policy that forbids every network request.

    Args:
        title: plain text.
        body: markup.
        scripts: script elements, at the end of the page.
        css: style of this page's own.
    """
    from tl_asymmetry.plots import page  # here, since it brings plotly

    return render("page.html", title=title, body=body, scripts=scripts, css=Html(page.CSS + css)) + "\n"


def write_page(path: str | Path, content: str) -> Path:
    """Write a page (UTF-8) in one step and return its path; an earlier page stays until this one is whole.

    Raises:
        ValueError: a path that is a folder, or in none.
        OSError: no room (errno ENOSPC).
    """
    path = page_path(path)
    replace_file(path, content.encode("utf-8", "replace"))  # half a surrogate pair is no character
    return path


def page_path(path: str | Path) -> Path:
    """Where a page is to be written, `~` for the home folder; refused before the page is made.

    Raises:
        ValueError: a path that is a folder, or in none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"expected the path of a file, got the folder {path}; pass e.g. {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ValueError(f"expected an existing folder, got {path.parent}; create it or pass another path")
    return path


def page_scripts(first: Sequence[str], rest: Sequence[str], *, figures: bool) -> Html:
    """The script that draws a page's figures and saves its tables, among the data it needs.

    Args:
        first: data elements of the first figure: before the script, which draws it at once.
        rest: all other data elements: after it.
        figures: whether the page has any, so that plotly.js is needed.
    """
    from tl_asymmetry.plots import page

    code = [page.plotly_script()] if figures else []
    return Html("".join([page.page_settings(), *code, *first, page.script(page.SCRIPT), *rest]))


@dataclass(frozen=True)
class FigureBox:
    """Where a figure stands on a page."""

    group: str
    """Of the figures that one choice picks from."""
    key: str
    """Id of the element that it is drawn into."""
    label: str
    """In the choice."""
    name: str
    """Said by screen readers."""
    height: int
    """Pixels kept for it."""


def figure_boxes(section: FigureSection, group: str) -> tuple[list[FigureBox], list[str]]:
    """The boxes of a section's figures, and the elements that hold their data.

    Raises:
        ValueError: a section without a figure, or with something else.
    """
    from tl_asymmetry.plots import page

    # A plotly figure is no Mapping, though it can be indexed like one.
    figures: dict[str, Any] = dict(section.figure) if isinstance(section.figure, Mapping) else {"": section.figure}
    if not figures:
        raise ValueError(f"expected at least one figure under {section.heading!r}, got none; leave the section out")
    boxes: list[FigureBox] = []
    held: list[str] = []
    for i, (label, figure) in enumerate(figures.items()):
        key = f"plot-{group}-{i}"
        held += page.figure_scripts(figure, key)
        height = int(figure.layout.height or 450) - sum(page.controls_height(figure))
        boxes.append(FigureBox(group, key, label, f"{section.heading}: {label}" if label else section.heading, height))
    return boxes, held


@dataclass(frozen=True)
class TableBox:
    """The part of a table that stands on a page, and its download."""

    key: str
    """Id of the element that holds all of it."""
    file: str
    """Name of the download."""
    size: str
    """Of the download, in words."""
    said: str
    """How many rows are shown."""
    columns: list[tuple[str, bool]]
    """Names, and whether they hold numbers."""
    rows: list[list[tuple[str, tuple[str, bool]]]]
    """Cells that are shown, each with its column."""

    @property
    def long(self) -> bool:
        """Whether it fills its box."""
        return len(self.rows) > LONG_TABLE


def table_box(section: TableSection, max_rows: int, key: str) -> tuple[TableBox, list[str]]:
    """The first rows of a table, how many there are, and a download of all; and the element it is held in.

    Args:
        section: the table and its heading.
        max_rows: rows shown.
        key: of the table on the page.
    """
    from tl_asymmetry.plots import page

    table = section.table
    shown = (table if section.shown is None else table[list(section.shown)]).head(max_rows)
    kinds = (getattr(t, "numpy_dtype", t).kind for t in shown.dtypes)
    columns = [(str(name), kind in "iufb") for name, kind in zip(shown.columns, kinds, strict=True)]
    some = f", {len(columns)} of {len(table.columns)} columns" if len(columns) < len(table.columns) else ""
    content = table.to_csv(index=False).encode()
    box = TableBox(
        key=f"{key}-csv",
        file=f"{section.filename}.csv",
        size=f"{max(1, round(len(content) / 1000)):,} kB",
        said=f"All {len(table):,} rows{some}." if len(shown) == len(table)
        else f"{len(shown):,} of {len(table):,} rows{some} shown.",
        columns=columns,
        rows=[
            [(_cell(value), column) for value, column in zip(row, columns, strict=True)]
            for row in shown.itertuples(index=False, name=None)
        ],
    )  # fmt: skip
    return box, [page.packed(content, box.key)]


def _cell(value: Any) -> str:
    """A cell's text: four significant digits for floats, an en dash where nothing is known."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return "–" if math.isnan(value) else f"{float(value):.4g}"
    text = str(value)
    return "–" if text in ("<NA>", "None", "NaT") and not isinstance(value, str) else text


def settings_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting and its value in words."""
    return [(str(name), _setting(value)) for name, value in _flat(config).items()]


def _setting(value: Any) -> str:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one list, their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
