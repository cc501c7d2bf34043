"""One figure of all maps: whatever the menus and the slider stand at, the window shows what the table says."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from tests.synthetic import make_table
from tl_asymmetry.plots import head_maps_figure, heads_figure


def put(target, key, value):
    """Set "a.b.c" of nested dictionaries, as plotly does."""
    *path, last = key.split(".")
    for part in path:
        target = target.setdefault(part, {})
    target[last] = value


def apply(figure, matrix, value, rank):
    """What the browser would do: press a button of each menu and move the slider, in this order or any."""
    layout = figure["layout"]
    for step in (
        next(b for b in layout["updatemenus"][0]["buttons"] if b["label"] == matrix),
        next(b for b in layout["updatemenus"][1]["buttons"] if b["label"] == value),
        next(s for s in layout["sliders"][0]["steps"] if s["label"] == str(rank)),
    ):
        data, changes, targets = ({}, step["args"][0], []) if step["method"] == "relayout" else step["args"]
        for i, target in enumerate(targets):
            for key, values in data.items():
                put(figure["data"][target], key, values[i])
        for key, change in changes.items():
            put(layout, key, change)


def in_window(figure, trace):
    """Cells [layer][head] of a trace inside the figure's window."""
    low, high = figure["layout"]["xaxis"]["range"]
    bottom, top = figure["layout"]["yaxis"]["range"]
    centres = (np.array(trace["x"][:-1]) + np.array(trace["x"][1:])) / 2
    columns = [j for j, x in enumerate(centres) if low < x < high]
    rows = [i for i, y in enumerate(trace["y"]) if top < y < bottom]
    return rows, columns


def test_every_combination_shows_its_own_numbers():
    table = make_table(kv_heads=2)
    figure = head_maps_figure(table).to_plotly_json()
    matrices = [b["label"] for b in figure["layout"]["updatemenus"][0]["buttons"]]
    values = [b["label"] for b in figure["layout"]["updatemenus"][1]["buttons"]]
    assert matrices[:3] == ["W_Q in attn_in", "W_Q in prediction", "W_K in attn_in"]
    keys = {values[0]: "relative", values[1]: "excess", values[2]: "fraction_unrounded", values[3]: "isotropic_z"}
    for label, value, rank in itertools.product(matrices, values, (1, 4, 16)):
        apply(figure, label, value, rank)
        matrix, space = label.split(" in ")
        rows = table[(table["matrix"] == matrix) & (table["subspace"] == space) & (table["rank"] == rank)]
        expected = rows.pivot(index="layer", columns="head", values=keys[value]).to_numpy(float)
        if value == values[2]:
            expected = expected * 64 / rank
        shown = [
            t for t in figure["data"] if t.get("meta") == "diverging" and t["visible"] and in_window(figure, t)[0]
        ]  # fmt: skip
        if not np.isfinite(expected).any():
            assert not shown
            said = [t for t in figure["data"] if t["name"] == "absent" and t["visible"]]
            low, high = figure["layout"]["xaxis"]["range"]
            bottom, top = figure["layout"]["yaxis"]["range"]
            assert any(low < x < high and top < y < bottom for t in said for x, y in zip(t["x"], t["y"], strict=True))
            continue
        (trace,) = shown
        i, j = in_window(figure, trace)
        cells = np.array(trace["z"], dtype=float)[np.ix_(i, j)]
        assert cells.shape == expected.shape
        limit = trace["zmax"]
        assert trace["zmin"] == -limit
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = expected if value == values[3] else np.where(expected <= 0, -limit, np.log2(expected))
        np.testing.assert_allclose(cells, wanted, atol=6e-4)
        assert np.nanmax(np.abs(cells)) <= limit + 6e-4
        hover = next(t for t in figure["data"] if t["name"] == "hover" and in_window(figure, t)[0])
        assert f"· {matrix}<br>" in hover["hovertemplate"]
        fields = hover["customdata"][i[1]][j[0]]
        assert fields[1] == f"{rows[rows['layer'] == 1]['relative'].iloc[0]:.3g}"
        assert fields[2].endswith(f"k = {rank}")
        assert f"{matrix} against {space}" in figure["layout"]["xaxis"]["title"]["text"]


def test_controls_own_different_attributes():
    figure = head_maps_figure(make_table())
    touched = []
    for steps in (*(m.buttons for m in figure.layout.updatemenus), figure.layout.sliders[0].steps):
        own = set()
        for step in steps:
            if step.method == "relayout":
                own |= set(step.args[0])
            else:
                own |= set(step.args[0]) | set(step.args[1])
        touched.append(own)
    for a, b in itertools.combinations(touched, 2):
        assert not a & b


def test_marks_and_grey_cells_are_those_of_the_single_maps():
    table = make_table(kv_heads=2)
    figure = head_maps_figure(table, matrix="W_K", default_rank=16)
    low, high = figure.layout.xaxis.range
    bottom, top = figure.layout.yaxis.range
    alone = heads_figure(table, "W_K", rank=16)
    for name in (
        "above the isotropic null (q ≤ 0.05)",
        "rounding share ≥ 0.5 (mostly storage)",
        "rounding share ≥ 0.1",
    ):
        mark = next(t for t in figure.data if t.name == name)
        there = {
            (int((x - low) // 2), int(y - top))  # a KV head is two columns wide
            for x, y in zip(mark.x, mark.y, strict=True) if low < x < high and top < y < bottom
        }  # fmt: skip
        single = next(t for t in alone.data if t.name == name)
        assert there == {(round(x - 0.2), round(y + 0.2)) for x, y in zip(single.x, single.y, strict=True)}
        assert mark.marker.maxdisplayed
    assert figure.layout.xaxis.ticktext == ("0", "1") * 3
    assert figure.layout.xaxis.title.text == "KV head · W_K against attn_in"


def test_first_shown_and_errors():
    table = make_table()
    figure = head_maps_figure(table, matrix="W_O", subspace="resid_mid", value="unrounded", default_rank=1)
    assert figure.layout.updatemenus[0].active == 6
    assert figure.layout.updatemenus[1].active == 2
    assert figure.layout.sliders[0].active == 0
    assert "rounding removed" in figure.layout.title.text.replace("</b><br><b>", " ")
    with pytest.raises(ValueError, match="expected matrix to be one of 'W_Q', .* got 'W_X'"):
        head_maps_figure(table, matrix="W_X")
    with pytest.raises(ValueError, match="got 'gradient_excess', which is NaN in every row; pass value='relative'"):
        head_maps_figure(table, value="gradient_excess")
    single = head_maps_figure(table[(table["matrix"] == "W_in") & (table["rank"] == 4)])
    assert not single.layout.sliders
    assert "no heads" in single.layout.xaxis.title.text


def test_foreign_text_is_escaped_and_zero_is_said():
    bad = '"><img onerror=alert(1)> %{x} $a$'
    table = make_table()
    table["subspace"] = table["subspace"].replace({"attn_in": bad})
    figure = head_maps_figure(table, title=bad)
    for words in (
        figure.layout.title.text,
        figure.layout.xaxis.title.text,
        figure.layout.updatemenus[0].buttons[0].label,
    ):
        assert "<img" not in words
        assert "&lt;img" in words
        assert "%{" not in words
    table[["fraction", "relative", "excess", "isotropic_z", "fraction_unrounded"]] = np.nan
    assert "delta is zero" in head_maps_figure(table).layout.annotations[0].text.replace("<br>", " ")


def test_table_is_left_alone():
    table = make_table()
    before = table.copy()
    head_maps_figure(table)
    pd.testing.assert_frame_equal(table, before)
