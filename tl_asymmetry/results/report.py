"""One self-contained HTML file of one result or of several: opens offline, asks the network for nothing.

`Report` is neutral: an analysis fills it with words, figures and tables, and `write_report` writes the page; `report`
does so for any results. plotly is imported only when a page is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tl_asymmetry.arguments import checked
from tl_asymmetry.disk import make_folder
from tl_asymmetry.results.definitions import CITATIONS, DEFINITIONS, Citation
from tl_asymmetry.results.pages import (
    Html,
    document,
    figure_boxes,
    page_path,
    page_scripts,
    render,
    settings_rows,
    table_box,
    write_page,
)
from tl_asymmetry.results.sections import MARKS, Definition, FigureSection, TableSection

__all__ = [
    "CITATIONS",
    "DEFINITIONS",
    "MARKS",
    "Citation",
    "Definition",
    "FigureSection",
    "Html",
    "Report",
    "TableSection",
    "report",
    "report_html",
    "write_images",
    "write_report",
]


@dataclass(frozen=True)
class Report:
    """What a page says, whatever analysis it comes from."""

    title: str
    """Page title, plain text (model names welcome)."""
    subtitle: str = ""
    """One line under it."""
    summary: str = ""
    """What was found, in words built from the numbers: text or `Html`."""
    notes: Sequence[str] = ()
    """What degrades the answer: the result's warnings, one sentence each."""
    figures: Sequence[FigureSection] = ()
    """Figures in reading order."""
    tables: Sequence[TableSection] = ()
    """Tables in reading order."""
    methods: Sequence[tuple[str, str]] = ()
    """How it was measured here: (term, text or `Html`)."""
    definitions: Sequence[Definition] = DEFINITIONS
    """What the words mean and whose they are."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Every setting, version and hash; the names of nested ones are joined by dots."""
    citations: Sequence[Citation] = CITATIONS
    """What to cite."""


@runtime_checkable
class Reportable(Protocol):
    """A result: it fills a `Report` of itself."""

    def _report(self) -> Report: ...


@checked
def report(
    results: Reportable | Iterable[Reportable], path: str | Path, *, title: str | None = None, max_rows: int = 200
) -> Path:
    """Write one page of one result or of several, of whatever kinds, and return its path.

    Each result keeps its summary, notes, figures, tables and settings; definitions and citations they share stand
    once, at the end.

    Args:
        results: a result (anything with `to_html`), or several in reading order.
        path: the HTML file; its folder must exist, an existing file is replaced.
        title: of the page, plain text; None: the result's own, or how many there are.
        max_rows: rows of each table shown in the page; the download always has all.

    Raises:
        ValueError: no result, something else than a result, or a path that cannot be written to.

    Example:
        >>> from tl_asymmetry import report
        >>> report([study, tangents], "both.html", title="Edits and tangents")
        PosixPath('both.html')
    """
    if not isinstance(results, Reportable | Iterable) or isinstance(results, str | Mapping):
        raise ValueError(
            f"expected results, or one, got {type(results).__name__}; pass what an analysis returned, or a list"
        )
    several = [results] if isinstance(results, Reportable) else list(results)
    if not several:
        raise ValueError("expected at least one result, got none; pass what an analysis returned")
    for each in several:
        if not isinstance(each, Reportable):
            raise ValueError(f"expected results, got {type(each).__name__}; pass what an analysis returned")
    file = page_path(path)
    if max_rows < 1:
        raise ValueError(f"expected max_rows >= 1, got {max_rows}; pass a positive number of rows")
    return write_page(file, _page([each._report() for each in several], title, max_rows))


def write_report(path: str | Path, report: Report, *, max_rows: int = 200) -> Path:
    """Write a report as one HTML file (UTF-8) and return its path.

    Args:
        path: the file; its folder must exist, an existing file is replaced.
        report: what to say.
        max_rows: rows of each table shown in the page; the download always has all.

    Raises:
        ValueError: for a path that is a folder, a missing folder, or what `report_html` refuses.

    Example:
        >>> write_report("report.html", Report(title="base → aligned", summary="Nothing moved."))
        PosixPath('report.html')
    """
    return write_page(path, report_html(report, max_rows=max_rows))


def report_html(report: Report, *, max_rows: int = 200) -> str:
    """A report as one HTML document.

    plotly.js stands in it once (not at all without figures). A content security policy forbids every network
    request. Strings are escaped unless they are `Html`.

    Args:
        report: what to say.
        max_rows: rows of each table shown in the page.

    Raises:
        ValueError: for what is no `Report`, a `max_rows` below 1, or a figure that is none.
    """
    if not isinstance(report, Report):
        raise ValueError(f"expected a Report, got {type(report).__name__}; pass Report(title=…)")
    return _page([report], None, max_rows)


def write_images(
    result: Reportable | Report,
    folder: str | Path,
    *,
    format: str = "svg",
    width: int | str = 800,
    scale: float = 2.0,
    greyscale: bool = False,
) -> list[Path]:
    """Write every figure of a result as a static image, e.g. for a paper. Needs the extra `report` (kaleido).

    Menus and sliders are left out: an image shows what the figure shows first.

    Args:
        result: a result, or a `Report`.
        folder: made if need be; images are named after their headings and numbered.
        format: "svg", "pdf", "png", "jpg" or "webp".
        width: pixels; or "single" or "double", a paper's columns, where the title is left to the caption.
        scale: pixels of a bitmap for each of these; SVG and PDF have the width that is asked for.
        greyscale: maps from dark (below chance) to light (above it), which are read without colours as well; lines
            and marks differ in form anyway.

    Returns:
        The paths, in reading order.

    Raises:
        ImportError: kaleido is not installed.
        ValueError: another width.
    """
    from tl_asymmetry.plots.page import require_image, write_image  # here, since it brings plotly

    require_image(format, width, scale)  # before the figures are made
    report = result if isinstance(result, Report) else result._report()
    place = Path(folder).expanduser()
    make_folder(place)
    paths: list[Path] = []
    for section in report.figures:
        several = section.figure if isinstance(section.figure, Mapping) else {"": section.figure}
        for label, figure in several.items():
            words = "".join(c if c.isalnum() or c == "_" else " " for c in f"{section.heading} {label}").split()
            path = place / f"{len(paths) + 1:02}-{'-'.join(words)[:80]}.{format}"
            paths.append(write_image(figure, path, format=format, width=width, scale=float(scale), greyscale=greyscale))
    return paths


def _page(reports: Sequence[Report], title: str | None, max_rows: int) -> str:
    if max_rows < 1:
        raise ValueError(f"expected max_rows >= 1, got {max_rows}; pass a positive number of rows")
    single = len(reports) == 1
    page_title = title if title is not None else reports[0].title if single else f"{len(reports)} analyses"
    results, held = [], []
    for n, each in enumerate(reports):
        key = f"result-{n}"
        parts = _parts(each, "" if single else f"{key}-", max_rows)
        results.append({"report": each, "key": key, "parts": parts})
        held += [element for part in parts for element in part.held]
    body = render("report.html", title=page_title, results=results, shared=_shared_parts(reports), marks=MARKS)
    figures = any(each.figures for each in reports)
    return document(page_title, body, page_scripts(held[:1], held[1:], figures=figures) if held else Html())


class _Part(NamedTuple):
    """A part of the page."""

    name: str
    """Heading, and in the contents."""
    key: str
    """Its id."""
    kind: str
    """Which part of the template shows it."""
    what: Any
    """What is shown."""
    boxes: Any = None
    """Where its figures or its table stand."""
    held: Sequence[str] = ()
    """Elements of the data it shows, which stand at the end of the page."""


def _parts(report: Report, prefix: str, max_rows: int) -> list[_Part]:
    """What a result says of itself."""
    parts: list[_Part] = []
    if report.summary:
        parts.append(_Part("Summary", f"{prefix}summary", "prose", report.summary))
    if report.notes:
        parts.append(_Part("Notes", f"{prefix}notes", "notes", report.notes))
    for i, section in enumerate(report.figures):
        boxes, held = figure_boxes(section, f"{prefix}{i}")
        parts.append(_Part(section.heading, f"{prefix}figure-{i}", "figures", section, boxes, held))
    for i, table in enumerate(report.tables):
        box, held = table_box(table, max_rows, f"{prefix}table-{i}")
        parts.append(_Part(table.heading, f"{prefix}table-{i}", "table", table, box, held))
    if report.methods:
        parts.append(_Part("How it was measured", f"{prefix}methods", "methods", report.methods))
    if report.config:
        parts.append(_Part("Settings and versions", f"{prefix}config", "settings", settings_rows(report.config)))
    return parts


def _shared_parts(reports: Sequence[Report]) -> list[_Part]:
    """What the words mean and what to cite: of all results, each once."""
    parts: list[_Part] = []
    definitions = list(dict.fromkeys(d for each in reports for d in each.definitions))
    if definitions:
        parts.append(_Part("Definitions", "definitions", "definitions", definitions))
    citations = list(dict.fromkeys(c for each in reports for c in each.citations))
    if citations:
        parts.append(_Part("How to cite", "citations", "citations", citations))
    return parts
