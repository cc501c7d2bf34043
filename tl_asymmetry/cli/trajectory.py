"""The commands for several models of one run or base: `tl-asymmetry trajectory`, `tl-asymmetry compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.cli.options import as_path

if TYPE_CHECKING:
    from tl_asymmetry.results.result import Result

_DEMO_STORIES = 200


def add_trajectory(commands: Any) -> argparse.ArgumentParser:
    """The parser of `trajectory`, among the others."""
    parser: argparse.ArgumentParser = commands.add_parser("trajectory", help="the checkpoints of one training run")
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT_DIR", nargs="*",
        help="a training's output folder, or its directories named like checkpoint-500, step500, or with a "
        "trainer_state.json",
    )  # fmt: skip
    parser.add_argument("--base", help="what the run started from, if it is not among them: directory or hub name")
    parser.add_argument("--demo", action="store_true", help="the embedded run's five checkpoints, offline")
    parser.add_argument("--pythia", metavar="NAME", help="a model of the Pythia suite on the hub, with --steps")
    parser.add_argument("--steps", type=int, nargs="+", help="which of its checkpoints")
    parser.add_argument("--texts", type=as_path, help="as in analyze")
    parser.add_argument("--out", type=as_path, default=Path("tl-asymmetry-trajectory"), help="folder for the result, "
                        "the report and, in its folder store, every finished checkpoint")  # fmt: skip
    parser.add_argument("--store", type=as_path, help="folder for the finished checkpoints instead; a run that was "
                        "killed goes on there")  # fmt: skip
    parser.add_argument("--reference", choices=("first", "previous", "both"), default="first", help="what a "
                        "checkpoint's weights are subtracted from")  # fmt: skip
    parser.add_argument("--subspaces-from", default="base", help="base (the first checkpoint), each, or the directory "
                        "or hub name of one model")  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks of the subspaces")
    parser.add_argument("--max-tokens", type=int, help="use no more tokens than this")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    parser.add_argument("--groups", type=int, default=8, help="jackknife groups; 1 switches intervals off")
    parser.add_argument("--seed", type=int, default=0, help="of the null's draws")
    return parser


def run_trajectory(options: argparse.Namespace, texts: list[Any] | None) -> Result:
    """Do what `trajectory` was asked for."""
    from tl_asymmetry import analyze_trajectory

    asked = [bool(options.checkpoints), options.demo, options.pythia is not None]
    if sum(asked) != 1:
        raise ValueError(
            "expected checkpoint directories, --demo or --pythia NAME, got "
            f"{'several of them' if any(asked) else 'none of them'}; pass one of the three"
        )
    checkpoints: Any = [as_path(folder) for folder in options.checkpoints]
    if len(checkpoints) == 1:
        (checkpoints,) = checkpoints
    if options.demo:
        from tl_asymmetry.demo import demo_run, demo_texts

        checkpoints = demo_run()
        texts = demo_texts(_DEMO_STORIES, seed=0) if texts is None else texts
    elif options.pythia is not None:
        from tl_asymmetry.trajectory.pythia import pythia_checkpoints

        if not options.steps:
            raise ValueError("expected --steps with --pythia, got none; pass e.g. --steps 0 1000 143000")
        checkpoints = pythia_checkpoints(options.pythia, options.steps)
    return analyze_trajectory(
        checkpoints,
        texts,
        base=options.base,
        store=options.out / "store" if options.store is None else options.store,
        reference=options.reference,
        subspaces_from=options.subspaces_from,
        ranks=options.ranks,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        groups=options.groups,
        seed=options.seed,
    )


def add_compare(commands: Any) -> argparse.ArgumentParser:
    """The parser of `compare`, among the others."""
    parser: argparse.ArgumentParser = commands.add_parser("compare", help="saved analyses of one base")
    parser.add_argument(
        "folders", metavar="[NAME=]DIR", nargs="+",
        help="folders written by analyze, two or more; those of one NAME are runs of one training",
    )  # fmt: skip
    parser.add_argument("--names", nargs="+", help="what to call folders without NAME=")
    parser.add_argument("--out", type=as_path, default=Path("tl-asymmetry-comparison"), help="folder for the result")
    return parser


def run_compare(options: argparse.Namespace) -> Result:
    """Do what `compare` was asked for: with names, several runs an arm."""
    from tl_asymmetry import PairAnalysis, compare

    if len(options.folders) < 2:
        raise ValueError("expected two folders or more, got one; pass the folders of two analyses of one base")
    arms: dict[str, list[str]] = {}
    for said in options.folders:
        name, separator, folder = said.partition("=")
        if separator and name and folder and not Path(said).exists():
            arms.setdefault(name, []).append(folder)
    if not arms:
        return compare(*(PairAnalysis.load(folder) for folder in options.folders), names=options.names)
    if sum(map(len, arms.values())) < len(options.folders) or options.names is not None:
        raise ValueError(
            "expected folders all with a name or all without, and --names only without, got both; pass "
            "dpo=DIR dpo=DIR sft=DIR sft=DIR"
        )
    return compare({name: [PairAnalysis.load(folder) for folder in folders] for name, folders in arms.items()})
