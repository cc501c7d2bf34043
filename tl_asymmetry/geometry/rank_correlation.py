"""Spearman's correlation of measurements with the grade of the group they belong to."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

EXACT_GROUPS = 8
"""Up to so many groups all orders are tried (40,320 of them)."""


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
    held = grades[present].double()
    if len(present) <= EXACT_GROUPS:
        orders, method = torch.tensor(list(itertools.permutations(range(len(present))))), "exact"
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(draws, len(present), generator=generator, dtype=torch.float64).argsort(1)
        orders, method = torch.cat([torch.arange(len(present)).unsqueeze(0), drawn]), "draws"
    # Only each group's rank changes with the order: it takes as many places as it has values.
    size = torch.bincount(index, minlength=len(present)).double()
    x = held[orders]
    below = ((x.unsqueeze(1) < x.unsqueeze(2)) * size).sum(2)
    equal = ((x.unsqueeze(1) == x.unsqueeze(2)) * size).sum(2)
    middle = (size.sum() + 1) / 2
    x = below + (equal + 1) / 2 - middle
    y = torch.from_numpy(stats.rankdata(values.numpy())) - middle
    within = torch.zeros_like(size).index_add_(0, index, y)
    ρ = (x @ within) / ((x.square() @ size) * y.square().sum()).sqrt()
    extreme = ρ.abs() >= ρ[0].abs() - 1e-12
    return round(float(ρ[0]), 12), float(extreme.double().mean()), method
