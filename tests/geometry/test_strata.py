"""Strata of token frequency, and samples of rows that no batch decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference_tangents as reference
from tl_asymmetry.geometry.sample import RowSample
from tl_asymmetry.geometry.strata import frequency_strata


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.integers(1, 5))
def test_strata_are_those_of_single_occurrences(counts, number):
    naive = reference.strata(counts, number)
    filled = len({s for s in naive if s >= 0})
    if not any(counts):
        with pytest.raises(ValueError, match="expected tokens to count"):
            frequency_strata(torch.tensor(counts), number)
    elif filled < number:
        with pytest.raises(
            ValueError, match=f"fill {number} strata of equal mass, got {filled} filled by {sum(counts)}"
        ):
            frequency_strata(torch.tensor(counts), number)
    else:
        assert frequency_strata(torch.tensor(counts), number).tolist() == naive


def test_zipf_words_fill_five_strata_about_evenly():
    counts = (10_000 / torch.arange(1, 2001)).long()
    stratum = frequency_strata(counts, 5)
    mass = torch.stack([counts[stratum == s].sum() for s in range(5)]) / counts.sum()
    assert (mass - 0.2).abs().max() < 0.05
    for s in range(4):  # every type of a stratum is rarer than every type of the next
        assert counts[stratum == s].max() <= counts[stratum == s + 1].min()


def test_strata_refuses_none():
    with pytest.raises(ValueError, match="expected strata >= 1"):
        frequency_strata(torch.tensor([1, 2]), 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.lists(st.integers(1, 60), max_size=4), st.integers(0, 100))
def test_sample_is_the_rows_of_the_smallest_keys(rows, size, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(1000, generator=generator)[:rows]
    x = torch.randn(rows, 3, generator=generator)
    expected = x[keys.argsort()[:size]]
    sample = RowSample(size)
    order = torch.randperm(rows, generator=generator)
    for part in torch.tensor_split(order, sorted(c for c in cuts if c < rows)):
        if len(part):
            sample.update(x[part], keys[part])
    assert torch.equal(sample.rows, expected)
    half = rows // 2
    merged = RowSample(size)
    for part in (slice(half, None), slice(half)):
        one = RowSample(size)
        if len(keys[part]):
            one.update(x[part], keys[part])
        merged.merge(one)
    assert torch.equal(merged.rows, expected)
    assert torch.equal(merged.keys, keys.sort().values[:size])


def test_sample_refuses_what_holds_nothing():
    with pytest.raises(ValueError, match="expected size >= 1"):
        RowSample(0)
    with pytest.raises(ValueError, match="expected a sample of at least one row"):
        _ = RowSample(3).rows
