"""Figures of Jacobians: what is drawn is what the tables say."""

import numpy as np
import pandas as pd
import pytest

from tl_asymmetry.plots.jacobians import MOST_RANKS, gain_figure, overlap_figure, singular_values_figure


def gains(layers=3, ranks=4, name="x"):
    rows = [
        {"layer": i, "rank": k, "gain": 2.0 ** (i - k), "direction_gain": 3.0, "name": name}
        for i in range(layers)
        for k in range(1, ranks + 1)
    ]
    return pd.DataFrame(rows)


def overlaps():
    names = ["layer 0", "layer 1", "prediction"]
    rows = [
        {"a": a, "b": b, "rank": k, "overlap": 1.0 if a == b else k / 10, "chance": k / 64}
        for k in (1, 4) for a in names for b in names
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_singular_values():
    σ = np.array([[4.0, 1.0, 1e-20], [2.0, 0.5, 0.25]])
    figure = singular_values_figure(σ, [3, 5], what="<b>the block</b>")
    assert [trace.name for trace in figure.data] == ["layer 3", "layer 5"]
    np.testing.assert_array_equal(figure.data[1].y, σ[1])
    assert np.isnan(figure.data[0].y[2])
    assert "1e-12th of the largest are left out" in figure.layout.title.text
    assert "&lt;b&gt;" in figure.layout.title.text
    assert figure.layout.yaxis.type == "log"
    with pytest.raises(ValueError, match=r"expected singular values of shape \[1, d\], got \[2, 3\]"):
        singular_values_figure(σ, [0])


def test_gain():
    figure = gain_figure(gains())
    heat = figure.data[0]
    assert list(heat.y) == [0, 1, 2]
    assert list(heat.x) == ["1", "2", "3", "4"]
    np.testing.assert_allclose(np.array(heat.z, dtype=float), [[i - k for k in range(1, 5)] for i in range(3)])
    assert heat.zmin == -heat.zmax
    assert "rank k" in figure.layout.xaxis.title.text
    alone = gain_figure(gains(), value="direction_gain", template="dark")
    assert np.allclose(np.array(alone.data[0].z, dtype=float), np.log2(3))
    many = gain_figure(gains(1, 500))
    assert len(many.data[0].x) <= MOST_RANKS
    assert many.data[0].x[-1] == "500"
    with pytest.raises(ValueError, match="expected value to be one of 'gain', 'direction_gain', got 'z'"):
        gain_figure(gains(), value="z")
    with pytest.raises(ValueError, match="expected a table with rows, got an empty one"):
        gain_figure(gains().iloc[:0])


def test_overlap():
    figure = overlap_figure(overlaps(), rank=4)
    heat = figure.data[0]
    np.testing.assert_allclose(np.array(heat.z, dtype=float), np.where(np.eye(3), 1, 0.4))
    steps = figure.layout.sliders[0].steps
    assert [step.label for step in steps] == ["1", "4"]
    assert figure.layout.sliders[0].active == 1
    np.testing.assert_allclose(np.array(steps[0].args[0]["z"][0], dtype=float), np.where(np.eye(3), 1, 0.1))
    assert "0.0625" in str(heat.customdata[0][1])
    with pytest.raises(ValueError, match="expected rank to be one of 1, 4, got 9"):
        overlap_figure(overlaps(), rank=9)
    with pytest.raises(ValueError, match="expected a table with rows"):
        overlap_figure(overlaps().iloc[:0])


@pytest.mark.parametrize("template", [None, "light", "dark", "plotly_dark"])
def test_templates_and_sizes(template):
    for figure in (
        singular_values_figure([[2.0, 1.0]], [0], template=template, width=400, height=500),
        gain_figure(gains(), template=template, width=400, height=500),
        overlap_figure(overlaps(), template=template, width=400, height=500),
    ):
        assert (figure.layout.width, figure.layout.height) == (400, 500)
        figure.to_json()
