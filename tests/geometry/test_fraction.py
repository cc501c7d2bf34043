"""Energy profiles against explicit projectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference
from tl_asymmetry.geometry.fraction import energy_profile, gram_energy, projected_energy, subspace_fraction

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, k, seed=seed)).Q


@pytest.mark.parametrize(("dtype", "tolerance"), [*PRECISIONS, (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("residual_axis", [-2, -1])
@pytest.mark.parametrize("shape", [(3, 10, 4), (3, 10, 25), (2, 3, 10, 4), (10, 4)])
def test_equals_explicit_projectors(
    shape: tuple[int, ...], residual_axis: int, dtype: torch.dtype, tolerance: float
) -> None:
    delta, basis = (1e-3 * gaussian(*shape)).to(dtype), orthonormal(10, 6)
    given_delta = delta.mT if residual_axis == -1 else delta
    profile = energy_profile(given_delta, basis, residual_axis=residual_axis)
    fraction = subspace_fraction(given_delta, basis, residual_axis=residual_axis)
    heads = reference.float64(delta).reshape(-1, *shape[-2:])
    truth = np.stack([reference.energy_profile(head, basis.numpy()) for head in heads])
    assert profile.dtype == fraction.dtype == torch.float64
    assert profile.shape == (*shape[:-2], 6)
    np.testing.assert_allclose(profile.reshape(-1, 6), truth, atol=tolerance, rtol=tolerance)
    whole = [reference.subspace_fraction(head, basis.numpy()) for head in heads]
    np.testing.assert_allclose(fraction.reshape(-1), whole, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_planted_delta_lies_wholly_in_its_subspace(dtype: torch.dtype, tolerance: float) -> None:
    basis = orthonormal(32, 32)
    delta = (basis[:, :4] @ gaussian(4, 9, seed=2)).to(dtype)
    curve = energy_profile(delta, basis).cumsum(-1)
    assert curve[2] < 0.999
    np.testing.assert_allclose(curve[3:], 1, rtol=tolerance)
    assert subspace_fraction(delta, basis[:, 4:]) < tolerance


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_rotations_leave_fractions_and_sums_alone(d: int, other: int, seed: int) -> None:
    delta, basis = gaussian(d, other, seed=seed), orthonormal(d, d, seed=seed + 1)
    profile = energy_profile(delta, basis)
    assert profile.sum().item() == pytest.approx(1, abs=1e-12)
    rotation, turn = orthonormal(d, d, seed=seed + 2), orthonormal(other, other, seed=seed + 3)
    np.testing.assert_allclose(energy_profile(rotation @ delta @ turn, rotation @ basis), profile, atol=1e-12)
    # Any other basis of the same subspace, any scale of the delta.
    k = max(1, d // 2)
    again = basis[:, :k] @ orthonormal(k, k, seed=seed + 4)
    fraction = subspace_fraction(-1e4 * delta, again).item()
    assert fraction == pytest.approx(profile[:k].sum().item(), abs=1e-12)


def test_zero_delta_is_undefined() -> None:
    delta = torch.stack([torch.zeros(4, 3), torch.ones(4, 3)])
    fraction = subspace_fraction(delta, torch.eye(4)[:, :1])
    assert fraction.isnan().tolist() == [True, False]
    assert fraction[1].item() == pytest.approx(0.25)


def test_gram_energy_is_the_same_and_never_negative() -> None:
    delta, basis = gaussian(3, 8, 20), orthonormal(8, 5)
    np.testing.assert_allclose(gram_energy(delta @ delta.mT, basis), projected_energy(delta, basis)[0], rtol=1e-10)
    # Directions orthogonal to a strong float32 delta: rounding leaves either sign.
    full = orthonormal(64, 64).float()
    planted = full[:, :1] @ gaussian(1, 100).float()
    assert gram_energy(planted @ planted.mT, full).min() >= 0


def test_callers_precision_is_not_used() -> None:
    delta, basis = gaussian(64, 32), orthonormal(64, 8)
    truth, gram = energy_profile(delta, basis), (delta @ delta.mT).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(energy_profile(delta.float(), basis.float()), truth, atol=1e-6)
        energies = gram_energy(gram, basis)
    np.testing.assert_allclose(energies, truth * delta.square().sum(), rtol=1e-5)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"expected residual_axis -2 \(read\) or -1 \(write\), got 0"):
        energy_profile(torch.ones(3, 2), torch.eye(3), residual_axis=0)
    with pytest.raises(ValueError, match=r"expected a delta with 3 entries on axis -2, got shape \(2, 3\)"):
        energy_profile(torch.ones(2, 3), torch.eye(3))
