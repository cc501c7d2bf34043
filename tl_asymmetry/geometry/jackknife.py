"""Delete-one-group intervals for positive quantities."""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

MINIMUM_GROUPS = 3


def log_jackknife_interval(
    estimate: Float[Tensor, "*item"], replicates: Float[Tensor, group * item], *, level: float = 0.95
) -> tuple[Float[Tensor, "*item"], Float[Tensor, "*item"]]:
    """Interval exp(θ̂ ± t √v) for a positive quantity from its delete-one-group replicates (Shao & Tu 1995, ch. 2).

    θ = log of the quantity, v = (g − 1)/g Σ (θ_(i) − θ̄)², t the quantile of Student's t with g − 1 degrees of freedom.

    Args:
        estimate: from all groups.
        replicates: without group i, for each of g groups.
        level: coverage.

    Returns:
        Lower and upper end, float64; NaN with fewer than 3 groups, or where the estimate is not positive.

    Example:
        >>> low, high = log_jackknife_interval(torch.tensor(2.0), torch.tensor([1.9, 2.0, 2.1]))
        >>> bool(low < 2 < high)
        True
    """
    θ = estimate.double().log()
    g = len(replicates)
    if g < MINIMUM_GROUPS:
        nan = torch.full_like(θ, torch.nan)
        return nan, nan
    leave_one_out = replicates.double().log()
    v = (g - 1) / g * (leave_one_out - leave_one_out.mean(0)).square().sum(0)
    half = float(special.stdtrit(g - 1, 0.5 + level / 2)) * v.sqrt()
    low, high = (θ - half).exp(), (θ + half).exp()
    defined = θ.isfinite()
    return torch.where(defined, low, torch.nan), torch.where(defined, high, torch.nan)
