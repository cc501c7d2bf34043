"""The reference names everything public, and nothing that is not."""

import re
import runpy
import sys
from pathlib import Path

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
