"""Layer × head maps say what the table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tl_asymmetry.plots import head_maps_figure, heads_figure, rank_curve_figure, style
from tl_asymmetry.plots.maps import VERDICTS


def trace(figure, name):
    return next(t for t in figure.data if t.name == name)


def at(table, matrix, subspace, rank, layer, head):
    rows = table[
        (table["matrix"] == matrix) & (table["subspace"] == subspace) & (table["rank"] == rank)
    ].set_index(["layer", "head"])  # fmt: skip
    return rows.loc[(layer, head)]


def test_cells_are_log2_of_the_tables_values(table):
    figure = heads_figure(table, "W_Q", rank=4)
    for layer in range(4):
        for head in range(4):
            row = at(table, "W_Q", "attn_in", 4, layer, head)
            for name in ("relative", "excess"):
                assert trace(figure, name).z[layer][head] == pytest.approx(np.log2(row[name]), abs=6e-4)
            assert trace(figure, "z").z[layer][head] == pytest.approx(row["isotropic_z"], abs=6e-4)
            unrounded = row["fraction_unrounded"] * 64 / 4
            if unrounded > 0:
                assert trace(figure, "unrounded").z[layer][head] == pytest.approx(np.log2(unrounded), abs=6e-4)


def test_scale_is_centred_on_chance_and_symmetric(table):
    for shown in heads_figure(table, "W_Q").data[:4]:
        assert shown.zmin == -shown.zmax
        assert shown.zmid == 0
    bar = trace(heads_figure(table, "W_Q"), "relative").colorbar
    assert bar.ticktext[list(bar.tickvals).index(0)] == "1"


def test_hover_names_head_interval_both_nulls_and_rounding(table):
    figure = heads_figure(table, "W_Q", rank=4)
    row = at(table, "W_Q", "attn_in", 4, 2, 3)
    hover = figure.data[-1]
    cell = hover.customdata[2][3]
    assert cell[0] == "L2H3"
    assert cell[1] == f"{row['relative']:.3g}"
    assert cell[3] == f"{row['ci_low']:.3g} to {row['ci_high']:.3g}"
    assert cell[4].startswith(f"{row['rounding_share']:.3g}")
    isotropic, matched = cell[8:]
    assert f"z {row['isotropic_z']:.3g}" in isotropic
    assert f"q {row['isotropic_q']:.2g}" in isotropic
    assert "(beta)" in isotropic
    # The reference is a fraction in the table and relative in the hover, where excess is their plain ratio.
    assert matched == f"{row['activation_matched'] * 64 / 4:.3g}, excess {row['excess']:.3g}"
    for words in (
        "isotropic null",
        "activation-matched",
        "rounding share",
        "95 % interval over texts",
        "· W_Q",
        "eigengap",
        "‖ΔW‖/‖W‖",
    ):
        assert words in hover.hovertemplate


def test_nan_is_said_in_words(table):
    hover = heads_figure(table, "W_O", rank=4).data[-1]
    assert hover.customdata[0][0][3] == "none (weights only)"
    assert "activation-matched" not in hover.hovertemplate  # it does not apply
    table.loc[table["layer"] == 0, "eigengap"] = np.nan
    assert heads_figure(table, "W_O", rank=4).data[-1].customdata[0][0][6] == "–"


def test_menu_switches_what_it_says_and_the_title_says_what_one_means(table):
    figure = heads_figure(table, "W_Q")
    menu = figure.layout.updatemenus[0]
    shown = [t.name for t in figure.data if t.visible is True]
    assert shown[0] == "relative"
    meanings = {
        "relative": "1 = chance", "excess": "1 = what gradients on these", "unrounded": "1 = chance", "z": "0 = chance"
    }  # fmt: skip
    assert [b.label for b in menu.buttons] == [
        "relative fraction over the isotropic null",
        "excess over the activation-matched reference",
        "relative fraction over the isotropic null, rounding removed",
        "isotropic z",
    ]
    for button, (name, meaning) in zip(menu.buttons, meanings.items(), strict=True):
        visible = button.args[0]["visible"]
        assert len(visible) == len(figure.data)
        assert [t.name for t, v in zip(figure.data[:4], visible, strict=False) if v] == [name]
        stays = [t.name for t, v in zip(figure.data[4:], visible[4:], strict=True) if v]
        chance = (
            ["above the isotropic null (q ≤ 0.05)"] if name != "excess" else []
        )  # a dot is the test of what is shown
        assert stays == ["greyed", "rounding share ≥ 0.5 (mostly storage)", "rounding share ≥ 0.1", *chance, "hover"]
        assert meaning in button.args[1]["title.text"].replace("</span><br><span style='font-size:12px'>", " ")


def test_slider_refills_values_dots_and_hover_whatever_the_menu_stands_at(table):
    figure = heads_figure(table, "W_Q")
    slider = figure.layout.sliders[0]
    assert [s.label for s in slider.steps] == ["1", "4", "16"]
    assert slider.active == 1  # d // 16
    for step, rank in zip(slider.steps, (1, 4, 16), strict=True):
        update, targets = step.args
        alone = heads_figure(table, "W_Q", rank=rank)
        assert "visible" not in update
        for i, target in enumerate(targets):
            assert figure.data[target].name == alone.data[target].name
            if figure.data[target].name in ("relative", "excess", "unrounded", "z"):
                assert update["z"][i] == [list(r) for r in alone.data[target].z]
                assert update["zmax"][i] == alone.data[target].zmax
        assert list(update["x"][-2]) == list(alone.data[targets[-2]].x)
        assert update["customdata"][-1][1][2] == list(alone.data[-1].customdata[1][2])


@pytest.mark.parametrize(("given", "active"), [({"default_rank": 16}, 2), ({"default_rank": 1}, 0)])
def test_default_rank(table, given, active):
    assert heads_figure(table, "W_Q", **given).layout.sliders[0].active == active


def test_marks_stand_where_the_table_says(table):
    figure = heads_figure(table, "W_Q", rank=4)
    rows = table[(table["matrix"] == "W_Q") & (table["subspace"] == "attn_in") & (table["rank"] == 4)]
    significant = rows[rows["isotropic_q"] < 0.05]
    dots = trace(figure, "above the isotropic null (q ≤ 0.05)")
    assert set(zip(dots.x, dots.y, strict=True)) == set(zip(significant["head"], significant["layer"], strict=True))
    dominated = rows[rows["rounding_share"] >= 0.5]
    assert len(dominated)
    crosses = trace(figure, "rounding share ≥ 0.5 (mostly storage)")
    assert set(zip(crosses.x, crosses.y, strict=True)) == set(zip(dominated["head"], dominated["layer"], strict=True))
    grey = np.array(trace(figure, "greyed").z, dtype=float)
    assert np.isfinite(grey).sum() == len(dominated)
    marked = rows[(rows["rounding_share"] >= 0.1) & (rows["rounding_share"] < 0.5)]
    assert len(trace(figure, "rounding share ≥ 0.1").x) == len(marked)
    assert len({t.marker.symbol for t in figure.data if t.type == "scatter"}) == 3  # told apart without colour


def judged(table):
    """The table with what tests of both nulls say: above, below or not told apart, and a verdict."""
    rng = np.random.default_rng(0)
    told = ["above", "below", "not told apart"]
    verdicts = ["beyond", "as trained", "less than trained", "depleted", "no evidence"]
    read = table["pathway"] == "read"
    return table.assign(
        vs_chance=rng.choice(told, len(table)), vs_reference=np.where(read, rng.choice(told, len(table)), ""),
        verdict=rng.choice(verdicts, len(table)),
    )  # fmt: skip


def test_dots_are_the_test_of_the_value_shown_above_and_below(table):
    table = judged(table)
    rows = table.query("matrix == 'W_Q' and subspace == 'attn_in' and rank == 4")
    for value, column, null in (
        ("relative", "vs_chance", "isotropic null"),
        ("excess", "vs_reference", "activation-matched reference"),
    ):
        figure = heads_figure(table, "W_Q", rank=4, value=value)
        shown = [t for t in figure.data if t.type == "scatter" and t.visible is not False and "q ≤" in t.name]
        assert [t.name for t in shown] == [f"above the {null} (q ≤ 0.05)", f"below the {null} (q ≤ 0.05)"]
        for told, dots in zip(("above", "below"), shown, strict=True):
            wanted = rows[rows[column] == told]
            assert set(zip(dots.x, dots.y, strict=True)) == set(zip(wanted["head"], wanted["layer"], strict=True))
        light = [t.marker.color for t in shown]
        assert light == ["#14181f", "#ffffff"]  # told apart without colour
        assert [t.marker.line.color for t in shown] == light[::-1]


def test_a_bar_of_words_has_room_only_while_it_is_shown(table):
    table = judged(table)
    for draw in (lambda **v: heads_figure(table, "W_Q", rank=4, **v), lambda **v: head_maps_figure(table, **v)):
        number, word = draw(), draw(value="verdict")
        assert (number.layout.margin.r, word.layout.margin.r) == (64, 190)
        for button in number.layout.updatemenus[-1].buttons:
            assert button.args[1]["margin.r"] == (190 if button.label == "verdict" else 64)


def test_a_map_of_verdicts_writes_a_sign_into_every_cell(table):
    table = judged(table)
    rows = table.query("matrix == 'W_Q' and subspace == 'attn_in' and rank == 4").set_index(["layer", "head"])
    figure = heads_figure(table, "W_Q", rank=4, value="verdict")
    cells = trace(figure, "verdict")
    for layer in range(4):
        for head in range(4):
            verdict = rows.loc[(layer, head), "verdict"]
            sign, colour = VERDICTS[verdict]
            code = cells.z[layer][head]
            assert cells.text[layer][head] == sign
            assert cells.colorbar.ticktext[cells.colorbar.tickvals.index(code)] == f"{sign} {verdict}"
            at = (code + 0.5) / len(VERDICTS)
            assert [c for stop, c in cells.colorscale if stop <= at][-1] == colour
    assert not any(t.visible is not False and "q ≤" in (t.name or "") for t in figure.data)
    assert figure.data[-1].customdata[1][2][-1] == rows.loc[(1, 2), "verdict"]
    assert len({sign for sign, _ in VERDICTS.values()}) == len(VERDICTS)
    whole = head_maps_figure(table, value="verdict")
    shown = [t for t in whole.data if t.name == "verdict" and t.visible]
    assert len(shown) == len(table[["matrix", "subspace"]].drop_duplicates())
    assert {sign for t in shown for row in t.text for sign in row if sign} <= {sign for sign, _ in VERDICTS.values()}


def test_every_null_of_the_registry_is_a_value_and_a_line_of_the_hover(table):
    """Figures name no null: what the table of nulls holds is what they show."""
    keys = ["layer", "head", "matrix", "pathway", "subspace", "rank"]
    read = table[table["pathway"] == "read"]
    chance = table[keys].assign(
        null="isotropic", label="isotropic null", over="the isotropic null", meaning="1 = chance.", applies="every row",
        expected=table["rank"] / 64, excess=table["relative"], low=np.nan, high=np.nan, p=table["isotropic_p"],
        q=table["isotropic_q"],
    )  # fmt: skip
    tomorrow = read[keys].assign(
        null="unheard_of", label="null of tomorrow", over="tomorrow's null", meaning="1 = tomorrow.", applies="reads",
        expected=0.125, excess=read["fraction"] / 0.125, low=0.5, high=1.5, p=0.25, q=0.01,
    )  # fmt: skip
    nulls = pd.concat([chance, tomorrow])
    figure = heads_figure(table, "W_Q", nulls=nulls, rank=4, value="unheard_of")
    labels = [b.label for b in figure.layout.updatemenus[0].buttons]
    assert labels[:2] == ["relative fraction over the isotropic null", "excess over tomorrow's null"]
    row = at(table, "W_Q", "attn_in", 4, 2, 3)
    assert trace(figure, "unheard_of").z[2][3] == pytest.approx(np.log2(row["fraction"] / 0.125), abs=6e-4)
    assert len(trace(figure, "above tomorrow's null (q ≤ 0.05)").x) == 16
    hover = figure.data[-1]
    assert "<br>null of tomorrow: %{customdata[9]}" in hover.hovertemplate
    assert hover.customdata[2][3][9] == f"2, excess {row['fraction'] / 0.125:.3g} (0.5 to 1.5), p 0.25, q 0.01"
    assert "tomorrow" not in heads_figure(table, "W_O", nulls=nulls, rank=4).data[-1].hovertemplate
    maps = head_maps_figure(table, nulls=nulls, value="unheard_of")
    said = [t for t in maps.data if t.name == "absent" and t.visible]
    assert all(text == "no value:<br>null of tomorrow<br>applies to reads" for t in said for text in t.text)
    curve = rank_curve_figure(table, "W_Q", nulls=nulls, layer=1, head=0)
    np.testing.assert_allclose(trace(curve, "null of tomorrow").y, 0.125 * 64 / np.array([1, 4, 16]))


def test_mlp_matrix_is_one_column(table):
    figure = heads_figure(table, "W_in", rank=4)
    assert np.shape(figure.data[0].z) == (4, 1)
    assert figure.layout.xaxis.ticktext == ("MLP",)
    assert figure.data[-1].customdata[3][0][0] == "L3"


def test_kv_heads_are_named_with_the_query_heads_they_serve(grouped):
    figure = heads_figure(grouped, "W_K", rank=4)
    assert np.shape(figure.data[0].z) == (4, 2)
    assert figure.data[-1].customdata[3][1][0] == "L3 KV head 1 (query heads 2–3)"
    assert figure.layout.xaxis.title.text == "KV head"
    assert heads_figure(grouped, "W_Q", rank=4).layout.xaxis.title.text == "head"
    assert heads_figure(grouped, "W_K", rank=4, kv=False).data[-1].customdata[3][1][0] == "L3H1"


def test_value_absent_from_a_matrix_is_not_offered(table):
    labels = [b.label for b in heads_figure(table, "W_O").layout.updatemenus[0].buttons]
    assert not any("activation-matched" in label for label in labels)


def test_zero_delta_is_said(table):
    empty = table.copy()
    for column in ("fraction", "relative", "excess", "isotropic_z", "isotropic_q", "ci_low", "ci_high"):
        empty[column] = np.nan
    figure = heads_figure(empty, "W_Q")
    assert "delta is zero" in figure.layout.annotations[0].text.replace("<br>", " ")


def test_zero_fraction_takes_the_far_end_of_the_scale(table):
    table.loc[table["matrix"] == "W_Q", "relative"] = np.where(table.loc[table["matrix"] == "W_Q", "head"] == 0, 0, 2)
    shown = trace(heads_figure(table, "W_Q", rank=4, d_model=64), "relative")
    assert shown.z[0][0] == shown.zmin == -1


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"matrix": "W_X"}, "expected matrix to be one of 'W_Q', 'W_K'"),
        ({"matrix": "W_Q", "subspace": "resid_post"}, "expected subspace of W_Q to be one of 'attn_in', 'prediction'"),
        ({"matrix": "W_Q", "rank": 5}, "expected rank to be one of 1, 4, 16, got 5; pass rank=1"),
        ({"matrix": "W_Q", "default_rank": 5}, "expected default_rank to be one of 1, 4, 16, got 5"),
        ({"matrix": "W_Q", "value": "p"}, "expected value to be one of 'relative', 'excess'"),
        ({"matrix": "W_O", "value": "excess"}, "got 'excess', which is NaN in every row; pass value='relative'"),
        ({"matrix": "W_Q", "d_model": 0}, "expected d_model >= 1, got 0"),
        ({"matrix": "W_Q", "template": "sepia"}, "sepia"),
    ],
)
def test_errors_say_what_to_pass(table, kwargs, words):
    with pytest.raises(ValueError, match="^(?s:.*)$") as error:
        heads_figure(table, **kwargs)
    assert words in str(error.value)


def test_errors_about_the_table(table):
    with pytest.raises(ValueError, match="expected a table with the columns relative, got one without"):
        heads_figure(table.drop(columns="relative"), "W_Q")
    with pytest.raises(ValueError, match="expected one row per layer, head and rank of W_Q against attn_in"):
        heads_figure(pd.concat([table, table]), "W_Q")


def test_foreign_text_is_escaped(table):
    bad = '"><img onerror=alert(1)> %{x} $a$'
    table["subspace"] = table["subspace"].replace({"attn_in": bad})
    figure = heads_figure(table, "W_Q", title=bad, rank=4, subspace=bad)
    text = figure.layout.title.text
    assert "<img" not in text
    assert "&lt;img" in text
    assert "%{" not in text
    assert "$" not in text


def test_templates_and_size(table):
    assert heads_figure(table, "W_Q").layout.template.layout.paper_bgcolor == "#ffffff"
    dark = heads_figure(table, "W_Q", template="dark", width=500, height=400)
    assert dark.layout.template.layout.paper_bgcolor == style.PAPER["dark"]
    assert (dark.layout.width, dark.layout.height) == (500, 400)
    assert dark.data[0].colorscale[3][1] == style.DIVERGING["dark"][3][1]
    assert heads_figure(table, "W_Q", template="plotly_white").layout.template.layout.paper_bgcolor == "white"


def test_table_is_left_alone(table):
    before = table.copy()
    heads_figure(table, "W_Q")
    pd.testing.assert_frame_equal(table, before)
