"""The loop is the published one, and goes on bit for bit from its folder."""

from __future__ import annotations

import pytest
import torch

from tests.listing import check_listed
from tests.oracles.reference_grokking import lens_weights, seeded
from tests.oracles.reference_grokking import train as naive_train
from tl_asymmetry.grokking import GrokRun, ModularArithmetic, Recipe, arms, train
from tl_asymmetry.grokking.loop import GrokLoop
from tl_asymmetry.results.result import load
from tl_asymmetry.store import StoreReader

SMALL = {"d_model": 16, "d_mlp": 32}
ARMS = {
    "none": None,
    "keep": {"arm": "keep", "window": 6},
    "raw": {"arm": "remove", "window": 6, "buffer": "raw"},
    "random": {"arm": "keep", "space": "random", "window": 6},
    "noise": {"arm": "noise", "window": 6},
    "update": {"arm": "keep", "target": "update", "window": 6},
    "freeze": {"arm": "freeze"},
}


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("mode", [None, "keep", "remove"])
def test_weights_are_those_of_a_naive_loop(op, mode):
    """Published sizes of everything but the model, 20 steps, the arms projected from the eighth on."""
    naive = seeded(3, p=23, d=32, d_mlp=48)
    naive_train(naive, op, 23, 3, 20, mode=mode, window=8, batch=64)
    projection = None if mode is None else {"arm": mode, "window": 8}
    run = train(
        op, p=23, seed=3, recipe=Recipe(steps=20, every=20, batch_size=64), projection=projection,
        sizes={"d_model": 32, "d_mlp": 48},
    )  # fmt: skip
    start = seeded(3, p=23, d=32, d_mlp=48)
    expected, before = lens_weights(naive), lens_weights(start)
    for name, value in run.weights(step=20).items():
        # Adam divides by gradients that may be rounding (b_K's is exactly zero in theory): those entries say nothing.
        if name.endswith("b_K"):
            continue
        moved = (expected[name] - before[name]).norm()
        assert (value - expected[name]).norm() <= 2e-3 * moved, name


@pytest.mark.parametrize("arm", list(ARMS))
def test_resume_is_bit_identical(arm, tmp_path):
    def loop(store=None):
        task = ModularArithmetic("add", p=11, seed=1)
        return GrokLoop(task, seed=1, recipe=Recipe(steps=20, every=5), projection=ARMS[arm], store=store, sizes=SMALL)

    through = loop()
    through.run()
    first = loop(tmp_path)
    first.run(until=13)  # three steps past the last state on disk, as after a crash
    second = loop(tmp_path)
    assert second.progress.step == 10
    second.run()
    for (name, ours), theirs in zip(
        through.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert through.progress.rows[1:] == second.progress.rows[1:]
    assert through.progress.checkpoints.keys() == second.progress.checkpoints.keys()
    for step, weights in through.progress.checkpoints.items():
        assert all(torch.equal(w, second.progress.checkpoints[step][n]) for n, w in weights.items())
    finished = loop(tmp_path)
    assert finished.progress.finished
    finished.run()
    assert finished.progress.step == 20


def test_a_folder_of_another_run_is_refused(tmp_path):
    recipe = Recipe(steps=4, every=2)
    train("add", p=7, seed=1, recipe=recipe, store=tmp_path, sizes=SMALL)
    with pytest.raises(
        ValueError,
        match=r"was begun with, got others: projection.seed \(1001 there, 1002 here\), seed \(1 .*, task.seed .*; pass",
    ):
        train("add", p=7, seed=2, recipe=recipe, store=tmp_path, sizes=SMALL)
    assert StoreReader(tmp_path).entry("state")["step"] == 4


def test_stops_after_enough_evaluations_in_all(monkeypatch):
    tests = iter([0.0, 0.99, 0.2, 0.985, 0.97, 0.98, 1.0])
    calls = {"n": 0}

    def fake(model, pairs, targets):
        calls["n"] += 1
        return [next(tests)] if calls["n"] % 2 else [1.0]  # test first, then train

    monkeypatch.setattr("tl_asymmetry.grokking.loop.accuracy", fake)
    run = train("add", p=7, seed=0, recipe=Recipe(steps=100, every=1, stop_count=3), sizes=SMALL)
    assert run.config["step"] == 5  # 0.99, 0.985 and 0.98 count, in spite of what lies between
    assert run.grok_step(count=3) == 5
    assert run.grok_step(count=1) == 1
    assert run.grok_step() is None
    assert run.notes == ()


def test_several_heads_share_a_batch_and_all_must_reach_the_accuracy():
    run = train(("add", "mul"), p=7, seed=0, recipe=Recipe(steps=4, every=2), sizes=SMALL)
    assert run.table["op"].tolist() == ["add", "mul"] * 3
    assert run.model(step=4)(torch.tensor([[1, 2]])).shape == (1, 2, 7)
    assert len(run.task.train) == 18
    assert run.config["counted"] == 0
    assert "only 0 of 20 evaluations" in run.notes[0]


def test_result_saves_loads_and_speaks(tmp_path):
    run = train("sq", p=7, seed=0, recipe=Recipe(steps=4, every=2), sizes=SMALL)
    check_listed(run)
    run.save(tmp_path / "run")
    again = load(tmp_path / "run")
    assert isinstance(again, GrokRun)
    assert again.steps == [0, 2, 4]
    assert torch.equal(again.weights(step=2)["embed.W_E"], run.weights(step=2)["embed.W_E"])
    assert again.task == run.task
    assert "sq modulo 7, seed 0" in run.summary()
    page = run.to_html(tmp_path / "run.html").read_text()
    assert "Accuracy" in page
    with pytest.raises(ValueError, match="expected a step with a checkpoint, got 3; pass one of 0, 2, 4"):
        run.weights(step=3)
    bare = train("sq", p=7, seed=0, recipe=Recipe(steps=4, every=2), sizes=SMALL, keep_checkpoints=False)
    assert bare.steps == []
    assert bare.table["test_accuracy"].equals(run.table["test_accuracy"])


def test_a_recorder_sees_the_live_model():
    seen = {}
    run = train(
        "add", p=7, seed=0, recipe=Recipe(steps=4, every=2), sizes=SMALL,
        recorder=lambda step, model: seen.update({step: model.embed.W_E.detach().clone()}),
    )  # fmt: skip
    assert list(seen) == [2, 4]
    assert torch.equal(seen[2], run.weights(step=2)["embed.W_E"])


def test_arms_by_seed():
    table = arms(
        "add", seeds=(0, 1), which={"control": None, "frozen": {"arm": "freeze"}}, p=7,
        recipe=Recipe(steps=4, every=2), sizes=SMALL,
    )  # fmt: skip
    assert table.groupby(["arm", "seed"]).size().tolist() == [3, 3, 3, 3]


def test_the_global_random_state_is_untouched():
    import numpy as np

    before, theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train("add", p=7, seed=0, recipe=Recipe(steps=4, every=2), sizes=SMALL, projection={"arm": "noise", "window": 3})
    assert torch.equal(before, torch.get_rng_state())
    assert (theirs == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"steps": 0}, "expected steps >= 1, got 0"), ({"stop_accuracy": 1.5}, "expected stop_accuracy in")],
)
def test_bad_recipes(keywords, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**keywords)
