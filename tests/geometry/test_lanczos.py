"""The largest eigenvalue against a dense solve."""

from __future__ import annotations

import pytest
import torch

from tl_asymmetry.geometry.lanczos import largest_eigenvalue


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_equals_the_dense_one(decay):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(80, 80, generator=generator, dtype=torch.float64)).Q
    λ = torch.arange(1, 81, dtype=torch.float64) ** -decay
    M = Q @ torch.diag(λ) @ Q.T
    value, residual = largest_eigenvalue(lambda v: M @ v, 80, tolerance=1e-8)
    assert value == pytest.approx(1.0, abs=1e-9)
    assert residual <= 1e-8


def test_stops_early_with_an_honest_residual():
    M = torch.diag(torch.linspace(0.9, 1, 200, dtype=torch.float64))
    value, residual = largest_eigenvalue(lambda v: M @ v, 200, tolerance=1e-10, most=5)
    assert value <= 1
    assert residual > 1e-10
    assert (torch.linspace(0.9, 1, 200) - value).abs().min() <= residual * value


def test_zero_and_rank_one():
    assert largest_eigenvalue(lambda v: 0 * v, 10) == (0.0, 0.0)
    u = torch.arange(10, dtype=torch.float64)
    value, residual = largest_eigenvalue(lambda v: u * (u @ v), 10, tolerance=1e-9)
    assert value == pytest.approx((u @ u).item())
    assert residual < 1e-9
