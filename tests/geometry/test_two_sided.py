"""The two-sided share: its moments and tail against draws of Haar frames, its rounding against the definition."""

import functools

import pytest
import torch

from tests.oracles.naive_spectra import haar, share_between
from tl_asymmetry.geometry.two_sided import (
    rounding_profile_between,
    two_sided_moments,
    two_sided_share,
    two_sided_tail,
)

SPECTRA = {"rank one": [1.0], "falling": [i**-0.5 for i in range(1, 17)], "flat": [1.0] * 16}


@functools.lru_cache(maxsize=1)  # the cases of one shape stand together
def frames(m, n, k, j, count=20_000):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.linalg.qr(torch.randn(count, *shape, generator=generator, dtype=torch.float64)).Q
        for shape in ((m, k), (n, j))
    )


def draws(spectrum, m, n, k, j):
    """Shares of one delta between drawn frames: its singular vectors may be the axes."""
    s = torch.tensor(spectrum, dtype=torch.float64)
    s = s / s.norm()
    U, V = (frame[:, : len(s)] for frame in frames(m, n, k, j))
    return (U.mT @ (s[:, None] * V)).square().sum((-2, -1)), s.pow(4).sum()[None]


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize(("m", "n", "k", "j"), [(48, 24, 4, 4), (20, 40, 3, 7), (24, 16, 5, 12)])
def test_moments_and_tail_against_draws(spectrum, m, n, k, j):
    shares, purity = draws(spectrum, m, n, k, j)
    mean, variance = two_sided_moments(purity, m, n, k, j)
    assert float(shares.mean()) == pytest.approx(mean, abs=5 * float(shares.std()) / len(shares) ** 0.5)
    if variance > 1e-12:
        assert float(shares.var()) == pytest.approx(float(variance), rel=0.08)
    for level, low, high in ((0.05, 0.85, 1.15), (0.01, 0.55, 1.6)):
        p = two_sided_tail(shares.quantile(1 - level)[None], purity, m, n, k, j)
        if variance > 1e-12:
            assert low < float(p) / level < high


def test_a_delta_of_rank_one_has_the_product_of_two_beta_laws():
    from scipy import integrate, stats

    m, n, k, j, x = 30, 12, 3, 2, 0.2
    left, right = stats.beta(k / 2, (m - k) / 2), stats.beta(j / 2, (n - j) / 2)
    exact = integrate.quad(lambda a: left.pdf(a) * right.sf(x / a), x, 1, epsabs=1e-14)[0]
    one = torch.ones(1, dtype=torch.float64)
    assert float(two_sided_tail(x * one, one, m, n, k, j)) == pytest.approx(exact, rel=1e-5)


def test_what_has_no_variance_has_no_test():
    half = torch.full((1,), 0.5, dtype=torch.float64)
    assert two_sided_tail(2 * half, half, 6, 4, 6, 4).isnan().all()
    assert two_sided_tail(half * torch.nan, half, 6, 4, 2, 2).isnan().all()
    mean, variance = two_sided_moments(half, 6, 4, 6, 4)
    assert (mean, float(variance)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="expected a frame of 1 to 4 columns, got 5; pass such a rank"):
        two_sided_moments(half, 6, 4, 2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_against_loops(dtype):
    generator = torch.Generator().manual_seed(3)
    ΔW = torch.randn(2, 9, 5, generator=generator).to(dtype)
    U, V = haar(9, 3, generator), haar(5, 2, generator)
    shares = two_sided_share(ΔW, U.expand(2, -1, -1), V.expand(2, -1, -1))
    expected = [share_between(ΔW[head].double(), U, V) for head in range(2)]
    assert shares.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_share_of_rounding_is_that_of_rounded_weights():
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(40, 30, generator=generator) * torch.linspace(0.1, 4, 30)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    frames = U[None, :, :4], Vh.T[None, :, :4]
    noises = [W * (1 + 0.02 * torch.randn(40, 30, generator=generator)) for _ in range(400)]
    shares = torch.stack([two_sided_share((w.bfloat16().float() - w)[None], *frames) for w in noises])
    assert float(rounding_profile_between(W[None], *frames)[0, 3]) == pytest.approx(float(shares.mean()), rel=0.08)
