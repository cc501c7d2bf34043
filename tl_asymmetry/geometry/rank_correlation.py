"""Spearman's correlation of measurements with the grade of the group they belong to."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

EXACT_GROUPS = 8
"""Up to so many groups all orders are tried (40,320 of them)."""

_BATCH = 4096


def grouped_spearman(
    values: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    grades: Float[Tensor, " groups"],
    *,
    draws: int = 20_000,
    seed: int = 0,
) -> tuple[float, float, str]:
    """Spearman's ρ between values and their group's grade, and a two-sided p from permutations of the grades.

    The groups are what is exchanged under the null, not the values: several seeds of one objective share its grade and
    say nothing new about it. So with few groups p cannot be small (4 groups: 1/12 at best).

    Args:
        values: measurements; those that are NaN are left out.
        groups: for each the index of its group.
        grades: of each group; equal ones are ties.
        draws: permutations drawn where there are more than 8 groups.
        seed: of those draws.

    Returns:
        ρ, p and "exact" or "draws"; NaN, NaN and "none" with fewer than three groups or without spread.

    Example:
        >>> grouped_spearman(torch.tensor([1.0, 2.0, 3.0]), torch.arange(3), torch.tensor([0.1, 0.2, 0.9]))
        (1.0, 0.3333333333333333, 'exact')
    """
    known = ~values.isnan() & ~grades[groups].isnan()
    values, groups = values[known].double(), groups[known]
    present = groups.unique()
    if len(present) < 3 or len(values.unique()) < 2 or len(grades[present].unique()) < 2:
        return math.nan, math.nan, "none"
    index = torch.searchsorted(present, groups)
    # Only each group's rank changes with the order: it takes as many places as it has values.
    size = torch.bincount(index, minlength=len(present)).double().numpy()
    middle = (size.sum() + 1) / 2
    y = stats.rankdata(values.numpy()) - middle
    within = np.bincount(index.numpy(), weights=y)

    def correlation(x: np.ndarray) -> np.ndarray | np.floating:
        below = ((x[..., None, :] < x[..., :, None]) * size).sum(-1)
        equal = ((x[..., None, :] == x[..., :, None]) * size).sum(-1)
        ranks = below + (equal + 1) / 2 - middle
        return (ranks @ within) / np.sqrt((ranks**2 @ size) * (y @ y))

    held = grades[present].double().numpy()
    exact = len(present) <= EXACT_GROUPS
    test = stats.permutation_test(
        (held,), lambda x, axis: np.abs(correlation(x)), permutation_type="pairings", vectorized=True,
        alternative="greater", n_resamples=math.factorial(len(present)) if exact else draws, batch=_BATCH,
        random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return round(float(correlation(held)), 12), float(test.pvalue), "exact" if exact else "draws"
