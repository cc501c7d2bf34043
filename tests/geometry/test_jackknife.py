"""Delete-one-group intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tests.oracles import reference
from tl_asymmetry.geometry.jackknife import log_jackknife_interval


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("groups", [3, 8])
def test_equals_a_loop(groups: int, level: float) -> None:
    generator = np.random.default_rng(groups)
    estimate, replicates = generator.lognormal(size=(2, 3)), generator.lognormal(size=(groups, 2, 3))
    low, high = log_jackknife_interval(torch.tensor(estimate), torch.tensor(replicates), level=level)
    t = stats.t.ppf(0.5 + level / 2, groups - 1)
    for i in np.ndindex(2, 3):
        truth = reference.log_jackknife(estimate[i], list(replicates[(slice(None), *i)]), t)
        np.testing.assert_allclose([low[i], high[i]], truth, rtol=1e-10)


def test_covers_a_lognormal_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    groups, size, trials, σ = 8, 40, 2000, 0.5
    sums = generator.lognormal(sigma=σ, size=(groups, size, trials)).sum(1)
    estimate = torch.tensor(sums.sum(0) / (groups * size))
    replicates = torch.tensor((sums.sum(0) - sums) / ((groups - 1) * size))
    low, high = log_jackknife_interval(estimate, replicates)
    truth = np.exp(σ**2 / 2)
    coverage = ((low < truth) & (truth < high)).double().mean().item()
    assert 0.93 < coverage < 0.97


def test_undefined() -> None:
    low, high = log_jackknife_interval(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
    assert low.isnan()
    assert high.isnan()
    estimate = torch.tensor([1.0, 0.0, -1.0, torch.nan])
    low, high = log_jackknife_interval(estimate, torch.ones(4, 4))
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True, True, True]
    assert (low[0], high[0]) == (1, 1)
