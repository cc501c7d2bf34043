"""What the built package says of itself: the README with its links and pictures at their public addresses.

On a package index there is no repository around it for them to be relative to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)]+)\)")
"""A link or picture in Markdown whose target is a file of the repository."""


def absolute(readme: str, repository: str) -> str:
    """Its links lead to the repository's pages, its pictures to the files themselves."""

    def moved(link: re.Match[str]) -> str:
        picture, words, file = link.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/main/{file})"

    return LINK.sub(moved, readme)


class ReadmeHook(MetadataHookInterface):
    """Sets `readme`, which pyproject.toml declares dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put the README in."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute(readme, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
