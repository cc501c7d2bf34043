"""What every result shares: tables and arrays on disk, as safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SCHEMA = 1
_DOCUMENT, _ARRAYS = "result.json", "arrays.safetensors"


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
    _replace(folder / _ARRAYS, lambda part: save_file(numbers, part))
    _replace(folder / _DOCUMENT, lambda part: part.write_text(json.dumps(document, indent=1, ensure_ascii=False)))
    return folder


def load_result(
    path: str | Path, kind: str
) -> tuple[dict[str, pd.DataFrame], dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Read what `save_result` wrote: tables, arrays, config and notes.

    Raises:
        ValueError: no result there, another kind of result, or one written by a newer version.
    """
    folder = Path(path)
    if not (folder / _DOCUMENT).is_file():
        raise ValueError(f"expected a folder with {_DOCUMENT}, got {str(folder)!r}; pass a folder written by save")
    document = json.loads((folder / _DOCUMENT).read_text())
    if document.get("kind") != kind:
        raise ValueError(f"expected a saved {kind}, got {document.get('kind')!r}; pass its folder or use its own load")
    if document["schema"] > SCHEMA:
        raise ValueError(
            f"expected schema {SCHEMA} or older, got {document['schema']}; pass it to a newer tl_asymmetry"
        )
    numbers = load_file(folder / _ARRAYS)
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


def _replace(target: Path, write: Any) -> None:
    part = target.with_name(target.name + ".part")
    try:
        write(part)
        part.chmod(0o644)  # safetensors writes files that nobody else may read
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
