"""Size and load time of the report and the explorer of a pair of 32 layers × 32 heads, in headless Chromium; and of an
explorer of 48 layers × 64 heads.

    python benchmarks/report.py      # prints the table, writes benchmarks/results/report.json

The pair is random: its tables, profiles and spectra are full of noise, which compresses worse than a trained pair's.
Of 48 × 64 heads nothing is analysed: the rows and arrays of the first pair are repeated, each number times noise of its
own, and three directions a head are drawn at random among 32,000 tokens and all contexts.
Times are wall-clock in a fresh browser context, median of the rounds: until the document is parsed, until the first
figure (or the explorer's map) is drawn (and the processor time the page spent until then, which does not count waiting
for others), and until a press of a control, two seconds later, is answered (and the processor time of that). "empty" is
a report of one small figure: what plotly.js alone costs on this machine, for comparison where others are at work on it.
The last two columns of the table are the bound and whether it held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

LAYERS, HEADS, D_MODEL, VOCABULARY = 32, 32, 256, 1000
TOKENS, SEQUENCE = 4096, 64
WIDE = 48, 64
WORDS, DIRECTIONS = 32_000, 3
MEGABYTES, SECONDS = 15.0, 3.0
RESULTS = Path(__file__).parent / "results"


def analyse() -> tuple[Any, Any]:
    """A random pair of 32 × 32 heads, analysed with everything a report can show; and its base."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from tl_asymmetry import analyze_pair

    config = HookedTransformerConfig(
        n_layers=LAYERS, d_model=D_MODEL, n_heads=HEADS, d_head=D_MODEL // HEADS, d_mlp=4 * D_MODEL,
        d_vocab=VOCABULARY, n_ctx=SEQUENCE, act_fn="gelu_new", normalization_type="LN", seed=0, device="cpu",
    )  # fmt: skip
    base, aligned = HookedTransformer(config).eval(), HookedTransformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, theirs in zip(aligned.parameters(), base.parameters(), strict=True):
            mine.copy_(theirs + torch.randn(theirs.shape, generator=generator) * 1e-3)
    tokens = torch.randint(VOCABULARY, (TOKENS // SEQUENCE, SEQUENCE), generator=generator)
    return analyze_pair(base, aligned, tokens=tokens, groups=4, progress=True), base


OF_HEAD = ("delta_norm", "delta_relative_norm", "delta_shrink", "delta_effective_rank", "rounding_share")
"""Columns that depend on neither subspace nor rank."""


def widened(result: Any, layers: int, heads: int) -> Any:
    """A pair's result as that of more layers and heads: its rows and arrays repeated, each number times noise."""
    from tl_asymmetry.plots.held import OWN

    rng, shape = np.random.default_rng(0), result.config["shape"]
    more = [range(-(-wanted // had)) for wanted, had in ((layers, shape["n_layers"]), (heads, shape["n_heads"]))]

    def noise(table: pd.DataFrame, keys: list[str]) -> np.ndarray:
        return np.exp(0.1 * rng.normal(size=len(table)))[table.groupby(keys, dropna=False).ngroup()]

    def rows(table: pd.DataFrame) -> pd.DataFrame:
        of_heads = table["head"].notna()
        parts = [
            part.assign(layer=part["layer"] + shape["n_layers"] * i, head=part["head"] + shape["n_heads"] * j)
            for i in more[0]
            for j in more[1]
            for part in [table if j == 0 else table[of_heads]]
        ]
        found = pd.concat(parts, ignore_index=True)
        found = found[(found["layer"] < layers) & ~(found["head"] >= heads).fillna(value=False)]
        found = found.reset_index(drop=True)
        for name in found.select_dtypes("float64"):
            keys = ["layer", "subspace", "rank"] if name == "eigengap" else ["layer", "head", "matrix"]
            found[name] *= noise(found, keys if name == "eigengap" or name in OF_HEAD else [*keys, "subspace", "rank"])
        return found

    table, nulls = rows(result.table), pd.concat([rows(of) for _, of in result.nulls.groupby("null", sort=False)])
    table["fraction_unrounded"] = table["fraction"]
    table["relative"] = table["fraction"] * shape["d_model"] / table["rank"]
    table["excess"] = table["fraction"] / table["activation_matched"]
    keys = ["layer", "head", "matrix", "subspace", "rank"]
    nulls = nulls.set_index(keys)
    for null, own in (("isotropic", OWN[0][-1]), ("adam", OWN[1][-1])):
        these = nulls["null"] == null
        for name, column in own.items():
            nulls.loc[these, name] = table.set_index(keys)[column].reindex(nulls.index[these])
    arrays = dict(result.arrays)
    generator = torch.Generator().manual_seed(2)
    for name, array in arrays.items():
        if name.startswith(("profile/", "spectrum/")):
            at = [torch.arange(n) % had for n, had in zip((layers, heads), array.shape, strict=False)]
            wide = array[at[0]] if array.shape[1] == 1 else array[at[0]][:, at[1]]
            arrays[name] = wide * torch.exp(0.1 * torch.randn(wide.shape, generator=generator))
    config = {**result.config, "shape": {**shape, "n_layers": layers, "n_heads": heads}}
    return replace(result, table=table, nulls=nulls.reset_index(), arrays=arrays, config=config)


class Words:
    """Stands for a tokenizer of many words."""

    def decode(self, ids: list[int]) -> str:
        """Five letters a token."""
        return "".join(" " + "".join(chr(97 + (7919 * i // 26**place) % 26) for place in range(4)) for i in ids)


def write_wide(result: Any, path: Path) -> Path:
    """The explorer of a widened result, each head's directions drawn at random."""
    from unittest.mock import patch

    from tl_asymmetry.explore import contents, page
    from tl_asymmetry.pair.lookups import MatrixDirections

    layers, heads = WIDE
    generator = torch.Generator().manual_seed(3)
    sequences = result.arrays["tokens"].split(result.arrays["lengths"].tolist())

    def drawn(*args: Any) -> dict[str, Any]:
        found = {}
        for matrix in dict.fromkeys(result.table["matrix"]):
            shape = layers, 1 if matrix in ("W_in", "W_out") else heads, DIRECTIONS

            def some(*more: int, shape: tuple[int, ...] = shape) -> torch.Tensor:
                return torch.rand(*shape, *more, generator=generator)

            found[matrix] = MatrixDirections(
                energy=some(), projections=some(2, page.CONTEXTS),
                contexts=(some(2, page.CONTEXTS) * len(result.arrays["tokens"])).long(),
                **{kind: (some(2, page.NEAREST_TOKENS) * WORDS).long() for kind in ("embedding", "unembedding")},
                **{f"{kind}_cosine": some(2, page.NEAREST_TOKENS) for kind in ("embedding", "unembedding")},
            )  # fmt: skip
        return contents.directions(found, sequences, Words(), args[-1])

    with patch.object(page, "_directions", drawn):
        return result.to_explorer(path, progress=False)


def measure(browser: Any, path: Path, ready: str, look: str, press: str, answered: str) -> dict[str, float]:
    """Seconds from navigation to the moments a reader notices."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    inspector = page.context.new_cdp_session(page)
    inspector.send("Performance.enable")
    page.set_default_timeout(120_000)

    def processor() -> float:
        return {m["name"]: m["value"] for m in inspector.send("Performance.getMetrics")["metrics"]}["ProcessTime"]

    begin = time.perf_counter()
    page.goto(path.as_uri(), wait_until="domcontentloaded")
    parsed = time.perf_counter() - begin
    until(page, ready)
    drawn = time.perf_counter() - begin
    spent = processor()
    page.evaluate(look)
    page.wait_for_timeout(2000)  # a reader looks first, and the page goes on reading
    before, begin = processor(), time.perf_counter()
    page.evaluate(press)
    until(page, answered)
    pressed = time.perf_counter() - begin
    answer = processor() - before
    page.context.close()
    return {
        "parsed": parsed, "drawn": drawn, "processor time until drawn": spent, "control answered": pressed,
        "processor time of the answer": answer,
    }  # fmt: skip


def write_empty(path: Path) -> Path:
    """A report with next to nothing in it."""
    import plotly.graph_objects as go

    from tl_asymmetry.results.report import FigureSection, Report, write_report

    return write_report(path, Report("empty", figures=[FigureSection("Line", go.Figure(go.Scatter(y=[1, 2])))]))


def until(page: Any, condition: str) -> None:
    """Wait for a condition; playwright's own waiting needs `eval`, which the pages forbid themselves."""
    end = time.perf_counter() + 120
    while not page.evaluate(condition):
        if time.perf_counter() > end:
            raise TimeoutError(condition)
        time.sleep(0.01)


PAGES = {
    "empty": (
        "document.querySelector('#figure-0 .js-plotly-plot .main-svg') !== null",
        "document.querySelector('#figure-0').scrollIntoView()",
        "document.querySelector('#figure-0 button').focus()",
        "document.activeElement.textContent === 'Save as PNG'",
    ),
    "report": (
        "document.querySelector('#figure-0 .js-plotly-plot .hm') !== null",
        "document.querySelector('#figure-1').scrollIntoView()",
        """const menu = document.querySelector('#figure-1 select'); menu.value = 3;
           menu.dispatchEvent(new Event('change'))""",
        "document.querySelector('#figure-1 .plot')._fullLayout.xaxis.title.text.includes('W_K')",
    ),
    "explorer": (
        "document.documentElement.dataset.ready === 'yes'",
        "document.querySelector('#map').scrollIntoView()",
        "document.querySelector('#map td').click()",
        "document.querySelectorAll('.card .main-svg').length >= 2",
    ),
}


PAGES["explorer 48 × 64"] = PAGES["explorer"]


def main() -> None:
    """Analyse, write, open, print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--keep", type=Path, help="folder to leave the two pages in")
    options = arguments.parse_args()
    from playwright.sync_api import sync_playwright

    result, base = analyse()
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    seconds, paths = {}, {}
    for name, write in (
        ("empty", write_empty),
        ("report", lambda path: result.to_html(path)),
        ("explorer", lambda path: result.to_explorer(path, model=base, progress=False)),
        ("explorer 48 × 64", lambda path: write_wide(widened(result, *WIDE), path)),
    ):
        begin = time.perf_counter()
        paths[name] = write(folder / f"{name}.html")
        seconds[name] = time.perf_counter() - begin
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in PAGES}
        for _ in range(options.rounds):
            for name, (ready, *acts) in PAGES.items():
                rounds[name].append(measure(browser, paths[name], ready, *acts))
        chromium_version = browser.version
        browser.close()
    for name in PAGES:
        size = paths[name].stat().st_size / 1e6
        rows.append({"page": name, "measure": "size, MB", "value": size, "bound": MEGABYTES})
        rows.append({"page": name, "measure": "written in, s", "value": seconds[name], "bound": None})
        for moment in rounds[name][0]:
            value = statistics.median(r[moment] for r in rounds[name])
            rows.append({"page": name, "measure": f"{moment}, s", "value": value, "bound": SECONDS})
    for row in rows:
        row["held"] = None if row["bound"] is None else row["value"] <= row["bound"]
        sys.stdout.write(
            f"{row['page']:16} {row['measure']:30} {row['value']:8.2f}  {row['bound'] or '':>5} {row['held']}\n"
        )
    RESULTS.mkdir(exist_ok=True)
    document = {
        "rows": rows, "shape": {"layers": LAYERS, "heads": HEADS, "d_model": D_MODEL, "tokens": TOKENS},
        "rounds": options.rounds, "load_average": os.getloadavg()[0], "table_rows": len(result.table),
        "cpu": platform.processor() or platform.machine(),
        "chromium": chromium_version, "plotly": version("plotly"), "torch": version("torch"),
    }  # fmt: skip
    (RESULTS / "report.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
