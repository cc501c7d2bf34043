"""The task is arithmetic, and a published seed means the published split."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.reference_grokking import split
from tl_asymmetry.grokking import ModularArithmetic


@pytest.mark.parametrize("op", ["add", "sub", "mul", "sq"])
@pytest.mark.parametrize("seed", [42, 2024])
def test_split_is_the_published_one(op, seed):
    task = ModularArithmetic(op, seed=seed)
    train, test = split(op, 97, seed)
    assert task.train.tolist() == [list(pair) for pair in train]
    assert task.test.tolist() == [list(pair) for pair in test]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([5, 7, 11, 13]), st.integers(0, 100), st.floats(0.2, 0.8))
def test_every_pair_once_and_every_result_right(p, seed, fraction):
    task = ModularArithmetic(("add", "sub", "mul", "sq"), p=p, seed=seed, train_fraction=fraction)
    pairs = torch.cat([task.train, task.test])
    assert len({tuple(pair) for pair in pairs.tolist()}) == (p - 1) ** 2
    for (a, b), found in zip(pairs.tolist(), task.targets(pairs).tolist(), strict=True):
        assert found == [(a + b) % p, (a - b) % p, a * b % p, (a * a + b * b) % p]


def test_zero_belongs_to_additive_tables_only():
    assert ModularArithmetic("add", p=6).lowest == 0
    assert ModularArithmetic("mul", p=7).lowest == 1
    assert ModularArithmetic(("sq", "mul"), p=7).lowest == 1


def test_sample_repeats_and_covers_the_table():
    task = ModularArithmetic("mul", p=5)
    drawn = task.sample(500, seed=1)
    assert torch.equal(drawn, task.sample(500, seed=1))
    assert set(drawn.flatten().tolist()) == {1, 2, 3, 4}
    assert not torch.equal(drawn, task.sample(500, seed=2))


def test_random_states_are_untouched(unchecked_types):
    before, here = random.getstate(), torch.get_rng_state()
    ModularArithmetic("add").sample(10, seed=0)
    _ = ModularArithmetic("add").train
    assert random.getstate() == before
    assert torch.equal(here, torch.get_rng_state())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"ops": "mul", "p": 91}, "expected a prime p for 'mul', whose operands are invertible, got 91"),
        ({"ops": "mul", "p": 1}, "expected p from 2 to 2,000, got 1"),
        ({"ops": "div"}, "expected operations among add, sub, mul, sq, got 'div'"),
        ({"ops": ("add", "add")}, "expected operations among"),
        ({"ops": ()}, "expected operations among"),
        ({"ops": "add", "train_fraction": 1.0}, "expected a train fraction that leaves pairs on both sides, got 1.0"),
        ({"ops": "add", "train_fraction": 0.0}, "expected a train fraction"),
    ],
)
def test_bad_input(keywords, message):
    with pytest.raises(ValueError, match=message):
        ModularArithmetic(**keywords)


def test_a_composite_modulus_serves_where_no_inverse_is_needed():
    assert len(ModularArithmetic("add", p=91).train) == 91 * 91 // 2
