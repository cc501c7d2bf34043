"""Spearman's ρ against scipy, its permutation p against all orders written out."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from tl_asymmetry.geometry.rank_correlation import grouped_spearman


def test_rho_is_scipys_and_p_counts_the_orders():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        values = torch.randn(12, generator=generator, dtype=torch.float64)
        groups = torch.arange(4).repeat_interleave(3)
        grades = torch.tensor([0.5, 2.0, 1.0, 1.0], dtype=torch.float64)  # with a tie
        ρ, p, method = grouped_spearman(values, groups, grades)
        expected = stats.spearmanr(values, grades[groups]).statistic
        assert ρ == pytest.approx(expected)
        others = [
            stats.spearmanr(values, torch.tensor(order)[groups]).statistic
            for order in itertools.permutations(grades.tolist())
        ]
        assert p == pytest.approx(np.mean([abs(other) >= abs(expected) - 1e-12 for other in others]))
        assert method == "exact"


def test_groups_of_different_size_and_missing_values():
    values = torch.tensor([1.0, 2.0, torch.nan, 3.0, 0.5, 4.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 3])
    grades = torch.tensor([0.0, 1.0, torch.nan, 2.0])
    ρ, _, _ = grouped_spearman(values, groups, grades)
    known = [0, 1, 3, 5]
    assert ρ == pytest.approx(stats.spearmanr(values[known], grades[groups[known]]).statistic)


def test_many_groups_are_drawn_from_a_seed():
    values, groups = torch.arange(10.0), torch.arange(10)
    ρ, p, method = grouped_spearman(values, groups, values, draws=2000)
    assert (ρ, method) == (1.0, "draws")
    assert p == pytest.approx(1 / 2001)
    noise = torch.randn(10, generator=torch.Generator().manual_seed(3))
    assert grouped_spearman(noise, groups, values, seed=1)[1] == grouped_spearman(noise, groups, values, seed=1)[1]
    state = torch.random.get_rng_state()
    grouped_spearman(noise, groups, values)
    assert torch.equal(state, torch.random.get_rng_state())


def test_seeds_are_no_new_grades():
    """More seeds of three perfectly ordered objectives do not make p smaller than 1/3."""
    for seeds in (1, 5):
        groups = torch.arange(3).repeat_interleave(seeds)
        values = groups + torch.linspace(0, 0.1, len(groups))
        assert grouped_spearman(values, groups, torch.arange(3.0))[1] == pytest.approx(1 / 3)


def test_p_is_uniform_when_nothing_goes_together():
    generator = torch.Generator().manual_seed(1)
    found = [
        grouped_spearman(torch.randn(10, generator=generator), torch.arange(5).repeat(2), torch.arange(5.0))[1]
        for _ in range(150)
    ]
    for level in (0.1, 0.3, 0.6):
        share = np.mean([p <= level for p in found])
        assert share <= level + 3 * (level * (1 - level) / 150) ** 0.5
    assert np.mean([p <= 0.6 for p in found]) > 0.4


@pytest.mark.parametrize(
    ("values", "grades"),
    [([1.0, 2.0], [0.0, 1.0]), ([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]), ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])],
)
def test_nothing_to_correlate(values, grades):
    ρ, p, method = grouped_spearman(torch.tensor(values), torch.arange(len(values)), torch.tensor(grades))
    assert np.isnan(ρ)
    assert np.isnan(p)
    assert method == "none"
