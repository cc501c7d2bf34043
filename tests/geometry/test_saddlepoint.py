"""Tails without a floor: against exact laws and against draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.oracles import reference
from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p, haar_leverages
from tl_asymmetry.geometry.quadratic_form import fraction_tail_rank_one
from tl_asymmetry.geometry.saddlepoint import rotation_tails


def isotropic_tail(λ: torch.Tensor, d: int, k: int, x: torch.Tensor, *, below: bool = False) -> torch.Tensor:
    h = torch.stack([1 - x, -x], -1)
    copies = torch.tensor([[float(k), d - k]]).expand(len(x), -1)
    return rotation_tails(h, copies, λ.expand(len(x), -1), d)[int(below)]


# Estimate over true p; the far tail is conservative.
BOUNDS = {0.5: (0.95, 1.05), 0.1: (0.9, 1.05), 0.05: (0.9, 1.05), 0.01: (0.9, 1.2), 1e-3: (1, 2), 1e-4: (1, 4)}


@pytest.mark.parametrize(("d", "k"), [(64, 1), (64, 4), (64, 16), (512, 4), (512, 32)])
@pytest.mark.parametrize("p", BOUNDS)
def test_a_delta_of_rank_one_has_a_beta_tail(d: int, k: int, p: float) -> None:
    x = torch.tensor([stats.beta(k / 2, (d - k) / 2).isf(p)])
    low, high = BOUNDS[p]
    assert low < isotropic_tail(torch.ones(1, 1), d, k, x).item() / p < high


@pytest.mark.parametrize("p", [1e-6, 1e-10])
def test_far_tails_are_conservative_and_within_three_orders(p: float) -> None:
    λ = torch.arange(1.0, 33).double() ** -1
    λ = λ / λ.sum()
    x = torch.linspace(0.02, 0.2, 2000, dtype=torch.float64)
    exact = fraction_tail_rank_one(λ.expand(len(x), -1), 128, x)
    at = int((exact - p).abs().argmin())
    found = isotropic_tail(λ.unsqueeze(0), 128, 1, x[at : at + 1]).item()
    assert 1 < found / exact[at].item() < 1000


@pytest.mark.parametrize("k", [4, 16])
def test_agrees_with_draws(k: int) -> None:
    d = 64
    λ = torch.arange(1.0, 25).double() ** -1
    λ = λ / λ.sum()
    fractions = haar_leverages(d, k, 3)[:, :24].double() @ λ
    for p in (0.5, 0.1, 0.01):
        x = fractions.quantile(1 - p).reshape(1)
        found = isotropic_tail(λ.unsqueeze(0), d, k, x).item()
        assert found / p == pytest.approx(1, abs=0.1 + 4 / np.sqrt(p * len(fractions)))


def test_no_step_at_the_expected_fraction() -> None:
    """There both terms of the formula are infinite and their difference, which depends on the skewness, is not."""
    d, k = 64, 4
    λ = (torch.arange(1.0, 9).double() ** -1).unsqueeze(0)
    at = torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64) * 0.02 + k / d
    p = isotropic_tail(λ / λ.sum(), d, k, at)
    assert p[1].item() == pytest.approx((p[0] + p[2]).item() / 2, abs=1e-4)
    assert abs(p[1].item() - 0.5) > 0.01  # a skewed law


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 10), st.floats(0.02, 0.9), st.integers(0, 1000))
def test_both_tails_add_up_and_fall(r: int, k: int, x: float, seed: int) -> None:
    d = 12
    λ = torch.rand(1, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    at = torch.tensor([x, min(x + 0.05, 0.99)], dtype=torch.float64)
    above, below = (isotropic_tail(λ / λ.sum(), d, k, at, below=side) for side in (False, True))
    if above.isnan().any():
        return
    assert above[1] <= above[0] + 1e-9
    assert bool(((above >= 0) & (above <= 1)).all())
    # The two expansions are each other's complement but for what they leave out.
    assert above[0].item() + below[0].item() == pytest.approx(1, abs=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(1, 12), st.floats(-4, 4), st.integers(0, 10_000))
def test_agrees_with_every_term_written_out(d: int, r: int, shift: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    h = generator.standard_normal(d) * generator.random(d) ** 4 + 0.3 * shift
    s = np.append(generator.gamma(0.5, size=min(r, d)), np.zeros(d - min(r, d)))
    found = rotation_tails(*(torch.tensor(x).unsqueeze(0) for x in (h, np.ones(d), s[: min(r, d)])), d)[0].item()
    if np.isnan(found) or abs(stats.norm.ppf(found)) < 0.1:  # near the middle both lose digits
        return
    assert found == pytest.approx(reference.rotation_tail(h, s), rel=1e-7, abs=1e-14)


def test_items_of_different_sizes_and_dimensions_are_as_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for d, m, r in ((64, 5, 3), (63, 12, 40), (20, 20, 20), (64, 2, 64)):
        h = torch.randn(1, m, generator=generator, dtype=torch.float64) - 1
        copies = torch.cat([torch.ones(1, m - 1), torch.full((1, 1), float(d - m + 1))], 1)
        cases.append((h, copies, torch.rand(1, r, generator=generator, dtype=torch.float64), d))
    wide = [
        torch.cat([torch.nn.functional.pad(case[i], (0, 64 - case[i].shape[1])) for case in cases]) for i in range(3)
    ]
    together = rotation_tails(*wide, torch.tensor([float(d) for *_, d in cases]))
    torch.testing.assert_close(together, torch.cat([rotation_tails(*case) for case in cases], 1), rtol=1e-10, atol=0)


def test_scale_company_and_dtype_do_not_matter() -> None:
    h = torch.tensor([[0.9, -0.1], [0.5, -0.2]], dtype=torch.float64)
    copies = torch.tensor([[4.0, 60.0], [8.0, 56.0]], dtype=torch.float64)
    s = torch.rand(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = rotation_tails(h, copies, s, 64)
    alone = torch.cat(
        [rotation_tails(1e-7 * h[i : i + 1], copies[i : i + 1], 1e5 * s[i : i + 1], 64) for i in (0, 1)], 1
    )
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=0)
    single = rotation_tails(h.float(), copies.float(), s.float(), 64)
    torch.testing.assert_close(together, single, rtol=1e-3, atol=0)
    assert together.dtype == single.dtype == torch.float64


def test_zeros_behind_a_spectrum_are_missing_ones() -> None:
    d, k = 64, 4
    short, long = torch.arange(8.0, 0, -1).double().unsqueeze(0), torch.arange(32.0, 0, -1).double().unsqueeze(0)
    x = torch.tensor([0.2], dtype=torch.float64)
    apart = [isotropic_tail(λ / λ.sum(), d, k, x) for λ in (short, long)]
    stacked = torch.cat([torch.nn.functional.pad(short, (0, 24)) / short.sum(), long / long.sum()])
    h = torch.cat([1 - x, -x]).expand(2, -1)
    together = rotation_tails(h, torch.tensor([[float(k), d - k]]).expand(2, -1), stacked, d)[0]
    assert torch.equal(together, torch.cat(apart))


def test_what_cannot_vary_has_no_tail() -> None:
    flat = torch.ones(1, 8)
    assert rotation_tails(torch.tensor([[0.5, -0.5]]), torch.tensor([[4.0, 4.0]]), flat, 8).isnan().all()
    assert rotation_tails(torch.tensor([[0.5, 0.5]]), torch.tensor([[4.0, 4.0]]), torch.rand(1, 3), 8).isnan().all()
    nothing = torch.zeros(1, 0)
    assert rotation_tails(torch.tensor([[0.5, -0.5]]), torch.tensor([[4.0, 4.0]]), nothing, 8).isnan().all()


def test_a_head_wholly_inside_u4_among_1024() -> None:
    d, heads = 64, 1024
    generator = np.random.default_rng(0)
    λ = torch.tensor(generator.gamma(1.0, size=(heads, 16)))
    Q = haar_leverages(d, 4, 1)[:heads, :16].double()
    fraction = (Q * λ).sum(-1) / λ.sum(-1)
    fraction[7] = 1.0
    p, method = IsotropicNull(d, seed=0).tail(λ, 4, fraction)
    q = adjusted_p(p)
    assert method[7] == "saddlepoint"
    assert q[7] < 1e-6
    assert (np.delete(q, 7) < 0.05).sum() <= 2


def test_rank_one_deltas_are_exact_at_every_rank() -> None:
    d = 48
    for k in (2, 5, 16):
        x = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
        above, below, method = IsotropicNull(d, seed=0).tails(torch.tensor([[3.0, 0, 0]]).expand(3, -1), k, x)
        law = stats.beta(k / 2, (d - k) / 2)
        np.testing.assert_allclose(above, law.sf(x), rtol=1e-12)
        np.testing.assert_allclose(below, law.cdf(x), rtol=1e-12)
        assert set(method) == {"exact"}


def test_both_tails_of_draws_add_up() -> None:
    d = 48
    λ = torch.tensor([[4.0] + [0.1] * (d - 1)], dtype=torch.float64)
    at = torch.tensor([0.15], dtype=torch.float64)
    above, below, _ = IsotropicNull(d, seed=0).tails(λ, 2, at)
    assert above[0] + below[0] == pytest.approx(1, abs=1e-3)
    generator = np.random.default_rng(5)
    delta = np.diag(np.sqrt(λ[0].numpy()))
    sampled = np.array([reference.subspace_fraction(delta, reference.haar_basis(d, 2, generator)) for _ in range(3000)])
    assert below[0] == pytest.approx((sampled <= 0.15).mean(), abs=0.04)
