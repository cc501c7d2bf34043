"""Summaries of a spectrum against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.spectrum import (
    effective_rank,
    isoscore,
    marchenko_pastur_edge,
    participation_ratio,
    stable_rank,
)

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
SUMMARIES = (effective_rank, participation_ratio, stable_rank)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_summaries_equal_their_definitions(dtype: torch.dtype, tolerance: float) -> None:
    λ = torch.stack([torch.arange(1, 7).double() ** -p for p in (0, 0.5, 2)] + [torch.tensor([3.0, 0, 0, 1, 0, 0])])
    for row, ours in zip(λ.numpy(), zip(*(f(λ.to(dtype)).double() for f in SUMMARIES), strict=True), strict=True):
        truth = reference.effective_rank(row), row.sum() ** 2 / (row**2).sum(), row.sum() / row.max()
        np.testing.assert_allclose(ours, truth, rtol=tolerance)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_ranks_are_ordered_and_have_no_scale(values: list[float], scale: float) -> None:
    λ = torch.tensor(values, dtype=torch.float64)
    effective, participation, stable = (f(λ).item() for f in SUMMARIES)
    slack = 1 + 1e-9
    assert 1 <= stable * slack <= participation * slack**2 <= effective * slack**3 <= len(values) * slack**4
    assert [f(λ * scale).item() for f in SUMMARIES] == pytest.approx([effective, participation, stable], rel=1e-9)
    assert effective_rank(torch.cat([λ, torch.zeros(3)])).item() == pytest.approx(effective, rel=1e-12)


def test_what_rounding_made_negative_counts_as_nothing() -> None:
    λ = torch.tensor([2.0, 1.0, -1e-17], dtype=torch.float64)
    for f in SUMMARIES:
        assert f(λ).item() == pytest.approx(f(λ[:2]).item(), rel=1e-12)
        assert f(torch.zeros(3)).isnan()


@pytest.mark.parametrize("power", [0, 1, 3])
def test_isoscore_is_isoscore_star(power: int) -> None:
    points = gaussian(200, 7) * torch.arange(1, 8).double() ** -power + 10
    moments = StreamingMoments(7)
    moments.update(points)
    assert isoscore(moments.covariance).item() == pytest.approx(reference.isoscore_star(points.numpy()), abs=1e-10)
    assert isoscore(moments.covariance.float()).item() == pytest.approx(
        reference.isoscore_star(points.numpy()), abs=1e-5
    )


def test_isoscore_ends() -> None:
    v = gaussian(5, 1)
    assert isoscore(v @ v.mT).item() == pytest.approx(0, abs=1e-12)
    assert isoscore(torch.stack([torch.eye(5), 3 * torch.eye(5)])).tolist() == pytest.approx([1, 1])
    assert isoscore(torch.zeros(3, 3)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("γ", [0.25, 1, 2])
def test_marchenko_pastur_edge(γ: float, dtype: torch.dtype) -> None:
    """Float32 rows leave ~1e-8 in place of the zeros of a moment of more dimensions than samples."""
    samples = 400
    d, σ2 = int(γ * samples), 2.5
    moments = StreamingMoments(d)
    moments.update((math.sqrt(σ2) * gaussian(samples, d)).to(dtype))
    λ = torch.linalg.eigvalsh(moments.second_moment)
    edge = marchenko_pastur_edge(λ, samples)
    assert edge == pytest.approx(σ2 * (1 + math.sqrt(γ)) ** 2, rel=0.03)
    assert edge == pytest.approx(λ.max().item(), rel=0.08)
    spiked = torch.cat([λ[:-3], torch.full((3,), 100.0)])  # a few spikes do not move the bulk's edge
    assert marchenko_pastur_edge(spiked, samples) == pytest.approx(edge, rel=0.05)


def test_rounding_in_the_place_of_missing_directions_is_no_bulk() -> None:
    """Rows given four times have a quarter of the rank that their number allows."""
    rows = gaussian(60, 120).repeat(4, 1)
    edges = []
    for dtype in (torch.float64, torch.float32):
        moments = StreamingMoments(120)
        moments.update(rows.to(dtype))
        edges.append(marchenko_pastur_edge(torch.linalg.eigvalsh(moments.second_moment), len(rows)))
    assert edges[1] == pytest.approx(edges[0], rel=1e-5)


def test_messages() -> None:
    with pytest.raises(ValueError, match="expected samples >= 1, got 0; pass the number of tokens behind the moment"):
        marchenko_pastur_edge(torch.ones(3), 0)
    with pytest.raises(ValueError, match="expected at least one positive eigenvalue, got none"):
        marchenko_pastur_edge(torch.zeros(3), 5)
