"""The sections of a report: figures and tables under their headings, and what its words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

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
    shown: Sequence[str] | None = None
    """Columns that stand on the page; None: all of them. The download has all."""
