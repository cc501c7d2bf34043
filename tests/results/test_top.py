"""`top`: one implementation for all results; how their tables print; tables as LaTeX."""

from __future__ import annotations

import importlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from tl_asymmetry.results.latex import latex_table
from tl_asymmetry.results.result import KINDS, Result
from tl_asymmetry.results.tables import Table, as_table

pytestmark = pytest.mark.quick


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Toy(Result):
    LISTED = ("ratio", "q")
    SIGNED = ("ratio",)


def toy(rank: object = 4) -> Toy:
    table = pd.DataFrame({
        "layer": [0, 1, 2, 3, 0], "matrix": ["W_Q", "W_Q", "W_K", "W_K", "W_Q"], "rank": [4, 4, 4, 4, 1],
        "ratio": [1.0, -3.0, 2.0, float("nan"), 9.0], "size": [1.0, 2.0, 3.0, 4.0, 5.0],
        "q": [0.5, 0.1, 0.2, 0.01, 0.0], "verdict": "",
    })  # fmt: skip
    return Toy(table=table, config={"shown_rank": rank}, notes=(), arrays={})


def test_the_rows_that_stand_out_come_first() -> None:
    found = toy().top()
    assert list(found.columns) == ["layer", "matrix", "rank", "ratio", "q"]
    assert found["layer"].tolist() == [1, 2, 0]  # a ratio has both signs: farthest from 0; NaN and rank 1 are not there
    assert toy().top(1, by="q")["layer"].tolist() == [3]
    assert toy().top(9, "size", "W_Q")["size"].tolist() == [2.0, 1.0]
    assert toy({"W_Q": 1, "W_K": 4}).top(2)["ratio"].tolist() == [9.0, 2.0]
    assert toy(None).top(1)["ratio"].tolist() == [9.0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"n": 0}, "expected n >= 1, got 0"),
        ({"by": "ratios"}, "expected by among ratio, size, q, got 'ratios'; pass 'ratio'"),
        ({"by": "verdict"}, "expected by among"),
        ({"matrix": "WQ"}, "expected a matrix among W_Q, W_K, got 'WQ'; pass 'W_Q'"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(asked: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        toy().top(**asked)


def test_a_result_whose_rows_are_of_no_matrix_says_so() -> None:
    bare = Toy(table=toy().table.drop(columns="matrix"), config={}, notes=(), arrays={})
    assert len(bare.top()) == 4
    with pytest.raises(ValueError, match="expected no matrix, since no row is of one alone, got 'W_Q'; leave it out"):
        bare.top(matrix="W_Q")


def test_a_column_without_numbers_names_one_that_has_some() -> None:
    empty = Toy(table=toy().table.assign(ratio=float("nan")), config={}, notes=(), arrays={})
    with pytest.raises(ValueError, match="expected numbers in 'ratio' for some matrix, got none; pass by='size'"):
        empty.top()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_result_says_what_is_read_first(kind: str) -> None:
    assert getattr(importlib.import_module(KINDS[kind]), kind).LISTED


# --- how tables print -------------------------------------------------------------------------------------------------


def wide(rows: int = 3) -> pd.DataFrame:
    labels = {"layer": range(rows), "head": pd.array([pd.NA] * rows, dtype="Int64"), "matrix": "W_Q", "pathway": "read"}
    return pd.DataFrame(labels | {f"number_{i}": [i + 0.123456] * rows for i in range(30)} | {"verdict": "above"})


def test_a_wide_table_prints_what_is_read_first_and_how_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    table = as_table(wide(), ["verdict", "number_29", "not there"])
    header, *rows, _, size = repr(table).splitlines()
    assert header.split() == ["layer", "matrix", "verdict", "number_29", "number_0", "number_1"]
    assert rows[0].split() == ["0", "0", "W_Q", "above", "29.1", "0.123", "1.12"]
    assert size == "[3 rows × 35 columns: see .columns; to_string() prints all]"
    assert repr(table.head(2)).splitlines()[0] == header
    html = table._repr_html_()
    assert html is not None
    assert "number_29" in html
    assert "number_20" not in html
    assert "3 rows × 35 columns" in html
    long = repr(as_table(wide(1000), ["verdict"])).splitlines()
    assert len(long) == 1 + 10 + 1 + 2
    monkeypatch.setenv("COLUMNS", "200")
    assert "number_10" in repr(table)


def test_a_table_is_a_data_frame_in_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = wide()
    table = as_table(plain, ["verdict"])
    pd.testing.assert_frame_equal(plain, table)
    pd.testing.assert_frame_equal(table, plain)
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(table)), plain)
    assert repr(pickle.loads(pickle.dumps(table))) == repr(table)
    assert table.equals(plain)
    assert isinstance(table.groupby("matrix").sum(numeric_only=True), Table)
    narrow = ["layer", "matrix", "pathway", "number_0"]  # what was chosen is shown
    assert repr(table[narrow]) == repr(plain[narrow])
    for other in (table.describe(), table.iloc[:0], table.set_axis(range(35), axis=1), table.T):
        assert repr(other) == repr(pd.DataFrame(other))
    with pd.option_context("display.max_columns", None):
        assert repr(table) == repr(plain)
        assert table._repr_html_() == plain._repr_html_()


def test_latex_reads_what_it_would_read_otherwise() -> None:
    table = pd.DataFrame({"|ΔW|_%": [1.5e-7, float("nan"), -2.0], "found": ["12↑ 0↓ of 16", "a & b", None]})
    assert latex_table(table).splitlines() == [
        r"\begin{tabular}{rl}", r"\toprule", r"$|$$\Delta$W$|$\_\% & found \\", r"\midrule",
        r"$1.5 \times 10^{-7}$ & 12$\uparrow$ 0$\downarrow$ of 16 \\", r"-- & a \& b \\", r"$-$2 & -- \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


def test_files_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.tex"
    assert path.parent.exists() is False
    assert f"{toy().to_latex(path, 'top')}\n" == path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="expected a table among summary, top, table, got 'tables'; pass 'table'"):
        toy().to_latex(table="tables")
    with pytest.raises(ValueError, match="expected a table among table, got 'summary'; pass one of these"):
        toy().to_csv(path, "summary")
    with pytest.raises(ValueError, match="expected the path of a file, got the folder .*; pass e.g. .*table.tex"):
        toy().to_latex(tmp_path, "table")
