"""Write the project's public address, as pyproject.toml has it, into every notebook: `python tutorials/address.py`.

Also strips outputs, so that a notebook just run can be committed.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/tutorials/{name}.ipynb)"
)
INSTALL = '%pip install --quiet "torch=={{torch}}" "tl-asymmetry @ git+https://github.com/{repository}"'
"""Whatever else is missing is added; the torch that is there (Colab's, built for its GPU) stays."""


def repository() -> str:
    """ "owner/name" of the repository named under `[project.urls]` in pyproject.toml."""
    pyproject = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Repository = "https://github\.com/([^"]+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise ValueError("expected Repository under [project.urls] in pyproject.toml, got none; add the address there")
    return found[1]


def addressed(notebook: nbformat.NotebookNode, name: str, repository: str) -> nbformat.NotebookNode:
    """The notebook with badge and install line for that repository, and without outputs."""
    for cell in notebook.cells:
        cell.source = re.sub(r"\[!\[Open in Colab\].*", BADGE.format(repository=repository, name=name), cell.source)
        cell.source = re.sub(r"%pip install --quiet .*", INSTALL.format(repository=repository), cell.source)
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def main() -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = addressed(nbformat.read(path, as_version=4), path.stem, repository())
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
