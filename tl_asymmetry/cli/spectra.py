"""The part of the command line about spectra: arguments of `tl-asymmetry spectra`, and what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.options import as_model, as_path

if TYPE_CHECKING:
    from tl_asymmetry.spectra.result import SpectralAnalysis


def add_spectra(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "spectra", help="weights alone: the change in the base's own singular frame"
    )
    parser.add_argument("base", metavar="BASE", type=as_model, help="hub name or local folder; read, not loaded")
    parser.add_argument(
        "aligned", metavar="ALIGNED", type=as_model, help="the same, a .safetensors file or a LoRA adapter"
    )
    parser.add_argument(
        "--out", type=as_path, default=Path("tl-asymmetry-spectra"), help="folder for result and report"
    )
    parser.add_argument("--matrices", nargs="+", help="which; all unless given")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of leading singular vectors")
    parser.add_argument("--seed", type=int, default=0, help="of the deltas at random orientation")
    return parser


def run_spectra(options: argparse.Namespace) -> SpectralAnalysis:
    """The analysis of two models in files, one matrix at a time.

    Raises:
        ValueError: what `analyze_spectra` refuses.
    """
    from tl_asymmetry import analyze_spectra

    return analyze_spectra(
        options.base, options.aligned, matrices=options.matrices, ranks=options.ranks, seed=options.seed
    )
