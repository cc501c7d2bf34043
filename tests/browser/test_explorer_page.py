"""The explorer as a reader meets it: click, keyboard, search, sort, compare, download, share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.browser.conftest import HOSTILE
from tests.browser.measures import CONTRASTS, unreached_by_keyboard, until

READY = "document.documentElement.dataset.ready === 'yes'"
DRAWN = "Array.from(document.querySelectorAll('.card .chart')).every((chart) => chart.data || chart.textContent)"


@pytest.fixture
def look(visit, explorer_page):
    def go(fragment="", **options):
        page = visit(explorer_page, fragment, **options)
        until(page, READY)
        until(page, DRAWN)
        return page

    return go


def row(result, layer, head, matrix, subspace, rank):
    table = result.table
    rows = table[(table["layer"] == layer) & (table["matrix"] == matrix) & (table["subspace"] == subspace)]
    rows = rows[(rows["rank"] == rank) & (rows["head"].isna() if head is None else rows["head"] == head)]
    return rows.iloc[0]


def facts(card):
    return dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))


def told(page):
    """What is chosen, and what the page shows for it."""
    chosen = {
        each: page.locator(each).input_value() for each in ("#choose-map", "#choose-value", "#choose-rank", "#search")
    }
    return chosen | {each: page.locator(each).inner_text() for each in ("#rank-shown", "#meaning", "#rows")}


def test_a_click_opens_the_heads_own_numbers(look, pair):
    page = look()
    page.locator("td[data-layer='1'][data-head='2']").click()
    card = page.locator(".card")
    assert card.locator("h3").inner_text() == "L1H2 · W_Q"
    until(page, DRAWN)
    assert page.url.endswith("#L1H2/W_Q")
    expected = row(pair[0], 1, 2, "W_Q", "attn_in", 4)
    told = facts(card)
    assert told["relative at k = 4"].startswith(f"{expected['relative']:.3g} ")
    assert told["95 % interval over texts"] == f"{expected['ci_low']:.3g} to {expected['ci_high']:.3g}"
    assert told["isotropic null"].startswith(f"z {expected['isotropic_z']:.3g}, ")
    assert told["Adam on these inputs"].split(", ")[1].startswith(f"excess {expected['excess']:.3g} (")
    drawn = page.evaluate("Array.from(document.querySelectorAll('.card .chart')).map((c) => c.data)")
    curve, spectrum = drawn[0], drawn[1]
    points = next(t for t in curve if "q ≤" in t["name"])
    table = pair[0].table.query("layer == 1 and head == 2 and matrix == 'W_Q' and subspace == 'attn_in'")
    np.testing.assert_allclose(points["y"], table["relative"], rtol=1e-6)
    line = next(t for t in curve if t["name"] == "relative")
    profile = pair[0].energy_profile("W_Q", "attn_in")[1, 2].cumsum()
    assert [f"{y:.3g}" for y in line["y"]] == [f"{profile[k - 1] * 64 / k:.3g}" for k in line["x"]]
    values = pair[0].delta_spectrum("W_Q")[1, 2]
    assert [f"{y:.3g}" for y in spectrum[0]["y"]] == [f"{v:.3g}" for v in values / values.sum()]


def test_directions_edits_and_trajectory_stand_with_their_head_as_text(look, pair, trajectory):
    page = look("#L1H2/W_Q")
    card = page.locator(".card")
    assert card.locator(".direction").count() == 3
    token = card.locator(".token").first.inner_text()
    assert token.replace("␣", " ").endswith(HOSTILE)
    assert HOSTILE in card.locator(".context mark").first.inner_text()
    expected = pair[0].directions(1, "W_Q", 2, n=1, model=pair[1])
    first = expected["embedding_tokens"][0][0][0]
    assert pair[1].tokenizer.decode([int(token.split("␣")[0])]) == first
    assert "0.125" in card.inner_text()
    assert HOSTILE in card.inner_text()
    drawn = page.evaluate("document.querySelectorAll('.card .chart')[2].data")
    assert [t["y"] for t in drawn] == [[1, 2, 4, 5], [1, 1, 1.25, 1.5]]
    assert [t["name"] for t in drawn] == [
        "attn_in, since the first checkpoint",
        "prediction, since the first checkpoint",
    ]
    assert page.locator("main img").count() == 0


def test_deep_link_opens_several_side_by_side(look):
    page = look("#L0H1/W_O/resid_mid+L3/W_in+L2H3/W_K")
    assert page.locator(".card h3").all_inner_texts() == ["L0H1 · W_O", "L3 · W_in", "L2H3 · W_K"]
    assert page.locator(".card select").first.input_value() == "resid_mid"
    assert page.locator("#choose-map option:checked").inner_text() == "W_K in attn_in"
    boxes = [c.bounding_box() for c in page.locator(".card").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] != boxes[1]["x"]
    ranges = page.evaluate(
        "Array.from(document.querySelectorAll('.card')).map((c) => c.querySelector('.chart').layout.yaxis.range)"
    )
    assert ranges[0] == ranges[1] == ranges[2]  # one scale, to be compared
    page.locator(".card", has_text="L3 · W_in").get_by_role("button", name="Close").click()
    assert page.url.endswith("#L0H1/W_O/resid_mid+L2H3/W_K")
    page.evaluate("location.hash = '#L9H9/W_Q'")
    until(page, "document.getElementById('said').textContent.includes('names no head')")


def test_the_open_head_stands_beside_the_map_and_both_stay_in_sight(look):
    page = look("#L1H2/W_Q")
    page.locator("td[data-layer='2'][data-head='1']").click()
    boxes = [page.locator(which).bounding_box() for which in ("#map", ".card")]
    assert boxes[1]["x"] > boxes[0]["x"] + boxes[0]["width"] / 2
    assert all(0 <= box["y"] < 900 for box in boxes)
    page = look("#L1H2/W_Q", width=390)
    boxes = [page.locator(which).bounding_box() for which in ("#map", ".card")]
    assert boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]


def test_a_shared_address_restores_what_was_chosen(look):
    page = look("#L1H2/W_Q")
    page.locator("#choose-map").select_option(label="W_V in prediction")
    page.locator("#choose-value").select_option(label="isotropic z")
    page.locator("#choose-rank").press("End")
    page.locator("#search").fill("q < 0.05; L2")
    page.locator("#choose-rows").select_option("all")
    page.locator("#only-q").check()
    page.get_by_role("button", name="rounding", exact=True).click()
    page.get_by_role("button", name="rounding ▼").click()
    page.evaluate("scrollTo(0, 120); document.getElementById('open').scrollTop = 260")
    until(page, "location.hash.includes('scroll=120%2C260')")  # clicks scroll as well
    address = page.evaluate("location.hash")[1:]
    assert address.startswith("L1H2/W_Q;map=W_V%2Fprediction;value=z;rank=16;search=")
    chosen = told(page)
    assert chosen["#rank-shown"] == "16"
    assert look("#" + address) is page
    assert told(page) == chosen
    assert page.locator(".card h3").all_inner_texts() == ["L1H2 · W_Q"]
    assert page.locator("#only-q").is_checked()
    assert not page.locator("#no-rounding").is_checked()
    assert page.evaluate("[scrollY, document.getElementById('open').scrollTop]") == [120, 260]
    look("#;value=nothing;rank=99;map=W_X/y;search=%E0%A4%A")
    assert page.locator("#choose-value").input_value() == "relative"
    assert page.locator("#map td").count() == 16


def test_pin_keeps_a_head_beside_the_next(look):
    page = look("#L0H0/W_Q")
    page.get_by_role("button", name="Pin", exact=True).click()
    page.locator("td[data-layer='3'][data-head='1']").click()
    page.locator("td[data-layer='2'][data-head='2']").click()
    assert page.locator(".card h3").all_inner_texts() == ["L0H0 · W_Q", "L2H2 · W_Q"]
    assert page.url.endswith("#L0H0/W_Q+L2H2/W_Q")


def test_menus_and_slider_show_the_tables_numbers_in_the_map(look, pair):
    page = look()
    page.locator("#choose-map").select_option(label="W_V in attn_in")
    page.locator("#choose-value").select_option(label="excess over Adam on these inputs")
    page.locator("#choose-rank").press("End")
    words = page.locator("td[data-layer='2'][data-head='1']").get_attribute("aria-label")
    expected = row(pair[0], 2, 1, "W_V", "attn_in", 16)
    assert words.startswith(f"L2H1: {expected['excess']:.3g}")
    assert ("above it (q ≤ 0.05)" in words) == (expected["vs_reference"] == "above")  # the test of what is shown
    page.locator("#choose-value").select_option(label="relative fraction over the isotropic null")
    words = page.locator("td[data-layer='2'][data-head='1']").get_attribute("aria-label")
    assert ("above it (q ≤ 0.05)" in words) == (expected["isotropic_q"] <= 0.05)
    page.locator("#choose-map").select_option(label="W_in in mlp_in")
    assert page.locator("#map td").count() == 4


def test_search_sort_filter_and_download(look, pair):
    page = look()
    page.locator("#choose-rows").select_option("all")
    page.locator("#search").fill("L2 relative > 2 q< 0.05")
    assert "Understood: L2, relative > 2, isotropic_q < 0.05." in page.locator("#found").inner_text()
    table = pair[0].table
    wanted = table[
        (table["rank"] == 4) & (table["layer"] == 2) & (table["relative"] > 2) & (table["isotropic_q"] < 0.05)
    ]  # fmt: skip
    assert len(wanted) > 3
    until(page, f"document.querySelectorAll('#rows tbody tr').length === {len(wanted)}")
    page.get_by_role("button", name="relative", exact=True).click()
    shown = [float(v) for v in page.locator("#rows tbody td:nth-child(4)").all_inner_texts()]
    np.testing.assert_allclose(shown, [float(f"{v:.3g}") for v in sorted(wanted["relative"], reverse=True)])
    assert page.locator("#rows th[aria-sort='descending']").inner_text().startswith("relative")
    page.get_by_role("button", name="relative ▼").click()
    assert page.locator("#rows th[aria-sort='ascending']").count() == 1
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download these rows as CSV").click()
    read = pd.read_csv(waiting.value.path(), dtype={"head": "Int64"})
    assert list(read.columns) == list(table.columns)
    keys = ["matrix", "subspace", "layer", "head"]
    a, b = read.sort_values(keys, ignore_index=True), wanted.sort_values(keys, ignore_index=True)
    for column in table.columns:
        if table[column].dtype == "float64":
            # held in single precision and written in the fewest digits that give it back: two half units, 2 · 2⁻²⁴
            np.testing.assert_allclose(a[column], b[column], rtol=1.2e-7)
        else:
            words = [["" if pd.isna(v) else str(v) for v in frame[column]] for frame in (a, b)]
            assert words[0] == words[1]
    dimmed = page.locator("#map td.dim").count()
    assert dimmed == 16 - len(wanted[(wanted["matrix"] == "W_Q") & (wanted["subspace"] == "attn_in")])
    page.locator("#search").fill("nonsense")
    assert "Not understood: nonsense" in page.locator("#found").inner_text()


def test_all_by_keyboard(look):
    page = look()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#map td')"):
            break
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "End", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert page.locator(".card h3").inner_text() == "L1H2 · W_Q"
    assert page.evaluate("document.activeElement.dataset.head") == "2"  # the map keeps the focus
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    assert unreached_by_keyboard(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_telephone_and_can_be_read(look, scheme):
    page = look("#L0H1/W_O+L2H3/W_Q", width=390, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    too_faint = [found for found in page.evaluate(CONTRASTS) if found["ratio"] < found["needed"]]
    assert not too_faint


def test_without_a_model_the_page_says_what_is_missing(visit, pair, tmp_path):
    result = pair[0].load(pair[0].save(tmp_path / "saved"))
    page = visit(result.to_explorer(tmp_path / "bare.html"), "#L0H0/W_Q")
    until(page, READY)
    assert "The base model was not at hand" in page.locator(".card").inner_text()
