"""Grokking runs trained together, gradients in one batched pass, against the same runs one after another.

    python benchmarks/lockstep.py                  # prints the table, writes benchmarks/results/lockstep-<device>.json
    python benchmarks/lockstep.py --device cuda

The published model, batch and optimiser, evaluations left out. Seconds for a step of one run, medians of interleaved
rounds in one process; "gain" is how many times faster together is. No bound: on a GPU launches cost more than
arithmetic and it should pay, on a CPU there is nothing to gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from tl_asymmetry.grokking import ModularArithmetic, Recipe
from tl_asymmetry.training.grok_loop import GrokLoop
from tl_asymmetry.training.lockstep import run_together

RESULTS = Path(__file__).parent / "results"


def loops(count: int, steps: int, device: str) -> list[GrokLoop]:
    """Runs of several seeds that differ in nothing else, their first evaluation made."""
    recipe = Recipe(steps=steps, every=steps + 1)
    made = [
        GrokLoop(ModularArithmetic("add", seed=s), seed=s, recipe=recipe, keep_checkpoints=False, device=device)
        for s in range(count)
    ]
    for loop in made:
        loop.begin()
    return made


def seconds(count: int, steps: int, device: str, *, together: bool) -> float:
    """Per run and step; the one evaluation at the end is the same for both."""
    made = loops(count, steps, device)
    start = time.perf_counter()
    if together:
        run_together(made)
    else:
        for loop in made:
            loop.run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / (count * steps)


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, nargs="+", default=[3, 21])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds(2, 5, options.device, together=True)  # warm-up
    found = []
    for count in options.runs:
        rounds = [
            {name: seconds(count, options.steps, options.device, together=name == "together") for name in
             ("apart", "together")}
            for _ in range(options.rounds)
        ]  # fmt: skip
        row = {"runs": count, **{name: statistics.median(r[name] for r in rounds) for name in rounds[0]}}
        found.append(row | {"gain": statistics.median(r["apart"] / r["together"] for r in rounds)})
        sys.stdout.write(
            f"{count:3d} runs: {row['apart'] * 1e3:.2f} ms a step apart, {row['together'] * 1e3:.2f} ms together, "
            f"gain {found[-1]['gain']:.2f} ×\n"
        )
    on_gpu = options.device != "cpu"
    document = {
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()}-thread CPU",
        "versions": {package: version(package) for package in ("torch", "tl-asymmetry")},
        "steps": options.steps,
        "rounds": options.rounds,
        "rows": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"lockstep-{options.device}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
