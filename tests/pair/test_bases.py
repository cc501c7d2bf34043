"""Replicates of a basis: what float32 may and may not change."""

from __future__ import annotations

import pytest
import torch

from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.pair.bases import LayerBases

D, K, GROUPS = 512, 32, 4


def bases(spread: float, *, exact: bool, centered: bool = False) -> LayerBases:
    """Moments of Gaussian rows, λ_1 / λ_K about `spread`, in four groups."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(D).mul(0.3)
    scale[:K] = torch.logspace(0, -0.5 * torch.log10(torch.tensor(spread)).item(), K)
    scale[K:] = scale[K - 1] / 2
    groups = []
    for _ in range(GROUPS):
        moments = StreamingMoments(D)
        moments.update(torch.randn(1500, D, generator=generator) * scale)
        groups.append({("attn_in", 0): moments})
    return LayerBases(0, groups, {}, centered=centered, exact=exact, softmax_centres_keys=False, optimizer="adam")


@pytest.mark.parametrize("centered", [False, True])
def test_float32_replicates_span_the_same_subspace(centered: bool) -> None:
    pairs = zip(
        bases(1e2, exact=False, centered=centered).replicates("attn_in", K),
        bases(1e2, exact=True, centered=centered).replicates("attn_in", K),
        strict=True,
    )
    for narrow, exact in pairs:
        assert (narrow.dtype, exact.dtype) == (torch.float32, torch.float64)
        cosines = torch.linalg.svdvals(narrow.double().mT @ exact)
        assert (1 - cosines).abs().max() < 1e-5  # unit length itself is good to √d ε = 3e-6 in float32


def test_a_wide_spectrum_stays_in_float64() -> None:
    assert next(bases(1e5, exact=False).replicates("attn_in", K)).dtype == torch.float64


def test_a_replicate_is_the_basis_without_one_group() -> None:
    whole = bases(1e2, exact=True, centered=True)
    left_out = next(whole.replicates("attn_in", K))
    rest = StreamingMoments(D)
    for group in whole._groups[1:]:
        rest.merge(group["attn_in", 0])
    expected = torch.linalg.eigh(rest.covariance)[1].flip(-1)[:, :K]
    torch.testing.assert_close((expected.mT @ left_out).diagonal().abs(), torch.ones(K, dtype=torch.float64))
