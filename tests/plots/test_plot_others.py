"""Layer summaries, rank curves, asymmetry and spectra say what their tables say."""

from __future__ import annotations

import importlib
import inspect
import re

import numpy as np
import pytest
import torch

from tests import tiny
from tests.synthetic import make_asymmetry, make_table
from tl_asymmetry import analyze_pair, plots
from tl_asymmetry.geometry import marchenko_pastur_edge
from tl_asymmetry.plots import asymmetry_figure, layers_figure, rank_curve_figure, spectrum_figure
from tl_asymmetry.results.result import KINDS


def trace(figure, name):
    return next(t for t in figure.data if t.name == name)


def words(figure):
    """The title without its markup and line breaks."""
    return re.sub("<[^>]*>", "", figure.layout.title.text.replace("<br>", " "))


def rows_of(table, matrix, subspace, rank):
    return table[(table["matrix"] == matrix) & (table["subspace"] == subspace) & (table["rank"] == rank)]


def test_every_figure_takes_the_same_keywords():
    for name in plots.__all__:
        if name.endswith("_figure"):
            layout = inspect.signature(getattr(plots, name)).parameters["layout"]
            assert layout.kind is inspect.Parameter.VAR_KEYWORD
            assert layout.annotation == "Unpack[Layout]"
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        plots.heads_figure(make_table(), "W_Q", widht=400)


def test_every_method_of_a_result_lists_its_arguments():
    """An editor's help shows them, and an error names the method that was called."""
    for name, module in KINDS.items():
        kind = getattr(importlib.import_module(module), name)
        for method in (m for m in dir(kind) if m.startswith("plot_")):
            parameters = inspect.signature(getattr(kind, method)).parameters
            hidden = [p.name for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
            assert not hidden, f"{name}.{method}"
            for keyword in ("title", "template", "width", "height"):
                assert parameters[keyword].kind is inspect.Parameter.KEYWORD_ONLY, f"{name}.{method}"
                assert parameters[keyword].default is None, f"{name}.{method}"


# Layers


def test_layers_draw_the_median_head_and_the_reference(table):
    figure = layers_figure(table, rank=4)
    for matrix, space in (("W_Q", "attn_in"), ("W_O", "prediction"), ("W_in", "mlp_in"), ("W_out", "prediction")):
        rows = rows_of(table, matrix, space, 4)
        line = trace(figure, f"{matrix} · {space}")
        np.testing.assert_allclose(line.y, rows.groupby("layer")["relative"].median())
        reference = trace(figure, f"{matrix} matched reference").y
        if matrix in ("W_O", "W_out"):
            assert set(reference) == {None}
        else:
            np.testing.assert_allclose(reference, rows.groupby("layer")["activation_matched"].median() * 64 / 4)
    band = trace(figure, "W_Q middle half")
    quartiles = rows_of(table, "W_Q", "attn_in", 4).groupby("layer")["relative"].quantile([0.25, 0.75]).unstack()
    np.testing.assert_allclose(band.y, [*quartiles[0.25], *quartiles[0.75][::-1]])


def test_layers_show_reads_above_writes_and_both_nulls(table):
    figure = layers_figure(table, rank=4)
    assert trace(figure, "W_Q · attn_in").yaxis == "y"
    assert trace(figure, "W_O · prediction").yaxis == "y2"
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range
    assert [s.y0 for s in figure.layout.shapes] == [1, 1]
    hover = trace(figure, "W_Q · attn_in")
    assert "isotropic null" in hover.hovertemplate
    assert hover.customdata[0][5].startswith("activation-matched: ")
    assert hover.customdata[2][4].endswith(" of 4")
    assert "1 = chance" in words(figure)
    assert "without gradients" in words(figure)


def test_layers_use_gradients_where_there_are_some():
    figure = layers_figure(make_table(gradients=True), rank=4)
    assert all(v > 0 for v in trace(figure, "W_O matched reference").y)
    assert trace(figure, "W_O · prediction").customdata[0][5].startswith("gradient-matched: ")
    assert "without gradients" not in words(figure)


def test_layers_slider_equals_the_single_rank(table):
    figure = layers_figure(table)
    for step, rank in zip(figure.layout.sliders[0].steps, (1, 4, 16), strict=True):
        alone = layers_figure(table, rank=rank)
        for i in step.args[1]:
            assert list(step.args[0]["y"][i]) == list(alone.data[i].y)


def test_layers_errors(table):
    with pytest.raises(
        ValueError, match="expected matrices among 'W_Q', .*got 'W_X'; pass .* or matrices=None for all"
    ):
        layers_figure(table, matrices=["W_X"])
    with pytest.raises(ValueError, match="expected matrices with a name or more, got none; pass matrices=None for all"):
        layers_figure(table, matrices=[])
    with pytest.raises(ValueError, match="expected subspace of W_K to be one of .*got 'mlp_in'"):
        layers_figure(table, matrices=["W_K"], subspace="mlp_in")


# Rank curves


def test_rank_curve_draws_the_row_its_interval_its_nulls_and_the_bound(table):
    rows = table[(table["matrix"] == "W_Q") & (table["subspace"] == "attn_in")]
    rows = rows[(rows["layer"] == 1) & (rows["head"] == 2)]
    figure = rank_curve_figure(table, "W_Q", layer=1, head=2)
    np.testing.assert_allclose(trace(figure, "L1H2").y, rows["relative"])
    np.testing.assert_allclose(
        trace(figure, "activation-matched reference").y, rows["activation_matched"] * 64 / rows["rank"]
    )
    np.testing.assert_allclose(trace(figure, "most possible, d/k").y, [64, 16, 4])
    whiskers = trace(figure, "L1H2").error_y
    np.testing.assert_allclose(whiskers.array, rows["ci_high"] - rows["relative"])
    np.testing.assert_allclose(whiskers.arrayminus, rows["relative"] - rows["ci_low"])
    assert figure.layout.shapes[0].y0 == 1
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    filled = [not s.endswith("-open") for s in trace(figure, "L1H2").marker.symbol]
    assert filled == (rows["isotropic_q"] < 0.05).tolist()


def test_rank_curve_without_interval_or_reference(table):
    figure = rank_curve_figure(table, "W_O", layer=0, head=0)
    names = [t.name for t in figure.data]
    assert names == ["most possible, d/k", "L0H0, every k", "L0H0"]
    assert figure.data[-1].error_y.array is None
    assert figure.data[-1].customdata[0][3] == "none (weights only)"


def test_rank_curve_of_all_heads_and_of_an_mlp(table, grouped):
    figure = rank_curve_figure(table, "W_Q", layer=0)
    assert [t.name for t in figure.data][-4:] == ["L0H0", "L0H1", "L0H2", "L0H3"]
    assert all(t.error_y.array is None for t in figure.data)
    many = rank_curve_figure(make_table(layers=1, heads=16), "W_Q", layer=0)
    assert {t.showlegend for t in many.data[-16:]} == {False}
    assert "Hover names the head" in words(many)
    assert rank_curve_figure(table, "W_in", layer=2).data[-1].name == "L2"
    assert rank_curve_figure(grouped, "W_K", layer=2, head=1).data[-1].name == "L2 KV head 1 (query heads 2–3)"


def test_rank_curve_runs_through_every_k_with_whiskers_at_the_ranks_alone():
    """Between two ranks of the table a curve may turn: what is drawn there are numbers, no line between points."""
    kind = tiny.KINDS[-1]
    result = analyze_pair(
        tiny.build("gpt2", kind), tiny.build("gpt2", kind, delta=0.05), tokens=tiny.tokens(9, 12), ranks=[2, 8],
        matrices=["W_Q"], progress=False,
    )  # fmt: skip
    d = result.config["shape"]["d_model"]
    figure = result.plot_rank_curve("W_Q", 1, 0)
    line, points = trace(figure, "L1H0, every k"), trace(figure, "L1H0")
    assert list(line.x) == list(range(1, d + 1))
    fraction = np.cumsum(result.energy_profile("W_Q", "attn_in")[1, 0].astype(np.float64))
    np.testing.assert_allclose(line.y, fraction * d / np.arange(1, d + 1), rtol=1e-6)
    assert list(points.x) == [2, 8]
    np.testing.assert_allclose(points.y, [line.y[1], line.y[7]], rtol=1e-5)
    assert np.isfinite(points.error_y.array).all()
    reference = trace(figure, "SGD on these inputs")
    assert list(reference.x) == list(range(1, 9))  # as far as the ranks go
    where = "matrix == 'W_Q' and subspace == 'attn_in' and layer == 1 and head == 0 and null == 'sgd'"
    rows = result.nulls.query(where)
    np.testing.assert_allclose(np.array(reference.y)[[1, 7]], rows["expected"] * d / rows["rank"], rtol=1e-12)


def test_rank_curve_errors(table):
    with pytest.raises(ValueError, match="expected layer to be one of 0, 1, 2, 3, got 9; pass layer=0"):
        rank_curve_figure(table, "W_Q", layer=9)
    with pytest.raises(ValueError, match="expected head of W_Q to be one of 0, 1, 2, 3, got 4; pass head=0"):
        rank_curve_figure(table, "W_Q", layer=0, head=4)
    with pytest.raises(ValueError, match="expected head of W_in to be one of None, got 0; pass head=None"):
        rank_curve_figure(table, "W_in", layer=0, head=0)


# Asymmetry


def test_asymmetry_draws_heads_layers_and_intervals(asymmetry):
    figure = asymmetry_figure(asymmetry, rank=4)
    rows = asymmetry[asymmetry["rank"] == 4]
    heads, layers = rows[rows["head"].notna()], rows[rows["head"].isna()]
    scatter = trace(figure, "head")
    np.testing.assert_allclose(scatter.x, heads["write"], rtol=1e-5)
    np.testing.assert_allclose(scatter.y, heads["read"], rtol=1e-5)
    pooled = trace(figure, "layer, heads pooled (95 % over texts)")
    np.testing.assert_allclose(pooled.y, layers["log2_ratio"], rtol=1e-5)
    np.testing.assert_allclose(pooled.error_y.array, layers["ci_high"] - layers["log2_ratio"], rtol=1e-5)
    np.testing.assert_allclose(pooled.error_y.arrayminus, layers["log2_ratio"] - layers["ci_low"], rtol=1e-5)
    diagonal = trace(figure, "read = write")
    assert list(diagonal.x) == list(diagonal.y)
    lines = [(s.x0, s.x1, s.y0, s.y1) for s in figure.layout.shapes]
    assert (0, 1, 1, 1) in lines
    assert (1, 1, 0, 1) in lines
    assert scatter.customdata[0][0] == "L0H0"
    assert scatter.customdata[0][5] == "unknown without gradients"
    assert "need not be 0" in words(figure)


def test_asymmetry_with_expectation(table):
    figure = asymmetry_figure(make_asymmetry(table, expected=True), rank=4)
    assert list(trace(figure, "expected by matched references").y) == [0.7] * 4
    assert trace(figure, "head").customdata[0][5] == "0.7"
    assert "Green bars" in words(figure)


def test_asymmetry_slider_equals_the_single_rank(asymmetry):
    figure = asymmetry_figure(asymmetry)
    for step, rank in zip(figure.layout.sliders[0].steps, (1, 4, 16), strict=True):
        data, layout, targets = step.args
        alone = asymmetry_figure(asymmetry, rank=rank)
        for i, target in enumerate(targets):
            assert list(data["x"][i]) == list(alone.data[target].x)
            assert list(data["y"][i]) == list(alone.data[target].y)
        assert list(layout["xaxis.range"]) == list(alone.layout.xaxis.range)


def test_asymmetry_with_nan_and_errors(asymmetry):
    asymmetry.loc[asymmetry["layer"] == 0, ["read", "log2_ratio", "ci_low", "ci_high"]] = np.nan
    figure = asymmetry_figure(asymmetry, rank=4)
    assert trace(figure, "head").y[0] is None
    assert trace(figure, "head").customdata[0][3] == "–"
    with pytest.raises(ValueError, match="expected rank to be one of 1, 4, 16, got 2"):
        asymmetry_figure(asymmetry, rank=2)
    with pytest.raises(ValueError, match="expected a table with the columns read, .*pass PairAnalysis.asymmetry"):
        asymmetry_figure(asymmetry.drop(columns="read"))


# Spectra


def test_spectrum_draws_descending_values_and_their_shares():
    values = np.random.default_rng(0).gamma(1, 1, (3, 20))
    figure = spectrum_figure(values, name="attn_in", edge=2.0, ranks=[4])
    for layer in range(3):
        np.testing.assert_allclose(trace(figure, f"L{layer}").y, np.sort(values[layer])[::-1])
        share = figure.layout.updatemenus[0].buttons[1].args[0]["y"][layer]
        np.testing.assert_allclose(share, np.sort(values[layer])[::-1] / values[layer].sum())
    assert list(trace(figure, "L1: Marchenko–Pastur edge").y) == [2.0, 2.0]
    assert figure.layout.shapes[0].x0 == 4
    steps = figure.layout.sliders[0].steps
    assert [s.label for s in steps] == ["all", "L0", "L1", "L2"]
    assert list(steps[2].args[0]["visible"]) == [False, True, False, False, True, False]


def test_spectrum_of_names_escapes_them_and_takes_one_vector():
    figure = spectrum_figure({"<b>a</b>": np.arange(1.0, 5.0), "b": np.arange(2.0, 6.0)})
    assert figure.data[0].name == "&lt;b&gt;a&lt;/b&gt;"
    assert len(spectrum_figure(np.arange(1.0, 9.0)).data) == 1


def test_spectrum_counts_what_a_log_axis_cannot_hold_and_says_when_it_thins():
    figure = spectrum_figure(np.array([[1.0, 0.5, 0.0, -1e-12]]))
    assert len(figure.data[0].y) == 2
    assert "2 eigenvalues" in words(figure)
    large = spectrum_figure(np.linspace(1, 2, 5000)[None])
    assert len(large.data[0].y) <= 400
    assert {1, 2, 64, 5000} <= set(large.data[0].x)
    assert "400 log-spaced" in words(large)


def test_a_direction_without_variance_does_not_stretch_the_axis():
    values = np.append(np.linspace(4, 1, 30), 1e-7)
    figure = spectrum_figure(values[None], edge=0.5)
    assert figure.data[0].y[-1] == 1e-7  # drawn, under the axis
    low, high = figure.layout.yaxis.range
    assert -0.6 < low < np.log10(0.5) < np.log10(4) < high
    assert "1 last eigenvalues" in words(figure)
    share = figure.layout.updatemenus[0].buttons[1].args[1]["yaxis.range"]
    assert 10 ** share[0] < 0.5 / values.sum() < 4 / values.sum() < 10 ** share[1]
    steady = spectrum_figure(np.geomspace(1, 1e-6, 30)[None])
    assert steady.layout.yaxis.range[0] < -6


def test_spectrum_errors():
    with pytest.raises(ValueError, match=r"expected eigenvalues of shape \[d\] or \[layer, d\], got \[1, 2, 3\]"):
        spectrum_figure(np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="without NaN or infinity"):
        spectrum_figure(np.array([np.nan]))
    with pytest.raises(ValueError, match="expected at least one spectrum, got none"):
        spectrum_figure({})
    with pytest.raises(ValueError, match="expected layer to be one of 'L0', 'L1', got 'L2'"):
        spectrum_figure(np.ones((2, 4)), layer=2)
    with pytest.raises(ValueError, match="expected edge's name to be one of 'a', got 'b'"):
        spectrum_figure({"a": np.ones(3)}, edge={"b": 1.0})
    with pytest.raises(ValueError, match="expected ranks >= 1, got 0"):
        spectrum_figure(np.ones((2, 4)), ranks=[0])


def test_activation_spectra_carry_their_edge_and_weights_do_not():
    kind = tiny.KINDS[-1]
    result = analyze_pair(
        tiny.build("gpt2", kind), tiny.build("gpt2", kind, delta=0.05), tokens=tiny.tokens(9, 12), ranks=[4], groups=1,
        progress=False,
    )  # fmt: skip
    figure = result.plot_spectrum("attn_in")
    samples = 9 * 11  # first positions are left out
    assert result.config["tokens"] == samples
    for layer, λ in enumerate(result.eigenvalues("attn_in")):
        edge = trace(figure, f"L{layer}: Marchenko–Pastur edge").y[0]
        assert edge == pytest.approx(marchenko_pastur_edge(torch.from_numpy(λ), samples))
    assert not any("edge" in t.name for t in result.plot_spectrum("prediction").data)
    assert not any("edge" in t.name for t in result.plot_spectrum("W_Q").data)
