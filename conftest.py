"""Examples in docstrings may use what a user would have at hand; each name is made when an example first says it."""

import gc
import re
from functools import cache
from pathlib import Path

import jaxtyping
import pytest

ROOT = Path(__file__).parent
QUICK = tuple(
    ROOT / name
    for name in ("tests/geometry", "tests/test_names.py", "tests/test_documentation.py", "tl_asymmetry/geometry")
)
"""Rooms whose tests need no model: `-m quick` runs them, less those marked slow."""


KERNELS = (ROOT / "tests/geometry", ROOT / "tl_asymmetry/geometry")
"""Rooms whose tests run under the checker of shapes; elsewhere numbers are held, it takes a fifth of the time."""
CHECKED = not jaxtyping.config.jaxtyping_disable  # JAXTYPING_DISABLE=1 switches it off there, too


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item):
    here = any(item.path.is_relative_to(room) for room in KERNELS)
    jaxtyping.config.update("jaxtyping_disable", not (CHECKED and here))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """What is imported lives to the end: the collector need not walk through it again and again, nor often."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)
        gc.enable()


def pytest_ignore_collect(collection_path, config):
    """Under `-m quick` nothing else is even imported."""
    if config.getoption("markexpr") != "quick":
        return None
    near = any(collection_path.is_relative_to(room) or room.is_relative_to(collection_path) for room in QUICK)
    return None if near else True


def pytest_collection_modifyitems(items):
    for item in items:
        if "slow" not in item.keywords and any(item.path.is_relative_to(room) for room in QUICK):
            item.add_marker(pytest.mark.quick)
    items.sort(key=_turn)


def _turn(item):
    """What is long comes first, then the examples, which share analyses: at the end workers take from each other."""
    if item.name.startswith("test_a_notebook_runs"):
        return 0
    return 1 if isinstance(item, pytest.DoctestItem) else 2


@cache
def _at_hand(name):
    from tl_asymmetry import (
        ModelView,
        analyze_pair,
        analyze_tangents,
        analyze_trajectory,
        compare,
        rank_one_study,
    )
    from tl_asymmetry.demo import demo_model, demo_texts

    def pair(aligned):
        return analyze_pair(_at_hand("base"), aligned, demo_texts(20, seed=0), groups=4, progress=False)

    makers = {
        "base": lambda: demo_model("base"),
        "model": lambda: _at_hand("base"),
        "aligned": lambda: demo_model("dpo"),
        "view": lambda: ModelView(_at_hand("base")),
        "result": lambda: pair(_at_hand("aligned")),
        "comparison": lambda: compare(_at_hand("result"), pair(demo_model("control"))),
        "trajectory": lambda: analyze_trajectory(
            {step: demo_model(f"step{step}") for step in (0, 50, 150, 400)},
            demo_texts(20, seed=0), groups=4, progress=False,
        ),
        "tangents": lambda: analyze_tangents(
            {step: demo_model(f"step{step}") for step in (0, 150)}, demo_texts(12, seed=0), rank=4, progress=False
        ),
        "study": lambda: rank_one_study(
            _at_hand("base"), _at_hand("aligned"), demo_texts(2, seed=0),
            sites=[(3, "W_O", 0)], draws=2, scales=[2], progress=False,
        ),
    }  # fmt: skip
    return makers[name]()


NAMES = ("base", "model", "aligned", "view", "result", "comparison", "trajectory", "tangents", "study")


@pytest.fixture(autouse=True)
def examples(request):
    """Give every doctest what it names, in a folder of its own."""
    if isinstance(request.node, pytest.DoctestItem):
        folder, namespace = (request.getfixturevalue(name) for name in ("tmp_path", "doctest_namespace"))
        request.getfixturevalue("monkeypatch").chdir(folder)
        spoken = " ".join(example.source for example in request.node.dtest.examples)
        namespace.update({name: _at_hand(name) for name in NAMES if re.search(rf"\b{name}\b", spoken)})
