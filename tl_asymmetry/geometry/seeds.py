"""Independent streams of random numbers, each known by its key."""

from __future__ import annotations

import hashlib

import torch


def seeded(*key: int | str | None) -> torch.Generator:
    """A CPU generator of its own for each key; equal keys, equal streams.

    Example:
        >>> torch.equal(torch.rand(2, generator=seeded(0, "a")), torch.rand(2, generator=seeded(0, "a")))
        True
    """
    digest = hashlib.sha256(":".join(map(str, key)).encode("utf-8")).digest()
    # manual_seed takes a signed 64-bit number.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
