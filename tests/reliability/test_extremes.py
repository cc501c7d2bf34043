"""Names that no page is wide enough for, numbers at the ends of what floats can hold."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.reliability.conftest import OPTIONS
from tl_asymmetry import analyze_pair
from tl_asymmetry.plots import style
from tl_asymmetry.results.pages import title_markup

LONG = "a" * 5000 + "<b>" + "z" * 5000


def test_a_name_that_no_page_is_wide_enough_for_is_cut_in_the_middle(tmp_path: Path) -> None:
    base = tiny.bridge("gpt2")
    base.cfg.model_name = LONG
    result = analyze_pair(base, tiny.perturbed(base), matrices=["W_Q"], **OPTIONS)
    whole = LONG.replace("<b>", "&lt;b&gt;")
    for page in (result.to_html(tmp_path / "report.html"), result.to_explorer(tmp_path / "explorer.html", model=base)):
        text = page.read_text(encoding="utf-8")
        heading = text[text.index("<h1>") : text.index("</h1>")]
        assert whole in heading.partition('">')[0]  # the tooltip
        assert len(heading.partition('">')[2]) < 200
    assert title_markup("short") == "short"
    assert len(style.text(LONG)) < 180
