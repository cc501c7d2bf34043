"""Figures of couplings and arms say what their tables say."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from tl_asymmetry.plots import accuracy_figure, arms_figure, coupling_figure, windows_figure


@pytest.fixture(name="means")
def means_fixture() -> pd.DataFrame:
    rows = []
    for objective in ("add", "<b>sub</b>"):
        for estimator, level in (("update", 2.0), ("gradient", 90.0)):
            for window in (1, 20):
                for alignment in ("backward", "forward"):
                    for step in (0, 100, 200):
                        ratio = level * (1 + step / 100) / window**0.5 * (1 if alignment == "backward" else 1.5)
                        rows.append((step, objective, estimator, window, alignment, ratio, 2 * ratio, 3, window))
    columns = ["step", "objective", "estimator", "window", "alignment", "mean_ratio", "ratio_1", "directions", "rows"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture(name="accuracy")
def accuracy_fixture() -> pd.DataFrame:
    return pd.DataFrame(
        [(s, op, min(1.0, s / 100), s / 250) for op in ("add", "<b>sub</b>") for s in (0, 50, 100, 200)],
        columns=["step", "op", "train_accuracy", "test_accuracy"],
    )


def test_accuracy_above_ratios_below_on_one_axis(means, accuracy):
    figure = coupling_figure(means, accuracy, objective="add")
    traces = {t.name: t for t in figure.data}
    assert list(traces["held out accuracy"].y) == [0, 0.2, 0.4, 0.8]
    curve = means.query("objective == 'add' and estimator == 'gradient' and window == 20 and alignment == 'forward'")
    drawn = traces["gradient directions, forward window"]
    np.testing.assert_allclose(drawn.y, curve["mean_ratio"])
    assert drawn.line.dash == "dash"
    assert traces["held out accuracy"].yaxis == "y"
    assert drawn.yaxis == "y2"
    assert figure.layout.xaxis.matches == "x2"
    assert [s.y0 for s in figure.layout.shapes] == [1]
    low, high = figure.layout.yaxis2.range
    assert low <= math.log10(curve["mean_ratio"].min())
    assert high >= math.log10(means.loc[means["window"] == 20, "mean_ratio"].max())
    assert "1 = a random direction" in drawn.hovertemplate


def test_a_slider_picks_the_objective(means, accuracy):
    figure = coupling_figure(means, accuracy)
    steps = figure.layout.sliders[0].steps
    assert [s.label for s in steps] == ["add", "&lt;b&gt;sub&lt;/b&gt;"]
    shown = [t.visible for t in figure.data]
    assert list(steps[0].args[0]["visible"]) == shown
    assert [not v for v in shown] == list(steps[1].args[0]["visible"])


def test_without_accuracies_there_is_one_panel(means, accuracy):
    figure = coupling_figure(means, accuracy.iloc[:0], window=1)
    assert figure.layout.yaxis.title.text == "mean ratio R̄"
    assert "yaxis2" not in figure.layout.to_plotly_json()
    with pytest.raises(ValueError, match="expected window to be one of 1, 20, got 3"):
        coupling_figure(means, accuracy, window=3)
    with pytest.raises(ValueError, match="expected objective to be one of"):
        coupling_figure(means, accuracy, objective="mul")


def test_windows_draw_both_peaks(means):
    peaks = means.groupby(["objective", "estimator", "window", "alignment"], sort=False).last().reset_index()
    peaks = peaks.assign(step_1=peaks["step"])
    figure = windows_figure(peaks[(peaks["objective"] == "add") & (peaks["alignment"] == "backward")])
    traces = {t.name: t for t in figure.data}
    assert list(traces) == ["R₁ update directions", "R̄ update directions", "R₁ gradient directions",
                            "R̄ gradient directions"]  # fmt: skip
    assert list(traces["R₁ gradient directions"].x) == [1, 20]
    np.testing.assert_allclose(traces["R₁ gradient directions"].y, 2 * np.array(traces["R̄ gradient directions"].y))
    assert traces["R̄ gradient directions"].marker.symbol == "circle-open"


def test_accuracy_of_every_operation(accuracy):
    figure = accuracy_figure(accuracy, title="<i>x</i>")
    assert [t.name for t in figure.data][2:] == ["&lt;b&gt;sub&lt;/b&gt;, train", "&lt;b&gt;sub&lt;/b&gt;, held out"]
    assert "&lt;i&gt;" in figure.layout.title.text


def test_arms_one_line_a_seed_with_the_step_marked():
    rows = []
    for arm, reach in (("control", 300), ("keep", 100), ("never", 9999)):
        for seed in (1, 2):
            for step in (0, 100, 200, 300):
                for op in ("add", "sub"):
                    good = step >= reach and not (op == "sub" and seed == 2 and step == reach)
                    rows.append((arm, seed, step, op, 0.99 if good else 0.1))
    table = pd.DataFrame(rows, columns=["arm", "seed", "step", "op", "test_accuracy"])
    figure = arms_figure(table)
    lines = [t for t in figure.data if t.mode == "lines"]
    marks = {t.name: t for t in figure.data if t.mode == "markers"}
    assert len(lines) == 6
    assert sum(t.showlegend for t in lines) == 3
    assert list(marks["control"].x) == [300]  # with seed 2 the lowest operation never gets there
    assert list(marks["keep"].x) == [100, 200]
    assert list(marks["never"].x) == []
    assert len({t.marker.symbol for t in marks.values()}) == 3
