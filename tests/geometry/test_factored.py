"""Thin factors against the product multiplied out, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference
from tl_asymmetry.geometry.factored import factored_energy, factored_svd

SIZES = st.integers(1, 9)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(d=SIZES, e=SIZES, r=st.integers(0, 12), heads=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_svd_and_energies_are_those_of_the_product(d: int, e: int, r: int, heads: int, seed: int) -> None:
    left, right = gaussian(1, d, r, seed=seed), gaussian(heads, e, r, seed=seed + 1000)
    product = (left @ right.mT).numpy()
    U, σ, V = factored_svd(left, right)
    assert σ.shape == (heads, max(1, min(d, e, r)) if r else 1)
    np.testing.assert_allclose(
        np.einsum("...di,...i,...ei->...de", U, σ, V), product, atol=1e-10 * (1 + abs(product).max())
    )
    truth = np.linalg.svd(product, compute_uv=False)[..., : σ.shape[-1]]
    np.testing.assert_allclose(σ, truth, atol=1e-10 * (1 + truth.max()))
    basis = torch.linalg.qr(gaussian(d, d, seed=seed + 5)).Q
    energies = np.stack([((basis.numpy().T @ head) ** 2).sum(1) for head in product])
    np.testing.assert_allclose(factored_energy(left, right, basis), energies, atol=1e-10 * (1 + energies.max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision_is_taken_and_float64_given(dtype: torch.dtype) -> None:
    left, right = gaussian(8, 3).to(dtype), gaussian(5, 3, seed=1).to(dtype)
    σ = factored_svd(left.float(), right.float())[1]
    exact = np.linalg.svd(left.double().numpy() @ right.double().numpy().T, compute_uv=False)[:3]
    assert σ.dtype == torch.float64
    np.testing.assert_allclose(σ, exact, rtol=1e-12)
    profile = factored_energy(left, right, torch.eye(8)) / σ.square().sum()
    np.testing.assert_allclose(
        profile, reference.energy_profile(left.double().numpy() @ right.double().numpy().T, np.eye(8)), rtol=1e-10
    )
