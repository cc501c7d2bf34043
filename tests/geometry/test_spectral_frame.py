"""Frames against a full SVD; rotation by chance against Haar draws; turning keeps what it must."""

import numpy as np
import pytest
import torch

from tests.oracles.naive_spectra import haar
from tl_asymmetry.geometry.spectral_frame import (
    at_random_orientation,
    expected_rotation,
    intruders,
    leading_frame,
    rotation,
    spectral_frame,
)


def weights(m, n, seed=0, heads=2, dtype=torch.float32):
    return torch.randn(heads, m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_frame_is_the_svd(shape, dtype):
    W = weights(*shape, dtype=dtype)
    U, σ, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    frame = spectral_frame(W)
    torch.testing.assert_close(frame.values, σ, rtol=1e-10, atol=1e-10)
    for ours, theirs in ((frame.left(5), U[..., :5]), (frame.right(5), Vh.mT[..., :5])):
        torch.testing.assert_close((ours.mT @ theirs).abs(), torch.eye(5).double().expand(2, -1, -1), rtol=0, atol=1e-8)
    for cosines, vectors, axis in (
        (frame.left_cosines, U, shape[0]),
        (frame.right_cosines, Vh.mT, shape[1]),
    ):
        v = haar(axis, 3, torch.Generator().manual_seed(1)).expand(2, -1, -1)
        torch.testing.assert_close(cosines(v), (v.mT @ vectors).abs(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(260, 280), (280, 260), (30, 12)])
def test_leading_vectors_alone_are_those_of_the_whole_frame(shape):
    W = weights(*shape)
    whole, leading = spectral_frame(W, longer=5), leading_frame(W, 5)
    torch.testing.assert_close(leading.values, whole.values[..., :5], rtol=1e-12, atol=0)
    for ours, theirs in ((leading.left(5), whole.left(5)), (leading.right(5), whole.right(5))):
        assert ours.shape == theirs.shape
        torch.testing.assert_close((ours.mT @ theirs).abs(), torch.eye(5).double().expand(2, -1, -1), rtol=0, atol=1e-9)


def test_a_weight_without_full_rank_has_no_direction_there():
    W = weights(20, 3) @ weights(3, 8, seed=1)
    frame = spectral_frame(W)
    left = frame.left(8)
    torch.testing.assert_close(left.mT @ left, torch.eye(8).double().expand(2, -1, -1), rtol=0, atol=1e-8)
    assert bool((frame.left_cosines(left)[..., 3:] == 0).all())


def test_rotation_is_the_mean_squared_sine():
    first, second = (haar(20, 4, torch.Generator().manual_seed(s))[None] for s in (0, 1))
    cosines = torch.linalg.svdvals(first.mT @ second)
    assert rotation(first, second).item() == pytest.approx((1 - cosines.square()).mean().item(), rel=1e-12)
    assert rotation(first, first).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_expected_rotation_and_turned_deltas_against_haar_draws(shape):
    m, n = shape
    W = torch.diag_embed(torch.linspace(6, 1, 16)).double()
    W = torch.nn.functional.pad(W, (0, n - 16, 0, m - 16))[None]
    Δ = 0.01 * weights(m, n, seed=2, heads=1, dtype=torch.float64)
    frame, s = spectral_frame(W), torch.linalg.svdvals(Δ[0])
    generator, turns = torch.Generator().manual_seed(3), np.random.default_rng(3)
    drawn = torch.stack([haar(m, 16, generator) @ torch.diag(s) @ haar(n, 16, generator).T for _ in range(300)])
    turned = torch.cat([at_random_orientation(Δ, turns) for _ in range(300)])
    expected = [side.item() for side in expected_rotation(frame.values, Δ.square().sum((-2, -1)), m, n, 3)]
    for deltas in (drawn, turned):
        others = spectral_frame(W + deltas)
        sides = ((frame.left(3), others.left(3)), (frame.right(3), others.right(3)))
        means = [rotation(ours.expand_as(theirs), theirs).mean().item() for ours, theirs in sides]
        assert means == pytest.approx(expected, rel=0.08)


def test_turning_keeps_singular_values_and_forgets_directions():
    Δ = torch.zeros(1, 32, 16)
    Δ[0, 0, 0] = 1.0
    turned = [at_random_orientation(Δ, np.random.default_rng(seed)) for seed in range(400)]
    for one in turned[:5]:
        torch.testing.assert_close(torch.linalg.svdvals(one), torch.linalg.svdvals(Δ), atol=1e-6, rtol=0)
    share = torch.stack([one.square()[0, :4, :4].sum() for one in turned])
    assert share.mean().item() == pytest.approx(4 * 4 / (32 * 16), rel=0.2)
    only_rows = at_random_orientation(Δ, np.random.default_rng(0), axes=(-2,))
    assert only_rows[0, :, 0].square().sum().item() == pytest.approx(1, rel=1e-6)


def test_intruders_are_those_that_resemble_none():
    cosines = torch.tensor([[[0.9, 0.1], [0.3, 0.4], [0.5, 0.0]]], dtype=torch.float64)
    assert intruders(cosines).tolist() == [[0, 1, 0]]
    assert intruders(cosines, threshold=0.95).tolist() == [[1, 1, 1]]


def test_first_order_is_not_taken_where_two_singular_values_nearly_meet():
    values = torch.tensor([[5.0, 3.0001, 3.0, 1.0]], dtype=torch.float64)
    energy = torch.tensor([1e-3], dtype=torch.float64)
    assert all(side.isinf().all() for side in expected_rotation(values, energy, 4, 6, 2))
    assert all(side.item() < 1e-3 for side in expected_rotation(values, energy, 4, 6, 1))
