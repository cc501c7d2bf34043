"""Stacks of what layers have in different sizes, or not at all."""

import pytest
import torch

from tl_asymmetry.geometry.padding import padded_stack


def test_equal_parts_are_stacked_as_they_are():
    parts = [torch.randn(2, 3, dtype=torch.float64) for _ in range(3)]
    assert torch.equal(padded_stack(parts), torch.stack(parts))


def test_what_is_missing_is_nan_and_what_lies_beyond_a_rank_is_nothing():
    small, large = torch.ones(1, 2), torch.full((3, 4), 2.0)
    stacked = padded_stack([small, large, None], beyond=0.0)
    assert stacked.shape == (3, 3, 4)
    assert stacked[0, 0].tolist() == [1, 1, 0, 0]
    assert stacked[0, 1:].isnan().all()
    assert torch.equal(stacked[1], large)
    assert stacked[2].isnan().all()
    assert padded_stack([small[0], large[0]])[0, 2:].isnan().all()


def test_nothing_to_stack_is_refused():
    with pytest.raises(ValueError, match="expected tensors of one number of dimensions"):
        padded_stack([None])
    with pytest.raises(ValueError, match=r"got \[1, 2\]"):
        padded_stack([torch.ones(2), torch.ones(2, 2)])
