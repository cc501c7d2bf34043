"""Pages that are made of what the code already says: the README, and the definitions the reports carry."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"
TUTORIALS = README.parent / "tutorials"
GROWTH = README.parent / "benchmarks" / "results" / "scale-growth-cpu.json"
GROKKING = README.parent / "benchmarks" / "results" / "grokking.json"
DEFINED = {
    "Weight deltas: `analyze_pair`": "tl_asymmetry.results.definitions.DEFINITIONS",
    "Planted directions: `detection_power`": "tl_asymmetry.power.result.DEFINITIONS",
    "Training runs: `analyze_trajectory`": "tl_asymmetry.trajectory.report.TRAJECTORY_DEFINITIONS",
    "Several analyses: `compare`": "tl_asymmetry.comparison.result.COMPARISON_DEFINITIONS",
    "Many deltas: `compare_deltas`": "tl_asymmetry.comparison.deltas_result.DELTA_DEFINITIONS",
    "Gradients: `gradient_covariance`": "tl_asymmetry.gradients.report.DEFINITIONS",
    "Graded objectives: `contrastive_control`": "tl_asymmetry.control.result.DEFINITIONS",
    "Rank-1 edits: `rank_one_study`": "tl_asymmetry.interventions.result.DEFINITIONS",
    "Heads set back: `rewind_study`": "tl_asymmetry.rewinding.result.DEFINITIONS",
    "Stages of training: `analyze_stages`": "tl_asymmetry.stages.result.DEFINITIONS",
    "The shift of activations: `activation_shift`": "tl_asymmetry.shift.result.DEFINITIONS",
    "Jacobians: `layer_jacobians`": "tl_asymmetry.jacobians.result.DEFINITIONS",
    "Pullback: `prediction_pullback`": "tl_asymmetry.jacobians.pullback_result.DEFINITIONS",
    "The base's own frame: `analyze_spectra`": "tl_asymmetry.spectra.report.SPECTRAL_DEFINITIONS",
    "Tangent proxies: `analyze_tangents`": "tl_asymmetry.tangents.report.TANGENT_DEFINITIONS",
    "Training directions: `direction_coupling`": "tl_asymmetry.coupling.result.DEFINITIONS",
}
"""Headings of the page of definitions, and where the definitions under each stand."""
WINDOWS = {"backward": "before", "forward": "after"}
"""Of a checkpoint, as the page of grokking calls them."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill the front page with the README and the page of definitions with the reports' own."""
    if page.file.src_uri == "index.md":
        return front_page()
    for name, made in (
        ("definitions", definitions), ("nulls", nulls), ("papers", _papers), ("growth", growth), ("grokking", grokking),
    ):  # fmt: skip
        markdown = markdown.replace(f"{{{{ {name} }}}}", made())
    return markdown


def on_files(files: Any, *, config: Any) -> Any:
    """Add every tutorial as a page: its words and its code, as the notebook stands in the repository."""
    from mkdocs.structure.files import File

    for path in sorted(TUTORIALS.glob("*.ipynb")):
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=notebook_page(path)))
    return files


def notebook_page(path: Path) -> str:
    """A notebook as a page; links to other notebooks lead to theirs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source))
        elif "%pip" not in source:
            parts.append(f"```python\n{source}\n```")
    return "\n\n".join(parts)


def front_page() -> str:
    """The README as it reads on the site: links into docs/ stay there, links to other files lead to the repository."""
    text = README.read_text(encoding="utf-8").replace('="docs/', '="')
    return re.sub(r"\]\(([^)#\s][^)\s]*)", lambda link: f"]({_from_the_site(link[1])}", text)


def _from_the_site(target: str) -> str:
    if "://" in target:
        return target
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{_repository()}/blob/main/{target}"


def _repository() -> str:
    """The public address, from the one place that knows it."""
    project = (README.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
    assert found is not None, "pyproject.toml has no Repository under project.urls"
    return found[1]


def definitions() -> str:
    """Every definition the reports carry, under the analysis it belongs to."""
    from tl_asymmetry.results.report import MARKS

    parts = ["\n".join(f"- `{mark}` {says}" for mark, says in MARKS.items())]
    for heading, where in DEFINED.items():
        module, name = where.rsplit(".", 1)
        parts.append(f"## {heading}")
        parts += [f"### {d.term}\n\n`{d.mark}` {d.text}" for d in getattr(import_module(module), name)]
    return "\n\n".join(parts)


def nulls() -> str:
    """Every null that `PairAnalysis.nulls` can hold, as a table."""
    from tl_asymmetry.results.nulls import NULLS

    rows = [f"| `{null.key}` | {null.label} | {null.applies} | {null.meaning} |" for null in NULLS.values()]
    return "\n".join(["| `null` | it is called | it applies to | an excess of 1 |", "|---|---|---|---|", *rows])


def growth() -> str:
    """How a call's seconds grow with each size, as `benchmarks/scale.py` measured it."""
    measured = json.loads(GROWTH.read_text(encoding="utf-8"))["measured"]
    rows = [
        f"| {what} | {', '.join(f'{size:,}' for size in one['sizes'])} | "
        f"{', '.join(f'{seconds:.3g}' for seconds in one['seconds'])} | {one['exponent']:.2f} | "
        f"{' → '.join(dict.fromkeys(one['leading']))} |"
        for what in ("width", "layers", "heads", "groups", "tokens", "ranks")
        for one in [measured[what]]
        if "leading" in one
    ]
    head = ["| size | values | seconds of one core | exponent | the stage that takes most |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def grokking() -> str:
    """The published numbers of training directions and centroids, and those of our runs beside them, as tables."""
    record = json.loads(GROKKING.read_text(encoding="utf-8"))
    peaks = [
        "| largest ratio of a run | published | here, window before | here, window after | measured |",
        "|---|---|---|---|---|",
    ]
    for quantity, said in record["published"].items():
        found = record["ours"][quantity]
        if quantity.startswith(("update", "gradient")) and "ratio 1" not in quantity:
            either = [list(found[alignment].values()) for alignment in WINDOWS]
            told = ", ".join(f"{op} {value}" for op, value in said.items()) if isinstance(said, dict) else said
            ranges = " | ".join(f"{min(values):.1f} to {max(values):.1f}" for values in either)
            peaks.append(f"| {quantity.removesuffix(', peak mean ratio')} | {told} | {ranges} | {len(either[0])} |")
    later = [
        "| updates of | steps between checkpoints | window | largest, by operation | of the second half | last |",
        "|---|---|---|---|---|---|",
    ]
    rows = record["ours"]["update, multitask, by steps between checkpoints"]
    for part, spacing, alignment in dict.fromkeys((row["part"], row["spacing"], row["alignment"]) for row in rows):
        own = [row for row in rows if (row["part"], row["spacing"], row["alignment"]) == (part, spacing, alignment)]
        numbers = [[row[name] for row in own] for name in ("mean_ratio", "second_half", "last")]
        told = " | ".join(f"{min(values):.2f} to {max(values):.2f}" for values in numbers)
        later.append(f"| {part.removesuffix('-control')} | {spacing} | {WINDOWS[alignment]} | {told} |")
    arms = ["| arm | published | here, mean of three seeds | by seed |", "|---|---|---|---|"]
    quantity = "step of the 20th evaluation of 0.98, add, mean of 3 seeds"
    for arm, said in record["published"][quantity].items():
        found = record["ours"][quantity][arm]
        by_seed = ", ".join(str(step) for step in found["by seed"].values())
        arms.append(f"| {arm} | {said or '–'} | {found['mean']:.0f} | {by_seed} |")
    return "\n\n".join("\n".join(table) for table in (peaks, later, arms))


def _papers() -> str:
    from tl_asymmetry.results.report import CITATIONS

    return "\n".join(
        f"- “{c.title}”, [arXiv:{c.arxiv}](https://arxiv.org/abs/{c.arxiv}). {c.used_for}" for c in CITATIONS
    )
