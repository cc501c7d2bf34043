"""What recording costs a training: TrajectoryRecorder at every=100 against the demo model's own training steps.

    python -m benchmarks.recorder              # prints the table, writes benchmarks/results/recorder-cpu.json

The steps are those of `benchmarks.embedded_pair.build`: AdamW on stories, batch 32, gradient clipping. Blocks of 25
steps and recordings alternate in one process, so that others on the machine slow both alike; the overhead is a
recording's time over that of 100 steps (four times the block before it), median over the rounds, by the clock and in
processor time, which others on the machine do not add to. The set-up (texts through the model, bases of the first
checkpoint) and the nulls in `result()` are no part of the loop and listed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

EVERY, BLOCK = 100, 25
RESULTS = Path(__file__).parent / "results"


class Training:
    """The demo's training loop, a few steps at a time."""

    def __init__(self, folder: Path, *, lens: bool) -> None:
        from benchmarks.embedded_pair.build import Recipe, _Build
        from benchmarks.embedded_pair.model import tensors_from_gpt2
        from tl_asymmetry.demo import demo_gpt2, demo_model

        build = _Build(folder, Recipe(), progress=False)
        build._prepare()
        self.batches = build._story_batches("benchmark", build.recipe.base_batch)
        if lens:
            self.model: Any = demo_model("step50").train()
        else:
            self.model = build._trainable(tensors_from_gpt2(build.config, demo_gpt2("step50"))).train()
        self.lens = lens
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95))
        self.step = 0

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of so many optimiser steps, by the clock and of this process."""
        from tl_asymmetry.training.objectives import CrossEntropy

        objective = CrossEntropy()
        start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = objective(self.model, next(self.batches))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            loss.item()
            self.step += 1
        return time.perf_counter() - start[0], time.process_time() - start[1]


def measure(lens: bool, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Medians of one kind of model and one way to record."""
    from tl_asymmetry import TrajectoryRecorder
    from tl_asymmetry.demo import demo_texts, demo_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        training = Training(Path(folder), lens=lens)
        training.run(10)
        start = time.perf_counter()
        recorder = TrajectoryRecorder(
            training.model, EVERY, Path(folder) / "run", demo_texts(200), tokenizer=demo_tokenizer(),
            step=training.step, batch_size=32, **options,
        )  # fmt: skip
        setup = time.perf_counter() - start
        training.run(5)
        recorder.record(training.step)  # the first one sets caches up
        steps, records = [], []
        for _ in range(rounds):
            block = training.run(BLOCK)
            start, processor = time.perf_counter(), time.process_time()
            recorder.record(training.step)
            records.append((time.perf_counter() - start, time.process_time() - processor))
            steps.append((block[0] * EVERY / BLOCK, block[1] * EVERY / BLOCK))
        start = time.perf_counter()
        result = recorder.result()
        nulls = time.perf_counter() - start
        recorder.close()
        parts = (Path(folder) / "run" / "parts").glob("step-*.safetensors")
        size = statistics.mean(part.stat().st_size for part in parts)
    wall, processor = ([r[i] / s[i] for r, s in zip(records, steps, strict=True)] for i in range(2))
    return {
        "model": "TransformerLens model" if lens else "transformers GPT2LMHeadModel",
        "options": {name: str(value) for name, value in options.items()},
        "seconds_per_100_steps": statistics.median(s for s, _ in steps),
        "seconds_per_recording": statistics.median(s for s, _ in records),
        "overhead": statistics.median(wall),
        "worst_overhead": max(wall),
        "processor_overhead": statistics.median(processor),
        "setup_seconds": setup,
        "result_seconds": nulls,
        "recordings": len(result.steps),
        "bytes_per_recording": size,
        "rounds": {"steps": steps, "records": records},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as the demo is built
    rows = []
    for lens, settings in (
        (True, {}),
        (False, {}),
        (True, {"reference": "both"}),
        (True, {"subspaces_from": "each"}),
    ):
        row = measure(lens, settings, options.rounds)
        rows.append(row)
        held = "held" if row["overhead"] <= 0.1 else "MISSED"
        sys.stdout.write(
            f"{row['model']:32} {str(row['options']):32} {row['overhead']:7.2%} of {row['seconds_per_100_steps']:.2f} "
            f"s (worst {row['worst_overhead']:.2%}, processor {row['processor_overhead']:.2%}) <= 10 % {held}; set-up "
            f"{row['setup_seconds']:.2f} s, nulls {row['result_seconds']:.2f} s for {row['recordings']}, "
            f"{row['bytes_per_recording'] / 1e3:.0f} kB each\n"
        )
        sys.stdout.flush()
        document = {
            "every": EVERY,
            "machine": platform.machine(),
            "versions": {package: version(package) for package in ("torch", "transformer-lens", "tl-asymmetry")},
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "recorder-cpu.json").write_text(json.dumps(document, indent=1) + "\n")  # each row as it comes


if __name__ == "__main__":
    main()
