"""Runs in lockstep are the single runs, to rounding."""

from __future__ import annotations

import pytest
import torch

from tl_asymmetry.grokking import ModularArithmetic, Recipe, arms
from tl_asymmetry.training.grok_loop import GrokLoop
from tl_asymmetry.training.lockstep import run_together

ARMS = {"control": None, "keep": {"arm": "keep", "window": 6}, "frozen": {"arm": "freeze"}}


def make(arm="control", seed=1, op="add", *, folder=None, steps=20, d_mlp=32):
    recipe = Recipe(steps=steps, every=5, batch_size=32)
    loop = GrokLoop(
        ModularArithmetic(op, p=11, seed=seed), seed=seed, recipe=recipe, projection=ARMS[arm], folder=folder,
        sizes={"d_model": 16, "d_mlp": d_mlp},
    )  # fmt: skip
    loop.model.double()  # rounding out of the way: what is left is the algorithm
    return loop


def assert_same(ours, theirs):
    assert ours.progress.step == theirs.progress.step
    for (name, a), b in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        # b_K's gradient is zero in theory and rounding in practice, and Adam divides by it
        if not name.endswith("b_K"):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_are_those_of_single_runs():
    names = [(arm, seed, op) for arm in ARMS for seed, op in ((1, "add"), (2, "sub"))]
    single, together = [make(*name) for name in names], [make(*name) for name in names]
    for loop in single:
        loop.run()
    evaluated = []
    run_together(together, report=lambda loop: evaluated.append(loop.progress.step))
    assert evaluated == [step for step in (5, 10, 15, 20) for _ in names]
    for ours, theirs in zip(together, single, strict=True):
        assert_same(ours, theirs)
        assert [row["test_accuracy"] for row in ours.progress.rows] == [
            row["test_accuracy"] for row in theirs.progress.rows
        ]


def test_a_run_that_stops_leaves_the_others_and_owns_its_weights(tmp_path):
    short, long = make(steps=10, folder=tmp_path / "short"), make(seed=2, folder=tmp_path / "long")
    run_together([short, long])
    assert (short.progress.step, long.progress.step) == (10, 20)
    alone = make(seed=2)
    alone.run()
    assert_same(long, alone)
    parameters = list(short.model.parameters())
    assert all(p.untyped_storage().nbytes() == p.numel() * p.element_size() for p in parameters)
    assert all(p.grad is None for p in parameters)
    resumed = make(seed=2, folder=tmp_path / "long")
    assert resumed.progress.finished


def test_weights_are_their_own_again_after_an_interruption():
    loops = [make(), make(seed=2)]

    def interrupt(loop):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_together(loops, report=interrupt)
    assert [loop.progress.step for loop in loops] == [5, 4]  # the report of the first came before the second's step
    storages = {p.untyped_storage().data_ptr() for loop in loops for p in loop.model.parameters()}
    assert len(storages) == sum(1 for loop in loops for _ in loop.model.parameters())


def test_arms_together_are_the_arms():
    options = dict(p=7, seeds=(0, 1), recipe=Recipe(steps=4, every=2), sizes={"d_model": 16, "d_mlp": 32}, which=ARMS)
    apart, together = arms("add", **options), arms("add", together=True, **options)
    assert together.drop(columns="loss").equals(apart.drop(columns="loss"))
    assert (together["loss"] - apart["loss"]).abs().max() < 1e-4


def test_unlike_runs_are_refused():
    with pytest.raises(ValueError, match="expected runs of one shape, batch size and device, got 2 kinds; pass loops"):
        run_together([make(), make(d_mlp=48)])
    with pytest.raises(ValueError, match="got 0 kinds"):
        run_together([])
