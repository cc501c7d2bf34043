"""Strata of equal mass: token types sorted by how often they occur, cut where a fifth of all occurrences is reached."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frequency_strata(counts: Float[Tensor, " type"] | Int[Tensor, " type"], strata: int) -> Int[Tensor, " type"]:
    """The stratum of each token type: 0 the rarest, `strata − 1` the most frequent, −1 for types that do not occur.

    Quantiles of the log-frequency of an occurrence: each stratum is to hold an equal share of all occurrences. Types of
    one count stay together, so the shares are equal only as far as the counts allow; a count goes where its middle
    occurrence falls.

    Args:
        counts: how often each type occurs.
        strata: how many.

    Raises:
        ValueError: strata < 1, no occurrence at all, or counts so few or so unequal that a stratum stays empty.

    Example:
        >>> frequency_strata(torch.tensor([1, 1, 0, 2, 4]), 2).tolist()
        [0, 0, -1, 0, 1]
    """
    if strata < 1:
        raise ValueError(f"expected strata >= 1, got {strata}; pass strata=5")
    values, index = counts.double().unique(return_inverse=True)  # rising
    mass = torch.zeros_like(values).index_add_(0, index.flatten(), counts.double().flatten())
    total = mass.sum()
    if not total > 0:
        raise ValueError("expected tokens to count, got none; pass texts")
    middle = (mass.cumsum(0) - mass / 2) / total
    place = (middle * strata).long().clamp(max=strata - 1)
    filled = place[values > 0].unique()
    if len(filled) < strata:
        raise ValueError(
            f"expected texts whose token frequencies fill {strata} strata of equal mass, got {len(filled)} filled by "
            f"{int(total)} tokens of {int((counts > 0).sum())} types; pass more texts, frequencies= of a larger "
            "corpus, or fewer strata (strata=0 leaves them out)"
        )
    return torch.where(counts > 0, place[index], -1)
