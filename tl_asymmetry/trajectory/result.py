"""What `analyze_trajectory` and `TrajectoryRecorder` give back: tables over steps, figures, a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.names import kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.numbers import Layout, Measurements
from tl_asymmetry.results.report import Report
from tl_asymmetry.store import Parts, StoreReader
from tl_asymmetry.trajectory.data import TrajectoryData
from tl_asymmetry.trajectory.measurements import trajectory_tables
from tl_asymmetry.trajectory.report import elsewhere, headline, summary_table, trajectory_report


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class TrajectoryAnalysis(TrajectoryData):
    """Where a training run has moved its weights, by checkpoint and head, against both nulls.

    Made by `analyze_trajectory`, by a `TrajectoryRecorder`, or from a store alone. Printing it gives the summary; in a
    notebook it is a table.
    """

    def _title(self) -> str:
        steps, models = self.config["steps"], self.config["model"]
        return f"{models['name']}, steps {steps[0]} to {steps[-1]}"

    def _facts(self) -> str:
        shape, ranks = self.config["shape"], ", ".join(map(str, self.config["ranks"]))
        source = self.config["subspaces_from"]
        source = source if isinstance(source, str) else "one model"
        return (
            f"{len(self.config['steps'])} checkpoints; {shape['n_layers']} layers × {shape['n_heads']} heads, d_model "
            f"{shape['d_model']}; {self.config['tokens']} tokens in {self.config['sequences']} sequences; subspaces "
            f"from {source}; ranks {ranks}, shown {self.config['shown_rank']}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return summary_table(self)

    def _headline(self) -> list[str]:
        return headline(self)

    def _report(self) -> Report:
        return trajectory_report(self)

    @classmethod
    def from_store(cls, store: str | Path) -> TrajectoryAnalysis:
        """The analysis of everything that a store holds, without any model; also while a run still writes to it.

        Raises:
            ValueError: no store of a trajectory there, or one without a finished checkpoint.
            DamagedFile: a file that is not as it was written.

        Example:
            >>> from tl_asymmetry import analyze_trajectory
            >>> from tl_asymmetry.demo import demo_model, demo_texts
            >>> run = {step: demo_model(f"step{step}") for step in (0, 50)}
            >>> first = analyze_trajectory(run, demo_texts(9), store="run", ranks=[4], groups=1, progress=False)
            >>> TrajectoryAnalysis.from_store("run").table.equals(first.table)
            True
        """
        reader = StoreReader(store)
        if reader.kind != "trajectory":
            raise ValueError(f"expected the store of a trajectory, got one of {reader.kind!r}; pass another folder")
        if not reader.steps:
            raise ValueError(f"expected a finished checkpoint in {str(store)!r}, got none; run the analysis first")
        return cls.assemble(
            reader, reader.steps, settings=reader.settings, about=reader.about, notes=reader.about["notes"]
        )

    @classmethod
    def assemble(
        cls,
        store: Parts,
        steps: Sequence[int],
        *,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        notes: Sequence[str],
    ) -> TrajectoryAnalysis:
        """Make the tables of some finished checkpoints, one at a time; their nulls are made here."""
        shape, targets = settings["shape"], settings["targets"]
        layout = Layout(
            d=shape["d_model"],
            n_layers=shape["n_layers"],
            n_heads=shape["n_heads"],
            units={m: ("head" if kind_of(m).heads else None,) * shape["n_layers"] for m in targets},
            targets={matrix: tuple(names) for matrix, names in targets.items()},
            ranks=tuple(settings["ranks"]),
            measured={name: tuple(ranks) for name, ranks in settings["measured"].items()},
        )
        spectra: dict[str, list[Tensor]] = {}

        def checkpoints() -> Iterator[tuple[int, str, Measurements]]:
            for step in steps:
                numbers = store.arrays(step)
                for name, value in numbers.items():
                    if name.startswith("gradients/"):
                        spectra.setdefault(f"gradient_spectrum/{name.partition('/')[2]}", []).append(value)
                for reference in settings["references"]:
                    for matrix in targets:
                        name = f"{matrix}/{reference}"
                        spectra.setdefault(f"spectrum/{name}", []).append(numbers[f"{reference}/{matrix}/spectrum"])
                    yield step, reference, Measurements.read(layout, numbers, delta=f"{reference}/")

        tables = trajectory_tables(
            checkpoints(), layout, optimizer=settings["optimizer"], few=about["few_tokens"], seed=settings["seed"]
        )
        start = settings["start"]
        entries = [
            {
                "step": start["step"],
                "name": about["name"],
                "weights_xxh3": start["weights_xxh3"],
                "previous_step": pd.NA,
            },
            *({"step": step, **_listed(store.entry(step))} for step in steps),
        ]
        config = {
            "arguments": about["arguments"],
            "versions": about["versions"],
            "model": about["model"],
            "steps": [start["step"], *steps],
            **{name: value for name, value in settings.items() if name != "start"},
            "shown_rank": _shown_rank(tables.curves, about["shown_rank"]),
            "intervals": about["intervals"],
            "tokens": about["tokens"],
            "tokens_xxh3": settings["tokens"],
            "sequences": about["sequences"],
        }
        told = Notes()
        for line in elsewhere(tables.table):
            told.warn(line)
        return cls(
            table=tables.table,
            asymmetry=tables.asymmetry,
            curves=tables.curves,
            checkpoints=pd.DataFrame(entries).astype({"previous_step": "Int64"}),
            config=config,
            notes=(*notes, *told.lines),
            arrays={"steps": torch.tensor(list(steps)), **{name: torch.stack(held) for name, held in spectra.items()}},
        )


def _shown_rank(curves: pd.DataFrame, planned: int) -> int:
    """The rank nearest to the planned one that no matrix and subspace lacks more often than others."""
    there = curves["rank"].value_counts()
    return int(min(there.index[there == there.max()], key=lambda k: (abs(k - planned), k), default=planned))


def _listed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": entry["name"], "weights_xxh3": entry["weights_xxh3"], "previous_step": entry["previous"][0]}
