"""Cost of one step of `RollingSVD` against an SVD of the window and against its whole Gram matrix anew.

    python benchmarks/rolling_svd.py           # prints the table, writes benchmarks/results/rolling_svd.json

Times are medians of interleaved rounds in one process, compared as ratios. "gram" is the fairest rival: all products of
the window at the same precision (float64 accumulation of float32 rows), in one matrix product; "gram float32" gives
that precision up. A step of ours takes in a row and decomposes the Gram matrix; the right vectors, made on demand,
are timed apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from tl_asymmetry.geometry import RollingSVD

WINDOW, RANK = 32, 3
RESULTS = Path(__file__).parent / "results"
BOUNDS = {"svd": 10.0, "gram": 3.0}


def measure(size: int, rounds: int, with_svd: bool) -> dict[str, dict[str, float]]:
    """Seconds a step, by method; the median, and the quotient by ours."""
    generator = torch.Generator().manual_seed(0)
    ours = RollingSVD(WINDOW, RANK)
    window = torch.randn(WINDOW, size, generator=generator)
    for row in window:
        ours.update(row)
    state = {"at": 0}

    def step() -> None:
        ours.update(window[state["at"] % WINDOW])
        _ = ours.singular_values
        state["at"] += 1

    def gram(dtype: torch.dtype) -> None:
        total = torch.zeros(WINDOW, WINDOW, dtype=dtype)
        for columns in window.split(1 << 14, 1):
            wide = columns.to(dtype)
            total += wide @ wide.mT
        torch.linalg.eigh(total.double())

    runs: dict[str, Callable[[], object]] = {
        "ours": step,
        "right vectors": lambda: ours.right_singular_vectors,
        "gram": lambda: gram(torch.float64),
        "gram float32": lambda: gram(torch.float32),
    }
    if with_svd:
        runs["svd"] = lambda: torch.linalg.svd(window, full_matrices=False)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(times[1:]),
            "ratio": statistics.median(t / o for t, o in zip(times[1:], seconds["ours"][1:], strict=True)),
        }
        for name, times in seconds.items()
    }


def drift(steps: int) -> float:
    """Largest error of a singular value over a long stream, relative to the largest one, against a float64 SVD."""
    generator = torch.Generator().manual_seed(1)
    svd, rows, worst = RollingSVD(WINDOW, RANK), [], 0.0
    row = torch.randn(2000, generator=generator)
    for _ in range(steps):
        row = 0.95 * row + 0.1 * torch.randn(2000, generator=generator)
        rows = [*rows[-WINDOW + 1 :], row]
        svd.update(row)
        σ = torch.linalg.svdvals(torch.stack(rows).double())
        k = min(RANK, len(rows))
        worst = max(worst, ((svd.singular_values - σ[:k]).abs().max() / σ[0]).item())
    return worst


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", type=int, nargs="+", default=[131_072, 1_000_000])
    options = parser.parse_args()
    sizes = {size: measure(size, options.rounds, with_svd=True) for size in options.parameters}
    error = drift(1000)
    for size, methods in sizes.items():
        sys.stdout.write(f"{size} parameters, window {WINDOW}\n")
        for name, found in methods.items():
            bound = f"(at least {BOUNDS[name]:g})" if name in BOUNDS and size == 1_000_000 else ""
            sys.stdout.write(f"  {name:14s} {found['seconds'] * 1e3:9.2f} ms  {found['ratio']:7.2f} × {bound}\n")
    sys.stdout.write(f"largest error over 1000 steps: {error:.1e} of the first singular value\n")
    document = {
        "device": f"{torch.get_num_threads()}-core CPU",
        "versions": {package: version(package) for package in ("torch", "tl-asymmetry")},
        "window": WINDOW,
        "rank": RANK,
        "rounds": options.rounds,
        "sizes": sizes,
        "bounds": BOUNDS,
        "largest_relative_error": error,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rolling_svd.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
