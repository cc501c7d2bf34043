"""Pages that are made of what the code already says: the README, and the definitions every report carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "README.md"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill the front page with the README and the page of definitions with the reports' own."""
    if page.file.src_uri == "index.md":
        return README.read_text(encoding="utf-8").replace("](docs/", "](")
    return markdown.replace("{{ definitions }}", _definitions()).replace("{{ papers }}", _papers())


def _definitions() -> str:
    from tl_asymmetry.results.report import DEFINITIONS, MARKS

    legend = "\n".join(f"- `{mark}` {says}" for mark, says in MARKS.items())
    return f"{legend}\n\n" + "\n\n".join(f"## {d.term}\n\n`{d.mark}` {d.text}" for d in DEFINITIONS)


def _papers() -> str:
    from tl_asymmetry.results.report import CITATIONS

    return "\n".join(
        f"- “{c.title}”, [arXiv:{c.arxiv}](https://arxiv.org/abs/{c.arxiv}). {c.used_for}" for c in CITATIONS
    )
