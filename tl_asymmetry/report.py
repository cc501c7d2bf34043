"""One self-contained HTML file of a result: opens offline, asks the network for nothing.

`Report` is neutral: an analysis fills it with words, figures and tables, and `write_report` writes the page.
plotly is imported only when a page is built.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = [
    "CITATIONS",
    "DEFINITIONS",
    "Citation",
    "Definition",
    "FigureSection",
    "Html",
    "Report",
    "TableSection",
    "report_html",
    "write_report",
]

PLAIN_CSV_BYTES = 262_144
"""Up to this size a table's download is plain CSV; above, gzipped CSV."""


MARKS = {
    "[paper]": "stated by the paper or its author's own code",
    "[choice]": "our definition, because the paper's is not public",
    "[ours]": "something we add",
}
"""Whose a definition is."""


@dataclass(frozen=True)
class Definition:
    """What a word of the report means, and whose meaning it is."""

    term: str
    """The word, as the tables and figures use it."""
    mark: str
    """A key of `MARKS`."""
    text: str
    """The meaning, plain text."""


@dataclass(frozen=True)
class Citation:
    """A paper the software implements."""

    title: str
    """Its title."""
    arxiv: str
    """Its arXiv number."""
    used_for: str
    """What was taken from it."""


CITATIONS = (
    Citation(
        "Where pretraining writes and alignment reads", "2605.16600", "Read and write asymmetry of weight deltas.",
    ),
    Citation(
        "Revisiting anisotropy: the geometry of learning dynamics", "2604.08764",
        "Tangent proxies against normal controls.",
    ),
    Citation(
        "Gradient-direction sensitivity and linear centroids", "2604.25143", "Centroid response along directions."
    ),
)  # fmt: skip
"""The three papers. Their authors are left to arXiv rather than guessed."""

DEFINITIONS = (
    Definition(
        "The claim under study", "[paper]",
        "Alignment deltas concentrate in the read pathway (W_Q, W_K) along principal directions of the attention-input "
        "activations, and stay near isotropic in the write pathway (W_O, and W_2, here W_out) relative to the "
        "prediction subspace, which the unembedding defines.",
    ),
    Definition(
        "Delta (ΔW)", "[choice]",
        "Aligned weights minus base weights, subtracted and accumulated in float32. Its residual axis is the one of "
        "size d (d_model): the input of read matrices, the output of write matrices.",
    ),
    Definition(
        "Subspaces", "[choice]",
        "attn_in, mlp_in, resid_pre, resid_mid, resid_post: the leading eigenvectors of the uncentred second moment of "
        "that activation. prediction: the leading left singular vectors of the unembedding with the final norm's gain "
        "folded in and its mean over the vocabulary removed.",
    ),
    Definition(
        "Relative subspace fraction (relative)", "[choice]",
        "The share of the delta's squared norm that lies in a k-dimensional subspace, divided by k/d. 1 is what an "
        "isotropic delta has; d/k is the most there can be.",
    ),
    Definition(
        "Isotropic null (z, p, q)", "[ours]",
        "The same delta against a random subspace of the same rank. z counts its standard deviations; p is one-sided "
        "(at least this concentrated), p_method says how it was computed; q corrects it over all layers and heads of "
        "one matrix, subspace and rank. It cannot tell alignment from any other training, since any gradient "
        "reads.",
    ),
    Definition(
        "Activation-matched reference", "[ours]",
        "What the fraction would be if the update were a plain sum of outer products of this matrix's own inputs with "
        "independent upstream gradients. A reference, not an expectation: it has no p-value. For W_K in a "
        "model without rotary positions it uses inputs centred within each sequence. It is undefined on write "
        "matrices, whose residual side is their output; there the gradient-matched reference takes its place when "
        "gradients were captured.",
    ),
    Definition(
        "Excess", "[ours]",
        "Fraction divided by the reference. Near 1 the delta is as concentrated as its inputs alone explain, however "
        "far it is from isotropic.",
    ),
    Definition(
        "95 % interval", "[ours]",
        "Of relative, by leaving out one group of texts at a time. It covers which texts were sampled, not training "
        "seeds. There is none on prediction rows, which depend on weights alone, and it is unreliable where the "
        "eigengap is small.",
    ),
    Definition(
        "Eigengap", "[ours]",
        "The relative drop (λ_k − λ_{k+1}) / λ_k at the subspace's edge. Under 0.05 the edge is arbitrary, and the row "
        "is flagged.",
    ),
    Definition(
        "Rounding share", "[ours]",
        "The share of the delta's squared norm that storing weights in bf16 or fp16 would explain by itself; 0 for "
        "float32. Rounding noise is near isotropic and hides structure: heads are marked from 0.1 and greyed from 0.5. "
        "fraction_unrounded is the fraction with that share taken out.",
    ),
    Definition(
        "Asymmetry index (log2_ratio)", "[choice]",
        "log2 of relative read (W_Q and W_K against their input) over relative write (W_O against prediction; per "
        "layer also W_out). 0 is no asymmetry. Chance need not be 0, since any gradient reads: log2_expected is the "
        "same ratio of the matched references and log2_excess the difference; both need gradients. The interval "
        "covers the read side only.",
    ),
)  # fmt: skip
"""Definitions every report of a pair carries."""


class Html(str):
    """Trusted markup. Any other string given to a report is escaped.

    Example:
        >>> Html("<em>seven</em> heads")
        '<em>seven</em> heads'
    """

    __slots__ = ()


@dataclass(frozen=True)
class FigureSection:
    """A figure, or several to choose from, under one heading."""

    heading: str
    """Heading, plain text."""
    figure: go.Figure | Mapping[str, go.Figure]
    """One figure, or a mapping from labels to figures, of which the reader picks one (the first is shown)."""
    prose: str = ""
    """What to look for: text, paragraphs parted by an empty line, or `Html`."""
    pick: str = "show"
    """Label of the choice when there are several, e.g. "matrix"."""


@dataclass(frozen=True)
class TableSection:
    """A table under a heading, with a download of all its rows."""

    heading: str
    """Heading, plain text."""
    table: pd.DataFrame
    """The table; its index is not shown."""
    prose: str = ""
    """Text or `Html` above the table."""
    filename: str = "table"
    """Name of the downloaded file, without its ending."""


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
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"expected the path of a file, got the folder {path}; pass e.g. {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ValueError(f"expected an existing folder, got {path.parent}; create it or pass another path")
    path.write_text(report_html(report, max_rows=max_rows), encoding="utf-8")
    return path


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
    if max_rows < 1:
        raise ValueError(f"expected max_rows >= 1, got {max_rows}; pass a positive number of rows")
    from tl_asymmetry.plots import page  # here, since it brings plotly

    # (heading in the contents, id, markup)
    parts: list[tuple[str, str, str]] = []
    if report.summary:
        parts.append(("Summary", "summary", _prose(report.summary)))
    if report.notes:
        items = "".join(f"<li>{_inline(note)}</li>" for note in report.notes)
        parts.append(("Notes", "notes", f'<ul class="notes">{items}</ul>'))
    for i, section in enumerate(report.figures):
        parts.append((section.heading, f"figure-{i}", _prose(section.prose) + _figures(section, i)))
    for i, table in enumerate(report.tables):
        parts.append((table.heading, f"table-{i}", _prose(table.prose) + _table(table, max_rows)))
    if report.methods:
        parts.append(("How it was measured", "methods", _terms(report.methods)))
    if report.definitions:
        parts.append(("Definitions", "definitions", _definitions(report.definitions)))
    if report.config:
        rows = [(key, _setting(value)) for key, value in _flat(report.config).items()]
        parts.append(("Settings and versions", "config", _config(rows)))
    if report.citations:
        parts.append(("How to cite", "citations", _citations(report.citations)))

    contents = "".join(f'<li><a href="#{key}">{html.escape(name)}</a></li>' for name, key, _ in parts)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{html.escape(name)}</h2>{markup}'
        "</section>"
        for name, key, markup in parts
    )
    scripts = ""
    if report.figures:
        scripts = (
            f'<script type="application/json" id="page-settings">{page.page_settings()}</script>'
            f"<script>{page.plotly_code()}</script><script>{page.SCRIPT}</script>"
        )
    subtitle = f'<p class="subtitle">{_inline(report.subtitle)}</p>' if report.subtitle else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(report.title)}</title><style>{page.CSS}</style></head><body>"
        '<a class="skip" href="#content">Skip to content</a>'
        f"<header><h1>{html.escape(report.title)}</h1>{subtitle}</header>"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>'
        f'<main id="content" tabindex="-1">{body}</main>{scripts}</body></html>\n'
    )


def _inline(text: str) -> str:
    """Escaped, unless it is `Html`."""
    return str(text) if isinstance(text, Html) else html.escape(str(text))


def _prose(text: str) -> str:
    """Paragraphs: `Html` as it is, text escaped and split at empty lines."""
    if isinstance(text, Html):
        return f'<div class="prose">{text}</div>'
    return "".join(f"<p>{html.escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _figures(section: FigureSection, index: int) -> str:
    """The boxes of a section's figures, and the choice between them when there are several."""
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
    boxes = []
    for i, (label, figure) in enumerate(figures.items()):
        content = page.figure_script(figure)
        height = int(figure.layout.height or 450) - sum(page.controls_height(figure))
        name = f"{section.heading}: {label}" if label else section.heading
        boxes.append(
            f'<figure class="figure-box" data-group="{index}" aria-label="{html.escape(name)}"'
            f'{" hidden" if i else ""}><div class="controls"></div>'
            f'<div class="plot" id="plot-{index}-{i}" style="min-height:{height}px"></div>'
            f"{content}</figure>"
        )
    return choice + "".join(boxes)


def _table(section: TableSection, max_rows: int) -> str:
    """The first rows in a box that scrolls, how many there are, and a download of all."""
    table = section.table
    shown = table.head(max_rows)
    head = "".join(f'<th scope="col">{html.escape(str(c))}</th>' for c in table.columns)
    numeric = [kind.kind in "iufb" for kind in (getattr(t, "numpy_dtype", t) for t in table.dtypes)]
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if n else ''}>{_cell(v)}</td>" for v, n in zip(row, numeric, strict=True))
        + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    said = f"All {len(table):,} rows." if len(shown) == len(table) else f"{len(shown):,} of {len(table):,} rows shown."
    return (
        f'<p class="rows">{said} {_download(table, section.filename)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(section.heading)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    """A cell's text: four significant digits for floats, an en dash where nothing is known."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return "–" if value != value else html.escape(f"{float(value):.4g}")
    text = str(value)
    return "–" if text in ("<NA>", "None", "NaT") and not isinstance(value, str) else html.escape(text)


def _download(table: pd.DataFrame, filename: str) -> str:
    """A link whose address is the whole table."""
    content = table.to_csv(index=False).encode()
    name, kind = f"{filename}.csv", "text/csv;charset=utf-8"
    if len(content) > PLAIN_CSV_BYTES:
        # mtime fixed: the same result gives the same file, byte for byte.
        content, name, kind = gzip.compress(content, 9, mtime=0), f"{filename}.csv.gz", "application/gzip"
    size = f"{max(1, round(len(content) / 1000)):,} kB"
    address = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f'<a download="{html.escape(name)}" href="{address}">Download all as {html.escape(name)} ({size})</a>'


def _terms(terms: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{_inline(k)}</dt><dd>{_prose(v)}</dd>" for k, v in terms) + "</dl>"


def _definitions(definitions: Sequence[Definition]) -> str:
    legend = "".join(f"<li><span class=mark>{mark}</span> {html.escape(says)}</li>" for mark, says in MARKS.items())
    items = "".join(
        f"<dt>{html.escape(d.term)} <span class=mark>{html.escape(d.mark)}</span></dt><dd>{_prose(d.text)}</dd>"
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


def _config(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{html.escape(str(k))}</th><td>{html.escape(v)}</td></tr>' for k, v in rows)
    return (
        '<div class="scroll settings" tabindex="0" role="region" aria-label="Settings and versions">'
        f"<table><tbody>{body}</tbody></table></div>"
    )


def _citations(citations: Sequence[Citation]) -> str:
    items = "".join(
        f"<li>“{html.escape(c.title)}”, arXiv:{html.escape(c.arxiv)}. {html.escape(c.used_for)}</li>" for c in citations
    )
    return (
        "<p>The ideas are these papers'; the definitions marked [choice] and [ours] are this software's and should "
        f"be cited as such. The lists of authors stand on arXiv.</p><ul>{items}</ul>"
    )
