"""Energy, anisotropy, controls and the rank test of a fixed basis."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.oracles import reference, reference_tangents
from tl_asymmetry.geometry import isoscore, random_subspace
from tl_asymmetry.geometry.tangent import (
    anisotropy_shares,
    control_size,
    control_subspaces,
    energies,
    factor_of,
    moment_energies,
    rank_p,
)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_and_bases(samples, d, rank, seed, decay=0.7):
    G = gaussian(samples, d, seed=seed) * torch.arange(1, d + 1).double() ** -decay
    Q = random_subspace(d, rank, seed=seed).basis
    return G, Q


# --- controls ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 20), st.integers(0, 1000))
def test_normal_controls_are_orthogonal_to_the_basis_and_of_its_rank(d, rank, seed):
    rank = min(rank, d // 2)
    Q = random_subspace(d, rank, seed=seed).basis
    N = control_subspaces(Q, 5, seed=seed)
    assert N.shape == (5, d, rank)
    assert (Q.mT @ N).abs().max() < 1e-10
    assert (N.mT @ N - torch.eye(rank).double()).abs().max() < 1e-10
    assert torch.equal(N, control_subspaces(Q, 5, seed=seed))


def test_normal_controls_of_a_float32_basis():
    Q = random_subspace(64, 16, seed=0).basis.float()
    assert (Q.double().mT @ control_subspaces(Q, 20, seed=0)).abs().max() < 1e-6


def test_haar_controls_ignore_the_basis():
    first, second = (control_subspaces(random_subspace(12, 3, seed=s).basis, 4, control="haar", seed=7) for s in (0, 1))
    assert torch.equal(first, second)
    assert (first.mT @ first - torch.eye(3).double()).abs().max() < 1e-12


def test_mean_energy_of_normal_controls_is_told_by_the_energy():
    """(1 − E) r / (d − r): the ratio to their mean holds no more than E."""
    G, Q = rows_and_bases(50, 20, 4, seed=3)
    own = energies(G, Q.unsqueeze(0)).item()
    mean = energies(G, control_subspaces(Q, 20_000, seed=1)).mean().item()
    assert mean == pytest.approx((1 - own) * 4 / 16, rel=0.01)


# --- energy and anisotropy --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40), st.integers(3, 20), st.integers(1, 6), st.integers(0, 1000), st.floats(0, 3))
def test_energy_and_anisotropy_are_those_of_the_projected_points(samples, d, rank, seed, decay):
    rank = min(rank, d - 2)
    G, Q = rows_and_bases(samples, d, rank, seed, decay)
    N = control_subspaces(Q, 3, control="haar", seed=seed)
    bases = torch.cat([Q.unsqueeze(0), N])
    centred = G - G.mean(0)
    iso, shares = anisotropy_shares(centred, bases)
    assert iso.item() == pytest.approx(reference.isoscore_star(G.numpy()), abs=1e-10)
    for i, basis in enumerate(bases):
        assert energies(G, bases)[i].item() == pytest.approx(
            reference_tangents.energy(G.numpy(), basis.numpy()), abs=1e-12
        )
        naive = reference_tangents.anisotropy(G.numpy(), basis.numpy())
        if samples > rank + 2:  # else hardly anything may be left
            assert shares[i].item() == pytest.approx(naive, abs=1e-10)
    M = G.mT @ G / samples
    assert torch.allclose(moment_energies(M, bases), energies(G, bases), atol=1e-12)
    C = centred.mT @ centred / samples
    from_moment = anisotropy_shares(factor_of(C), bases)
    assert from_moment[0].item() == pytest.approx(iso.item(), abs=1e-10)
    assert isoscore(C).item() == pytest.approx(iso.item(), abs=1e-10)


@pytest.mark.parametrize("spectrum", ["random", "flat", "one", "steep"])
def test_isotropy_is_isoscore_star_on_spectra(spectrum):
    λ = {
        "random": torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        "flat": torch.ones(30).double(),
        "one": torch.eye(30)[0].double(),
        "steep": 0.5 ** torch.arange(30).double(),
    }[spectrum]
    V = random_subspace(30, 30, seed=1).basis
    # points whose covariance has exactly these eigenvalues: ± √(n λ_i) v_i
    points = torch.cat([λ.sqrt().unsqueeze(1) * V.mT, -λ.sqrt().unsqueeze(1) * V.mT]) * math.sqrt(30)
    iso, _ = anisotropy_shares(points, V[:, :2].unsqueeze(0))
    assert iso.item() == pytest.approx(reference.isoscore_star(points.numpy()), abs=1e-10)


def test_heads_at_once_are_heads_one_by_one():
    G = gaussian(3, 10, 8)
    bases = control_subspaces(random_subspace(8, 2, seed=0).basis, 4, seed=0)
    assert torch.allclose(energies(G, bases), torch.stack([energies(g, bases) for g in G]))
    iso, shares = anisotropy_shares(G, bases)
    for i, g in enumerate(G):
        assert torch.allclose(anisotropy_shares(g, bases)[0], iso[i])
        assert torch.allclose(anisotropy_shares(g, bases)[1], shares[i])


def test_gradients_that_live_in_the_basis():
    Q = random_subspace(20, 4, seed=0).basis
    G = gaussian(30, 4) @ Q.mT
    bases = torch.cat([Q.unsqueeze(0), control_subspaces(Q, 20, seed=1)])
    energy = energies(G, bases)
    assert energy[0].item() == pytest.approx(1, abs=1e-12)
    assert energy[1:].max() < 1e-12
    assert rank_p(energy[0], energy[1:]).item() == 1 / 21
    _, shares = anisotropy_shares(G, bases)
    assert shares[0].isnan()  # nothing is left outside
    assert shares[1:].abs().max() < 1e-10


def test_zero_gradient_has_no_energy():
    bases = random_subspace(6, 2, seed=0).basis.unsqueeze(0)
    assert energies(torch.zeros(4, 6), bases).isnan().all()
    assert moment_energies(torch.zeros(6, 6), bases).isnan().all()
    iso, shares = anisotropy_shares(torch.zeros(4, 6), bases)
    assert iso.isnan()
    assert shares.isnan().all()
    assert rank_p(torch.tensor(torch.nan), torch.rand(5)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_rows_are_taken_as_they_are(dtype):
    G, Q = rows_and_bases(30, 12, 3, seed=0)
    bases = Q.unsqueeze(0)
    assert torch.equal(energies(G.to(dtype), bases), energies(G.to(dtype).double(), bases))


# --- the rank test ----------------------------------------------------------------------------------------------------


def test_rank_p_counts():
    assert rank_p(torch.tensor(0.5), torch.tensor([0.1, 0.5, 0.9])).item() == 3 / 4
    assert rank_p(torch.tensor([1.0, 0.0]), torch.tensor([[0.1, 0.5], [0.1, 0.5]])).tolist() == [1 / 3, 1]


def test_rank_p_of_a_flat_gradient_is_one():
    """Every subspace has the same energy: rounding must not make a winner."""
    flat = torch.linalg.qr(gaussian(16, 16)).Q
    bases = control_subspaces(random_subspace(16, 4, seed=0).basis, 20, control="haar", seed=5)
    energy = energies(flat, bases)
    assert rank_p(energy[0], energy[1:]).item() == 1


def test_haar_rank_p_is_uniform_over_its_cells():
    G, _ = rows_and_bases(40, 16, 4, seed=5, decay=1.5)
    M, trials, draws = G.mT @ G, 4200, 20
    bases = control_subspaces(torch.eye(16).double()[:, :4], trials * (draws + 1), control="haar", seed=11)
    energy = moment_energies(M, bases).reshape(trials, draws + 1)
    cell = (rank_p(energy[:, 0], energy[:, 1:]) * (draws + 1)).round().long() - 1
    counts = torch.bincount(cell, minlength=draws + 1).numpy()
    assert counts.sum() == trials
    assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.slow
def test_complement_rank_p_is_not_and_its_size_is_measured():
    G, _ = rows_and_bases(40, 16, 4, seed=5, decay=1.5)
    M, trials, draws = G.mT @ G, 1000, 20
    rejected = 0
    for trial in range(trials):
        Q = random_subspace(16, 4, seed=10_000 + trial).basis
        energy = moment_energies(M, torch.cat([Q.unsqueeze(0), control_subspaces(Q, draws, seed=trial)]))
        rejected += bool(rank_p(energy[0], energy[1:]) <= 0.05)
    size, simulations = control_size(torch.linalg.eigvalsh(M).unsqueeze(0), 4, draws, seed=1)
    error = math.sqrt(size[0] * (1 - size[0]) * (1 / simulations + 1 / trials))
    assert abs(rejected / trials - size[0]) < 4 * error
    assert size[0] > 0.05 + 4 * math.sqrt(0.05 * 0.95 / simulations)


def test_size_of_haar_controls_is_exact():
    sizes, simulations = control_size(torch.rand(3, 16).double(), 4, 20, control="haar")
    assert simulations == 0
    np.testing.assert_allclose(sizes, 1 / 21)
    assert control_size(torch.rand(1, 16), 4, 99, control="haar")[0][0] == pytest.approx(0.05)
    assert control_size(torch.rand(1, 16), 4, 10, control="haar")[0][0] == 0  # p cannot get below 1 / 11


def test_size_depends_on_the_spectrum_alone():
    λ = torch.arange(1, 13).double() ** -1
    sizes, simulations = control_size(torch.stack([λ, 7 * λ, torch.zeros(12).double()]), 3, 20, simulations=300, seed=2)
    assert simulations == 300
    assert sizes[0] == sizes[1]
    assert math.isnan(sizes[2])
    assert control_size(λ.unsqueeze(0), 3, 20, simulations=300, seed=2)[0][0] == sizes[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(rank=0), "expected a rank from 1 to 9"),
        (dict(rank=10), "expected a rank from 1 to 9"),
        (dict(rank=6), r'expected a rank of at most 5 .* got 6; pass a smaller rank or control="haar"'),
        (dict(rank=2, draws=0), "expected draws from 1 to 100,000"),
        (dict(rank=2, control="normal"), 'expected control "complement" or "haar"'),
    ],
)
def test_refuses(arguments, text, unchecked_types):
    settings = {"draws": 5, "control": "complement"} | arguments
    with pytest.raises(ValueError, match=text):
        control_size(torch.ones(1, 10), settings["rank"], settings["draws"], control=settings["control"])
    if settings["rank"]:
        with pytest.raises(ValueError, match=text):
            control_subspaces(
                torch.eye(10)[:, : settings["rank"]], settings["draws"], control=settings["control"], seed=0
            )


def test_draws_from_its_own_seed(unchecked_types):
    before = torch.random.get_rng_state()
    control_subspaces(torch.eye(8)[:, :2], 3, seed=0)
    control_size(torch.ones(1, 8), 2, 5, simulations=10)
    assert torch.equal(before, torch.random.get_rng_state())
