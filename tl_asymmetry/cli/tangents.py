"""The part of the command line about tangents: arguments of `tl-asymmetry tangents`, and what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tl_asymmetry.tangents.result import TangentAnalysis


def add_tangents(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tangents", help="early directions of activations against true gradients"
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="*", type=Path, help="directories like checkpoint-500"
    )
    parser.add_argument("--demo", action="store_true", help="train tiny models offline and analyse these")
    parser.add_argument("--texts", type=Path, help="as for analyze")
    parser.add_argument(
        "--out", type=Path, default=Path("tl-asymmetry-tangents"), help="folder for results and reports"
    )
    parser.add_argument("--rank", type=int, nargs="+", help="ranks of the bases; 16 unless given")
    parser.add_argument(
        "--method", nargs="+", choices=["pca", "semi_nmf"], help="how bases are fitted; pca unless given"
    )
    parser.add_argument("--seeds", type=int, help="trainings of each tiny model (with --demo); 5 unless given")
    parser.add_argument("--workers", type=int, help="processes side by side (with --demo); 2 unless given")
    return parser


def run_tangents(options: argparse.Namespace, texts: list[Any] | None) -> TangentAnalysis | str:
    """The analysis of the directories given, or the tables of the tiny models as text.

    Raises:
        ValueError: both or neither asked for, or what `analyze_tangents` refuses.
    """
    if options.demo == bool(options.checkpoints):
        raise ValueError("expected checkpoint directories or --demo, got both or neither; pass one of the two")
    others = ("texts", "rank", "method") if options.demo else ("seeds", "workers")
    misplaced = [f"--{name}" for name in others if getattr(options, name) is not None]
    if misplaced:
        raise ValueError(
            f"expected {', '.join(misplaced)} {'without' if options.demo else 'with'} --demo alone, got the contrary; "
            "leave it out"
        )
    if options.demo:
        return _demo(options)
    from tl_asymmetry.tangents.analysis import analyze_tangents

    return analyze_tangents(options.checkpoints, texts, rank=options.rank or 16, method=options.method or "pca")


def _demo(options: argparse.Namespace) -> str:
    from tl_asymmetry.demo.tangents import tangent_study
    from tl_asymmetry.tangents.replication import (
        replication_claims,
        replication_frequency,
        replication_strata,
        replication_table,
    )

    seeds = 5 if options.seeds is None else options.seeds
    runs = tangent_study(seeds, folder=options.out, workers=2 if options.workers is None else options.workers)
    tables = (
        (f"Energy and anisotropy, means over {seeds} seeds", replication_table(runs), "table.csv"),
        ("Late checkpoints by token frequency (1 = rarest fifth)", replication_strata(runs), "strata.csv"),
        ("Log-frequency and distance to the centroid, last step", replication_frequency(runs), "frequency.csv"),
    )
    lines = []
    for title, table, name in tables:
        table.to_csv(options.out / name, index=False)
        lines += [title, table.to_string(index=False, float_format="{:.3g}".format), ""]
    return "\n".join([*lines, *replication_claims(runs), "", f"results and reports: {options.out}", ""])
