"""Semi-NMF: never rises, never below what is possible, what it says of itself is true."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference_tangents as reference
from tl_asymmetry.geometry import nonnegative, semi_nmf


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(samples=200, rank=4, d=12, seed=0):
    """Rows that really are sums of a few directions, with sparse codes."""
    generator = torch.Generator().manual_seed(seed)
    Z = torch.rand(samples, rank, generator=generator, dtype=torch.float64)
    Z *= torch.rand(samples, rank, generator=generator) < 0.4
    return Z, gaussian(rank, d, seed=seed + 1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([-3.0, 0, 5])
)
def test_objective_never_rises_and_is_the_true_one(samples, d, rank, seed, mean):
    rank = min(rank, samples, d)
    A = gaussian(samples, d, seed=seed) + mean
    fit = semi_nmf(A, rank, seeds=(seed,), max_iter=60, tol=0.0)
    assert all(after <= before for before, after in zip(fit.history, fit.history[1:], strict=False))
    assert bool((fit.Z >= 0).all())
    energy = A.square().sum().item()
    naive = reference.semi_nmf_objective(A.numpy(), fit.Z.numpy(), fit.D.numpy())
    assert fit.objective == pytest.approx(naive, abs=1e-9 * energy)
    assert fit.relative_error == pytest.approx(naive / energy, abs=1e-9)
    # no factorisation of this rank, of whatever sign, is better than the truncated SVD
    assert naive >= torch.linalg.svdvals(A)[rank:].square().sum().item() - 1e-9 * energy


def test_ends_where_neither_side_can_improve():
    A = gaussian(150, 10) + 1
    fit = semi_nmf(A, 4, seeds=(0,), max_iter=5000, tol=0.0)
    residual = A - fit.Z @ fit.D
    scale = A.square().sum()
    assert (fit.Z.mT @ residual).abs().max() < 1e-9 * scale  # D is the least-squares solution
    slope = -residual @ fit.D.mT  # of half the objective in Z: not negative where Z is 0, zero where it is not
    assert slope.min() > -1e-3 * scale**0.5
    assert (slope * fit.Z).abs().max() < 1e-3 * scale**0.5


def test_finds_the_span_rows_are_made_of():
    Z, D = parts()
    fit = semi_nmf(Z @ D, 4, seeds=range(4), max_iter=3000, tol=1e-10)
    assert fit.relative_error < 1e-4
    Q, P = (torch.linalg.qr(basis.mT).Q for basis in (fit.D, D))
    assert torch.linalg.svdvals(Q.mT @ P).min() > 1 - 1e-6


def test_best_start_is_kept_and_spread_told():
    A = gaussian(120, 9)
    one_by_one = [semi_nmf(A, 3, seeds=(seed,), max_iter=20).objective for seed in range(4)]
    fit = semi_nmf(A, 3, seeds=range(4), max_iter=20)
    assert fit.objectives == tuple(one_by_one)
    assert fit.objective == min(one_by_one) == fit.history[-1]


def test_stability():
    Z, D = parts(rank=3)
    alike = semi_nmf(Z @ D, 3, seeds=(1, 1, 1))
    assert alike.stability.tolist() == pytest.approx([1, 1, 1])
    noise = semi_nmf(gaussian(100, 30), 8, seeds=range(3), max_iter=30)
    assert noise.stability.mean() < 0.9
    assert semi_nmf(Z @ D, 3, seeds=(0,)).stability.isnan().all()


@pytest.mark.slow
def test_a_half_space_makes_it_as_good_as_pca():
    """Gillis & Kumar 2015: rows on one side of a plane have a semi-NMF as good as any factorisation."""
    A = gaussian(300, 20) + 4
    best = torch.linalg.svdvals(A)[5:].square().sum().item()
    fit = semi_nmf(A, 5, seeds=range(3), max_iter=3000, tol=1e-9)
    assert fit.objective < 1.01 * best


@pytest.mark.parametrize("rows", [2050, 5000])
def test_blocks_of_rows_change_nothing(rows, monkeypatch):
    A = gaussian(rows, 6) + 1
    whole = semi_nmf(A, 3, seeds=(0,), max_iter=10, tol=0.0)
    monkeypatch.setattr(nonnegative, "_ROWS_PER_BLOCK", 177)
    blocks = semi_nmf(A, 3, seeds=(0,), max_iter=10, tol=0.0)
    assert torch.allclose(whole.Z, blocks.Z, atol=1e-9)
    assert whole.objective == pytest.approx(blocks.objective, rel=1e-12)


def test_small_remainders_keep_their_digits_in_float32():
    """Massive activations: what is left over is 1e-8 of ‖A‖², less than the rounding of ‖A‖² itself."""
    A = (1e-3 * gaussian(300, 12) + 5).float()
    fit = semi_nmf(A, 4, seeds=(0,), max_iter=100)
    naive = reference.semi_nmf_objective(*(x.double().numpy() for x in (A, fit.Z, fit.D)))
    assert fit.relative_error < 1e-7
    assert fit.objective == pytest.approx(naive, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    A = (gaussian(200, 12) + 2).to(dtype)
    exact = semi_nmf(A.double(), 4, seeds=(0,), max_iter=100)
    fit = semi_nmf(A, 4, seeds=(0,), max_iter=100)
    assert fit.Z.dtype == fit.D.dtype == torch.float32
    assert fit.objective == pytest.approx(exact.objective, rel=1e-3)
    naive = reference.semi_nmf_objective(*(x.double().numpy() for x in (A, fit.Z, fit.D)))
    assert fit.objective == pytest.approx(naive, rel=1e-6)
    assert np.all(np.diff(fit.history) <= 0)


def test_fewer_distinct_rows_than_directions():
    A = gaussian(2, 6).repeat_interleave(10, 0)
    fit = semi_nmf(A, 5)
    assert fit.relative_error < 1e-12
    assert torch.isfinite(fit.D).all()


def test_draws_from_its_own_seed(unchecked_types):
    A = gaussian(50, 6)
    before = torch.random.get_rng_state()
    assert torch.equal(semi_nmf(A, 3, max_iter=20).D, semi_nmf(A, 3, max_iter=20).D)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(rank=0), "expected a rank from 1 to 6, got 0"),
        (dict(rank=7), "expected a rank from 1 to 6, got 7"),
        (dict(rank=2, seeds=()), "expected at least one seed"),
        (dict(rank=2, tol=-1.0), "expected tol >= 0"),
        (dict(rank=2, max_iter=0), "max_iter >= 1"),
    ],
)
def test_refuses(arguments, text, unchecked_types):
    with pytest.raises(ValueError, match=text):
        semi_nmf(gaussian(10, 6), **arguments)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_refuses_rows_without_meaning(value):
    with pytest.raises(ValueError, match="expected finite rows that are not all zero"):
        semi_nmf(torch.full((4, 3), value), 2)


@pytest.mark.gpu
def test_on_a_gpu():
    A = gaussian(500, 20) + 1
    here, there = semi_nmf(A, 4, seeds=(0,), max_iter=20), semi_nmf(A.cuda(), 4, seeds=(0,), max_iter=20)
    assert there.Z.is_cuda
    assert there.objective == pytest.approx(here.objective, rel=1e-6)
