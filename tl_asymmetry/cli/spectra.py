"""The part of the command line about spectra: arguments of `tl-asymmetry spectra`, and what it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tl_asymmetry.spectra.analysis import analyze_spectra
from tl_asymmetry.spectra.result import SpectralAnalysis


def add_spectra(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "spectra", help="weights alone: the change in the base's own singular frame"
    )
    parser.add_argument("base", metavar="BASE", help="hub name or local Hugging Face directory; read, not loaded")
    parser.add_argument("aligned", metavar="ALIGNED", help="the same, or a .safetensors file or a LoRA adapter")
    parser.add_argument("--out", type=Path, default=Path("tl-asymmetry-spectra"), help="folder for result and report")
    parser.add_argument("--matrices", nargs="+", help="which; all unless given")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of leading singular vectors")
    parser.add_argument("--seed", type=int, default=0, help="of the deltas at random orientation")
    return parser


def run_spectra(options: argparse.Namespace) -> SpectralAnalysis:
    """The analysis of two models in files, one matrix at a time.

    Raises:
        ValueError: what `analyze_spectra` refuses.
    """
    return analyze_spectra(
        options.base, options.aligned, matrices=options.matrices, ranks=options.ranks, seed=options.seed
    )
