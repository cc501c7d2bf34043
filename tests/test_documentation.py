"""The reference names everything public, and nothing that is not."""

import re
from pathlib import Path

import tl_asymmetry

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
