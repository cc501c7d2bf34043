"""Families, layers, heads: q against loops, and how often the tree errs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference
from tl_asymmetry.geometry.hierarchy import hierarchy, simes
from tl_asymmetry.geometry.nulls import adjusted_p


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(0, 3))
def test_simes_equals_a_loop(p: list[float], missing: int) -> None:
    found = simes(np.array([*p, *[np.nan] * missing]))
    assert float(found) == pytest.approx(reference.simes(p))


def test_a_tree_by_hand() -> None:
    nan = np.nan
    heads = {
        "W_Q": np.array([[1e-6, 0.5], [0.6, 0.7]]),
        "W_K": np.array([[0.4, 0.9], [0.2, 0.8]]),
        "W_in": np.array([[0.03], [nan]]),
    }
    pooled = {"W_Q": np.array([1e-3, 0.5]), "W_K": np.array([0.5, 0.5]), "W_in": np.array([nan, nan])}
    tree = hierarchy(heads, pooled)
    layers = [2 * min(1e-3, 2e-6), 2 * min(0.5, 0.7)]
    np.testing.assert_allclose(tree.layer_p["W_Q"], np.minimum(1, layers))
    assert tree.family_p["W_Q"] == pytest.approx(2 * layers[0])
    np.testing.assert_allclose(tree.layer_p["W_in"], [0.03, nan])
    q = adjusted_p(np.array([tree.family_p[f] for f in heads]))
    assert list(tree.family_q.values()) == pytest.approx(q)
    assert (q < 0.05).tolist() == [True, False, True]
    # Two of three families are selected: inside, the level is two thirds of 5 %.
    inside = adjusted_p(np.minimum(1, layers)) / (2 / 3)
    np.testing.assert_allclose(tree.layer_q["W_Q"], np.minimum(1, np.maximum(inside, q[0])))
    assert tree.head_q["W_Q"][0, 0] == pytest.approx(max(2e-6 / (2 / 3 * 1 / 2), tree.layer_q["W_Q"][0]))
    assert tree.head_q["W_Q"][0, 1] > 0.05
    assert tree.layer_q["W_in"][0] == pytest.approx(max(0.03 * 3 / 2, q[2]))
    assert np.isnan(tree.head_q["W_in"][1, 0])


def test_nothing_below_what_was_not_found() -> None:
    heads = {"a": np.array([[1e-3, 0.9]]), "b": np.array([[0.8, 0.9]])}
    tree = hierarchy(heads, {"a": np.array([0.9]), "b": np.array([0.9])})
    for family, p in heads.items():
        assert (tree.layer_q[family] >= tree.family_q[family] - 1e-12).all()
        assert (tree.head_q[family] >= tree.layer_q[family][:, None] - 1e-12).all()
        assert (tree.head_q[family] >= p - 1e-12).all()


@pytest.mark.slow
def test_errs_as_seldom_as_it_says_with_true_plants_beside() -> None:
    """Two of six families hold true heads: of all heads found, at most 5 % are false on average over families."""
    generator = np.random.default_rng(0)
    proportions, powers = [], []
    for _ in range(300):
        heads = {f: generator.uniform(size=(6, 12)) for f in range(6)}
        for f in (0, 1):
            heads[f][0, :6] = generator.uniform(size=6) * 1e-5
        pooled = {f: generator.uniform(size=6) for f in heads}
        tree = hierarchy(heads, pooled)
        true = {f: np.zeros((6, 12), bool) for f in heads}
        true[0][0, :6] = true[1][0, :6] = True
        selected = [f for f in heads if tree.family_q[f] <= 0.05]
        found = {f: tree.head_q[f] <= 0.05 for f in selected}
        proportions.append(np.mean([(found[f] & ~true[f]).sum() / max(1, found[f].sum()) for f in selected] or [0]))
        powers.append(np.mean([found[f][true[f]].mean() if f in found else 0 for f in (0, 1)]))
    assert np.mean(proportions) <= 0.065
    assert np.mean(powers) > 0.95


def test_inside_the_level_is_divided_by_the_share_selected_above() -> None:
    heads = {"found": np.array([[0.001, 0.02]]), "not found": np.array([[0.8, 0.9]])}
    tree = hierarchy(heads, dict.fromkeys(heads, np.array([np.nan])))
    assert tree.family_q == pytest.approx({"found": 0.004, "not found": 0.9})
    # One of two families is selected: q of Benjamini-Hochberg over two heads, 0.002 and 0.02, over a half.
    assert tree.head_q["found"].tolist() == [pytest.approx([0.004, 0.04])]
