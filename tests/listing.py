"""What every result's short list, printed table and LaTeX must be, asked of a real result in its own room."""

from __future__ import annotations

import pandas as pd
import pytest

from tl_asymmetry.results.result import Result


def check_listed(result: Result) -> None:
    """`top`, the printed `table` and `to_latex` of a result."""
    by = "shift" if not result.LISTED or result.LISTED[0] == "effect" else result.LISTED[0]
    top = result.top(3)
    assert 1 <= len(top) <= 3
    first = next(name for name in top if name in (by, "kl", "margin_shift"))
    values = top[first].abs() if first in result.SIGNED else top[first]
    assert values.is_monotonic_decreasing
    assert values.notna().all()
    if "matrix" in top:
        matrix = str(top["matrix"].iloc[0])
        assert set(result.top(2, matrix=matrix)["matrix"]) == {matrix}
        with pytest.raises(ValueError, match=f"expected a matrix among .*, got .*; pass '{matrix}'"):
            result.top(matrix=matrix.replace("_", ""))
    with pytest.raises(ValueError, match="expected by among .*, got 'nothing'; pass"):
        result.top(by="nothing")
    for table in (top, result.table):
        printed = repr(table).splitlines()
        assert max(map(len, printed)) <= 80
        assert "..." not in printed[0]
        assert table.equals(pd.DataFrame(table))
    text = result.to_latex(table="top", caption="Top_heads", label="tab:top")
    assert text.startswith("\\begin{table}\n\\centering\n\\caption{Top\\_heads}\n\\label{tab:top}\n\\begin{tabular}")
    assert text.count("\\\\") == 1 + len(result.top())
    assert result.to_latex().isascii()
