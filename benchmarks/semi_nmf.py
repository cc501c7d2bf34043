"""Semi-NMF against overcomplete's: objective reached, and time to reach the other's.

    python benchmarks/semi_nmf.py [--rows 4096] [--rank 16] [--rounds 3] [--out FILE.json]

Needs `pip install --no-deps overcomplete`. Data: activations of the demonstration model (block output, layer 2), and a
wide random matrix with a mean. Both get one start, one thread, float32, in turns within one process. overcomplete's
multiplicative updates run to their own stop (tol 1e-4 as by default, at most 500 iterations); then ours runs until its
objective is at or below theirs, and the times are compared as a ratio. Timings of a busy machine are ratios at best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overcomplete.optimization import SemiNMF as Overcomplete

from tl_asymmetry import ModelView, semi_nmf
from tl_asymmetry.demo import demo_model, demo_texts
from tl_asymmetry.models.texts import batches, tokenize


def activations(rows: int) -> torch.Tensor:
    view, seen = ModelView(demo_model("base")), []
    sequences = tokenize(view, demo_texts(rows // 40 + 8, seed=0))
    with torch.no_grad():
        for tokens, mask in batches(sequences, 32):
            with view.hooks({("resid_post", 2): lambda x, mask=mask: seen.append(x[mask])}):
                view.run(tokens)
    return torch.cat(seen)[:rows]


def wide(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 256, generator=generator) * torch.arange(1, 257) ** -0.5 + 0.3


def theirs(A: torch.Tensor, rank: int, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    start = time.perf_counter()
    Z, D = Overcomplete(nb_concepts=rank).fit(A, max_iter=500)
    seconds = time.perf_counter() - start
    return objective(A, Z, D), seconds


def ours(A: torch.Tensor, rank: int, seed: int, goal: float) -> tuple[float, float, float, float]:
    """Objective at the goal and time to it, by the shortest run that reaches it; objective and time of a full run."""
    start = time.perf_counter()
    full = semi_nmf(A, rank, seeds=(seed,), tol=1e-5, max_iter=500)
    whole = time.perf_counter() - start
    reached = next((i for i, value in enumerate(full.history) if value <= goal), None)
    if reached is None:
        return float("nan"), float("inf"), full.objective, whole
    start = time.perf_counter()
    short = semi_nmf(A, rank, seeds=(seed,), tol=0.0, max_iter=max(1, reached))
    return objective(A, short.Z, short.D), time.perf_counter() - start, objective(A, full.Z, full.D), whole


def objective(A: torch.Tensor, Z: torch.Tensor, D: torch.Tensor) -> float:
    return (A.double() - Z.double() @ D.double()).square().sum().item()


def compare(A: torch.Tensor, rank: int, rounds: int) -> dict[str, Any]:
    energy = A.double().square().sum().item()
    best = torch.linalg.svdvals(A.double())[rank:].square().sum().item()
    lines = []
    for seed in range(rounds):
        goal, their_seconds = theirs(A, rank, seed)
        at_goal, our_seconds, full, whole = ours(A, rank, seed, goal)
        lines.append(
            {
                "seed": seed,
                "overcomplete_error": goal / energy,
                "overcomplete_seconds": their_seconds,
                "ours_error_at_goal": at_goal / energy,
                "ours_seconds_to_goal": our_seconds,
                "speed_up": their_seconds / our_seconds,
                "ours_error": full / energy,
                "ours_seconds": whole,
            }
        )
    return {
        "rows": len(A),
        "d": A.shape[1],
        "rank": rank,
        "truncated_svd_error": best / energy,
        "median_speed_up_to_goal": statistics.median(line["speed_up"] for line in lines),
        "never_worse": all(line["ours_error"] <= line["overcomplete_error"] for line in lines),
        "rounds": lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[int], torch.Tensor]] = {"activations": activations, "wide": wide}
    found = {name: compare(make(options.rows), options.rank, options.rounds) for name, make in makers.items()}
    text = json.dumps({"torch": torch.__version__, "threads": 1, **found}, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
