"""Figures of a tangent analysis say what its tables say."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from tl_asymmetry.plots import tangent_anisotropy_figure, tangent_energy_figure, tangent_strata_figure


def make_table(name="W_Q"):
    """Two layers, three steps, two sites of weights and one of tokens; numbers follow from the place."""
    rows = []
    sites = [("weight", name, "attn_in"), ("weight", "W_in", "mlp_in"), ("activation", "resid_post", "resid_post")]
    for (gradient, site, point), step, layer, method, rank, head in itertools.product(
        sites, (0, 10, 40), (0, 1), ("pca", "semi_nmf"), (4, 16), (None, 0)
    ):
        x = 0.1 + 0.01 * step / 10 + 0.1 * layer + 0.002 * rank + 0.02 * (method == "pca") + 0.05 * (head is not None)
        x += 0.2 * (gradient == "activation") + 0.03 * (site == "W_in")
        rows.append(
            {
                "step": step, "phase": "late" if step > 12 else "early", "gradient": gradient, "site": site,
                "layer": layer, "head": head, "point": point, "method": method, "rank": rank, "energy": x,
                "normal_energy": 0.1, "ratio": x / 0.1, "p": 1 / 21 if layer else 0.5, "q": 0.5, "size": 0.13,
                "spectrum_expected": 0.3, "excess": x / 0.3, "largest_energy": 0.9, "isotropy": 0.1,
                "anisotropy": x - 0.3, "normal_anisotropy": -0.05, "anisotropy_p": 1 / 21, "gradient_norm": 1.0,
                "samples": 16,
            }
        )  # fmt: skip
    return pd.DataFrame(rows).astype({"head": "Int64"})


def make_strata():
    rows = [
        {
            "step": step, "phase": "late", "layer": layer, "method": method, "rank": 16, "stratum": n,
            "log_frequency_low": -9.0 + n, "log_frequency_high": -8.0 + n, "tokens": 100 * n,
            "energy": 0.1 * n + 0.01 * step / 10, "normal_energy": 0.1, "ratio": 1.0 * n, "p": 0.05,
            "gradient_share": 0.2, "distance": 3.0 + layer,
        }
        for step, layer, method, n in itertools.product((0, 40), (0, 1), ("pca", "semi_nmf"), range(1, 6))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def trace(figure, name):
    return next(t for t in figure.data if t.name == name)


def words(figure):
    return re.sub("<[^>]*>", "", figure.layout.title.text.replace("<br>", " "))


def test_energy_lines_are_whole_matrices_over_steps():
    table = make_table()
    figure = tangent_energy_figure(table, gradient="weight", method="semi_nmf", rank=4, basis_until=10.0)
    for layer in (0, 1):
        rows = table.query(
            "gradient == 'weight' and site == 'W_Q' and method == 'semi_nmf' and rank == 4 and layer == @layer"
        )
        rows = rows[rows["head"].isna()]
        line = trace(figure, f"L{layer}")
        assert list(line.x) == [0, 10, 40]
        np.testing.assert_allclose(line.y, rows["ratio"])
        np.testing.assert_allclose(trace(figure, f"L{layer} null").y, rows["spectrum_expected"] / rows["normal_energy"])
        assert set(line.marker.symbol) == {"circle" if layer else "circle-open"}
        assert line.customdata[0][0] == f"L{layer} · W_Q"
    assert "semi-NMF basis of rank 4" in words(figure)
    assert figure.layout.shapes[1].x0 == 10


def test_a_menu_shows_the_other_sites():
    table = make_table()
    figure = tangent_energy_figure(table, gradient="weight")
    menu = figure.layout.updatemenus[0]
    assert [button.label for button in menu.buttons] == ["W_Q", "W_in"]
    changed, title = menu.buttons[1].args
    rows = table[table["head"].isna()].query("site == 'W_in' and method == 'pca' and rank == 16 and layer == 1")
    np.testing.assert_allclose(changed["y"][3], rows["ratio"])
    assert "W_in" in title["title.text"]
    assert not tangent_energy_figure(table, gradient="activation").layout.updatemenus


def test_anisotropy_is_beside_that_of_the_controls():
    table = make_table()
    figure = tangent_anisotropy_figure(table, gradient="activation")
    rows = table[table["head"].isna()].query("gradient == 'activation' and method == 'pca' and rank == 16")
    np.testing.assert_allclose(trace(figure, "L1").y, rows.query("layer == 1")["anisotropy"])
    assert set(trace(figure, "L1 null").y) == {-0.05}
    assert "block output" in words(figure)


def test_strata_show_energy_above_distance_and_slide_over_steps():
    strata = make_strata()
    figure = tangent_strata_figure(strata, method="semi_nmf")
    assert [t.name for t in figure.data] == ["L0", "L1", "L0", "L1"]
    np.testing.assert_allclose(figure.data[0].y, [0.14, 0.24, 0.34, 0.44, 0.54])
    np.testing.assert_allclose(figure.data[3].y, [4.0] * 5)
    slider = figure.layout.sliders[0]
    assert slider.active == 1
    np.testing.assert_allclose(slider.steps[0].args[0]["y"][0], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert list(figure.layout.xaxis.ticktext) == ["rarest", "2", "3", "4", "most frequent"]


def test_text_is_escaped():
    figure = tangent_energy_figure(make_table("<b>x</b>"), gradient="weight", title="<i>t</i>")
    assert "<b>x</b>" not in figure.layout.title.text
    assert "&lt;i&gt;" in figure.layout.title.text
    assert figure.layout.updatemenus[0].buttons[0].label == "&lt;b&gt;x&lt;/b&gt;"


def test_gradients_of_zero_are_drawn_as_nothing():
    table = make_table()
    table[["energy", "ratio", "normal_energy", "spectrum_expected", "anisotropy", "normal_anisotropy"]] = np.nan
    for draw in (tangent_energy_figure, tangent_anisotropy_figure):
        assert "No value" in draw(table).layout.annotations[0].text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradient": "both"}, "expected gradient to be one of 'weight', 'activation', got 'both'"),
        ({"method": "ica"}, "expected method to be one of 'pca', 'semi_nmf', got 'ica'"),
        ({"rank": 5}, "expected rank to be one of 4, 16, got 5"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        tangent_energy_figure(make_table(), **options)
    with pytest.raises(ValueError, match="pass TangentAnalysis.table"):
        tangent_anisotropy_figure(make_table().drop(columns="energy"))
    with pytest.raises(ValueError, match=r"pass TangentAnalysis\.strata"):
        tangent_strata_figure(make_table())
