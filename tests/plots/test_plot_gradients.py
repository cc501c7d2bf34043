"""The gradient figures say what their tables say."""

import functools

import numpy as np
import pytest

from tl_asymmetry import gradient_covariance
from tl_asymmetry.demo import demo_model, demo_texts
from tl_asymmetry.objectives import CrossEntropy
from tl_asymmetry.plots import effective_rank_figure


@functools.cache
def covariance(temperature=1.0):
    options = {"matrices": ["W_Q", "W_V", "W_O", "W_in"], "full_mlp": True, "progress": False}
    return gradient_covariance(demo_model("base"), CrossEntropy(temperature), demo_texts(6), **options)


def test_effective_rank_by_layer_and_objective():
    tables = {"sharp <b>": covariance().table, "soft": covariance(8.0).table}
    figure = effective_rank_figure(tables, matrices=["W_O", "W_V"])
    shown = [t for t in figure.data if t.visible]
    assert [t.name for t in shown] == ["sharp &lt;b&gt;", "soft"]
    for trace, table in zip(shown, tables.values(), strict=True):
        rows = table.query("matrix == 'W_O' and side == 'gradient' and head == 0")
        np.testing.assert_allclose(trace.y, rows["effective_rank"] / 64)
        np.testing.assert_allclose(
            np.array(trace.y) + trace.error_y.array, rows["effective_rank_high"].to_numpy(float) / 64
        )
    labels = [b.label for b in figure.layout.updatemenus[0].buttons]
    assert labels == ["δ of W_O", "δ of W_V", "a of W_O", "a of W_V"]
    visible = figure.layout.updatemenus[0].buttons[1].args[0]["visible"]
    heads = tables["soft"].query("matrix == 'W_V' and side == 'gradient'")
    np.testing.assert_allclose(
        [t for t, v in zip(figure.data, visible, strict=True) if v][1].y,
        heads.groupby("layer")["effective_rank"].median() / 16,
    )
    assert sum(visible) == 2


def test_one_table_and_nothing_to_show():
    assert len(effective_rank_figure(covariance().table, matrices=["W_in"]).data) == 2
    empty = covariance().table.assign(effective_rank=np.nan)
    assert "No effective rank" in effective_rank_figure(empty).layout.annotations[0].text


def test_the_results_own_figures():
    assert covariance().plot_effective_rank(template="dark").data
    figure = covariance().plot_spectrum("W_O")
    λ = covariance().spectrum("W_O")[2, 0]
    np.testing.assert_allclose(next(t for t in figure.data if t.name == "L2").y, λ[λ > 0])
    assert "δ of W_O" in figure.layout.title.text
    assert covariance().plot_spectrum("W_Q", "input").data


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    with pytest.raises(ValueError, match="expected side to be one of 'gradient', 'input', got 'left'"):
        effective_rank_figure(covariance().table, side="left")
    with pytest.raises(ValueError, match="expected matrices among 'W_Q', .* got 'W_X'"):
        effective_rank_figure(covariance().table, matrices=["W_X"])
    with pytest.raises(ValueError, match="expected at least one table, got none"):
        effective_rank_figure({})
