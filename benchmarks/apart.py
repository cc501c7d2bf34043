"""Measurements in processes of their own, and the memory they take. Used by the benchmarks beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def memory_meter(device: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """Two functions: set the high-water mark back and give bytes in use; give the mark."""
    if device != "cpu":

        def reset() -> int:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()

        return reset, torch.cuda.max_memory_allocated

    def field(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))

    def reset_resident() -> int:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present
        return field("VmRSS")

    return reset_resident, lambda: field("VmHWM")


def measured_apart(script: str, *arguments: str) -> dict[str, Any] | None:
    """One measurement in a process of its own; None where a peer is not installed."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        return None
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    shown = {name: value for name, value in measured.items() if isinstance(value, float | int)} or measured.get("ratio")
    sys.stderr.write(f"{' '.join(arguments)}: {shown}\n")
    return measured
