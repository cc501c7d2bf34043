"""Examples in docstrings may use what a user would have at hand: a `model`, a `view` of it, a `result` of its pair."""

from functools import lru_cache

import pytest


@lru_cache(maxsize=1)
def _world():
    from tl_asymmetry import ModelView, analyze_pair, analyze_trajectory, compare
    from tl_asymmetry.demo import demo_model, demo_pair, demo_texts

    base, aligned = demo_pair()
    result = analyze_pair(base, aligned, demo_texts(20, seed=0), groups=4, progress=False)
    control = analyze_pair(base, demo_model("control"), demo_texts(20, seed=0), groups=4, progress=False)
    run = {step: demo_model(f"step{step}") for step in (0, 50, 150, 400)}
    trajectory = analyze_trajectory(run, demo_texts(20, seed=0), groups=4, progress=False)
    return {
        "comparison": compare(result, control),
        "trajectory": trajectory,
        "model": base,
        "base": base,
        "aligned": aligned,
        "view": ModelView(base),
        "result": result,
    }


@pytest.fixture(autouse=True)
def examples(request, doctest_namespace, monkeypatch, tmp_path):
    """Give every doctest that world, in a folder of its own."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)
        doctest_namespace.update(_world())
