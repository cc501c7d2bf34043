"""The part of the command line about many weight changes: arguments of `tl-asymmetry deltas`, and what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.options import as_model, as_path, named_model

if TYPE_CHECKING:
    from tl_asymmetry.comparison.deltas_result import DeltaComparison


def add_deltas(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "deltas", help="many weight changes of one base: which trainings made the same change"
    )
    parser.add_argument("base", metavar="BASE", type=as_model, help="hub name or local folder; read, not loaded")
    parser.add_argument(
        "models", metavar="NAME=MODEL", nargs="+",
        help="a name and a hub name, Hugging Face directory, .safetensors file or LoRA adapter; a name that is given "
        "again is another run of the same training",
    )  # fmt: skip
    parser.add_argument("--out", type=as_path, default=Path("tl-asymmetry-deltas"), help="folder for result and report")
    parser.add_argument("--matrices", nargs="+", help="which; all unless given")
    parser.add_argument("--rank", type=int, default=4, help="how many leading directions are compared")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of chance and rounding")
    return parser


def run_deltas(options: argparse.Namespace) -> DeltaComparison:
    """The comparison of models in files, one matrix at a time.

    Raises:
        ValueError: a model without a name, what `compare_deltas` refuses.
    """
    from tl_asymmetry import compare_deltas

    runs: dict[str, list[str]] = {}
    for said in options.models:
        name, model = named_model(said, "models as NAME=MODEL", "dpo=DIR kto=DIR")
        runs.setdefault(name, []).append(model)
    shelf = {name: models if len(models) > 1 else models[0] for name, models in runs.items()}
    return compare_deltas(options.base, shelf, matrices=options.matrices, rank=options.rank, seed=options.seed)
