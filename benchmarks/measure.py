"""What the benchmarks share: tables with bounds, peak memory, and measurements in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tl_asymmetry.geometry.memory import return_freed_memory

Row = tuple[str, float, str, float | None]
"""Name, value, sign ("<=" or ">=") and bound; "" and None where there is none."""


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Print what was measured and whether its bounds held; the same rows for the JSON."""
    width = max(len(name) for name, *_ in rows)
    for name, value, sign, bound in rows:
        held = "" if bound is None else "held" if (value <= bound if sign == "<=" else value >= bound) else "MISSED"
        limit = "" if bound is None else f"{sign} {bound:g}"
        sys.stdout.write(f"{name:{width}} {value:10.3g}  {limit:8} {held}\n")
    return [{"name": n, "value": v, "bound": None if b is None else f"{sign} {b:g}"} for n, v, sign, b in rows]


def memory_meter(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """Two functions: one sets the high-water mark back and gives the bytes held now, one reads the mark."""
    if device != "cpu":

        def reset() -> int:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()

        return reset, torch.cuda.max_memory_allocated

    def field(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))

    def reset_resident() -> int:
        # What loading and warming up have freed is no memory held, yet glibc keeps it (1.8 GB at GPT-2's shape), and a
        # peak taken above it would be too small by as much.
        gc.collect()
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
        return field("VmRSS")

    return reset_resident, lambda: field("VmHWM")


def map_blocks() -> None:
    """From now on let glibc map every block of 64 KiB or more by itself and unmap it when it is freed.

    The resident peak is then what was held at once, the same from run to run; without this it also counts freed blocks
    that glibc keeps, which at a small shape is more than what is held. Slower, so not for times.
    """
    threshold = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if threshold is not None:
        threshold(-3, 1 << 16)  # M_MMAP_THRESHOLD


def apart(*command: str) -> dict[str, Any] | None:
    """One measurement in a Python process of its own, which ends its output with JSON, if it has any.

    None where it has none or exits with 3 (a peer is not installed).
    """
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        return None
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    if not done.stdout.strip():
        return None
    measured = json.loads(done.stdout.splitlines()[-1])
    shown = {name: value for name, value in measured.items() if isinstance(value, float | int)} or measured.get("ratio")
    sys.stderr.write(f"{' '.join(command[1:])}: {shown}\n")
    return measured
