"""The report as a reader meets it: opens from disk, draws, combines its controls, keeps foreign text text."""

from __future__ import annotations

import numpy as np
import pytest

from tests.browser.conftest import HOSTILE
from tests.browser.measures import CONTRASTS, LAID_OVER, SHOWN_MAP, unreached_by_keyboard, until

HEADS = "#figure-1"


def scroll_through(page):
    """Figures are drawn when they come near the screen."""
    for box in page.locator(".figure-box:not([hidden])").all():
        box.scroll_into_view_if_needed()
        box.locator(".main-svg").first.wait_for()


def test_every_figure_is_drawn_and_names_stay_text(visit, report_page, pair):
    page = visit(report_page)
    assert page.locator("h1").inner_text() == pair[0]._title()
    assert HOSTILE in page.locator("h1").inner_text()
    scroll_through(page)
    assert page.locator("text=could not be drawn").count() == 0
    assert page.locator("main img").count() == 0


def test_menus_and_slider_combine_by_keyboard(visit, report_page, pair):
    page = visit(report_page)
    page.locator(f"{HEADS} .main-svg").first.wait_for()
    table = pair[0].table
    matrix, value = page.locator(f"{HEADS} select").all()
    rank = page.locator(f"{HEADS} input[type=range]")
    # in an order that makes each control follow upon another's change
    rank.press("End")
    matrix.select_option(label="W_K in attn_in")
    value.select_option(label="excess over Adam on these inputs")
    rank.press("ArrowLeft")
    matrix.select_option(label="W_V in prediction")
    shown = page.evaluate(SHOWN_MAP, f"{HEADS} .plot")
    rows = table[(table["matrix"] == "W_V") & (table["subspace"] == "prediction") & (table["rank"] == 4)]
    expected = np.log2(rows.pivot(index="layer", columns="head", values="excess").to_numpy(float))
    np.testing.assert_allclose(np.array(shown["z"], dtype=float), expected, atol=6e-4)
    assert "W_V against prediction" in shown["axis"]
    assert "excess" in shown["title"].replace("<br>", " ").lower()
    value.select_option(label="isotropic z")
    rank.press("Home")
    shown = page.evaluate(SHOWN_MAP, f"{HEADS} .plot")
    rows = table[(table["matrix"] == "W_V") & (table["subspace"] == "prediction") & (table["rank"] == 1)]
    expected = rows.pivot(index="layer", columns="head", values="isotropic_z").to_numpy(float)
    np.testing.assert_allclose(np.array(shown["z"], dtype=float), expected, atol=6e-4)
    assert shown["marks"] == int((rows["isotropic_q"] < 0.05).sum())


def test_hover_explains_a_cell(visit, report_page, pair):
    page = visit(report_page)
    page.locator(f"{HEADS} .main-svg").first.wait_for()
    until(page, f"document.querySelector('{HEADS} .plot').dataset.hover === 'yes' || "
                f"document.getElementById('plot-1-0-hover') === null")  # fmt: skip
    page.locator(f"{HEADS} .plot .nsewdrag").hover(position={"x": 40, "y": 20})
    page.locator(f"{HEADS} .hovertext").first.wait_for()
    words = page.locator(f"{HEADS} .hovertext").first.text_content()
    for part in (
        "L0H0",
        "W_Q",
        "95 % interval",
        "isotropic null",
        "Adam on these inputs",
        "verdict",
        "rounding share",
        "q ",
    ):
        assert part in words


def test_a_figure_of_its_own_works_with_plotlys_own_controls(visit, pair, tmp_path):
    path = tmp_path / "figure.html"
    pair[0].plot_heads().write_html(path, include_plotlyjs=True, config={"showSendToCloud": False})
    page = visit(path)
    page.locator(".updatemenu-header").first.click()
    page.locator(".updatemenu-dropdown-button", has_text="W_O in prediction").click()
    page.locator(".updatemenu-header").nth(1).click()
    page.locator(".updatemenu-dropdown-button", has_text="isotropic z").click()
    page.locator(".slider-group rect.slider-rail-touch-rect").click(position={"x": 5, "y": 5})
    until(page, "document.querySelector('.js-plotly-plot').layout.sliders[0].active === 0")
    page.wait_for_timeout(300)
    shown = page.evaluate(SHOWN_MAP, ".js-plotly-plot")
    rows = pair[0].table.query("matrix == 'W_O' and subspace == 'prediction' and rank == 1")
    expected = rows.pivot(index="layer", columns="head", values="isotropic_z").to_numpy(float)
    np.testing.assert_allclose(np.array(shown["z"], dtype=float), expected, atol=6e-4)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_telephone_and_can_be_read(visit, report_page, scheme):
    page = visit(report_page, width=390, scheme=scheme)
    scroll_through(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    too_faint = [found for found in page.evaluate(CONTRASTS) if found["ratio"] < found["needed"]]
    assert not too_faint
    assert page.evaluate(LAID_OVER) == []


def test_keyboard_reaches_every_control(visit, report_page):
    page = visit(report_page)
    scroll_through(page)
    page.evaluate("scrollTo(0, 0)")
    assert unreached_by_keyboard(page) == []


def test_download_is_the_whole_table(visit, report_page, pair):
    import pandas as pd

    page = visit(report_page)
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download all as table.csv").click()
    assert waiting.value.suggested_filename == "table.csv"
    read = pd.read_csv(waiting.value.path())
    table = pair[0].table
    assert list(read.columns) == list(table.columns)
    keys = ["matrix", "subspace", "layer", "head", "rank"]
    sorted_by_keys = [each.sort_values(keys, ignore_index=True) for each in (read, table)]
    np.testing.assert_allclose(sorted_by_keys[0]["relative"], sorted_by_keys[1]["relative"], rtol=1e-12)
    shown = pair[0].config["shown_rank"]
    assert (read["rank"] == shown).iloc[: (table["rank"] == shown).sum()].all()
    assert read["excess"].iloc[0] == pytest.approx(table.loc[table["rank"] == shown, "excess"].max())
