"""Replicates of a basis: what float32 may and may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nearby import nearby_directions
from tl_asymmetry.models.capture import first_of, means_of
from tl_asymmetry.pair.bases import LayerBases

D, K, GROUPS = 512, 96, 4  # more directions than block iteration is used for


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
        bases(1e2, exact=False, centered=centered).replicates("attn_in", [K]),
        bases(1e2, exact=True, centered=centered).replicates("attn_in", [K]),
        strict=True,
    )
    for narrow, exact in pairs:
        assert (narrow.dtype, exact.dtype) == (torch.float32, torch.float64)
        cosines = torch.linalg.svdvals(narrow.double().mT @ exact)
        assert (1 - cosines).abs().max() < 1e-5  # unit length itself is good to √d ε = 3e-6 in float32


def test_a_wide_spectrum_stays_in_float64() -> None:
    assert next(bases(1e5, exact=False).replicates("attn_in", [K])).dtype == torch.float64


def test_a_replicate_is_the_basis_without_one_group() -> None:
    whole = bases(1e2, exact=True, centered=True)
    left_out = next(whole.replicates("attn_in", [K]))
    rest = StreamingMoments(D)
    for group in whole._groups[1:]:
        rest.merge(group["attn_in", 0])
    expected = torch.linalg.eigh(rest.covariance)[1].flip(-1)[:, :K]
    torch.testing.assert_close((expected.mT @ left_out).diagonal().abs(), torch.ones(K, dtype=torch.float64))


def test_block_iteration_where_few_directions_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces every eigensolve where it is certified; where the first is not, the others are solved at once."""
    asked = []

    def counted(*arguments: Any) -> torch.Tensor | None:
        asked.append(1)
        return nearby_directions(*arguments)

    monkeypatch.setattr("tl_asymmetry.pair.bases.nearby_directions", counted)
    monkeypatch.setattr("tl_asymmetry.pair.bases.leading_directions", lambda *_: pytest.fail("solved in full"))
    few = list(bases(1e5, exact=False).replicates("attn_in", [1, 48]))
    assert (len(few), len(asked), few[0].shape, few[0].dtype) == (GROUPS, GROUPS, (D, 48), torch.float64)
    monkeypatch.undo()
    for quick, full in zip(few, bases(1e5, exact=True).replicates("attn_in", [1, 48]), strict=True):
        assert (1 - torch.linalg.svdvals(quick.mT @ full)).abs().max() < 1e-6
    monkeypatch.setattr("tl_asymmetry.pair.bases.nearby_directions", lambda *_: asked.append(1))
    asked.clear()
    refused = list(bases(1e5, exact=False).replicates("attn_in", [48]))
    assert len(asked) == 1
    monkeypatch.setattr("tl_asymmetry.pair.bases.worth_iterating", lambda *_: False)
    assert all(map(torch.equal, refused, bases(1e5, exact=False).replicates("attn_in", [48])))


@pytest.mark.parametrize("positions", [1, 5])
def test_sums_of_inputs_are_those_of_their_rows(positions: int) -> None:
    """Of counted positions, of all, about each sequence's mean: NaN where nothing varies within sequences."""
    rows = torch.randn(3, 4, positions, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    groups = [
        {
            ("attn_in", 0): moments_of(x[:, 1:]),
            (first_of("attn_in"), 0): moments_of(x[:, 0]),
            (means_of("attn_in"), 0): moments_of(x.sum(1) / positions**0.5),
        }
        for x in rows
    ]
    made = LayerBases(0, groups, {}, centered=False, exact=True, softmax_centres_keys=True, optimizer="adam")
    within = rows - rows.mean(2, keepdim=True)
    nothing = torch.full((3, 6, 6), torch.nan, dtype=torch.float64)
    for matrix, of in (("W_Q", rows[:, :, 1:]), ("W_V", rows), ("W_K", within)):
        reading = made.reading(matrix)
        expected = nothing if matrix == "W_K" and positions == 1 else torch.einsum("gspi,gspj->gij", of, of)
        sums = made.input_sums(reading)
        torch.testing.assert_close(torch.stack([sums[group] for group in range(len(sums))]), expected, equal_nan=True)
        torch.testing.assert_close(made.input_moment(reading), expected.sum(0), equal_nan=True)


def moments_of(rows: torch.Tensor) -> StreamingMoments:
    moments = StreamingMoments(6)
    if rows.numel():
        moments.update(rows)
    return moments
