"""The part of the command line about stages: arguments of `tl-asymmetry stages`, and what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.options import as_path, named_model

if TYPE_CHECKING:
    from tl_asymmetry.stages.result import StageAnalysis


def add_stages(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "stages", help="a chain of training stages: what each did to the weights, and what became of it"
    )
    parser.add_argument(
        "stages", metavar="NAME=MODEL", nargs="+",
        help="in order of training: a name and a hub name, Hugging Face directory, .safetensors file or LoRA adapter",
    )  # fmt: skip
    parser.add_argument("--out", type=as_path, default=Path("tl-asymmetry-stages"), help="folder for result and report")
    parser.add_argument("--matrices", nargs="+", help="which; all unless given")
    parser.add_argument("--rank", type=int, default=4, help="how many leading directions are compared")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated storage noise")
    return parser


def run_stages(options: argparse.Namespace) -> StageAnalysis:
    """The ledger of models in files, one matrix at a time.

    Raises:
        ValueError: a stage without a name, two of one name, what `analyze_stages` refuses.
    """
    from tl_asymmetry import analyze_stages

    stages: dict[str, str] = {}
    for said in options.stages:
        name, model = named_model(said, "stages as NAME=MODEL, each name once", "base=DIR dpo=DIR", taken=stages)
        stages[name] = model
    return analyze_stages(stages, matrices=options.matrices, rank=options.rank, seed=options.seed)
