"""All matrices side by side: every cell its own number, one scale, verdicts by sign."""

from __future__ import annotations

import numpy as np
import pytest

from tests.synthetic import make_table
from tl_asymmetry.plots import head_sheet_figure, heads_figure, maps
from tl_asymmetry.plots import rows as pick


def cells(figure):
    """The coloured cells, by panel."""
    return [t for t in figure.data if t.type == "heatmap" and t.name not in ("greyed", "hover")]


def test_every_panel_is_the_map_of_its_matrix_on_one_scale(grouped):
    figure = head_sheet_figure(grouped, value="relative", rank=4, across=3)
    matrices = list(dict.fromkeys(grouped["matrix"]))
    panels = cells(figure)
    titles = [a.text for a in figure.layout.annotations]
    assert len(panels) == len(matrices) == len(titles)
    assert len({(p.zmin, p.zmax) for p in panels}) == 1
    assert [p.showscale for p in panels] == [True] + [False] * (len(panels) - 1)
    for panel, matrix, title in zip(panels, matrices, titles, strict=True):
        space = pick.default_subspace(grouped, matrix)
        assert title == f"{matrix} · {space}"
        alone = heads_figure(grouped, matrix, subspace=space, rank=4, value="relative").data[0]
        np.testing.assert_array_equal(np.array(panel.z, dtype=float), np.array(alone.z, dtype=float))
    assert not figure.layout.updatemenus
    assert not figure.layout.sliders
    shown = [t.name for t in figure.data if t.showlegend]
    assert len(shown) == len(set(shown))


def test_verdicts_have_signs_and_a_legend_of_those_that_occur():
    table = make_table()
    table["verdict"] = np.where(table["layer"] == 0, "beyond", "as trained")
    figure = head_sheet_figure(table, rank=4)
    assert {sign for panel in cells(figure) for row in panel.text for sign in row} == {"▲", "≈"}
    legend = [t.name for t in figure.data if t.type == "scatter" and t.name.split(" ")[0] in ("▲", "≈", "△", "●")]
    assert legend == ["▲ beyond", "≈ as trained"]
    assert not any(panel.showscale for panel in cells(figure))
    hover = next(t for t in figure.data if t.name == "hover")
    assert hover.customdata[0][1].endswith("H1: beyond")


def test_marks_are_those_of_the_single_maps():
    table = make_table()
    figure, single = head_sheet_figure(table, value="relative", rank=4), heads_figure(table, "W_Q", rank=4)
    for name in ("greyed", f"rounding share ≥ {maps.ROUNDING_FLAGGED}"):
        ours, theirs = (next(t for t in f.data if t.name == name) for f in (figure, single))
        assert ours.x == theirs.x
        assert ours.y == theirs.y


def test_what_is_not_there_is_refused():
    table = make_table()
    with pytest.raises(ValueError, match="expected across >= 1, got 0; pass how many maps stand in a row"):
        head_sheet_figure(table, across=0)
    with pytest.raises(ValueError, match="expected rank to be one of"):
        head_sheet_figure(table, rank=3)
    with pytest.raises(ValueError, match="expected a value that some matrix has, got 'z', which is NaN everywhere"):
        head_sheet_figure(table.assign(isotropic_z=np.nan), value="z")
