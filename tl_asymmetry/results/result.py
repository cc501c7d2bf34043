"""What every result shares: words, a report, tables and arrays in one safetensors file, never a pickle."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.disk import make_folder, replace_file
from tl_asymmetry.names import nearest
from tl_asymmetry.results.hub import SCHEME, fetched_result, push
from tl_asymmetry.results.latex import latex_table
from tl_asymmetry.results.pages import Html, page_path, render
from tl_asymmetry.results.report import Report, write_images, write_report
from tl_asymmetry.results.top import shown_rows, top_rows
from tl_asymmetry.store import read_part, write_part

KINDS = {
    "ActivationShift": "tl_asymmetry.shift.result",
    "Comparison": "tl_asymmetry.comparison.result",
    "ControlStudy": "tl_asymmetry.control.result",
    "CouplingStudy": "tl_asymmetry.coupling.result",
    "DeltaComparison": "tl_asymmetry.comparison.deltas_result",
    "GradientCovariance": "tl_asymmetry.gradients.result",
    "GrokRun": "tl_asymmetry.grokking",
    "LayerJacobians": "tl_asymmetry.jacobians.result",
    "PairAnalysis": "tl_asymmetry.pair.result",
    "PowerAnalysis": "tl_asymmetry.power.result",
    "PredictionPullback": "tl_asymmetry.jacobians.pullback_result",
    "RankOneStudy": "tl_asymmetry.interventions.result",
    "RewindStudy": "tl_asymmetry.rewinding.result",
    "StageAnalysis": "tl_asymmetry.stages.result",
    "SpectralAnalysis": "tl_asymmetry.spectra.result",
    "TangentAnalysis": "tl_asymmetry.tangents.result",
    "TrajectoryAnalysis": "tl_asymmetry.trajectory.result",
}
"""Every class of result, and the module that defines it."""

SCHEMA = 2
_FILE, _PART = "result.safetensors", "result"
_PLAIN = ("float64", "int64", "bool")


ResultT = TypeVar("ResultT", bound="Result")


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Result:
    """A finished analysis: a tidy table, every setting, what degrades the answer, and the arrays behind it.

    A subclass names its tables in `TABLES` and what is read first in `LISTED`, is listed in `KINDS`, and says of
    itself: `_title`, `_facts`, `_summary_table`, `_headline` and `_report`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table",)
    """Fields that are DataFrames, `table` first."""
    CAPTION: ClassVar[str] = ""
    """What a row of the summary's table is, and over what its medians are."""
    LISTED: ClassVar[tuple[str, ...]] = ()
    """Columns that `top` shows and a printed table begins with; `top` goes by the first unless told otherwise."""
    SIGNED: ClassVar[tuple[str, ...]] = ()
    """Columns of which both signs count: `top` goes by their size."""
    UNIT: ClassVar[str | None] = None
    """A column of the rows that `top` chooses from, of which every value has one line."""

    table: pd.DataFrame
    """Tidy, one row per thing measured."""
    config: dict[str, Any]
    """Every argument, versions, model names and hashes of weights, token counts. JSON-ready."""
    notes: tuple[str, ...]
    """What a reader must know: what was left out, what degrades the answer."""
    arrays: dict[str, Tensor]
    """Arrays behind the tables, by name; see the accessors."""

    def __post_init__(self) -> None:
        from tl_asymmetry.results.tables import as_table  # here, since a table is a class of pandas' own

        for name in self.TABLES:
            first = self.LISTED if name == "table" else ()
            object.__setattr__(self, name, as_table(getattr(self, name), first))

    # -- a short list --------------------------------------------------------------------------------------------

    def top(self, n: int = 10, by: str | None = None, matrix: str | None = None) -> pd.DataFrame:
        """The rows of the table that stand out most, one line each, at the shown rank.

        A read matrix is held against its own input, a write matrix against the prediction subspace, as far as these
        were measured. The order is that of point estimates: how sure they are stands beside them.

        Args:
            n: how many lines at most.
            by: a column of numbers, by default the result's main one: the largest come first, of p and q the smallest,
                of what counts with both signs (a log ratio) the farthest from 0.
            matrix: only this one.

        Returns:
            What tells the rows apart, the column that they are sorted by, and what says how far and how sure.

        Raises:
            ValueError: no such column or matrix, or one without numbers.
        """
        from tl_asymmetry.results.tables import as_table

        found = top_rows(
            self._listed(), n, self.LISTED[0] if by is None else by, matrix, self.LISTED, signed=self.SIGNED,
            unit=self.UNIT,
        )  # fmt: skip
        return as_table(found, self.LISTED if by is None else (by, *self.LISTED))

    def _listed(self) -> pd.DataFrame:
        """The rows that `top` chooses from, labels first."""
        return shown_rows(self.table, self.config)

    # -- other forms ---------------------------------------------------------------------------------------------

    def to_xarray(self) -> Any:
        """The table with its axes named. Needs the extra `xarray`.

        Returns:
            An `xarray.Dataset` over the first columns that tell all rows apart (layer, head, rank …; −1 where a row has
            none, as a matrix of the MLP has no head), or over rows where the grid would be mostly empty.

        Raises:
            ImportError: xarray is not installed.
        """
        from tl_asymmetry.results.labelled import labelled

        return labelled(self.table)

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        """Which model or models, plain text."""
        raise NotImplementedError

    def _facts(self) -> str:
        """One line: shapes, tokens, settings."""
        raise NotImplementedError

    def _summary_table(self) -> pd.DataFrame:
        """The main numbers, a screen of rows at most."""
        raise NotImplementedError

    def _headline(self) -> list[str]:
        """Sentences on what the table shows, claiming no more than its controls allow."""
        raise NotImplementedError

    def _report(self) -> Report:
        """What the page says."""
        raise NotImplementedError

    def summary(self) -> str:
        """The main numbers in one screen of plain text."""
        lines = [
            f"{type(self).__name__}: {self._title()}",
            self._facts(),
            "",
            *([self.CAPTION] if self.CAPTION else []),
            self._summary_table().to_string(index=False, float_format="{:.3g}".format, na_rep="–"),
            "",
            *self._headline(),
        ]
        if self.notes:
            lines += ["", "Notes:", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def __eq__(self, other: object) -> bool:
        """Whether it is the same result: kind, settings, notes, and every number."""
        return (
            type(other) is type(self)
            and isinstance(other, Result)
            and (self.config, self.notes, self.arrays.keys()) == (other.config, other.notes, other.arrays.keys())
            and all(getattr(self, name).equals(getattr(other, name)) for name in self.TABLES)
            and all(torch.equal(x.nan_to_num(), other.arrays[name].nan_to_num()) for name, x in self.arrays.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        """For a notebook; names are escaped."""
        table = self._summary_table().to_html(index=False, float_format="{:.3g}".format, na_rep="–", border=0)
        return render(
            "notebook.html", title=self._title(), facts=self._facts(), caption=self.CAPTION, table=Html(table),
            sentences=self._headline(), notes=self.notes,
        )  # fmt: skip

    def _page(self, **content: Any) -> Report:
        """A report with what every result says alike: what it is of, what was found, its notes and settings.

        Args:
            content: of the report's other fields, and of these where a result says them otherwise.
        """
        alike = {
            "title": self._title(), "subtitle": self._facts(), "summary": "\n\n".join(self._headline()),
            "notes": self.notes, "config": self.config,
        }  # fmt: skip
        return Report(**{**alike, **content})

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one self-contained page that opens offline. Returns its path."""
        return write_report(page_path(path), self._report())

    def write_images(
        self,
        folder: str | Path,
        *,
        format: str = "svg",
        width: int | str = 800,
        scale: float = 2.0,
        greyscale: bool = False,
    ) -> list[Path]:
        """Write every figure of the report as a static image. Needs the extra `report` (kaleido).

        Args:
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
        return write_images(self, folder, format=format, width=width, scale=scale, greyscale=greyscale)

    def to_csv(self, path: str | Path, table: str = "table") -> Path:
        """Write one of the tables as comma-separated values. Returns its path.

        Args:
            path: of the file; its folder is made if need be.
            table: name of the table.

        Raises:
            ValueError: no such table.
        """
        text = self._table(table, self.TABLES).to_csv(index=False)
        return _written(text, path, "table.csv")

    def to_latex(
        self,
        path: str | Path | None = None,
        table: str = "summary",
        *,
        caption: str | None = None,
        label: str | None = None,
    ) -> str:
        """A table for a paper, in the style of the LaTeX package booktabs; three significant digits to a number.

        Args:
            path: of a file to write it to as well; its folder is made if need be.
            table: "summary", the main numbers; "top"; or the name of one of the tables.
            caption: in words, escaped.
            label: for references.

        Returns:
            A `tabular`; with a caption or label in a `table`.

        Raises:
            ValueError: no such table.
        """
        text = latex_table(self._table(table, ("summary", "top", *self.TABLES)), caption=caption, label=label)
        if path is not None:
            _written(f"{text}\n", path, "table.tex")
        return text

    def _table(self, name: str, there: Sequence[str]) -> pd.DataFrame:
        """A table by its name."""
        if name not in there:
            raise ValueError(f"expected a table among {', '.join(there)}, got {name!r}; pass {nearest(name, there)}")
        if name in ("summary", "top"):
            return self._summary_table() if name == "summary" else self.top()
        found: pd.DataFrame = getattr(self, name)
        return found

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the result into a folder, which is returned: one safetensors file, made real by one rename.

        Raises:
            ValueError: a path that is no folder and cannot be made one.
            OSError: no room (errno ENOSPC) or another failure of the disk; a result saved there before is untouched.
        """
        document, numbers = self.packed()
        folder = Path(path).expanduser()
        make_folder(folder)
        write_part(folder / _FILE, _PART, numbers, document)
        return folder

    def push_to_hub(self, repo: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the result to the Hub: what `save` writes, and a card with hashes of weights and texts, and versions.

        A result may hold the ids of the tokens that were analyzed: make none public whose texts are private.

        Args:
            repo: "owner/name" of a dataset repository, made if need be.
            private: for a new one, only its owners read it.
            token: of the Hub; None: the one that was logged in with.

        Returns:
            Its address with the commit, "hf://owner/name@commit", which `load` reads.

        Raises:
            ValueError: a name that is none, no access, no network.
        """
        return push(self, repo, private=private, token=token)

    @classmethod
    def load(cls: type[ResultT], path: str | Path) -> ResultT:
        """Read what `save` wrote; every number as it was.

        Raises:
            ValueError: no such result there, or one whose file is not as it was written.
        """
        return cls.unpacked(*_read(path))

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The result as a part of a store: an entry that JSON can hold, and tensors."""
        numbers = {f"array/{name}": array for name, array in self.arrays.items()}
        layouts = {}
        for name in self.TABLES:
            table = getattr(self, name)
            columns = [_packed_column(table[column], f"table/{name}/{column}", numbers) for column in table.columns]
            layouts[name] = {"rows": len(table), "columns": columns}
        document = {
            "kind": type(self).__name__, "schema": SCHEMA, "config": self.config, "notes": list(self.notes),
            "tables": layouts,
        }  # fmt: skip
        return document, numbers

    @classmethod
    def unpacked(cls: type[ResultT], document: Mapping[str, Any], numbers: Mapping[str, Tensor]) -> ResultT:
        """The result that `packed` made these of.

        Raises:
            ValueError: another kind of result, or one of another version.
        """
        if document["kind"] != cls.__name__:
            raise ValueError(f"expected a saved {cls.__name__}, got {document['kind']!r}; pass its folder, or use load")
        if document["schema"] != SCHEMA:
            raise ValueError(
                f"expected schema {SCHEMA}, got {document['schema']}; pass it to the tl_asymmetry that wrote it"
            )
        tables = {}
        for name, layout in document["tables"].items():
            columns = {c["name"]: _unpacked_column(c, numbers[f"table/{name}/{c['name']}"]) for c in layout["columns"]}
            tables[name] = pd.DataFrame(columns, index=pd.RangeIndex(layout["rows"]))
        arrays = {name.removeprefix("array/"): x for name, x in numbers.items() if name.startswith("array/")}
        return cls(**tables, config=document["config"], notes=tuple(document["notes"]), arrays=arrays)


@checked
def load(path: str | Path) -> Result:
    """Read a saved result of whatever kind; every number as it was.

    Args:
        path: a folder that a result's `save` wrote, or "hf://owner/name" (or "hf://owner/name@revision") of what
            `push_to_hub` uploaded.

    Raises:
        ValueError: no result there, one whose file is not as it was written, or of a kind this version does not know.

    Example:
        >>> load(result.save("saved")).table.equals(result.table)
        True
    """
    document, numbers = _read(path)
    kind = document["kind"]
    if kind not in KINDS:
        raise ValueError(f"expected a saved {' or '.join(KINDS)}, got {kind!r}; pass it to the version that wrote it")
    found: type[Result] = getattr(importlib.import_module(KINDS[kind]), kind)
    return found.unpacked(document, numbers)


def _written(text: str, path: str | Path, example: str) -> Path:
    """A file with a text; its folder is made."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"expected the path of a file, got the folder {file}; pass e.g. {file / example}")
    make_folder(file.parent)
    replace_file(file, text.encode("utf-8"))
    return file


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = fetched_result(path, _FILE) if isinstance(path, str) and path.startswith(SCHEME) else Path(path)
    file = folder.expanduser() / _FILE
    if not file.exists():
        raise ValueError(f"expected a folder with {_FILE}, got {str(path)!r}; pass a folder written by save")
    return read_part(file, _PART)


def _packed_column(values: pd.Series, name: str, numbers: dict[str, Tensor]) -> dict[str, Any]:
    """A column as numbers, and what it takes to read them: others than plain ones by their place among all values."""
    column = {"name": values.name, "dtype": str(values.dtype)}
    if column["dtype"] in _PLAIN:
        numbers[name] = torch.from_numpy(values.to_numpy(copy=True))
        return column
    # as JSON, which tells 1, 1.0 and "1" apart
    written = ["null" if pd.isna(value) else json.dumps(value) for value in values.tolist()]
    places = {text: place for place, text in enumerate(dict.fromkeys(written))}
    numbers[name] = torch.tensor([places[text] for text in written], dtype=torch.int32)
    return {**column, "values": [json.loads(text) for text in places]}


def _unpacked_column(column: Mapping[str, Any], numbers: Tensor) -> pd.Series:
    if "values" not in column:
        return pd.Series(numbers.numpy())
    return pd.Series([column["values"][place] for place in numbers.tolist()], dtype=column["dtype"])
