"""The table of truth: its page is what its JSON gives, and its cells run, resume and say what they promise."""

from pathlib import Path

import pytest

from benchmarks import calibration, calibration_page

PROMISED = [cell.key for cell in calibration.cells()]
CELLS = ("isotropic: rank 1, rank 4", "intervals: independent tokens, 32 sequences of 8", "power: 80% of the energy "
         "planted, against a random subspace")  # fmt: skip


def test_the_page_is_what_the_numbers_give():
    document = calibration.read(calibration.RESULTS)
    assert calibration.PAGE.read_text(encoding="utf-8") == calibration_page.page(document, PROMISED)


def test_every_cell_has_a_name_of_its_own_and_the_numbers_are_of_these_cells():
    assert len(set(PROMISED)) == len(PROMISED) > 100
    assert {cell.section for cell in calibration.cells()} == set(calibration_page.SECTIONS)
    assert set(calibration.read(calibration.RESULTS)["cells"]) <= set(PROMISED)


def test_bounds_are_broken_only_where_the_page_says_why():
    for key, entry in calibration.read(calibration.RESULTS)["cells"].items():
        assert not calibration_page.broken(entry) or entry["exception"], key


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "quick.json"
    chosen = [cell for cell in calibration.cells() if cell.key in CELLS]
    calibration.run(path, chosen, share=calibration.QUICK, progress=False)
    return path


def test_quick_writes_the_cells_promised(written: Path):
    cells = calibration.read(written)["cells"]
    assert set(cells) == set(CELLS)
    size, coverage, power = (cells[key] for key in CELLS)
    assert size["found"]["above"]["0.05"]["of"] == 2000 * size["runs"]
    assert 0.03 < size["found"]["above"]["0.05"]["share"] < 0.07
    assert coverage["found"]["relative"]["of"] == 0  # so few tokens are all flagged
    assert coverage["found"]["relative, flagged too"]["of"] > 0
    assert power["found"]["above"]["0.05"]["share"] == 1
    page = calibration_page.page(calibration.read(written), [*CELLS, "isotropic: another"])
    assert "**Not measured yet, and so not known:** 1 of 4 cells. isotropic: another." in page
    assert "| rank 1, rank 4 | 2,000 |" in page


def test_a_cell_is_run_again_only_for_more_draws(written: Path):
    before = calibration.read(written)["cells"]
    chosen = [cell for cell in calibration.cells() if cell.key == CELLS[0]]
    calibration.run(written, chosen, share=calibration.QUICK, progress=False)
    assert calibration.read(written)["cells"] == before
    calibration.run(written, chosen, share=2.5 / chosen[0].runs, progress=False)
    assert calibration.read(written)["cells"][CELLS[0]]["runs"] == 2
    assert calibration.read(written)["cells"][CELLS[1]] == before[CELLS[1]]


def test_a_broken_bound_is_named():
    entry = {
        "section": "isotropic", "name": "made up", "kind": "size", "bound": None, "exception": "a reason",
        "found": {"above": {"0.05": {"share": 0.2, "error": 0.01, "of": 1000}}},
    }  # fmt: skip
    assert calibration_page.broken(entry) == ["above at 0.05"]
    page = calibration_page.page({"cells": {"x": entry}}, ["x"])
    assert "* **isotropic: made up** (above at 0.05): a reason." in page
    entry["found"]["above"]["0.05"] = {"share": 0.07, "error": 0.01, "of": 1000}
    assert not calibration_page.broken(entry)
    assert "| within error |" in calibration_page.page({"cells": {"x": entry}}, ["x"])
