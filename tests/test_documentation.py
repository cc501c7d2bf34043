"""The reference names everything public, and nothing that is not."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import tl_asymmetry
from tl_asymmetry.results.sections import Definition

ROOT = Path(__file__).parent.parent
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))


def test_the_reference_lists_every_public_name_once():
    listed = re.findall(r"^::: tl_asymmetry\.([A-Za-z]\w*)$", REFERENCE, re.MULTILINE)
    assert sorted(listed) == sorted({*tl_asymmetry.__all__, "demo"})


def test_every_public_name_is_documented():
    for name in tl_asymmetry.__all__:
        assert (getattr(tl_asymmetry, name).__doc__ or "").strip(), name


def test_pages_in_the_menu_exist():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in re.findall(r": ([\w/]+\.md)$", menu, re.MULTILINE):
        assert (ROOT / "docs" / page).is_file(), page


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
