"""The sections of a report: figures and tables under their headings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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
