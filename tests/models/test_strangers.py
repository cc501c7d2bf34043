"""Two models that are not one before and after training are named by every analysis of two models."""

import pytest

from tests import tiny
from tl_asymmetry import (
    activation_shift,
    analyze_pair,
    analyze_spectra,
    analyze_stages,
    analyze_trajectory,
    compare_deltas,
    detection_power,
    rank_one_study,
    rewind_study,
)

QUIET = {"progress": False}
READ = {"tokens": tiny.tokens(6, 8), **QUIET}
ANALYSES = {
    "pair": lambda a, b: analyze_pair(a, b, matrices="W_Q", ranks=[1], groups=1, **READ),
    "spectra": lambda a, b: analyze_spectra(a, b, matrices=["W_Q"], ranks=[1], **QUIET),
    "stages": lambda a, b: analyze_stages({"one": a, "other": b}, matrices=["W_Q"], **QUIET),
    "deltas": lambda a, b: compare_deltas(a, {"other": b, "third": tiny.perturbed(b)}, matrices=["W_Q"], **QUIET),
    "trajectory": lambda a, b: analyze_trajectory({0: a, 1: b}, matrices=["W_Q"], ranks=[1], groups=1, **READ),
    "power": lambda a, b: detection_power(a, b, matrices=["W_Q"], subspaces=["attn_in"], sizes=1, plants=1, **READ),
    "shift": lambda a, b: activation_shift(a, b, **READ),
    "rank one": lambda a, b: rank_one_study(a, b, sites=[(0, "W_Q", 0)], draws=1, **READ),
    "rewinding": lambda a, b: rewind_study(a, b, matrices=["W_Q"], steps=1, orders=1, shares=[], **READ),
}


@pytest.fixture(scope="module")
def model():
    return tiny.toy()


@pytest.mark.parametrize("name", ANALYSES)
def test_strangers_are_named(model, name):
    with pytest.warns(UserWarning, match=r"W_Q.* point elsewhere than .*\(median cosine of a head"):
        found = ANALYSES[name](model, tiny.toy(seed=1))
    assert "point elsewhere than" in found.summary()


@pytest.mark.parametrize("name", ["pair", "spectra", "stages", "trajectory"])
def test_a_step_from_the_base_is_no_stranger(model, name):
    assert "point elsewhere" not in ANALYSES[name](model, tiny.perturbed(model)).summary()
