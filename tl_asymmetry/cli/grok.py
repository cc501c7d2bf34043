"""`tl-asymmetry grok`: train on modular arithmetic and hold training directions against centroids."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.options import as_path

if TYPE_CHECKING:
    from tl_asymmetry.coupling.result import CouplingStudy


def add_grok(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser, without what it runs."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "grok", help="train on modular arithmetic; directions against centroids, offline"
    )
    parser.add_argument("--op", choices=("add", "sub", "mul", "sq"), default="add", help="the operation")
    parser.add_argument("--p", type=int, default=97, help="the modulus")
    parser.add_argument("--seed", type=int, default=42, help="of split, weights and batches")
    parser.add_argument("--quick", action="store_true", help="fewer checkpoints, probes and random "
                        "directions: about 4 minutes of one processor")  # fmt: skip
    parser.add_argument("--steps", type=int, help="train no longer than this (default 8000)")
    parser.add_argument(
        "--out", type=as_path, default=Path("tl-asymmetry-grok"), help="folder for run, result and report"
    )
    return parser


def run_grok(options: argparse.Namespace) -> CouplingStudy:
    """Train, or go on with the run in the folder, and measure it."""
    from tl_asymmetry.coupling.analysis import direction_coupling
    from tl_asymmetry.coupling.trajectories import GrokTrajectory
    from tl_asymmetry.grokking import Recipe, train

    recipe = Recipe() if options.steps is None else Recipe(steps=options.steps)
    run = train(options.op, p=options.p, seed=options.seed, recipe=recipe, store=options.out / "run", progress=True)
    source = GrokTrajectory(run, probes=512 if options.quick else 1024)
    effort: dict[str, Any] = {"checkpoints": 12, "draws": 10} if options.quick else {}
    return direction_coupling(source, progress=True, **effort)
