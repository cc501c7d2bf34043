"""A saved result and a page are there whole or not at all, and say when they are damaged."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from tests.killing import deaths
from tl_asymmetry import PairAnalysis
from tl_asymmetry.explore.page import explorer
from tl_asymmetry.results.report import Report, write_report
from tl_asymmetry.results.result import load

Results = tuple[PairAnalysis, PairAnalysis]


def whole(result: PairAnalysis) -> tuple[str, Any]:
    """What tells two results apart: names and numbers."""
    return result.config["models"]["aligned"]["weights_xxh3"], result.table["fraction"].tolist()


def test_a_kill_anywhere_in_save_leaves_one_result_or_the_other(results: Results, tmp_path: Path) -> None:
    first, second = results
    folder, count = tmp_path / "saved", 0

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        first.save(folder)

    for count in deaths(lambda: second.save(folder), prepare):  # noqa: B007
        assert whole(load(folder)) in (whole(first), whole(second))
        second.save(folder)
        assert whole(load(folder)) == whole(second)
    assert count == 4  # written, flushed, renamed, its folder flushed


def test_a_kill_while_a_page_is_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    pages = [write_report(page, Report(title=title, summary="x")).read_bytes() for title in ("first", "second")]
    count = 0
    for count in deaths(  # noqa: B007
        lambda: write_report(page, Report(title="second", summary="x")), lambda: page.write_bytes(pages[0])
    ):
        assert page.read_bytes() in pages
    assert count == 4


@pytest.mark.parametrize("at", [0.0, 0.01, 0.2, 0.4, 0.6, 0.8, 0.99, 1.0])
def test_a_flipped_bit_or_a_cut_is_said(results: Results, tmp_path: Path, at: float) -> None:
    file = results[0].save(tmp_path) / "result.safetensors"
    content = file.read_bytes()
    place = min(int(at * len(content)), len(content) - 1)
    for damaged in (content[:place], content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]):
        file.write_bytes(damaged)
        for read in (load, PairAnalysis.load):
            with pytest.raises(ValueError, match=r"expected .*result\.safetensors as it was written, got .*; pass a w"):
                read(tmp_path)


def test_numbers_of_another_result_or_shape_are_said(results: Results, tmp_path: Path) -> None:
    ours, theirs = (result.save(tmp_path / str(i)) / "result.safetensors" for i, result in enumerate(results))
    from safetensors import safe_open

    with safe_open(ours, framework="pt") as opened:
        words = opened.metadata()
    cut = load_file(ours)
    name = "table/table/fraction"
    cut[name] = cut[name][:3]
    for numbers in (load_file(theirs), cut, {n: x for n, x in load_file(ours).items() if n != name}):
        save_file(numbers, ours, metadata=words)
        with pytest.raises(ValueError, match="as it was written"):
            load(ours.parent)
    save_file(load_file(theirs), ours)
    with pytest.raises(ValueError, match="got a file that is no part of a store"):
        load(ours.parent)


@pytest.fixture
def plain_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures: how they are written is the subject."""
    monkeypatch.setattr(PairAnalysis, "_report", lambda self: Report(title=self._title(), summary=repr(whole(self))))


@pytest.mark.usefixtures("plain_pages")
def test_a_full_disk_leaves_what_was_there(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = results
    first.save(tmp_path)
    for write in (first.to_html, lambda path: explorer(first, path, progress=False)):
        write(tmp_path / f"{getattr(write, '__name__', 'x')}.html")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    real = os.write

    def full(fd: int, content: Any) -> int:
        if len(content) > 1000:
            return real(fd, bytes(content)[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", lambda fd, content: full(fd, content[-1500:]))
    for again in (
        lambda: second.save(tmp_path),
        lambda: second.to_html(tmp_path / "to_html.html"),
        lambda: explorer(second, tmp_path / "<lambda>.html", progress=False),
    ):
        with pytest.raises(OSError, match=r"expected room for .*, got a full disk .*: make room and run again") as said:
            again()
        assert said.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("plain_pages")
def test_what_stands_in_the_way_is_said(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in ("file", "link", "file/below"):
        with pytest.raises(ValueError, match="expected a folder, got"):
            results[0].save(tmp_path / path)
    for path in ("/dev/null", tmp_path):
        with pytest.raises(ValueError, match="expected the path of a file"):
            results[0].to_html(path)
    thesis = tmp_path / "thesis.html"
    thesis.write_text("x")
    (tmp_path / "report.html").symlink_to(thesis)
    results[0].to_html(tmp_path / "report.html")  # in the place of the link, not through it
    assert thesis.read_text() == "x"


def test_every_kind_of_column_comes_back_as_it_was(results: Results, tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "floats": [0.1, float("nan"), float("-inf")],
            "integers": [-(2**62), 0, 1],
            "some": pd.array([1, None, 3], dtype="Int64"),
            "maybe": pd.array([True, None, False], dtype="boolean"),
            "flags": [True, False, True],
            "words": ["naïve", None, 'a "quoted" \\ line\nbreak'],
            "mixed": pd.Series([1, 1.0, "1"], dtype="object"),
            "singles": pd.Series([0.1, 0.2, float("nan")], dtype="float32"),
        }
    )
    changed = dataclasses.replace(results[0], table=table, other_changes=table.iloc[:0], notes=("ünïcode",))
    again = load(changed.save(tmp_path))
    assert isinstance(again, PairAnalysis)
    pd.testing.assert_frame_equal(again.table, table, check_exact=True)
    assert [type(value) for value in again.table["mixed"]] == [int, float, str]
    pd.testing.assert_frame_equal(again.other_changes, table.iloc[:0])
    assert again.notes == changed.notes
