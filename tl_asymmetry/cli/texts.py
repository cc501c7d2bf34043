"""Texts in files: plain text, JSON, JSON lines, tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMATS = (
    "UTF-8: .txt (texts apart by blank lines), .jsonl (one text a line), .json (a list of texts), .csv or .tsv (a "
    'column text); a text is a string, {"text": …} or {"messages": […]}'
)
_COLUMNS = ("text", "messages", "prompt", "content")


def read_texts(path: Path) -> list[Any]:
    """The texts of a file, by the ending of its name.

    Raises:
        ValueError: no such file, or one that is not what its ending says, naming the file and the line.
    """
    if not path.is_file():
        raise ValueError(f"expected a file of texts, got {str(path)!r}, where there is none; pass its path")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first text
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {path}, got {error}; pass it converted to UTF-8") from error
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return [_entry(value, f"line {number} of {path}") for number, value in _lines(text, path)]
        case ".json":
            return _json(text, path)
        case ".csv" | ".tsv":
            return _table(text, path, "\t" if path.suffix.lower() == ".tsv" else ",")
    return [passage.strip() for passage in text.split("\n\n") if passage.strip()]


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parsed(line, f"line {number} of {path}", "pass one value a line")


def _json(text: str, path: Path) -> list[Any]:
    values = _parsed(text, str(path), "pass a list of texts")
    if not isinstance(values, list):
        raise ValueError(f"expected a list of texts in {path}, got a {type(values).__name__}; pass [text, …]")
    return [_entry(value, f"entry {number} of {path}") for number, value in enumerate(values, start=1)]


def _table(text: str, path: Path, separator: str) -> list[Any]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=separator)
    names = list(rows.fieldnames or ())
    column = names[0] if len(names) == 1 else next((name for name in _COLUMNS if name in names), None)
    if column is None:
        raise ValueError(
            f"expected a column text in {path}, got {', '.join(names) or 'nothing'}; rename the column with the texts"
        )
    return [row[column] for row in rows if (row[column] or "").strip()]


def _parsed(text: str, place: str, instead: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON in {place}, got {error}; {instead}") from error


def _entry(value: Any, place: str) -> Any:
    value = value.get("text", value.get("messages")) if isinstance(value, dict) else value
    if not isinstance(value, str | list):
        raise ValueError(
            f'expected a string, {{"text": …}} or {{"messages": […]}} in {place}, got something else; pass texts'
        )
    return value
