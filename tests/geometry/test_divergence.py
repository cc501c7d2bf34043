"""Divergence between predictions against a float64 oracle, also where they hardly differ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_asymmetry.geometry import divergence
from tl_asymmetry.geometry.divergence import Prediction


def oracle(here, there, targets):
    """KL and gain of log-probability by the definitions, float64."""
    here, there = here.double().log_softmax(-1), there.double().log_softmax(-1)
    kl = (here.exp() * (here - there)).sum(-1)
    gain = (there - here).gather(-1, targets[:, None])[:, 0]
    return kl, gain


def example(places=7, vocab=50, seed=0, size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    here = 3 * torch.randn(places, vocab, dtype=torch.float64, generator=generator)
    there = here + size * torch.randn(places, vocab, dtype=torch.float64, generator=generator)
    return here.to(dtype), there.to(dtype), torch.randint(vocab, (places,), generator=generator)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.3, 1.0, 5.0, 30.0]), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_oracle_float64(seed, size, places):
    here, there, targets = example(places, seed=seed, size=size)
    kl, gain = Prediction(here).compare(there, targets)
    expected_kl, expected_gain = oracle(here, there, targets)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gain, expected_gain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2, 1.0, 10.0])
def test_float32_keeps_digits_where_predictions_hardly_differ(size):
    """A constant added to every logit is no difference; the rest is one of 1e-10 nats and more."""
    here, there, targets = example(places=200, vocab=3000, size=size)
    # what float32 can say of the difference is given exactly
    here = here.float()
    there = (here.double() + (there - here.double()).float().double()).float()
    kl, _ = Prediction(here).compare(there, targets)
    expected, _ = oracle(here, there, targets)
    torch.testing.assert_close(kl.mean(), expected.mean(), rtol=2e-4, atol=0)


def test_equal_predictions_are_exactly_no_distance_apart():
    here, _, targets = example(dtype=torch.float32)
    kl, gain = Prediction(here).compare(here.clone(), targets)
    assert not kl.any()
    assert not gain.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    here, there, targets = example(dtype=dtype)
    kl, gain = Prediction(here).compare(there, targets)
    assert kl.dtype == gain.dtype == torch.float64
    expected_kl, expected_gain = oracle(here, there, targets)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gain, expected_gain, rtol=1e-5, atol=1e-5)


def test_huge_differences_neither_overflow_nor_turn_negative():
    here = torch.zeros(2, 4)
    there = torch.tensor([[500.0, 0, 0, 0], [-500.0, 0, 0, 0]])
    kl, gain = Prediction(here).compare(there, torch.tensor([1, 0]))
    expected_kl, expected_gain = oracle(here, there, torch.tensor([1, 0]))
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gain, expected_gain, rtol=1e-5, atol=1e-5)


def test_pieces_do_not_matter(monkeypatch):
    here, there, targets = example(places=23)
    whole = Prediction(here).compare(there, targets)
    monkeypatch.setitem(divergence._ELEMENTS_AT_A_TIME, "cpu", 120)
    for ours, theirs in zip(Prediction(here).compare(there, targets), whole, strict=True):
        assert torch.equal(ours, theirs)
