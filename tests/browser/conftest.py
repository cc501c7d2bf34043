"""A headless Chromium, and pages that fail on any console message or network request."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

HOSTILE = '"><img src=x onerror="window.attacked=1"><script>window.attacked=1</script>'


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by playwright; skips where one of them is absent."""
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with driver.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def tab(browser):
    """One for all visits: what Chromium compiled of a page's scripts serves whoever opens it in the same tab."""
    page = browser.new_context(accept_downloads=True).new_page()
    page.set_default_timeout(15_000)
    return page


@pytest.fixture
def visit(tab):
    """`visit(path, fragment="", width=1280, scheme="light")` opens a page; at the end nothing may have gone wrong."""
    said, asked, visits = [], [], []
    listeners = {
        "console": lambda message: said.append(message.text),
        "pageerror": lambda error: said.append(str(error)),
        "request": lambda request: asked.append(request.url),
    }

    def leave():
        assert tab.evaluate("window.attacked") is None
        tab.goto("about:blank")  # a new fragment alone would not load a page anew

    def go(path, fragment="", *, width=1280, scheme="light"):
        leave()
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(path.as_uri() + fragment)
        visits.append(path)
        return tab

    for event, listener in listeners.items():
        tab.on(event, listener)
    yield go
    leave()
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert not said
    assert all(url.startswith(("file:", "blob:", "about:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(visits)


@pytest.fixture(scope="session")
def pair():
    """The embedded pair, analysed; its names as bad as names can be, its base model kept alive."""
    from tl_asymmetry import analyze_pair
    from tl_asymmetry.demo import demo_pair, demo_texts

    base, aligned = demo_pair()
    result = analyze_pair(base, aligned, demo_texts(24, seed=0), groups=4, progress=False)
    result.config["models"]["base"]["name"] = HOSTILE
    return result, base


@pytest.fixture(scope="session")
def report_page(pair, tmp_path_factory):
    return pair[0].to_html(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="session")
def edits():
    return pd.DataFrame(
        {
            "layer": [1, 1, 2], "head": pd.array([2, 2, None], dtype="Int64"), "matrix": ["W_Q", "W_Q", "W_in"],
            "edit": ["removal", HOSTILE, "insertion"], "kl": [0.125, np.nan, 3.0],
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def trajectory():
    steps = [0, 10, 20, 30]
    return pd.DataFrame(
        {
            "step": steps * 2, "layer": 1, "head": 2, "matrix": "W_Q", "subspace": ["attn_in"] * 4 + ["prediction"] * 4,
            "reference": "first", "rank": 4, "relative": [1.0, 2.0, 4.0, 5.0, 1.0, 1.0, 1.25, 1.5],
        }
    )  # fmt: skip


@pytest.fixture(scope="session")
def explorer_page(pair, edits, trajectory, tmp_path_factory):
    result, base = pair

    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.tokenizer, "decode", lambda ids: f"{ids[-1]} {HOSTILE}")  # every word is an attack
        return result.to_explorer(path, model=base, edits=edits, trajectory=trajectory, progress=False)
