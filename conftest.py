"""Examples in docstrings may use what a user would have at hand: a `model`, a `view` of it, a `result` and a
`study` of its pair."""

from functools import lru_cache

import pytest


@lru_cache(maxsize=1)
def _world():
    from tl_asymmetry import ModelView, analyze_pair, rank_one_study
    from tl_asymmetry.demo import demo_pair, demo_texts

    base, aligned = demo_pair()
    result = analyze_pair(base, aligned, demo_texts(20, seed=0), groups=4, progress=False)
    study = rank_one_study(
        base, aligned, demo_texts(2, seed=0), sites=[(3, "W_O", 0)], draws=2, scales=[2], progress=False
    )
    world = {"model": base, "base": base, "aligned": aligned, "view": ModelView(base)}
    return {**world, "result": result, "study": study}


@pytest.fixture(autouse=True)
def examples(request, doctest_namespace, monkeypatch, tmp_path):
    """Give every doctest that world, in a folder of its own."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path)
        doctest_namespace.update(_world())
