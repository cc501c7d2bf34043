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
@pytest.mark.parametrize("corrected", [True, False])
def test_equals_a_loop(groups: int, level: float, corrected: bool) -> None:
    generator = np.random.default_rng(groups)
    estimate, replicates = generator.lognormal(size=(2, 3)), generator.lognormal(size=(groups, 2, 3))
    found = log_jackknife_interval(torch.tensor(estimate), torch.tensor(replicates), corrected=corrected, level=level)
    t = stats.t.ppf(0.5 + level / 2, groups - 1)
    for i in np.ndindex(2, 3):
        truth = reference.log_jackknife(estimate[i], list(replicates[(slice(None), *i)]), t, corrected=corrected)
        np.testing.assert_allclose([found.low[i], found.high[i], found.biased[i]], truth, rtol=1e-10)


def test_covers_a_lognormal_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    groups, size, trials, σ = 8, 40, 2000, 0.5
    sums = generator.lognormal(sigma=σ, size=(groups, size, trials)).sum(1)
    estimate = torch.tensor(sums.sum(0) / (groups * size))
    replicates = torch.tensor((sums.sum(0) - sums) / ((groups - 1) * size))
    for corrected in (True, False):
        found = log_jackknife_interval(estimate, replicates, corrected=corrected)
        truth = np.exp(σ**2 / 2)
        coverage = ((found.low < truth) & (truth < found.high)).double().mean().item()
        assert 0.93 < coverage < 0.97


def test_a_biased_quantity_is_covered_by_the_corrected_centre_only() -> None:
    """A log with a bias of 3/n: three quarters of its standard deviation at 16 groups."""
    generator = np.random.default_rng(1)
    groups, trials = 16, 4000
    draws = generator.standard_normal((groups, trials))
    estimate = torch.tensor(np.exp(draws.mean(0) + 3 / groups))
    replicates = torch.tensor(np.exp((draws.sum(0) - draws) / (groups - 1) + 3 / (groups - 1)))
    covered = {}
    for corrected in (True, False):
        found = log_jackknife_interval(estimate, replicates, corrected=corrected)
        covered[corrected] = ((found.low < 1) & (found.high > 1)).double().mean().item()
    assert covered[True] > 0.93
    assert covered[False] < 0.91


def test_undefined() -> None:
    found = log_jackknife_interval(torch.tensor(2.0), torch.tensor([1.0, 3.0]), corrected=True)
    assert found.low.isnan()
    assert found.high.isnan()
    estimate = torch.tensor([1.0, 0.0, -1.0, torch.nan])
    found = log_jackknife_interval(
        estimate, torch.tensor([0.9, 1.0, 1.1, 1.0]).unsqueeze(1).expand(4, 4), corrected=True
    )
    assert found.low.isnan().tolist() == found.high.isnan().tolist() == [False, True, True, True]


def test_groups_that_are_copies_of_each_other_give_no_interval() -> None:
    found = log_jackknife_interval(torch.tensor(2.0), torch.full((8,), 2.0), corrected=True)
    assert found.low.isnan()
    assert found.high.isnan()
    assert found.biased == 0


def test_bias_of_more_than_a_standard_error_is_told() -> None:
    replicates = torch.tensor([[1.0, 1.0], [1.1, 1.1], [0.9, 0.9]])
    found = log_jackknife_interval(torch.tensor([1.0, 1.6]), replicates, corrected=True)
    assert found.biased.tolist() == [0, 1]
