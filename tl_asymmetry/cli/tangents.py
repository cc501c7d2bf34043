"""The part of the command line about tangents: arguments of `tl-asymmetry tangents`, and what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.options import as_path

if TYPE_CHECKING:
    from tl_asymmetry.tangents.result import TangentAnalysis


def add_tangents(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tangents", help="early directions of activations against true gradients"
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="*", type=as_path, help="directories like checkpoint-500"
    )
    parser.add_argument("--demo", action="store_true", help="the embedded run's five checkpoints, offline")
    parser.add_argument("--texts", type=as_path, help="as for analyze")
    parser.add_argument(
        "--out",
        type=as_path,
        default=Path("tl-asymmetry-tangents"),
        help="folder for the result and the report",
    )
    parser.add_argument("--rank", type=int, nargs="+", default=16, help="ranks of the bases; 16 unless given")
    parser.add_argument(
        "--method", nargs="+", choices=["pca", "semi_nmf"], default="pca", help="how bases are fitted; pca unless given"
    )
    return parser


def run_tangents(options: argparse.Namespace, texts: list[Any] | None) -> TangentAnalysis:
    """The analysis of the directories given, or of the embedded run.

    Raises:
        ValueError: both or neither asked for, or what `analyze_tangents` refuses.
    """
    from tl_asymmetry import analyze_tangents

    if options.demo == bool(options.checkpoints):
        raise ValueError("expected checkpoint directories or --demo, got both or neither; pass one of the two")
    checkpoints: Any = options.checkpoints
    if options.demo:
        from tl_asymmetry.demo import demo_run, demo_texts

        checkpoints, texts = demo_run(), demo_texts(seed=0) if texts is None else texts
    return analyze_tangents(checkpoints, texts, rank=options.rank, method=options.method)
