"""Finished sites of a study on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_asymmetry.interventions.planner import EditSite
from tl_asymmetry.results.result import replace_file

_SETTINGS = "study.json"
SCHEMA = 1


class StudyStore:
    """One file for each finished site and intervention, in a folder that belongs to one study.

    Args:
        folder: made if need be; None keeps nothing.
        settings: all that a site's numbers depend on, JSON-ready.

    Raises:
        ValueError: the folder holds another study, naming what differs.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        ours = json.loads(json.dumps({"schema": SCHEMA, **settings}))
        file = self._folder / _SETTINGS
        if not file.is_file():
            replace_file(file, lambda part: part.write_text(json.dumps(ours, indent=1, ensure_ascii=False)))
            return
        theirs = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if differing:
            raise ValueError(
                f"expected a folder of the same study, got one with other {', '.join(differing)}; pass another store "
                "or the arguments it was made with"
            )

    def get(self, intervention: str, site: EditSite) -> dict[str, Any] | None:
        """What was put for a site, or None."""
        file = self._file(intervention, site)
        return None if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))

    def put(self, intervention: str, site: EditSite, record: Mapping[str, Any]) -> None:
        """Keep a finished site; in one step, so that there is never half a file."""
        file = self._file(intervention, site)
        if file is not None:
            text = json.dumps(record)
            replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))

    def _file(self, intervention: str, site: EditSite) -> Path | None:
        layer, matrix, head = site
        name = f"{intervention}_L{layer}_{matrix}_{'all' if head is None else f'H{head}'}.json"
        return None if self._folder is None else self._folder / name
