"""Colours that can be told apart, numbers and text that read the same everywhere."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pandas as pd
import pytest

from tl_asymmetry.plots import page, style
from tl_asymmetry.plots.layout import heading, reset


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("paper", style.PAPER.values())
@pytest.mark.parametrize(
    "colour", sorted({s["color"] for s in style.MATRIX_STYLE.values()} | set(style.SERIES) | {style.GUIDE})
)
def test_lines_and_points_reach_three_to_one(paper, colour):
    assert contrast(paper, colour) >= 3


@pytest.mark.parametrize("colour", style.sequential(12))
def test_layer_colours_show_on_both_pages(colour):
    assert min(contrast(p, colour) for p in style.PAPER.values()) >= 2.4  # drawn with a rim of GUIDE


@pytest.mark.parametrize("name", ["light", "dark"])
def test_ink_reaches_aa(name):
    assert contrast(style.PAPER[name], style.INK[name]) >= 4.5


def test_page_colours_reach_aa():
    light, dark = (dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{6})", part)) for part in page.CSS.split("@media", 1))
    for colours in (light, dark):
        for ground in ("paper", "panel", "note"):
            for ink in ("ink", "soft", "link"):
                assert contrast(colours[ground], colours[ink]) >= 4.5, (ground, ink)
        assert contrast(colours["paper"], colours["focus"]) >= 3


def test_the_greyscale_map_keeps_its_order_without_colours():
    """Where 1/2 and 2 are one grey, as on the coloured scale, a copy without colours says nothing."""
    light = [luminance(colour) for _, colour in style.GREYSCALE]
    assert light == sorted(light)
    assert [at for at, _ in style.GREYSCALE] == [at for at, _ in style.DIVERGING["light"]]
    assert min(contrast(style.GREYSCALE[i][1], style.GREYSCALE[3][1]) for i in (0, -1)) >= 2


def test_read_and_write_matrices_differ_without_colour():
    looks = [(s["symbol"], s["dash"]) for s in style.MATRIX_STYLE.values()]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    ("value", "text"), [(1.23456, "1.23"), (4.12e-4, "0.000412"), (float("nan"), "–"), (None, "–"), (pd.NA, "–")]
)
def test_number(value, text):
    assert style.number(value) == text


def test_ratio_axis_holds_chance_and_is_ticked_at_powers_of_two():
    axis = style.ratio_axis([3, 9, math.nan, 0, -1, None])
    assert axis["ticktext"][axis["tickvals"].index(1)] == "1"
    assert axis["range"][0] < 0 < math.log10(9) < axis["range"][1]
    assert [style.ratio_label(e) for e in (-2, 0, 3)] == ["1/4", "1", "8"]


def test_a_narrow_ratio_axis_has_more_ticks_than_chance_alone():
    axis = style.ratio_axis([0.8, 1.3])
    assert len(axis["tickvals"]) > 4
    assert 1 in axis["tickvals"]
    low, high = axis["range"]
    assert all(low <= math.log10(v) <= high for v in axis["tickvals"])
    assert axis["ticktext"][axis["tickvals"].index(1.25)] == "1.25"


def test_unknown_template():
    with pytest.raises(ValueError, match="expected one of 'light', 'dark', got 'sepia'; pass template='light'"):
        style.template("sepia")


def test_the_package_does_not_bring_plotly():
    code = "import sys, tl_asymmetry; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_heading_breaks_at_spaces_alone():
    """A page sets titles anew by joining their lines with spaces."""
    names = "a-model-with-a-hyphenated-name/of-some-length against another-model-with-a-hyphenated-name/of-some-length"
    shown = heading(names, names)
    assert re.sub("<[^>]*>", "", shown.replace("<br>", " ")) == f"{names} {names}"


def test_a_heading_fills_the_width_it_has_and_can_be_set_anew():
    first, line = "Relative fraction of each head", "1 = chance: what a random subspace of the same rank holds. " * 3
    wide, narrow = heading(first, line), heading(first, line, width=390)
    assert wide.count("<br>") == 2  # a notebook has room for a long line
    assert narrow.count("<br>") == 4
    assert reset(wide, 390) == narrow
    assert reset(narrow, 760) == wide
