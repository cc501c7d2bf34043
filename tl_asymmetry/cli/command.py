"""The command line: arguments are read before anything is imported that they do not need."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.deltas import add_deltas, run_deltas
from tl_asymmetry.cli.grok import add_grok, run_grok
from tl_asymmetry.cli.options import as_model, as_path
from tl_asymmetry.cli.spectra import add_spectra, run_spectra
from tl_asymmetry.cli.stages import add_stages, run_stages
from tl_asymmetry.cli.tangents import add_tangents, run_tangents
from tl_asymmetry.cli.texts import FORMATS, read_texts
from tl_asymmetry.cli.trajectory import add_compare, add_trajectory, run_compare, run_trajectory

if TYPE_CHECKING:
    from tl_asymmetry.results.result import Result

_DEMO_STORIES = 400


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input with one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever a terminal's encoding: ΔW is no reason to fail
            stream.reconfigure(encoding="utf-8", errors="replace")
    options = _parser().parse_args(arguments)
    try:
        if "out" in options:
            _check_folder(options.out)
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"tl-asymmetry: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-asymmetry",
        description="Where pretraining and alignment left their marks in a transformer's weights.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('tl-asymmetry')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the embedded pair, offline")
    demo.add_argument("--out", type=as_path, default=Path("tl-asymmetry-demo"), help="folder for the result and report")
    demo.set_defaults(run=_demo)

    analyze = commands.add_parser("analyze", help="a base and an aligned model")
    analyze.add_argument("base", metavar="BASE", type=as_model, help="hub name or local Hugging Face directory")
    analyze.add_argument(
        "aligned",
        metavar="ALIGNED",
        type=as_model,
        help="hub name, Hugging Face directory, .safetensors file or LoRA adapter",
    )
    analyze.add_argument("--texts", type=as_path, help="file of texts (see below)")
    analyze.add_argument(
        "--out", type=as_path, default=Path("tl-asymmetry-result"), help="folder for result and report"
    )
    analyze.add_argument("--ranks", type=int, nargs="+", help="ranks of the subspaces")
    analyze.add_argument("--max-tokens", type=int, help="use no more tokens than this")
    analyze.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    analyze.add_argument("--groups", type=int, default=8, help="jackknife groups; 1 switches intervals off")
    analyze.add_argument("--seed", type=int, default=0, help="of the null's draws")
    analyze.epilog = f"texts are read as {FORMATS}"
    analyze.set_defaults(run=_analyze)

    add_stages(commands).set_defaults(run=_stages)
    add_trajectory(commands).set_defaults(run=_trajectory)
    add_compare(commands).set_defaults(run=_compare)
    add_spectra(commands).set_defaults(run=_spectra)
    add_deltas(commands).set_defaults(run=_deltas)
    add_tangents(commands).set_defaults(run=_tangents)
    add_grok(commands).set_defaults(run=_grok)

    report = commands.add_parser("report", help="write the report of a saved result again")
    report.add_argument("folder", metavar="DIR", type=as_path, help="folder that holds a saved result")
    report.set_defaults(run=_report)
    return parser


def _check_folder(folder: Path) -> None:
    """Refuse, before the long run, a folder that nothing could be written to after it."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"expected a folder to write to, got {str(folder)!r} ({place} is none); pass another --out")


def _demo(options: argparse.Namespace) -> None:
    from tl_asymmetry import analyze_pair
    from tl_asymmetry.demo import demo_pair, demo_texts

    base, aligned = demo_pair()
    result = analyze_pair(base, aligned, demo_texts(_DEMO_STORIES, seed=0), batch_size=32)
    options.out.mkdir(parents=True, exist_ok=True)
    explorer = result.to_explorer(options.out / "explorer.html", model=base)
    _finish(result, options.out, f"open the explorer: {explorer}")


def _analyze(options: argparse.Namespace) -> None:
    from tl_asymmetry import analyze_pair
    from tl_asymmetry.models.processes import started_processes

    texts = _texts(options)
    with started_processes() as processes:  # under torchrun, the work is shared and the first process writes
        result = analyze_pair(
            options.base,
            options.aligned,
            texts,
            ranks=options.ranks,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            groups=options.groups,
            seed=options.seed,
        )
    if processes.is_first:
        _finish(result, options.out)


def _stages(options: argparse.Namespace) -> None:
    _finish(run_stages(options), options.out)


def _trajectory(options: argparse.Namespace) -> None:
    from tl_asymmetry.models.processes import started_processes

    texts = _texts(options)
    # Under torchrun the checkpoints are shared out and the first process writes.
    with started_processes() as processes:
        result = run_trajectory(options, texts)
    if processes.is_first:
        _finish(result, options.out)


def _compare(options: argparse.Namespace) -> None:
    _finish(run_compare(options), options.out)


def _spectra(options: argparse.Namespace) -> None:
    _finish(run_spectra(options), options.out)


def _deltas(options: argparse.Namespace) -> None:
    _finish(run_deltas(options), options.out)


def _tangents(options: argparse.Namespace) -> None:
    _finish(run_tangents(options, _texts(options)), options.out)


def _grok(options: argparse.Namespace) -> None:
    _finish(run_grok(options), options.out)


def _report(options: argparse.Namespace) -> None:
    from tl_asymmetry import load

    result = load(options.folder)
    sys.stdout.write(f"open the report: {result.to_html(options.folder / 'report.html')}\n")


def _finish(result: Result, folder: Path, *lines: str) -> None:
    """Write the result and its report; the last line says what to open."""
    result.save(folder)
    report = result.to_html(folder / "report.html")
    sys.stdout.write("\n".join([result.summary(), "", *lines, f"open the report: {report}", ""]))


def _texts(options: argparse.Namespace) -> list[Any] | None:
    return None if options.texts is None else read_texts(options.texts)
