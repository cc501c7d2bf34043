"""Tables of results: DataFrames that print what is read first."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tl_asymmetry.results.top import labels_of

_SAID_BY = {"place": ("layer", "head", "expert", "matrix", "pathway"), "matrix": ("pathway",)}
"""Labels that another label says already, and are therefore not printed beside it."""

_PLACE = ("place", "layer", "head", "expert", "matrix")
"""Labels that are printed even where all rows have the same."""

_NOTEBOOK_COLUMNS = 12
_LONG, _EDGE_ROWS = 60, 5
"""Of a table with more rows, so many of either end are printed."""


class AnyFrame(type):
    """The type of a DataFrame that any other one passes for."""

    # pandas.testing.assert_frame_equal asks isinstance(left, type(right)): a table read back from a file will do.
    def __instancecheck__(cls, thing: object) -> bool:
        return isinstance(thing, pd.DataFrame)


class Table(pd.DataFrame, metaclass=AnyFrame):
    """A DataFrame in all it does, but that it prints the columns that are read first, as many as a line has room for.

    pandas would print the first and the last few of them. With `pd.set_option("display.max_columns", None)` it prints
    all as pandas does, and so does `to_string()`.

    Example:
        >>> wide = pd.DataFrame({"layer": [0, 1]} | {f"number {i}": [0.25 * i, 1.0] for i in range(20)})
        >>> print(repr(as_table(wide, ["number 19"])).splitlines()[1][:22].rstrip())
        0      0       4.75
    """

    _metadata = ["_read_first"]
    _read_first: tuple[str, ...] = ()

    @property
    def _constructor(self) -> Any:
        return Table

    def __repr__(self) -> str:
        ends = self._ends()
        if self._as_pandas() or _printed_width(ends) <= _width():
            return repr(pd.DataFrame(self))
        numbered = max(len(str(label)) for label in ends.index)
        room = _width() - numbered
        columns: list[str] = []
        for name in self._ordered():
            room -= _printed_width(ends[[name]], **_WRITTEN) - numbered
            if room < 0 and columns:
                break
            columns.append(name)
        text = pd.DataFrame(self)[columns].to_string(max_rows=_LONG, min_rows=2 * _EDGE_ROWS, **_WRITTEN)
        return f"{text}\n\n[{self._size()}: see .columns; to_string() prints all]"

    def _repr_html_(self) -> str | None:
        if self._as_pandas() or self.shape[1] <= _NOTEBOOK_COLUMNS or not pd.get_option("display.notebook_repr_html"):
            return pd.DataFrame(self)._repr_html_()  # type: ignore[operator]
        shown = pd.DataFrame(self)[self._ordered()[:_NOTEBOOK_COLUMNS]]
        return f"{shown.to_html(max_rows=2 * _EDGE_ROWS, border=0, **_WRITTEN)}<p>{self._size()}: see .columns</p>"

    def _as_pandas(self) -> bool:
        """Whether it prints as any DataFrame does: nothing is known of its columns, or all are asked for."""
        named = self.columns.is_unique and all(isinstance(name, str) for name in self.columns)
        return not (self._read_first and named and len(self)) or pd.get_option("display.max_columns") is None

    def _ordered(self) -> list[str]:
        """All columns, in the order in which they are read: labels that tell these rows apart, what is read first."""
        labels = labels_of(self)
        said = {label for name in labels for label in _SAID_BY.get(name, ())}
        said |= {name for name in labels if self[name].isna().all()}
        telling = [name for name in labels if name not in said and (name in _PLACE or self[name].nunique() > 1)]
        order = [*telling, *(name for name in self._read_first if name in self), *map(str, self.columns)]
        return [name for name in dict.fromkeys(order) if name not in said]

    def _ends(self) -> pd.DataFrame:
        """The rows that are printed."""
        whole = pd.DataFrame(self)
        return whole if len(whole) <= _LONG else pd.concat([whole.head(_EDGE_ROWS), whole.tail(_EDGE_ROWS)])

    def _size(self) -> str:
        return f"{len(self):,} row{'s' if len(self) != 1 else ''} × {self.shape[1]} columns"


def as_table(frame: pd.DataFrame, read_first: Sequence[str] = ()) -> Table:
    """A DataFrame as a table: the same numbers, not copied.

    Args:
        frame: labels first.
        read_first: columns that are printed next to the labels, as far as they are there.
    """
    table = Table(frame)
    table._read_first = tuple(read_first) or tuple(str(c) for c in frame.columns)
    return table


def _width() -> int:
    """Characters in a line: what pandas was told, if it was, else the terminal's."""
    usual = 80
    told = pd.get_option("display.width") or usual
    return int(told) if told != usual else shutil.get_terminal_size((usual, 24)).columns


def _printed_width(frame: pd.DataFrame, **written: Any) -> int:
    return max(len(line) for line in frame.to_string(**written).splitlines())


def _number(value: float) -> str:
    return f"{value:.3g}"


_WRITTEN: dict[str, Any] = {"float_format": _number, "na_rep": "–"}
