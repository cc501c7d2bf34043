"""The command line: `tl-asymmetry demo | analyze | tangents | report`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_asymmetry.pair import analyze_pair
from tl_asymmetry.results import Result, open_result

_DEMO_STORIES = 400


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input with one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"tl-asymmetry: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-asymmetry",
        description="Where pretraining and alignment left their marks in a transformer's weights.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the embedded pair, offline")
    demo.add_argument("--out", type=Path, default=Path("tl-asymmetry-demo"), help="folder for the result and report")
    demo.set_defaults(run=_demo)

    analyze = commands.add_parser("analyze", help="a base and an aligned model")
    analyze.add_argument("base", metavar="BASE", help="hub name or local Hugging Face directory")
    analyze.add_argument("aligned", metavar="ALIGNED", help="hub name or local Hugging Face directory")
    analyze.add_argument(
        "--texts", type=Path, help="UTF-8 text file (texts apart by blank lines) or .jsonl (see below)"
    )
    analyze.add_argument("--out", type=Path, default=Path("tl-asymmetry-result"), help="folder for result and report")
    analyze.add_argument("--ranks", type=int, nargs="+", help="ranks of the subspaces")
    analyze.add_argument("--max-tokens", type=int, help="use no more tokens than this")
    analyze.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass")
    analyze.add_argument("--groups", type=int, default=8, help="jackknife groups; 1 switches intervals off")
    analyze.add_argument("--seed", type=int, default=0, help="of the null's draws")
    analyze.epilog = 'a .jsonl file has one string, {"text": …} or {"messages": […]} a line'
    analyze.set_defaults(run=_analyze)

    tangents = commands.add_parser("tangents", help="early directions of activations against true gradients")
    tangents.add_argument("checkpoints", metavar="CHECKPOINT", nargs="*", type=Path, help="directories like checkpoint-500")
    tangents.add_argument("--demo", action="store_true", help="train tiny models offline and analyse these")
    tangents.add_argument("--texts", type=Path, help="as for analyze")
    tangents.add_argument("--out", type=Path, default=Path("tl-asymmetry-tangents"), help="folder for results and reports")
    tangents.add_argument("--rank", type=int, nargs="+", default=[16], help="ranks of the bases")
    tangents.add_argument("--method", nargs="+", choices=["pca", "semi_nmf"], default=["pca"], help="how bases are fitted")
    tangents.add_argument("--seeds", type=int, default=5, help="trainings of each tiny model (--demo)")
    tangents.add_argument("--workers", type=int, default=2, help="processes side by side (--demo)")
    tangents.set_defaults(run=_tangents)

    report = commands.add_parser("report", help="write the report of a saved result again")
    report.add_argument("folder", metavar="DIR", type=Path, help="folder that holds a saved result")
    report.set_defaults(run=_report)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from tl_asymmetry.demo import demo_pair, demo_texts

    base, aligned = demo_pair()
    _finish(analyze_pair(base, aligned, demo_texts(_DEMO_STORIES, seed=0), batch_size=32), options.out)


def _analyze(options: argparse.Namespace) -> None:
    from tl_asymmetry.models.loading import open_model

    texts = None if options.texts is None else _read_texts(options.texts)
    result = analyze_pair(
        open_model(options.base),
        options.aligned,
        texts,
        ranks=options.ranks,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        groups=options.groups,
        seed=options.seed,
    )
    _finish(result, options.out)


def _tangents(options: argparse.Namespace) -> None:
    if options.demo == bool(options.checkpoints):
        raise ValueError("expected checkpoint directories or --demo, got both or neither; pass one of the two")
    if options.demo:
        _tangents_demo(options)
        return
    from tl_asymmetry.tangents import analyze_tangents

    texts = None if options.texts is None else _read_texts(options.texts)
    _finish(analyze_tangents(options.checkpoints, texts, rank=options.rank, method=options.method), options.out)


def _tangents_demo(options: argparse.Namespace) -> None:
    from tl_asymmetry.demo.tangents import tangent_study
    from tl_asymmetry.tangent_replication import (
        replication_claims,
        replication_frequency,
        replication_strata,
        replication_table,
    )

    runs = tangent_study(options.seeds, folder=options.out, workers=options.workers)
    parts = {
        f"Energy and anisotropy, means over {options.seeds} seeds": (replication_table(runs), "table.csv"),
        "Late checkpoints by token frequency (1 = rarest fifth)": (replication_strata(runs), "strata.csv"),
        "Log-frequency and distance to the centroid, last step": (replication_frequency(runs), "frequency.csv"),
    }
    for title, (table, name) in parts.items():
        table.to_csv(options.out / name, index=False)
        sys.stdout.write(f"{title}\n{table.to_string(index=False, float_format='{:.3g}'.format)}\n\n")
    sys.stdout.write("\n".join([*replication_claims(runs), f"\nresults and reports: {options.out}\n"]))


def _report(options: argparse.Namespace) -> None:
    result = open_result(options.folder)
    sys.stdout.write(f"report: {result.to_html(options.folder / 'report.html')}\n")


def _finish(result: Result, folder: Path) -> None:
    result.save(folder)
    report = result.to_html(folder / "report.html")
    sys.stdout.write(f"{result.summary()}\n\nreport: {report}\n")


def _read_texts(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text in {path}, got {error}; pass it converted to UTF-8") from error
    if path.suffix != ".jsonl":
        return [passage.strip() for passage in text.split("\n\n") if passage.strip()]
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected JSON in line {number} of {path}, got {error}; pass one value a line") from error
        if isinstance(entry, dict):
            entry = entry.get("text", entry.get("messages"))
        if not isinstance(entry, str | list):
            raise ValueError(
                f'expected a string, {{"text": …}} or {{"messages": […]}} in line {number} of {path}, got something '
                "else; pass one text a line"
            )
        texts.append(entry)
    return texts
