"""One place knows how TransformerLens is imported: a new version of it touches one file."""

from __future__ import annotations

import re
from pathlib import Path

import tl_asymmetry

_IMPORT = re.compile(r"^\s*(from|import) transformer_lens\b", re.MULTILINE)


def test_transformer_lens_is_imported_in_one_module() -> None:
    package = Path(tl_asymmetry.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert {name for name, text in sources.items() if _IMPORT.search(text)} == {"models/loading.py"}


def test_its_names_are_compared_nowhere() -> None:
    """What differs between kinds of model is asked of the kind, not told from its name."""
    package = Path(tl_asymmetry.__file__).parent
    asked = re.compile(r'\bview\.kind (==|!=) "Hooked')
    assert not [path for path in package.rglob("*.py") if asked.search(path.read_text(encoding="utf-8"))]
