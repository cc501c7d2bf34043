"""What every result shares: words, a report, tables and arrays on disk as safetensors and JSON, never a pickle."""

from __future__ import annotations

import html
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_asymmetry.results.report import Report, write_report

KINDS = {
    "Comparison": "tl_asymmetry.comparison.result",
    "ControlStudy": "tl_asymmetry.control.result",
    "CouplingStudy": "tl_asymmetry.coupling.result",
    "GradientCovariance": "tl_asymmetry.gradients.result",
    "GrokRun": "tl_asymmetry.grokking",
    "LayerJacobians": "tl_asymmetry.jacobians.result",
    "PairAnalysis": "tl_asymmetry.pair.result",
    "PredictionPullback": "tl_asymmetry.jacobians.pullback_result",
    "RankOneStudy": "tl_asymmetry.interventions.result",
    "TangentAnalysis": "tl_asymmetry.tangents.result",
    "TrajectoryAnalysis": "tl_asymmetry.trajectory.result",
}
"""Every class of result, and the module that defines it."""

SCHEMA = 1
_DOCUMENT, _ARRAYS = "result.json", "arrays.safetensors"


ResultT = TypeVar("ResultT", bound="Result")


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Result:
    """A finished analysis: a tidy table, every setting, what degrades the answer, and the arrays behind it.

    A subclass names its tables in `TABLES`, is listed in `KINDS`, and says of itself: `_title`, `_facts`,
    `_summary_table`, `_headline` and `_report`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table",)
    """Fields that are DataFrames, `table` first."""

    table: pd.DataFrame
    """Tidy, one row per thing measured."""
    config: dict[str, Any]
    """Every argument, versions, model names and hashes of weights, token counts. JSON-ready."""
    notes: tuple[str, ...]
    """What a reader must know: what was left out, what degrades the answer."""
    arrays: dict[str, Tensor]
    """Arrays behind the tables, by name; see the accessors."""

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
            self._summary_table().to_string(index=False, float_format="{:.3g}".format, na_rep="–"),
            "",
            *self._headline(),
        ]
        if self.notes:
            lines += ["", "Notes:", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """For a notebook; names are escaped."""
        table = self._summary_table().to_html(index=False, float_format="{:.3g}".format, na_rep="–", border=0)
        sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in self._headline())
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        listed = f"<details><summary>Notes ({len(self.notes)})</summary><ul>{notes}</ul></details>" if notes else ""
        return f"<div><h4>{html.escape(self._title())}</h4>{table}{sentences}{listed}</div>"

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one self-contained page that opens offline. Returns its path."""
        return write_report(path, self._report())

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the result into a folder (safetensors and JSON, no pickle). Returns the folder."""
        tables = {name: getattr(self, name) for name in self.TABLES}
        return save_result(
            path, type(self).__name__, tables=tables, arrays=self.arrays, config=self.config, notes=self.notes
        )

    @classmethod
    def load(cls: type[ResultT], path: str | Path) -> ResultT:
        """Read what `save` wrote; every number as it was.

        Raises:
            ValueError: no such result there.
        """
        tables, arrays, config, notes = load_result(path, cls.__name__)
        return cls(**tables, config=config, notes=notes, arrays=arrays)


def open_result(path: str | Path) -> Result:
    """Read a saved result of whatever kind.

    Raises:
        ValueError: no result there, or of a kind this version does not know.
    """
    kind = _document(path).get("kind")
    if kind not in KINDS:
        raise ValueError(f"expected a saved {' or '.join(KINDS)}, got {kind!r}; pass it to the version that wrote it")
    return getattr(importlib.import_module(KINDS[kind]), kind).load(path)


def save_result(
    path: str | Path,
    kind: str,
    *,
    tables: Mapping[str, pd.DataFrame],
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
) -> Path:
    """Write a result into a folder: `result.json` (tables' layout, config, notes) and `arrays.safetensors` (numbers).

    Each file is replaced in one step, the document last, so that a reader never meets half a result.

    Args:
        path: the folder, made if need be.
        kind: name of the result's class, checked on loading.
        tables: float columns go to the arrays bit for bit, all others into the document.
        arrays: tensors by name.
        config: JSON-ready settings.
        notes: lines the result carries.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {f"array/{name}": array.contiguous() for name, array in arrays.items()}
    layouts: dict[str, Any] = {}
    for name, table in tables.items():
        columns: list[dict[str, Any]] = []
        for column in table.columns:
            values = table[column]
            if values.dtype == "float64":
                numbers[f"table/{name}/{column}"] = torch.from_numpy(values.to_numpy(copy=True))
                columns.append({"name": column, "dtype": "float64"})
            else:
                plain = [None if pd.isna(v) else v for v in values.tolist()]
                columns.append({"name": column, "dtype": str(values.dtype), "values": plain})
        layouts[name] = {"rows": len(table), "columns": columns}
    document = {"kind": kind, "schema": SCHEMA, "config": dict(config), "notes": list(notes), "tables": layouts}
    document["arrays"] = list(arrays)  # a safetensors file forgets their order
    replace_file(folder / _ARRAYS, lambda part: save_file(numbers, part))
    replace_file(folder / _DOCUMENT, lambda part: part.write_text(json.dumps(document, indent=1, ensure_ascii=False)))
    return folder


def load_result(
    path: str | Path, kind: str
) -> tuple[dict[str, pd.DataFrame], dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Read what `save_result` wrote: tables, arrays, config and notes.

    Raises:
        ValueError: no result there, another kind of result, or one written by a newer version.
    """
    document = _document(path)
    if document.get("kind") != kind:
        raise ValueError(f"expected a saved {kind}, got {document.get('kind')!r}; pass its folder or use its own load")
    if document["schema"] > SCHEMA:
        raise ValueError(
            f"expected schema {SCHEMA} or older, got {document['schema']}; pass it to a newer tl_asymmetry"
        )
    numbers = load_file(Path(path) / _ARRAYS)
    tables = {}
    for name, layout in document["tables"].items():
        columns = {}
        for column in layout["columns"]:
            if column["dtype"] == "float64":
                columns[column["name"]] = pd.Series(numbers[f"table/{name}/{column['name']}"].numpy())
            else:
                columns[column["name"]] = pd.Series(column["values"], dtype=column["dtype"])
        tables[name] = pd.DataFrame(columns)
    arrays = {name: numbers[f"array/{name}"] for name in document["arrays"]}
    return tables, arrays, document["config"], tuple(document["notes"])


def _document(path: str | Path) -> dict[str, Any]:
    file = Path(path) / _DOCUMENT
    if not file.is_file():
        raise ValueError(f"expected a folder with {_DOCUMENT}, got {str(path)!r}; pass a folder written by save")
    return json.loads(file.read_text())


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one step: whoever reads meanwhile, or after a crash, meets the old one or the new one."""
    part = target.with_name(target.name + ".part")
    try:
        write(part)
        part.chmod(0o644)  # safetensors writes files that nobody else may read
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
