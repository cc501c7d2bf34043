"""Every notebook runs from top to bottom, is kept without outputs, and points at the project's address."""

import copy
import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import tiny

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 180
LESS = {
    "01_quick_start": {"demo_texts(200": "demo_texts(40"},
    "02_more_than_chance": {"demo_texts(200": "demo_texts(40"},
    "03_gradients": {
        "demo_preferences(40": "demo_preferences(16", "permutations=199": "permutations=39", "steps=8": "steps=2",
        "demo_texts(200": "demo_texts(40", "gradient_rows=32": "gradient_rows=8",
    },
    "04_jacobians": {"demo_texts(200": "demo_texts(40", "texts[:12]": "texts[:4]", "draws=8": "draws=2"},
    "05_rank_one_edits": {"demo_texts(8": "demo_texts(2", "draws=20": "draws=3", "draws=10": "draws=3",
                          "draws=59": "draws=5"},
    "06_trajectories": {"demo_texts(100": "demo_texts(30"},
    "08_grokking": {"draws=10": "draws=3", "checkpoints=8": "checkpoints=3"},
    "09_your_own_model": {"demo_texts(100": "demo_texts(30"},
    "11_stages_and_rewinding": {"demo_texts(12": "demo_texts(4", "orders=3": "orders=2"},
}  # fmt: skip
"""Fewer texts and draws where they are only repeated: that a notebook runs does not hang on how many there are."""


@pytest.fixture(scope="module")
def address():
    spec = importlib.util.spec_from_file_location("address", FOLDER / "address.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(tiny.HOOKED_AVAILABLE, reason="notebooks run once, on the TransformerLens that pip chooses (4.x)")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for words, less in LESS.get(path.stem, {}).items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
        assert cells, f"no {words!r} in {path.name}"
        for cell in cells:
            cell.source = cell.source.replace(words, less)
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_with_the_address_of_the_project(path, address):
    notebook = nbformat.read(path, as_version=4)
    name, repository = path.stem, address.repository()
    assert address.addressed(copy.deepcopy(notebook), name, repository) == notebook
    assert address.BADGE.format(repository=repository, name=name) in notebook.cells[0].source
    assert address.INSTALL.format(repository=repository) in notebook.cells[1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for word in cell.source.split("](")[1:]:
            target = word.split(")")[0]
            assert target.startswith("https://") or (FOLDER / target).is_file(), target
