"""The parts of a report as markup: prose, figures, tables, definitions, settings. What is foreign is escaped here."""

from __future__ import annotations

import html
import json
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_asymmetry.disk import replace_file
from tl_asymmetry.results.definitions import Citation
from tl_asymmetry.results.sections import MARKS, Definition, FigureSection, TableSection

LONG_TABLE = 12
"""Rows from which a table fills its box, so that the browser may put off what is off the screen."""


class Html(str):
    """Trusted markup. Any other string given to a report is escaped.

    Example:
        >>> Html("<em>seven</em> heads")
        '<em>seven</em> heads'
    """

    __slots__ = ()


def document(title: str, body: str, scripts: str, *, css: str = "") -> str:
    """A whole page around a body, with the style all pages share and a policy that forbids every network request.

    Args:
        title: plain text.
        body: markup.
        scripts: script elements, at the end of the page.
        css: style of this page's own.
    """
    from tl_asymmetry.plots import page  # here, since it brings plotly

    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{page.CSS}{css}</style></head><body>{body}{scripts}</body></html>\n"
    )


def write_page(path: str | Path, content: str) -> Path:
    """Write a page (UTF-8) in one step and return its path; an earlier page stays until this one is whole.

    Raises:
        ValueError: a path that is a folder, or in none.
        OSError: no room (errno ENOSPC).
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected the path of a file, got the folder {path}; pass e.g. {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ValueError(f"expected an existing folder, got {path.parent}; create it or pass another path")
    replace_file(path, content.encode("utf-8", "replace"))  # half a surrogate pair is no character
    return path


def page_scripts(first: Sequence[str], rest: Sequence[str], *, figures: bool) -> str:
    """The script that draws a page's figures and saves its tables, among the data it needs.

    Args:
        first: data elements of the first figure: before the script, which draws it at once.
        rest: all other data elements: after it.
        figures: whether the page has any, so that plotly.js is needed.
    """
    from tl_asymmetry.plots import page

    code = [page.plotly_script()] if figures else []
    return "".join([page.page_settings(), *code, *first, page.script(page.SCRIPT), *rest])


def inline(text: str) -> str:
    """Escaped, unless it is `Html`."""
    return str(text) if isinstance(text, Html) else html.escape(str(text))


def prose(text: str) -> str:
    """Paragraphs: `Html` as it is, text escaped and split at empty lines."""
    if isinstance(text, Html):
        return f'<div class="prose">{text}</div>'
    return "".join(f"<p>{html.escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def figures_boxes(section: FigureSection, index: str) -> tuple[str, list[str]]:
    """The boxes of a section's figures with the choice between them when there are several, and their data elements."""
    from tl_asymmetry.plots import page

    # A plotly figure is no Mapping, though it can be indexed like one.
    figures: dict[str, Any] = dict(section.figure) if isinstance(section.figure, Mapping) else {"": section.figure}
    if not figures:
        raise ValueError(f"expected at least one figure under {section.heading!r}, got none; leave the section out")
    choice = ""
    if len(figures) > 1:
        options = "".join(f'<option value="{i}">{html.escape(label)}</option>' for i, label in enumerate(figures))
        choice = (
            f'<p class="control"><label for="pick-{index}">{html.escape(section.pick)}</label>'
            f'<select id="pick-{index}" data-figures="{index}">{options}</select></p>'
        )
    boxes: list[str] = []
    held: list[str] = []
    for i, (label, figure) in enumerate(figures.items()):
        held += page.figure_scripts(figure, f"plot-{index}-{i}")
        height = int(figure.layout.height or 450) - sum(page.controls_height(figure))
        name = f"{section.heading}: {label}" if label else section.heading
        boxes.append(
            f'<figure class="figure-box" data-group="{index}" aria-label="{html.escape(name)}"'
            f'{" hidden" if i else ""}><div class="controls"></div>'
            f'<div class="plot" id="plot-{index}-{i}" style="min-height:{height}px"></div></figure>'
        )
    return choice + "".join(boxes), held


def table_box(section: TableSection, max_rows: int, key: str) -> tuple[str, list[str]]:
    """The first rows in a box that scrolls, how many there are, and a download of all; and the element it is held in.

    Args:
        section: the table and its heading.
        max_rows: rows shown.
        key: of the table on the page.
    """
    from tl_asymmetry.plots import page

    table = section.table
    shown = table.head(max_rows)
    numeric = [kind.kind in "iufb" for kind in (getattr(t, "numpy_dtype", t) for t in table.dtypes)]
    aligned = [" class=n" if n else "" for n in numeric]
    head = "".join(
        f'<th scope="col"{n}>{html.escape(str(c))}</th>' for c, n in zip(table.columns, aligned, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{n}>{_cell(v)}</td>" for v, n in zip(row, aligned, strict=True)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    said = f"All {len(table):,} rows." if len(shown) == len(table) else f"{len(shown):,} of {len(table):,} rows shown."
    content = table.to_csv(index=False).encode()
    file, size = html.escape(f"{section.filename}.csv"), f"{max(1, round(len(content) / 1000)):,} kB"
    markup = (
        f'<p class="rows">{said} <button type="button" data-file="{file}" data-held="{key}-csv">'
        f"Download all as {file} ({size})</button></p>"
        f'<div class="scroll{" long" if len(shown) > LONG_TABLE else ""}" tabindex="0" role="region" '
        f'aria-label="{html.escape(section.heading)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    return markup, [page.packed(content, f"{key}-csv")]


def _cell(value: Any) -> str:
    """A cell's text: four significant digits for floats, an en dash where nothing is known."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return "–" if value != value else html.escape(f"{float(value):.4g}")
    text = str(value)
    return "–" if text in ("<NA>", "None", "NaT") and not isinstance(value, str) else html.escape(text)


def terms_list(terms: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{inline(k)}</dt><dd>{prose(v)}</dd>" for k, v in terms) + "</dl>"


def definitions_list(definitions: Sequence[Definition]) -> str:
    legend = "".join(f"<li><span class=mark>{mark}</span> {html.escape(says)}</li>" for mark, says in MARKS.items())
    items = "".join(
        f"<dt>{html.escape(d.term)} <span class=mark>{html.escape(d.mark)}</span></dt><dd>{prose(d.text)}</dd>"
        for d in definitions
    )
    return f'<ul class="marks">{legend}</ul><dl>{items}</dl>'


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


def settings_table(config: Mapping[str, Any]) -> str:
    """Every setting, one a row."""
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(name)).replace(".", ".<wbr>")}</th>'
        f"<td>{html.escape(_setting(value))}</td></tr>"
        for name, value in _flat(config).items()
    )
    return (
        '<div class="scroll settings" tabindex="0" role="region" aria-label="Settings and versions">'
        f"<table><tbody>{body}</tbody></table></div>"
    )


def citations_list(citations: Sequence[Citation]) -> str:
    items = "".join(
        f"<li>“{html.escape(c.title)}”, arXiv:{html.escape(c.arxiv)}. {html.escape(c.used_for)}</li>" for c in citations
    )
    return (
        "<p>The ideas are these papers'; the definitions marked [choice] and [ours] are this software's and should "
        f"be cited as such. The lists of authors stand on arXiv.</p><ul>{items}</ul>"
    )
