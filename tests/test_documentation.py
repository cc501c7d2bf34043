"""The reference names everything public, and nothing that is not."""

import ast
import importlib
import inspect
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tl_asymmetry.results.sections import Definition

ROOT = Path(__file__).parent.parent
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))


ROOMS = ("coupling", "edits", "geometry", "grokking", "jacobians", "objectives")
"""Packages and modules whose names users import."""


def exported(room: str = "") -> dict[str, object]:
    """Public names, by where a user finds them, and what they are."""
    module = importlib.import_module(f"tl_asymmetry.{room}".rstrip("."))
    return {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__}


def test_the_reference_lists_every_public_name_once():
    """On top where it stands there, else in its room."""
    listed = re.findall(r"^::: (tl_asymmetry\.[\w.]+)$", REFERENCE, re.MULTILINE)
    assert len(listed) == len(set(listed))
    top = {place: thing for place, thing in exported().items() if not isinstance(thing, types.ModuleType)}
    in_rooms = {place for room in ROOMS for place, thing in exported(room).items() if thing not in top.values()}
    modules = {
        f"tl_asymmetry.{name}" for name in ("demo", "objectives", "grokking", "models.calibration.calibration_texts")
    }
    assert set(listed) - modules == {*top, *in_rooms}


def test_every_public_name_is_documented():
    for place, thing in [entry for room in ("", *ROOMS) for entry in exported(room).items()]:
        assert callable(thing) <= bool((thing.__doc__ or "").strip()), place


def test_no_module_hides_a_public_name_of_its_package():
    """Once imported, a module is an attribute of its package, whatever `__getattr__` would have given."""
    for room in ("", *ROOMS):
        path = ROOT / "tl_asymmetry" / room
        modules = {file.stem for file in path.iterdir()} if path.is_dir() else set()
        things = {place.rpartition(".")[2]: thing for place, thing in exported(room).items()}
        assert not {n for n, thing in things.items() if not isinstance(thing, types.ModuleType)} & modules, room


def test_about_thirty_functions_and_their_results_stand_on_top():
    functions = [name for name in exported() if name.rpartition(".")[2].islower()]
    assert 20 <= len(functions) <= 35


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, tl_asymmetry; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "pandas", "scipy", "plotly", "transformers", "transformer_lens"]
    assert subprocess.check_output([sys.executable, "-c", code, *heavy], text=True).strip() == "[]"


def test_the_page_on_reading_has_every_column_of_a_pair():
    from tl_asymmetry.pair.tables import PAIR_COLUMNS

    page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert {name for name in PAIR_COLUMNS if f"`{name}`" not in page} == set()


def test_recipes_call_what_there_is():
    """Every call of a public name in a recipe has arguments that it takes."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    public = {place.rpartition(".")[2]: thing for room in ("", *ROOMS) for place, thing in exported(room).items()}
    called = set()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            method = name.startswith("result.") and name.count(".") == 1
            thing = getattr(public["PairAnalysis"], name[7:]) if method else public.get(name)
            if thing is not None:
                own = (None,) if method else ()
                inspect.signature(thing).bind(*own, *call.args, **{k.arg: k.value for k in call.keywords})
                called.add(name)
    assert {"analyze_pair", "compare", "estimate_pair", "TrajectoryRecorder", "result.write_images"} <= called
    assert len(re.findall(r"^## ", page, re.MULTILINE)) >= 10


def test_pages_in_the_menu_exist():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in re.findall(r": ([\w/]+\.md)$", menu, re.MULTILINE):
        made = ROOT / page.replace(".md", ".ipynb")  # a tutorial's page is made of its notebook
        assert (ROOT / "docs" / page).is_file() or made.is_file(), page
    assert menu.count(": tutorials/") == len(list((ROOT / "tutorials").glob("*.ipynb")))


def test_the_page_of_definitions_has_those_of_every_report():
    page = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["definitions"]()
    held = [
        definition
        for module in list(sys.modules.values())
        if module.__name__.startswith("tl_asymmetry.")
        for value in vars(module).values()
        if isinstance(value, tuple)
        for definition in value
        if isinstance(definition, Definition)
    ]
    assert len({d.text for d in held}) > 40
    for definition in held:
        assert f"### {definition.term}\n\n`{definition.mark}` {definition.text}" in page, definition.term


def test_every_module_that_defines_something_is_on_that_page():
    where = set(runpy.run_path(str(ROOT / "docs" / "hooks.py"))["DEFINED"].values())
    modules = {name.rsplit(".", 1)[0] for name in where}
    defining = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tl_asymmetry").rglob("*.py")
        if re.search(r"^\w*DEFINITIONS = \(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert modules == defining


def test_the_front_page_leads_to_pages_and_to_the_repository():
    page = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["front_page"]()
    for target in re.findall(r"\]\(([^)#\s][^)\s]*)", page):
        assert "://" in target or (ROOT / "docs" / target).is_file(), target
    for file in re.findall(r"/blob/main/([^)\s]+)", page):
        assert (ROOT / file).exists(), file


def test_arguments_described_together_are_listed_one_by_one():
    pytest.importorskip("griffe", reason="comes with the docs extra")
    one_by_one = runpy.run_path(str(ROOT / "docs" / "grouped_arguments.py"))["one_by_one"]
    before = """
    Args:
        a, b: as in `f`; or
            as in `g`: both.
        one: alone.
        c, d,
            e: last.

    Raises:
        ValueError, TypeError: stays.
    """
    after = """
    Args:
        a: as in `f`; or
            as in `g`: both.
        b: as in `f`; or
            as in `g`: both.
        one: alone.
        c: last.
        d: last.
        e: last.

    Raises:
        ValueError, TypeError: stays.
    """
    assert one_by_one(before) == after


def test_the_page_of_models_is_what_was_measured() -> None:
    from benchmarks.architectures import PAGE, RESULTS, page

    assert PAGE.read_text() == page(json.loads(RESULTS.read_text()))


def test_what_is_said_of_a_real_model_was_measured() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "real_model.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "reading.md").read_text(encoding="utf-8").split())
    relative, excess = [], []
    for name in ("analyze_pair, DPO", "analyze_pair, control"):
        own = [record[name][f"read {point}"] for point in ("attn_in", "mlp_in")]
        assert sum(rows["rows"] for rows in own) == sum(rows["verdicts"]["as trained"] for rows in own) == 144
        relative.append({f"{rows['median relative']:.1f}" for rows in own})
        excess.append([f"{rows['median excess']:.2f}" for rows in own])
    assert relative == [{"2.5"}, {"3.3"}]
    assert "medians of `relative` 2.5 and 3.3" in page
    assert excess == [["0.91", "0.91"], ["1.02", "1.08"]]
    assert "medians of `excess` 0.91, held against inputs weighted by gradients, and 1.02 to 1.08" in page


def test_what_is_said_of_grokking_was_measured() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "grokking.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "reference" / "grokking.md").read_text(encoding="utf-8").split())
    ours = record["ours"]
    assert record["missing"] == []
    largest = ours["gradient, add, seed 42, peak ratio 1"]
    assert [round(largest[window]["forward"]["add-42"]) for window in ("1", "20", "40")] == [323, 147, 66]
    assert "323, 147 and 66" in page
    close = [
        ratio
        for found in ours["update, multitask, peak mean ratio"].values()
        for run, ratio in found.items()
        if run.startswith("all")
    ]
    assert (min(close), max(close)) == (pytest.approx(3.6, abs=0.05), pytest.approx(5.2, abs=0.05))
    distant = [row for row in ours["update, multitask, by steps between checkpoints"] if row["spacing"] == 200]
    peaks = [row["mean_ratio"] for row in distant]
    assert (min(peaks), max(peaks)) == (pytest.approx(1.6, abs=0.05), pytest.approx(2.0, abs=0.05))
    assert max(row["second_half"] for row in distant) < 1
    assert "3.6 to 5.2" in page
    assert "1.6 to 2.0" in page
    together = [run for run in record["runs"] if run["op"] in ("all", "three")]
    assert {run["steps"] for run in together} == {8_000, 24_000}
    assert all(run["first_98"] is None for run in together)


def test_on_a_package_index_the_readme_leads_to_files_that_are_there(monkeypatch):
    """There is no repository around it: links and pictures must be absolute."""
    interface = types.SimpleNamespace(MetadataHookInterface=object)  # the build's, which tests run without
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["ReadmeHook"]()
    hook.root, metadata = str(ROOT), {"urls": {"Repository": "https://example.org/us"}}
    hook.update(metadata)
    assert metadata["readme"]["content-type"] == "text/markdown"
    ours = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", ours)
    moved = re.findall(r"\]\(([^)\s]+)\)", metadata["readme"]["text"])
    for link, there in zip(links, moved, strict=True):
        kind = "raw" if link.startswith("docs/images/") else "blob"
        assert there == (link if link.startswith("https:") else f"https://example.org/us/{kind}/main/{link}")
        assert link.startswith("https:") or (ROOT / link).is_file()
    assert re.sub(r"\]\([^)]*\)", "]()", ours) == re.sub(r"\]\([^)]*\)", "]()", metadata["readme"]["text"])
