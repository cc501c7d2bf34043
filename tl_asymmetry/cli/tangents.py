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
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="ranks of the bases")
    parser.add_argument(
        "--method", nargs="+", choices=["pca", "semi_nmf"], default=["pca"], help="how bases are fitted"
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each tiny model (--demo)")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (--demo)")
    return parser


def run_tangents(options: argparse.Namespace, texts: list[Any] | None) -> TangentAnalysis | str:
    """The analysis of the directories given, or the tables of the tiny models as text.

    Raises:
        ValueError: both or neither asked for, or what `analyze_tangents` refuses.
    """
    if options.demo == bool(options.checkpoints):
        raise ValueError("expected checkpoint directories or --demo, got both or neither; pass one of the two")
    if options.demo:
        return _demo(options)
    from tl_asymmetry.tangents.analysis import analyze_tangents

    return analyze_tangents(options.checkpoints, texts, rank=options.rank, method=options.method)


def _demo(options: argparse.Namespace) -> str:
    from tl_asymmetry.demo.tangents import tangent_study
    from tl_asymmetry.tangents.replication import (
        replication_claims,
        replication_frequency,
        replication_strata,
        replication_table,
    )

    runs = tangent_study(options.seeds, folder=options.out, workers=options.workers)
    tables = (
        (f"Energy and anisotropy, means over {options.seeds} seeds", replication_table(runs), "table.csv"),
        ("Late checkpoints by token frequency (1 = rarest fifth)", replication_strata(runs), "strata.csv"),
        ("Log-frequency and distance to the centroid, last step", replication_frequency(runs), "frequency.csv"),
    )
    lines = []
    for title, table, name in tables:
        table.to_csv(options.out / name, index=False)
        lines += [title, table.to_string(index=False, float_format="{:.3g}".format), ""]
    return "\n".join([*lines, *replication_claims(runs), "", f"results and reports: {options.out}", ""])
