"""Kills, interrupts, flipped bits and full disks, over everything that is written or changed for a while.

    python benchmarks/faults.py            # an hour on two cores; writes benchmarks/results/faults.json
    python benchmarks/faults.py --quick    # minutes: every kind of fault, fewer of each

Run from the repository's root, since it breaks what the tests build. A fault is survived when nothing that was finished
is lost, no number is other than it was, and nothing is left behind: after a kill the work goes on to the same files or
tables; an interrupt leaves the model as it was; a damaged file is refused by name; a full disk leaves what was there.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import tiny
from tests.killing import dies
from tests.reliability.test_interrupts import CONTEXTS, Struck, same, state
from tl_asymmetry import (
    analyze_pair,
    analyze_tangents,
    analyze_trajectory,
    contrastive_control,
    rank_one_study,
    rewind_study,
)
from tl_asymmetry.grokking import Recipe, train
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.objectives import CrossEntropy, PreferenceBatch, TokenBatch
from tl_asymmetry.results.result import load
from tl_asymmetry.store import PartStore, StoreReader

RESULTS = Path(__file__).parent / "results"
TOKENS = tiny.tokens(3, 8)
SIZES = (16, 64, 128, 256, 512)
"""Of the full disks, KiB."""


@dataclass
class Count:
    """How many faults of a kind were tried, and how many of them survived."""

    tried: int = 0
    survived: int = 0

    def add(self, survived: bool, where: str) -> None:
        """One more."""
        self.tried += 1
        self.survived += survived
        if not survived:
            sys.stdout.write(f"NOT SURVIVED: {where}\n")


# --- what is written --------------------------------------------------------------------------------------------------


def writers() -> dict[str, Callable[[Path], None]]:
    """Everything that keeps what it has finished, as a function of a folder; called again it goes on there."""
    base = tiny.bridge("gpt2")
    aligned = tiny.perturbed(base)
    common: dict[str, Any] = {"tokens": TOKENS, "progress": False}

    def counted(tokens: torch.Tensor) -> TokenBatch:
        return TokenBatch(tokens, torch.arange(tokens.shape[1]).expand_as(tokens) >= 2)

    pair = analyze_pair(base, aligned, ranks=[4], groups=1, matrices=["W_Q"], **common)

    def parts(folder: Path) -> None:
        with PartStore(folder, "parts", {"seed": 0}, {}) as store:
            for step in range(3):
                store.put(step, {"x": torch.full((9,), float(step))}, {"step": step})

    return {
        "parts": parts,
        "saved result": lambda folder: pair.save(folder) and None,
        "trajectory": lambda folder: analyze_trajectory(
            {0: base, 1: aligned}, store=folder, ranks=[4], groups=1, matrices=["W_Q"], **common
        ) and None,
        "study": lambda folder: rank_one_study(
            base, aligned, store=folder, sites=[(0, "W_Q", 0), (1, "W_O", 1)], draws=2, **common
        ) and None,
        "tangents": lambda folder: analyze_tangents(
            {0: base, 20: aligned}, store=folder, rank=2, strata=2, groups=2, **common
        ) and None,
        "control": lambda folder: contrastive_control(
            base, {"sharp": CrossEntropy(), "soft": CrossEntropy(8.0)},
            [PreferenceBatch(counted(TOKENS), counted(TOKENS.flip(0)))], store=folder, steps=1, seeds=[0, 1],
            batch_size=3, ranks=[4], matrices=["W_Q"], gradient_rows=8, progress=False,
        ) and None,
        "rewinding": lambda folder: rewind_study(
            base, aligned, store=folder, matrices=["W_Q"], steps=2, orders=1, matched=1, shares=(0, 1), **common
        ) and None,
        "grokking run": lambda folder: train(
            "add", p=7, seed=0, recipe=Recipe(steps=4, every=2), sizes={"d_model": 16, "d_mlp": 32}, store=folder
        ) and None,
    }  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock and what a killed `save` was still writing: the same work makes the same bytes."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "lock" and p.suffix != ".part")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def kills(made: dict[str, Callable[[Path], None]], room: Path, stride: int) -> dict[str, Count]:
    """SIGKILL at durable calls, every `stride`-th; then the work goes on."""
    counts = {}
    for name, write in made.items():
        counts[name] = count = Count()
        write(room / "whole")
        whole = content(room / "whole")
        for at in range(1, 200, stride):
            folder = room / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            if not dies(lambda write=write, folder=folder: write(folder), at):
                break
            write(folder)
            count.add(content(folder) == whole, f"{name}, killed at durable call {at}")
        shutil.rmtree(room / "whole")
    return counts


def flips(made: dict[str, Callable[[Path], None]], room: Path, ranges: int) -> dict[str, Count]:
    """One bit in each of many ranges of bytes of every file: refused by name, or nothing that is read has changed."""
    counts, draw = {}, random.Random(0)
    for name, write in made.items():
        counts[name] = count = Count()
        write(room / name)
        before = _read(room / name)
        for file in sorted(p for p in (room / name).rglob("*") if p.is_file() and p.name != "lock"):
            sound = file.read_bytes()
            width = max(1, len(sound) // ranges)
            for start in range(0, len(sound), width):
                at = min(start + draw.randrange(width), len(sound) - 1)
                file.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << draw.randrange(8)]) + sound[at + 1 :])
                try:
                    fine = _read(room / name) == before
                except ValueError as error:
                    fine = str(file.name) in str(error) or str(room / name) in str(error)
                count.add(fine, f"{file}, byte {at}")
            file.write_bytes(sound)
    return counts


def _read(folder: Path) -> str:
    """All that is in a folder."""
    if (folder / "result.safetensors").exists():
        result = load(folder)
        return repr((result.config, result.table.to_csv(), {n: x.tolist() for n, x in result.arrays.items()}))
    reader = StoreReader(folder)
    arrays = {name: {n: x.tolist() for n, x in reader.arrays(name).items()} for name in reader.names}
    entries = {name: reader.entry(name) for name in reader.names}
    return repr((reader.kind, reader.settings, reader.about, entries, arrays))


# --- what is changed for a while --------------------------------------------------------------------------------------


def interrupts_by_line() -> dict[str, Count]:
    """A SIGINT at every line of every context, on every kind of model."""
    counts = {}
    for kind in tiny.KINDS:
        view = _half_frozen(kind)
        for name, context in CONTEXTS.items():
            counts[f"{kind}: {name}"] = count = Count()
            before, at = state(view), 0
            while True:
                at += 1
                struck = Struck(at)
                try:
                    entered = context(view)
                    sys.settrace(struck)
                    with entered:
                        pass
                    sys.settrace(None)
                    break
                except KeyboardInterrupt:
                    sys.settrace(None)
                    count.add(same(before, state(view)) == "", f"{kind}, {name}, {struck.where}")
    return counts


def interrupts_at_random(most: int) -> dict[str, Count]:
    """A SIGINT after a random time in contexts that are entered and left without pause."""
    counts, draw = {}, random.Random(0)
    for kind in tiny.KINDS:
        view = _half_frozen(kind)
        counts[f"{kind}: all contexts by turns"] = count = Count()
        before = state(view)
        for _ in range(most):
            with contextlib.suppress(KeyboardInterrupt):
                # again after a second: what Python raises in a `__del__` it reports and forgets
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, 0.02), 1)
                while True:
                    for context in CONTEXTS.values():
                        with context(view):
                            pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            count.add(same(before, state(view)) == "", kind)
    return counts


def _half_frozen(kind: str) -> ModelView:
    model = tiny.build("gpt2", kind).train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return ModelView(model)


# --- full disks -------------------------------------------------------------------------------------------------------


def full_disks(made: dict[str, Callable[[Path], None]], room: Path) -> dict[str, Count]:
    """Work on a disk of a few KiB: it fits, or is refused in words, and what was finished is whole."""
    counts: dict[str, Count] = {}
    for size in SIZES:
        for name, write in made.items():
            count = counts.setdefault(name, Count())
            with _small_disk(room, size) as disk:
                try:
                    write(disk / "run")
                    fine = True
                except OSError as error:
                    fine = error.errno == errno.ENOSPC and "got a full disk" in str(error)
                with contextlib.suppress(ValueError):  # there may be nothing yet
                    _read(disk / "run")
                fine &= not list(disk.rglob(".*.part"))
            count.add(fine, f"{name} on {size} KiB")
    return counts


@contextlib.contextmanager
def _small_disk(room: Path, size: int) -> Iterator[Path]:
    disk = room / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer faults of each kind")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        room, made = Path(folder), writers()
        found = {
            "interrupts by line": interrupts_by_line(),
            "interrupts at random": interrupts_at_random(40 if options.quick else 400),
            "bit flips": flips(made, room, 12 if options.quick else 256),
            "kills": kills(made, room, 3 if options.quick else 1),
            "full disks": full_disks(made, room) if os.geteuid() == 0 else {},
        }
    counted = {
        fault: {name: {"tried": c.tried, "survived": c.survived} for name, c in kinds.items()}
        for fault, kinds in found.items()
    }
    totals = {
        fault: {key: sum(kind[key] for kind in kinds.values()) for key in ("tried", "survived")}
        for fault, kinds in counted.items()
    }
    for fault, total in totals.items():
        sys.stdout.write(f"{fault:22} tried {total['tried']:5}  survived {total['survived']:5}\n")
    document = {
        "command": "python benchmarks/faults.py" + (" --quick" if options.quick else ""),
        "totals": totals,
        "by kind": counted,
        "seconds": round(time.perf_counter() - started),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "faults.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
