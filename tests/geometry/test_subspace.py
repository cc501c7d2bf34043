"""Bases: how they are made, ordered and compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.subspace import (
    Subspace,
    leading_directions,
    ordered_eigh,
    principal_subspace,
    random_subspace,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.data())
def test_principal_angles_and_overlap(d: int, data: st.DataObject) -> None:
    k1, k2 = data.draw(st.integers(1, d)), data.draw(st.integers(1, d))
    first, second = random_subspace(d, k1, seed=data.draw(st.integers(0, 99))), random_subspace(d, k2, seed=1000)
    angles = first.principal_angles(second)
    truth = np.sort(linalg.subspace_angles(first.basis.numpy(), second.basis.numpy()))
    np.testing.assert_allclose(angles, truth, atol=1e-7)
    assert first.overlap(second) == pytest.approx((np.cos(truth) ** 2).mean(), abs=1e-12)
    assert first.overlap(second) == pytest.approx(second.overlap(first), abs=1e-12)


@pytest.mark.parametrize("angle", [1e-10, 1e-4, 0.3, math.pi / 2 - 1e-10, math.pi / 2])
def test_angles_keep_their_digits_at_both_ends(angle: float) -> None:
    plane = Subspace(torch.eye(5, dtype=torch.float64)[:, :2])
    tilted = torch.zeros(5, 2, dtype=torch.float64)
    tilted[0, 0] = 1
    tilted[1, 1], tilted[2, 1] = math.cos(angle), math.sin(angle)
    angles = plane.principal_angles(Subspace(tilted))
    assert angles[0].item() == 0
    assert angles[1].item() == pytest.approx(angle, rel=1e-14)


def test_complement_completes_the_space() -> None:
    plane = random_subspace(7, 3, seed=0)
    rest = plane.complement()
    both = torch.cat([plane.basis, rest.basis], 1)
    torch.testing.assert_close(both.mT @ both, torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0)
    assert plane.overlap(rest) < 1e-24
    assert rest.name == "complement of random[0]"
    assert random_subspace(4, 4, seed=0).complement().rank == 0
    assert Subspace(plane.basis.float()).complement().basis.dtype == torch.float32


def test_truncate_keeps_the_strongest() -> None:
    subspace = principal_subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0])), name="x")
    top = subspace.truncate(2)
    assert top.eigenvalues is not None
    assert (top.eigenvalues.tolist(), top.name, top.d, top.rank) == ([3.0, 2.0], "x", 3, 2)
    assert top.basis.abs().tolist() == [[0, 0], [1, 0], [0, 1]]


def test_random_subspace_is_haar() -> None:
    d, k, draws = 6, 2, 3000
    bases = torch.stack([random_subspace(d, k, seed=seed).basis for seed in range(draws)])
    # Every entry of a column: mean 0, its square Beta(1/2, (d − 1)/2), and both columns alike.
    assert bases.mean(0).abs().max() < 4.5 / math.sqrt(d * draws)
    for row, column in [(0, 0), (5, 0), (0, 1), (3, 1)]:
        assert stats.kstest(bases[:, row, column].square().numpy(), stats.beta(0.5, (d - 1) / 2).cdf).pvalue > 1e-3
    # ‖Qᵀv‖² of any fixed v: Beta(k/2, (d − k)/2).
    v = torch.nn.functional.normalize(gaussian(d), dim=0)
    shares = (bases.mT @ v).square().sum(-1).numpy()
    assert stats.kstest(shares, stats.beta(k / 2, (d - k) / 2).cdf).pvalue > 1e-3


def test_random_subspace_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_subspace(8, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.basis, random_subspace(8, 3, seed=5).basis)
    assert not torch.equal(first.basis, random_subspace(8, 3, seed=6).basis)


@pytest.mark.parametrize("shape", [(5, 5), (3, 8, 8)])
def test_ordered_eigh(shape: tuple[int, ...]) -> None:
    X = gaussian(*shape)
    M = X @ X.mT
    λ, Q = ordered_eigh(M)
    np.testing.assert_allclose(λ, np.linalg.eigvalsh(M.numpy())[..., ::-1], rtol=1e-10)
    torch.testing.assert_close(Q @ torch.diag_embed(λ) @ Q.mT, M, rtol=1e-10, atol=1e-10)
    assert bool((Q.gather(-2, Q.abs().argmax(-2, keepdim=True)) > 0).all())


def test_leading_directions_come_in_the_same_order() -> None:
    X = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, Q = ordered_eigh(X.mT @ X)
    cosines = leading_directions(X.mT @ X, 4).mT @ Q[:, :4]
    torch.testing.assert_close(cosines.abs(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)


def test_ordered_eigh_has_one_answer() -> None:
    X = gaussian(3, 8, 8)
    M = X @ X.mT
    Q = ordered_eigh(M)[1]
    assert torch.equal(ordered_eigh(M.clone())[1], Q)
    # The same matrix alone, in another place of the batch, transposed, rounded otherwise: no sign turns.
    alone = torch.stack([ordered_eigh(m)[1] for m in M])
    for again in (alone, ordered_eigh(M.flip(0))[1].flip(0), ordered_eigh(M.mT)[1]):
        torch.testing.assert_close(again, Q, atol=1e-9, rtol=0)
    torch.testing.assert_close(ordered_eigh(M.float())[1].double(), Q, atol=1e-3, rtol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_principal_subspace_from_moments(centered: bool) -> None:
    rows = gaussian(50, 6) * torch.arange(1, 7) + 5
    moments = StreamingMoments(6)
    moments.update(rows)
    subspace = principal_subspace(moments, centered=centered, name="u")
    x = (rows - rows.mean(0) if centered else rows).numpy()
    _, σ, Vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(subspace.eigenvalues, σ**2 / 50, rtol=1e-10)
    np.testing.assert_allclose(np.abs((Vt @ subspace.basis.numpy()).diagonal()), 1, rtol=1e-10)


def test_principal_subspace_clamps_what_rounding_made_negative() -> None:
    v = gaussian(9, 1)
    eigenvalues = principal_subspace(v @ v.mT).eigenvalues
    assert eigenvalues is not None
    assert eigenvalues.min() == 0


def test_callers_precision_is_neither_used_nor_refused() -> None:
    X = gaussian(200, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plane = Subspace(torch.linalg.qr(X.float()).Q)
        assert principal_subspace(X @ X.mT).rank == plane.rank == 200
    torch.set_float32_matmul_precision("medium")
    try:
        assert random_subspace(200, 100, seed=0).rank == 100
    finally:
        torch.set_float32_matmul_precision("highest")


def test_messages() -> None:
    plane = random_subspace(4, 2, seed=0)
    with pytest.raises(ValueError, match="expected at most 2 columns in R\\^2, got 3"):
        Subspace(torch.eye(3)[:2])
    with pytest.raises(ValueError, match=r"expected 2 eigenvalues, got \(3,\)"):
        Subspace(plane.basis, torch.ones(3))
    with pytest.raises(ValueError, match="expected eigenvalues that descend, .*; pass the columns in that order"):
        Subspace(plane.basis, torch.tensor([1.0, 2.0]))
    for bad in (2 * plane.basis, plane.basis * torch.nan, plane.basis[:, [0, 0]]):
        with pytest.raises(ValueError, match=r"expected orthonormal columns, .*pass torch\.linalg\.qr\(basis\)\.Q"):
            Subspace(bad)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"expected a rank from 1 to 2, got {k}"):
            plane.truncate(k)
    with pytest.raises(
        ValueError, match="expected directions in R\\^4, got a subspace of R\\^5; pass bases of this model"
    ):
        plane.overlap(random_subspace(5, 2, seed=0))
    with pytest.raises(ValueError, match="expected a rank from 1 to 4, got 5"):
        random_subspace(4, 5, seed=0)
    with pytest.raises(ValueError, match="pass the covariance itself"):
        principal_subspace(torch.eye(2), centered=True)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 512])
def test_an_eigensolve_is_the_same_wherever_it_runs(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4 * d, d, dtype=torch.float64, generator=generator)
    symmetric = X.mT @ X
    (λ, Q), (λ_cuda, Q_cuda) = ordered_eigh(symmetric), ordered_eigh(symmetric.cuda())
    assert Q_cuda.device.type == "cpu"
    torch.testing.assert_close(λ_cuda, λ)
    torch.testing.assert_close(Q_cuda.abs(), Q.abs(), atol=1e-8, rtol=1e-6)
