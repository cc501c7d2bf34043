"""Memory that was freed should be free for others too."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed blocks back to the system: glibc keeps them (0.6 GB at GPT-2's shape), others have nothing to do."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
