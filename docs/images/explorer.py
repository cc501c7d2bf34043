"""Take the README's picture of the explorer, `explorer.png`: a head of the embedded pair, open beside the map.

    python docs/images/explorer.py

Needs playwright and a chromium on PATH.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

from tl_asymmetry import analyze_pair
from tl_asymmetry.demo import demo_pair, demo_texts

SHOWN = "#L1H2/W_Q"


def picture(page: Path, path: Path) -> None:
    """Write what a window of 1,280 × 860 shows of the page, its header aside."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1280, "height": 860})
        window.goto(page.as_uri() + SHOWN)
        window.locator(".card .main-svg").first.wait_for()
        window.evaluate("document.querySelector('.beside').scrollIntoView()")
        window.wait_for_timeout(1000)
        window.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    base, aligned = demo_pair()
    result = analyze_pair(base, aligned, demo_texts(400))
    with TemporaryDirectory() as folder:
        page = result.to_explorer(Path(folder) / "explorer.html", model=base)
        picture(page, Path(__file__).with_name("explorer.png"))
