"""The spread between runs as a yardstick: scipy's Welch test as oracle, and its size where that test fails."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tl_asymmetry.geometry.two_samples import separation


def runs(count: int, items: int, spread: float = 1.0, *, seed: int = 0) -> np.ndarray:
    return spread * np.random.default_rng(seed).standard_normal((count, items))


def test_groups_of_one_size_as_scipy() -> None:
    a, b = runs(3, 50) + 0.5, runs(3, 50, 2, seed=1)
    theirs = stats.ttest_ind(a, b, axis=0, equal_var=False)
    ours = separation(a, b)
    np.testing.assert_allclose(ours.p, theirs.pvalue, rtol=1e-9)
    interval = theirs.confidence_interval(0.95)
    np.testing.assert_allclose([ours.low, ours.high], [interval.low, interval.high], rtol=1e-9)
    swapped = separation(b, a)
    np.testing.assert_allclose([swapped.low, swapped.p], [-ours.high, ours.p])


@pytest.mark.parametrize("counts", [(2, 5), (5, 2), (3, 3), (2, 2)])
@pytest.mark.parametrize("spread", [0.25, 1, 4])
def test_it_rarely_finds_what_is_not_there(counts: tuple[int, int], spread: float) -> None:
    p = separation(runs(counts[0], 20_000, spread), runs(counts[1], 20_000, seed=1)).p
    for level, most in ((0.05, 0.06), (0.01, 0.0145), (0.001, 0.0022)):
        assert (p < level).mean() < most


def test_one_run_is_no_spread() -> None:
    found = separation(runs(1, 4), runs(5, 4, seed=1))
    assert all(np.isnan(values).all() for values in found)
    missing = separation(np.array([[np.nan], [1.0]]), np.array([[0.0], [1.0]]))
    assert all(np.isnan(values).all() for values in missing)
