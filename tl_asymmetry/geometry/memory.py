"""How much memory there is, that what was freed is free for others too, and work in pieces that fit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


def return_freed_memory() -> None:
    """Give freed blocks back to the system: glibc keeps them (0.6 GB at GPT-2's shape), others have nothing to do."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be taken on a device: on the CPU by this process's own limit too; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for itself but does not use is as good as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    rooms = [room for room in (_machine_room(), _group_room()) if room is not None]
    return min(rooms) if rooms else None


def _machine_room() -> int | None:
    """What Linux thinks it could hand out without swapping; elsewhere the pages that are free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def _group_room() -> int | None:
    """What is left of the limit of the control group (version 2), as in a container."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        cache = Path("/sys/fs/cgroup/memory.stat").read_text()
    except OSError:
        return None
    if limit == "max":
        return None
    files = next((int(line.split()[1]) for line in cache.splitlines() if line.startswith("inactive_file ")), 0)
    return max(0, int(limit) - int(used) + files)


def batches(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbouring places whose sizes add up to no more than that, or single ones that are larger.

    Example:
        >>> list(batches([3, 2, 9, 1, 1], 5))
        [[0, 1], [2], [3, 4]]
    """
    batch: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += size
    if batch:
        yield batch
