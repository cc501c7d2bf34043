"""What a fraction would be by chance: moments, cumulants, tails and false-discovery rates."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.oracles import reference
from tl_asymmetry.geometry import nulls
from tl_asymmetry.geometry.nulls import (
    FAR,
    HAAR_DRAWS,
    QUANTILE_TOLERANCE,
    IsotropicNull,
    adjusted_p,
    beta_disagreement,
    fraction_cumulants,
    haar_leverages,
    isotropic_null,
)
from tl_asymmetry.geometry.quadratic_form import fraction_tail_rank_one
from tl_asymmetry.geometry.saddlepoint import rotation_tails

D = 48
SPECTRA = {
    "flat": np.ones(12),
    "power law": np.arange(1.0, D + 1) ** -1.0,
    "one spike": np.array([4.0] + [0.1] * (D - 1)),
    "rank 1": np.ones(1),
}
RANKS = (1, 4, 16)
DRAWS = 2500
CUMULANT_CASES = [("power law", D, 4), ("one spike", D, 2), ("rank 1", 6, 2), ("flat", 16, 9)]
PROBABILITIES = st.one_of(st.floats(0, 1, allow_subnormal=False), st.just(float("nan")))


def spectrum_of(name: str) -> torch.Tensor:
    return torch.tensor(SPECTRA[name] / SPECTRA[name].sum()).unsqueeze(0)


def delta_of(λ: np.ndarray, d: int, other: int, seed: int) -> torch.Tensor:
    """A delta of squared singular values λ in random directions."""
    generator = np.random.default_rng(seed)
    n = len(λ)
    U, V = (reference.haar_basis(size, n, generator) for size in (d, other))
    return torch.tensor(U * np.sqrt(λ) @ V.T)


@pytest.fixture(scope="module")
def haar() -> dict[tuple[str, int], np.ndarray]:
    """Fractions of each spectrum in independent Haar-random subspaces, drawn by QR."""
    generator = np.random.default_rng(20)
    squares = {k: np.linalg.qr(generator.standard_normal((DRAWS, D, k)))[0] ** 2 for k in RANKS}
    return {(name, k): squares[k].sum(-1)[:, : len(λ)] @ (λ / λ.sum()) for name, λ in SPECTRA.items() for k in RANKS}


# --- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", RANKS)
def test_under_the_null_relative_averages_one_with_the_exact_variance(
    haar: dict[tuple[str, int], np.ndarray], name: str, k: int
) -> None:
    fractions = haar[name, k]
    mean, variance = isotropic_null(delta_of(SPECTRA[name], D, D, seed=3), k)
    assert mean == k / D
    assert fractions.mean() * D / k == pytest.approx(1, abs=4 * fractions.std() / np.sqrt(DRAWS) * D / k)
    squares = (fractions - mean) ** 2
    assert squares.mean() == pytest.approx(variance.item(), abs=4 * squares.std() / np.sqrt(DRAWS))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_isotropic_null_reads_either_orientation(dtype: torch.dtype, tolerance: float) -> None:
    delta = torch.stack([delta_of(np.arange(1.0, 6), 12, 7, seed=s) for s in (0, 1)]).to(dtype)
    λ = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    purity = (λ**2).sum(-1) / λ.sum(-1) ** 2
    truth = 2 * 3 * (12 - 3) * (12 * purity - 1) / (12**2 * 11 * 14)
    np.testing.assert_allclose(isotropic_null(delta, 3)[1], truth, rtol=tolerance)
    np.testing.assert_allclose(isotropic_null(delta.mT, 3, residual_axis=-1)[1], truth, rtol=tolerance)
    np.testing.assert_allclose(isotropic_null(100 * delta, 3)[1], truth, rtol=tolerance)


@pytest.mark.parametrize(("name", "d", "k"), CUMULANT_CASES)
def test_cumulants_agree_with_sampling(name: str, d: int, k: int) -> None:
    fractions = haar_leverages(d, k, 5)[:, : len(SPECTRA[name])].double() @ spectrum_of(name)[0]
    batches = np.stack([
        (np.var(f), stats.skew(f), stats.kurtosis(f)) for f in np.array_split(fractions.numpy(), 20)
    ])  # fmt: skip
    ours = [c.item() for c in fraction_cumulants(spectrum_of(name), d, k)]
    whole = np.var(fractions.numpy()), stats.skew(fractions.numpy()), stats.kurtosis(fractions.numpy())
    spread = batches.std(0) / np.sqrt(len(batches))
    for value, sampled, error in zip(ours, whole, spread, strict=True):
        assert value == pytest.approx(sampled, abs=5 * error + 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_cumulants_of_a_rank_one_delta_are_those_of_its_beta(k: int) -> None:
    d = 6
    law = stats.beta(k / 2, (d - k) / 2)
    truth = law.stats("vsk")
    ours = [c.item() for c in fraction_cumulants(torch.ones(1, 1), d, k)]
    np.testing.assert_allclose(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, 30, 47])
def test_haar_leverages_have_the_law_of_a_projections_diagonal(k: int) -> None:
    leverages = haar_leverages(D, k, 0)
    assert leverages.shape == (HAAR_DRAWS, D)
    np.testing.assert_allclose(leverages.sum(-1), k, rtol=1e-4)
    assert stats.kstest(leverages[:4000, 7].numpy(), stats.beta(k / 2, (D - k) / 2).cdf).pvalue > 1e-3


# --- p-values ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", RANKS)
def test_under_the_null_p_is_uniform(haar: dict[tuple[str, int], np.ndarray], name: str, k: int) -> None:
    fractions = torch.tensor(haar[name, k])
    p, below, method = IsotropicNull(D, seed=1).tails(spectrum_of(name).expand(DRAWS, -1), k, fractions)
    if k == 1 or name == "rank 1":
        assert set(method) == {"exact"}
    else:
        # One law for the middle, which the spectrum decides, and the saddlepoint for either tail.
        middle = "beta" if beta_disagreement(spectrum_of(name), D, k).item() <= QUANTILE_TOLERANCE else "draws"
        assert set(method) == {middle, "saddlepoint"}
        f = fractions.unsqueeze(-1)
        copies = torch.tensor([[k, D - k]], dtype=torch.float64).expand(DRAWS, -1)
        tails = rotation_tails(torch.cat([1 - f, -f], -1), copies, spectrum_of(name).expand(DRAWS, -1), D)
        far = tails.numpy().min(0) < FAR
        assert ((method == "saddlepoint") == far).all()
        np.testing.assert_allclose([p[far], below[far]], tails.numpy()[:, far], rtol=1e-9)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    for α in (0.05, 0.01):
        assert (p <= α).mean() == pytest.approx(α, abs=4 * np.sqrt(α * (1 - α) / DRAWS))


@pytest.mark.parametrize(
    ("name", "middle", "tail"),
    [("flat", "draws", "saddlepoint"), ("one spike", "draws", "saddlepoint"), ("rank 1", "exact", "exact")],
)
def test_methods_at_k_four(name: str, middle: str, tail: str) -> None:
    fractions = torch.tensor([0.1, 0.2], dtype=torch.float64)
    method = IsotropicNull(D, seed=0).tail(spectrum_of(name).expand(2, -1), 4, fractions)[1]
    assert method.tolist() == [middle, tail]


@functools.cache
def independent_leverages(d: int, k: int) -> torch.Tensor:
    seeds = range(999, 999 + -(-HAAR_DRAWS // len(haar_leverages(d, k, 999))))
    return torch.cat([haar_leverages(d, k, seed) for seed in seeds])


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("name", ["flat 1", "flat 2", "flat 32", "steep", "mild", "decaying", "two and bulk"])
@pytest.mark.parametrize("k", [2, 4, 16])
def test_where_the_code_says_beta_the_beta_holds(d: int, name: str, k: int) -> None:
    λ = {
        "flat 1": np.ones(1),
        "flat 2": np.ones(2),
        "flat 32": np.ones(32),
        "steep": np.arange(1.0, 33) ** -3,
        "mild": np.arange(1.0, d + 1) ** -0.5,
        "decaying": np.exp(-np.arange(32) / 8),
        "two and bulk": np.array([1.0, 1.0] + [0.02] * 30),
    }[name]
    λ = λ / λ.sum()
    spectrum = torch.tensor(λ).unsqueeze(0)
    method = IsotropicNull(d, seed=0).tail(spectrum, k, torch.tensor([k / d], dtype=torch.float64))[1][0]
    assert (method == "exact") == (name == "flat 1")  # a Beta, exactly so
    if method not in ("beta", "exact"):
        assert beta_disagreement(spectrum, d, k).item() > 0.03
        return
    # 200,000 draws on other seeds: 20,000 subspaces, ten permutations of the coordinates each.
    pool = independent_leverages(d, k)
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(d, generator=generator)[: len(λ)] for _ in range(10)]
    fractions = torch.cat([pool[:, order].double() @ spectrum[0] for order in orders])
    variance = isotropic_null(torch.diag(spectrum[0].sqrt()), k)[1].item() if len(λ) == d else None
    mean = k / d
    exact = fraction_cumulants(spectrum, d, k)[0].item()
    assert variance is None or variance == pytest.approx(exact, rel=1e-10)
    total = mean * (1 - mean) / exact - 1
    law = stats.beta(mean * total, (1 - mean) * total)
    for level in (0.95, 0.999):
        quantile = np.quantile(fractions.numpy(), level)
        # In standard deviations: the tolerance of 0.03, and three standard errors of the sampled quantile.
        noise = 3 * np.sqrt(level * (1 - level) / len(fractions)) / (law.pdf(quantile) * law.std())
        assert abs(quantile - law.ppf(level)) / law.std() < 0.03 + noise


def test_a_small_pool_is_stretched_by_permutations() -> None:
    λ = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    d, k = 400, 40  # fewer than HAAR_DRAWS Gaussian matrices fit
    draws = torch.cat(list(IsotropicNull(d, seed=2).draws(λ, k)))
    assert draws.shape == (HAAR_DRAWS, 1)
    assert len(haar_leverages(d, k, 2)) < HAAR_DRAWS
    variance, skewness, _ = (c.item() for c in fraction_cumulants(λ, d, k))
    assert draws.mean().item() == pytest.approx(k / d, rel=0.01)
    assert draws.var().item() == pytest.approx(variance, rel=0.05)
    assert stats.skew(draws[:, 0].numpy()) == pytest.approx(skewness, rel=0.2)


@pytest.mark.filterwarnings("error")
def test_tail_of_items_that_have_none() -> None:
    λ = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0]], dtype=torch.float64)
    x = torch.tensor([0.25, torch.nan, torch.nan, 0.9], dtype=torch.float64)
    for k in (1, 2):
        p, method = IsotropicNull(4, seed=0).tail(λ, k, x)
        assert np.isnan(p).tolist() == [True, True, True, False]
        assert method[:3].tolist() == ["none"] * 3
        assert method[3] != "none"


@pytest.mark.parametrize("k", [1, 2])
def test_a_delta_without_factors_has_no_tail(k: int) -> None:
    """An adapter leaves a matrix alone: its spectrum is empty."""
    nothing = torch.zeros(2, 0, dtype=torch.float64)
    *tails, method = IsotropicNull(4, seed=0).tails(nothing, k, torch.full((2,), torch.nan, dtype=torch.float64))
    assert np.isnan(tails).all()
    assert method.tolist() == ["none", "none"]


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_many_questions_are_answered_as_each_alone(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nulls, "_ITEMS", at_once)
    null = IsotropicNull(D, seed=0)
    x = torch.tensor([0.02, 0.2], dtype=torch.float64)
    asked = [(spectrum_of(name).expand(2, -1), k, x) for k in (1, 4) for name in ("one spike", "rank 1", "power law")]
    for one, told in zip(asked, null.tails_of(asked), strict=True):
        for together, alone in zip(told, null.tails(*one), strict=True):
            np.testing.assert_array_equal(together, alone)


def test_tail_depends_on_neither_scale_nor_company_nor_global_seed() -> None:
    null = IsotropicNull(D, seed=0)
    λ = torch.cat([spectrum_of("one spike"), spectrum_of("power law")])
    x = torch.tensor([0.3, 0.2], dtype=torch.float64)
    for k in RANKS:
        state = torch.get_rng_state()
        together = null.tail(λ, k, x)[0]
        assert torch.equal(torch.get_rng_state(), state)
        alone = [IsotropicNull(D, seed=0).tail(1e-6 * λ[i : i + 1], k, x[i : i + 1])[0][0] for i in range(2)]
        np.testing.assert_allclose(together, alone, rtol=1e-9)


# --- the exact tail of one direction -------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "r"), [(4, 1), (64, 1), (64, 32), (64, 63), (768, 1), (768, 64), (4096, 128)])
def test_flat_spectra_have_a_beta_tail(d: int, r: int) -> None:
    law = stats.beta(r / 2, (d - r) / 2)
    x = np.concatenate([np.linspace(0.01, 0.99, 25), law.isf(10.0 ** -np.arange(1, 290, 32)), [r / d]])
    x = x[(x > 0) & (x < 1) & (law.sf(x) > 1e-300)]
    spectrum = torch.full((len(x), r), 1 / r, dtype=torch.float64)
    p = fraction_tail_rank_one(spectrum, d, torch.tensor(x / r))
    np.testing.assert_allclose(p, law.sf(x), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["power law", "one spike"])
def test_other_spectra_agree_with_monte_carlo(name: str) -> None:
    draws = 400_000
    generator = np.random.default_rng(0)
    λ = spectrum_of(name)[0].numpy()
    squares = generator.standard_normal((draws, D)) ** 2
    fractions = squares @ λ / squares.sum(1)
    x = np.quantile(fractions, [0.001, 0.1, 0.5, 0.9, 0.99, 0.999])
    p = fraction_tail_rank_one(spectrum_of(name).expand(len(x), -1), D, torch.tensor(x)).numpy()
    sampled = (fractions[:, None] >= x).mean(0)
    np.testing.assert_allclose(p, sampled, atol=0, rtol=0.2)
    assert (np.abs(p - sampled) < 4 * np.sqrt(sampled * (1 - sampled) / draws)).all()


def test_two_eigenvalues_have_a_closed_form() -> None:
    """λ_1 and λ_2 fill R^d with multiplicities n and d − n: a Beta again, moved."""
    d, n, high, low = 40, 3, 0.2, 0.4 / 37
    λ = torch.tensor([high] * n + [low] * (d - n), dtype=torch.float64)
    x = np.linspace(low, high, 33)[1:-1]
    p = fraction_tail_rank_one(λ.expand(len(x), -1), d, torch.tensor(x))
    np.testing.assert_allclose(p, stats.beta(n / 2, (d - n) / 2).sf((x - low) / (high - low)), rtol=1e-9)


@pytest.mark.parametrize("x", [5e-324, 1e-300, 1e-160, 1e-100, 1e-33])
def test_a_fraction_of_nothing_but_rounding_has_p_one(x: float) -> None:
    p = fraction_tail_rank_one(spectrum_of("flat"), D, torch.tensor([x], dtype=torch.float64))
    assert p.item() == pytest.approx(1, abs=1e-12)


def test_draws_never_say_that_something_cannot_happen() -> None:
    """The observed one counts among them: (1 + more extreme) / (1 + draws)."""
    λ = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    tails = IsotropicNull(24, seed=0)._tails_by_draws(λ, 4, torch.tensor([2.0], dtype=torch.float64))
    assert tails.flatten().tolist() == [1 / (nulls.HAAR_DRAWS + 1), 1.0]


def test_edges_of_the_tail() -> None:
    λ = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    x = torch.tensor([0.6, 0.7, 1.0, 0.1, 0.05, 0.0, -1.0, torch.nan], dtype=torch.float64)
    p = fraction_tail_rank_one(λ.expand(len(x), -1), 3, x)
    assert p[:7].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert p[7].isnan()
    # With room beside the spectrum the smallest eigenvalue is 0.
    p = fraction_tail_rank_one(λ.expand(2, -1), 4, torch.tensor([0.0, 0.05], dtype=torch.float64))
    assert p[0] == 1
    assert 0.9 < p[1] < 1
    near = torch.tensor([0.6 - 1e-12, 0.6 - 1e-6, 0.1 + 1e-12], dtype=torch.float64)
    p = fraction_tail_rank_one(λ.expand(3, -1), 3, near)
    assert p.isfinite().all()
    assert 0 < p[0] < p[1] < 1e-4
    assert p[2] > 1 - 1e-4
    nothing = torch.tensor([1e-30, 1e-55, 1e-99], dtype=torch.float64)
    assert (fraction_tail_rank_one((λ[:2] / λ[:2].sum()).expand(3, -1), 3, nothing) > 1 - 1e-12).all()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1e-4, 1), min_size=2, max_size=10), st.integers(0, 20), st.data())
def test_the_tail_falls(values: list[float], room: int, data: st.DataObject) -> None:
    λ = torch.tensor(values, dtype=torch.float64)
    λ = λ / λ.sum()
    x = torch.tensor(sorted(data.draw(st.lists(st.floats(0, 1), min_size=6, max_size=6))), dtype=torch.float64)
    p = fraction_tail_rank_one(λ.expand(6, -1), len(λ) + room, x)
    assert bool((p.diff() <= 1e-7).all())
    assert bool(((p >= 0) & (p <= 1)).all())


# --- false discovery -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(PROBABILITIES, min_size=1, max_size=12), st.booleans())
def test_adjusted_p_equals_a_loop(p: list[float], yekutieli: bool) -> None:
    method: Literal["benjamini-hochberg", "benjamini-yekutieli"]
    method = "benjamini-yekutieli" if yekutieli else "benjamini-hochberg"
    q = adjusted_p(np.array(p), method)
    tested = [v for v in p if not np.isnan(v)]
    assert np.isnan(q).tolist() == np.isnan(p).tolist()
    np.testing.assert_allclose(q[~np.isnan(q)], reference.adjusted_p(tested, yekutieli), rtol=1e-10)
    if tested:
        peer = stats.false_discovery_control(tested, method="by" if yekutieli else "bh")
        np.testing.assert_allclose(q[~np.isnan(q)], peer, rtol=1e-10)


def test_messages() -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"expected a rank above 0 and below 4, got {k}; pass ranks that are"):
            isotropic_null(torch.eye(4), k)
        with pytest.raises(ValueError, match="expected a rank above 0 and below 4"):
            IsotropicNull(4, seed=0).tail(torch.ones(1, 2), k, torch.ones(1))
