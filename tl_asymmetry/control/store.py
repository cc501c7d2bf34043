"""Finished parts of a study on disk, so that a killed study goes on where it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tl_asymmetry.gradients.result import GradientCovariance
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.results.result import replace_file
from tl_asymmetry.training.runs import Run

_STUDY, _DONE = "study.json", "run.json"
_LOOSE = ("versions",)
"""Settings that may differ between the runs of one study."""


class Store:
    """A folder of finished parts; without a folder, nothing is kept and everything is made.

    A part is finished when its last file is there, and each file is put in its place in one step.

    Args:
        folder: made if need be; None for no store.
        config: what the study is; a folder that holds another study is refused.
    """

    def __init__(self, folder: str | Path | None, config: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._names = {name: i for i, name in enumerate(config["objectives"])}
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps({k: v for k, v in config.items() if k not in _LOOSE}))
        file = self._folder / _STUDY
        if not file.exists():
            text = json.dumps(identity, indent=1, ensure_ascii=False)
            replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))
            return
        there = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in identity if there.get(name) != identity[name]]
        if different:
            name = different[0]
            raise ValueError(
                f"expected a store of this study, got one with {name} {there.get(name)!r} instead of "
                f"{identity[name]!r} in {str(self._folder)!r}; pass another folder, or the arguments it was begun with"
            )

    def gradients(self, name: str, make: Callable[[], GradientCovariance]) -> GradientCovariance:
        """One objective's gradient covariance, read or made."""
        if self._folder is None:
            return make()
        folder = self._folder / f"{self._slug(name)}-gradients"
        if not (folder / "result.json").exists():  # the last file that save writes
            make().save(folder)
        return GradientCovariance.load(folder)

    def grade(
        self, key: tuple[str, int, str], make: Callable[[], tuple[Run, PairAnalysis]]
    ) -> tuple[Run, PairAnalysis]:
        """One grade's run and analysis, read or made."""
        if self._folder is None:
            return make()
        name, seed, compared = key
        folder = self._folder / f"{self._slug(name)}-seed{seed}-{compared}"
        if not (folder / _DONE).exists():
            run, pair = make()
            pair.save(folder)
            text = json.dumps(asdict(run))
            replace_file(folder / _DONE, lambda part: part.write_text(text, encoding="utf-8"))
        record = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        return Run(tuple(record["losses"]), tuple(record["distances"])), PairAnalysis.load(folder)

    def _slug(self, name: str) -> str:
        """A folder's name: the objective's place, and what of its name a file system takes."""
        return f"{self._names[name]:02d}-{re.sub(r'[^A-Za-z0-9.=]+', '_', name).strip('_')[:60]}"
