"""The tables of arXiv:2604.25143 beside ours: couplings of directions with centroids, and the interventions.

    python benchmarks/reproduce_grokking.py --quick          # one operation, one seed, a few minutes
    python benchmarks/reproduce_grokking.py --cache FOLDER   # everything, part by part; interrupt and go on at will
    python benchmarks/reproduce_grokking.py --missing        # only what the JSON still lists under "missing"
    python benchmarks/reproduce_grokking.py --parts three-42-control

Every training run lives in a subfolder of the cache and continues from its last evaluation; every study of a run is
kept there too. After each part `benchmarks/results/grokking.json` is written anew: from what is finished in the cache,
and for parts that the cache does not have from the JSON itself; parts that are in neither are listed under "missing".
Nothing is tuned: seeds, split, weights and batches are those of the author's
code, with three deviations that are named in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_asymmetry import CouplingStudy, direction_coupling
from tl_asymmetry.coupling.result import STREAM
from tl_asymmetry.grokking import PUBLISHED_ARMS, GrokRun, ModularArithmetic, run_of
from tl_asymmetry.grokking.loop import GrokLoop, Recipe
from tl_asymmetry.results.provenance import versions
from tl_asymmetry.store import StoreReader

RESULTS = Path(__file__).parent / "results"
SEEDS = (42, 137, 2024)
OPS = ("add", "sub", "mul", "sq")
TASKS: dict[str, tuple[str, ...]] = {"all": OPS, "three": ("add", "mul", "sq")}
TRIO = Recipe(steps=24_000, every=100, stop_count=3)
"""As the author's code for arXiv:2602.18523 trains three operations, which goes on for up to 300,000 steps."""
SPACING = 200
"""Steps between the checkpoints that code keeps. The updates' window of 20 then spans 4,000 steps instead of 500."""
ARMS: dict[str, Any] = {
    **PUBLISHED_ARMS,
    "noise": {"arm": "noise", "space": "rolling"},
    "keep-rolling-raw": {"arm": "keep", "space": "rolling", "buffer": "raw"},
    "keep-rolling-update": {"arm": "keep", "space": "rolling", "target": "update"},
}
SAID = ("objective", "alignment", "mean_ratio", "step", "second_half", "last")
PUBLISHED = {
    "update, single task, peak mean ratio": "3 to 9",
    "gradient, single task, peak mean ratio": "100 to 330 (4 operations × 3 seeds)",
    "gradient, add, seed 42, peak ratio 1": {"1": 648, "20": 212, "40": 140},
    "update, multitask, peak mean ratio": "at most 1",
    "gradient, multitask, peak mean ratio": {"add": 31.5, "sub": 44.9, "mul": 23.8, "sq": 21.8},
    "step of the 20th evaluation of 0.98, add, mean of 3 seeds": {
        "control": 3358, "remove-rolling": 3300, "keep-rolling": 1525, "remove-random": 3358, "keep-random": 1425,
        "zeroed": None, "frozen": None,
    },
}  # fmt: skip
DEVIATIONS = [
    "R is computed from the exact mixed derivative; the published finite difference stands beside it where measured",
    "one set of probes (seed 100 of the author's draw) serves updates and gradients; the author's update study uses "
    "seed 0",
    "random directions come from torch's generator, not NumPy's: other draws of the same distribution",
    "multitask: the recipe of the published four operations (all) is not public; one table of nonzero pairs, one "
    "batch for all heads, summed cross-entropies, stopping when all operations count. Beside them the three (add, mul, "
    "sq) of arXiv:2602.18523, whose code is public: evaluated every 100 steps, stopping at the third evaluation of "
    "0.98 of all (the author's: at the third in a row of each), after 24000 steps at most (the author's: 300000)",
]


@dataclass(frozen=True)
class Part:
    """A training run, and whether its couplings are studied."""

    op: str
    seed: int
    arm: str = "control"

    @property
    def name(self) -> str:
        return f"{self.op}-{self.seed}-{self.arm}"

    @property
    def studied(self) -> bool:
        return self.arm == "control"

    @property
    def recipe(self) -> Recipe:
        return TRIO if self.op == "three" else Recipe()

    def loop(self, cache: Path) -> GrokLoop:
        ops = TASKS.get(self.op, self.op)
        return GrokLoop(
            ModularArithmetic(ops, seed=self.seed), seed=self.seed, projection=ARMS[self.arm],
            recipe=self.recipe,
            keep_checkpoints=self.studied, store=cache / self.name,
        )  # fmt: skip


def plan() -> Iterator[Part]:
    """Parts, the most telling first."""
    short = ("keep-rolling", "keep-random", "zeroed", "frozen")
    for seed in SEEDS:
        yield Part("add", seed)
        for arm in short:
            yield Part("add", seed, arm)
    for op in OPS[1:]:
        yield Part(op, SEEDS[0])
    yield Part("add", SEEDS[0], "remove-rolling")
    yield Part("add", SEEDS[0], "remove-random")
    yield Part("all", SEEDS[0])
    for seed in SEEDS[1:]:
        yield Part("add", seed, "remove-rolling")
        yield Part("add", seed, "remove-random")
    yield Part("three", SEEDS[0])
    for seed in SEEDS[1:]:
        for op in OPS[1:]:
            yield Part(op, seed)
    for arm in ("noise", "keep-rolling-raw", "keep-rolling-update"):
        yield Part("add", SEEDS[0], arm)
    for seed in SEEDS[1:]:
        yield Part("all", seed)


def train_part(part: Part, cache: Path) -> GrokRun:
    """The finished run, continued if need be."""
    loop = part.loop(cache)
    first, start = loop.progress.step, time.perf_counter()
    loop.run()
    seconds = time.perf_counter() - start
    if loop.progress.step > first:
        with (cache / "times.jsonl").open("a") as log:
            log.write(json.dumps({"part": part.name, "steps": loop.progress.step - first, "seconds": seconds}) + "\n")
    return run_of(loop, seconds=seconds, first=first)


def study_part(part: Part, run: GrokRun, cache: Path, checkpoints: int) -> CouplingStudy:
    """Couplings of a control run, from the cache if they are there; the window sweep for the first one."""
    folder = cache / part.name / f"study-{checkpoints}"
    if (folder / "result.safetensors").is_file():
        return CouplingStudy.load(folder)
    first = part == Part("add", SEEDS[0])
    study = direction_coupling(
        run, windows=(20, 1, 40) if first else (20,), alignments=("backward", "forward"), checkpoints=checkpoints,
    )  # fmt: skip
    study.save(folder)
    return study


def sparse_study(part: Part, run: GrokRun, cache: Path, checkpoints: int) -> CouplingStudy:
    """Couplings of the updates between checkpoints `SPACING` steps apart."""
    folder = cache / part.name / f"sparse-{checkpoints}"
    if (folder / "result.safetensors").is_file():
        return CouplingStudy.load(folder)
    kept = [i for i, step in enumerate(run.steps) if step % SPACING == 0]
    thinned = replace(run, arrays={name: values[kept] for name, values in run.arrays.items()})
    study = direction_coupling(
        thinned, estimators=("update",), windows=(20,), alignments=("backward", "forward"), checkpoints=checkpoints
    )
    study.save(folder)
    return study


def published_method(part: Part, run: GrokRun, cache: Path, checkpoints: int) -> CouplingStudy:
    """As published throughout: finite differences and forward windows."""
    folder = cache / part.name / f"published-{checkpoints}"
    if (folder / "result.safetensors").is_file():
        return CouplingStudy.load(folder)
    study = direction_coupling(
        run, windows=(20,), alignments=("forward",), checkpoints=checkpoints, method="finite_difference"
    )
    study.save(folder)
    return study


def document(cache: Path, checkpoints: int) -> dict[str, Any]:
    """Everything finished so far, the paper's column beside ours."""
    earlier = published_results()
    runs, studies, missing = [], [], []
    for part in plan():
        kept = cache / part.name
        record = StoreReader(kept).entry("state") if (kept / "store.json").is_file() else {"finished": False}
        before = [run for run in earlier["runs"] if run["part"] == part.name]
        if not record["finished"] and before:
            runs += before
            studies += [study for study in earlier["studies"] if study["part"] == part.name]
            continue
        if not record["finished"]:
            reached = f", at step {record['step']}" if "step" in record else ""
            missing.append(f"training {part.name}{reached}")
            continue
        run = GrokRun(table=pd.DataFrame(record["rows"]), config={"step": record["step"]}, notes=(), arrays={})
        runs.append(
            {"part": part.name, "op": part.op, "seed": part.seed, "arm": part.arm, "steps": run.config["step"],
             "first_98": run.grok_step(count=1), "twentieth_98": run.grok_step(),
             "last_test_accuracy": run.table.groupby("op", sort=False)["test_accuracy"].last().to_dict()}
        )  # fmt: skip
        for kind in ("study", "sparse", "published") if part.studied else ():
            folder = cache / part.name / f"{kind}-{checkpoints}"
            if (folder / "result.safetensors").is_file():
                study = CouplingStudy.load(folder)
                studies.append(
                    {"part": part.name, "method": study.config["arguments"]["method"],
                     "spacing": SPACING if kind == "sparse" else part.recipe.every,
                     "checkpoints": int(study.table["step"].nunique()), "peaks": later(study).to_dict("records")}
                )  # fmt: skip
            elif kind == "study" or (kind == "published" and part == Part("add", SEEDS[0])):
                missing.append(f"{kind} {part.name}")
    return {
        "paper": "arXiv:2604.25143",
        "published": PUBLISHED,
        "ours": _ours(runs, studies),
        "deviations": DEVIATIONS,
        "missing": missing,
        "runs": runs,
        "studies": studies,
        "device": f"{torch.get_num_threads()}-thread CPU",
        "versions": versions(),
        "checkpoints_studied": checkpoints,
        "training_times": [*(t for t in earlier["training_times"] if not (cache / t["part"]).is_dir()), *_times(cache)],
    }


def later(study: CouplingStudy) -> pd.DataFrame:
    """The peaks, with the largest R̄ of the run's second half and the last one beside them."""
    means = study.mean_ratios
    second = means[means["step"] > means["step"].max() / 2].groupby(STREAM, sort=False)["mean_ratio"]
    beside = pd.DataFrame({"second_half": second.max(), "last": second.last()}).reset_index()
    return study.peaks.merge(beside, on=STREAM)


def published_results() -> dict[str, Any]:
    """What the committed JSON holds."""
    found: dict[str, Any] = json.loads((RESULTS / "grokking.json").read_text())
    return found


def _ours(runs: list[dict[str, Any]], studies: list[dict[str, Any]]) -> dict[str, Any]:
    """The paper's quantities from our runs, by alignment of the window; single values, no selection."""
    exact = [s for s in studies if s["method"] == "exact" and s["spacing"] != SPACING]

    def peaks(estimator: str, multitask: bool, window: int, column: str, only: str | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for study in exact:
            if (study["part"].split("-")[0] in TASKS) is not multitask or (only and study["part"] != only):
                continue
            for peak in study["peaks"]:
                if peak["estimator"] == estimator and peak["window"] == window:
                    key = f"{study['part'].removesuffix('-control')}{'/' + peak['objective'] if multitask else ''}"
                    found.setdefault(peak["alignment"], {})[key] = round(peak[column], 2)
        return found

    steps: dict[str, Any] = {}
    for name in PUBLISHED_ARMS:
        arm = {str(r["seed"]): r["twentieth_98"] for r in runs if r["op"] == "add" and r["arm"] == name}
        first = {str(r["seed"]): r["first_98"] for r in runs if r["op"] == "add" and r["arm"] == name}
        done = [s for s in arm.values() if s is not None]
        steps[name] = {
            "by seed": arm, "first 0.98 by seed": first, "seeds": len(done),
            "mean": round(sum(done) / len(done), 1) if done else None,
        }  # fmt: skip
    sweep = {str(w): peaks("gradient", False, w, "ratio_1", f"add-{SEEDS[0]}-control") for w in (1, 20, 40)}
    finite = [s for s in studies if s["method"] == "finite_difference"]
    apart = [
        {"part": study["part"], "spacing": study["spacing"]} | {name: peak[name] for name in SAID}
        for study in studies for peak in study["peaks"]
        if study["part"].split("-")[0] in TASKS and peak["estimator"] == "update" and "last" in peak
    ]  # fmt: skip
    return {
        "update, single task, peak mean ratio": peaks("update", False, 20, "mean_ratio"),
        "gradient, single task, peak mean ratio": peaks("gradient", False, 20, "mean_ratio"),
        "gradient, add, seed 42, peak ratio 1": sweep,
        "update, multitask, peak mean ratio": peaks("update", True, 20, "mean_ratio"),
        "update, multitask, by steps between checkpoints": apart,
        "gradient, multitask, peak mean ratio": peaks("gradient", True, 20, "mean_ratio"),
        "as published (finite difference, forward window)": {s["part"]: s["peaks"] for s in finite},
        "step of the 20th evaluation of 0.98, add, mean of 3 seeds": steps,
    }


def _times(cache: Path) -> list[dict[str, Any]]:
    log = cache / "times.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def write(target: Path, content: dict[str, Any]) -> None:
    """Replace the JSON in one step."""
    target.parent.mkdir(exist_ok=True)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, default=float) + "\n")
    os.replace(part, target)


def main() -> None:
    """Train, study, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("grokking-cache"), help="where runs live")
    parser.add_argument("--quick", action="store_true", help="add, seed 42, control alone; 12 checkpoints")
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--train-only", action="store_true", help="leave the studies for later")
    parser.add_argument("--missing", action="store_true", help="only what the JSON still lists as missing")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these, in the order of the plan")
    parser.add_argument("--write-only", action="store_true", help="write the JSON from what is there")
    options = parser.parse_args()
    checkpoints = 12 if options.quick else options.checkpoints
    parts = [Part("add", SEEDS[0])] if options.quick else list(plan())
    if options.missing:
        have = {run["part"] for run in published_results()["runs"]}
        parts = [part for part in parts if part.name not in have]
    if options.parts:
        parts = [part for part in parts if part.name in options.parts]
    target = (options.cache if options.quick else RESULTS) / "grokking.json"
    for part in [] if options.write_only else parts:
        options.cache.mkdir(parents=True, exist_ok=True)
        run = train_part(part, options.cache)
        sys.stdout.write(f"{part.name}: 0.98 at {run.grok_step(count=1)}, for the 20th time at {run.grok_step()}\n")
        if part.studied and not options.train_only:
            study = study_part(part, run, options.cache, checkpoints)
            sys.stdout.write(later(study).to_string(index=False) + "\n")
            write(target, document(options.cache, checkpoints))
            if part.op in TASKS:
                sys.stdout.write(
                    later(sparse_study(part, run, options.cache, checkpoints)).to_string(index=False) + "\n"
                )
            if part == Part("add", SEEDS[0]) and not options.quick:
                published_method(part, run, options.cache, checkpoints)
        sys.stdout.flush()
        write(target, document(options.cache, checkpoints))
    content = document(options.cache, checkpoints)
    write(target, content)
    sys.stdout.write(json.dumps({"published": content["published"], "ours": content["ours"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
