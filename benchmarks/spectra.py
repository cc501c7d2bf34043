"""Cost of `analyze_spectra` on one matrix against the bare float32 SVD of the base's, and its peak memory.

    python benchmarks/spectra.py            # prints the table, writes benchmarks/results/spectra-cpu.json

A bf16 pair of 1024 × 4096, ranks 1, 4, 16, 64, one thread; processor seconds of interleaved rounds, compared as a
ratio. Memory is measured once, on 2048 × 8192 (the largest matrix of a model of 1B parameters), with both weights held.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import memory_meter, table
from tl_asymmetry.spectra.matrix import matrix_rows

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 4, 16, 64)
MATRIX = "W_in"
RATIO, GIGABYTES = 1.5, 2.0


class OneMatrix:
    """Weights that have one matrix."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def weight(self, layer: int, matrix: str) -> Tensor:
        """The matrix, in float32 as a reader gives it."""
        return self._weight


def pair(rows: int, columns: int) -> tuple[Any, Any]:
    """A base and an aligned weight, both exactly bf16."""
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(rows, columns, generator=generator)
    other = W + 2e-4 * torch.randn(rows, columns, generator=generator)
    return OneMatrix(W.bfloat16().float()), OneMatrix(other.bfloat16().float())


def spectra(base: Any, aligned: Any) -> None:
    """What `analyze_spectra` does for one matrix."""
    list(matrix_rows(base, aligned, 0, MATRIX, RANKS, seed=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"svd": [], "ours": []}
    base, aligned = pair(1024, 4096)
    for _ in range(options.rounds):
        for name, call in (
            ("svd", lambda: torch.linalg.svd(base.weight(0, MATRIX), full_matrices=False)),
            ("ours", lambda: spectra(base, aligned)),
        ):
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    base, aligned = pair(2048, 8192)
    reset, peak = memory_meter("cpu")
    before = reset()
    spectra(base, aligned)
    held = (peak() - before) / 2**30
    ratios = [ours / svd for ours, svd in zip(seconds["ours"], seconds["svd"], strict=True)]
    rows = table(
        [
            ("bare SVD, s", statistics.median(seconds["svd"]), "", None),
            ("spectra, s", statistics.median(seconds["ours"]), "", None),
            ("spectra over SVD", statistics.median(ratios), "<=", RATIO),
            ("peak beside both weights, GiB", held, "<=", GIGABYTES),
        ]
    )
    found = {"torch": version("torch"), "rounds": options.rounds, "seconds": seconds, "table": rows}
    (RESULTS / "spectra-cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
