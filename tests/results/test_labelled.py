"""Tables with named axes: every number where its labels say, whatever kind of result it is."""

from __future__ import annotations

import importlib

import numpy as np
import pandas as pd
import pytest

from tl_asymmetry.results.labelled import labelled
from tl_asymmetry.results.result import KINDS, Result

pytest.importorskip("xarray")


def table() -> pd.DataFrame:
    """Two layers; W_Q with two heads, W_in with none; two ranks."""
    rows = [(m, layer, h, k) for m, heads in (("W_Q", (0, 1)), ("W_in", (pd.NA,))) for layer in (0, 1) for h in heads
            for k in (1, 4)]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["matrix", "layer", "head", "rank"]).astype({"layer": "Int64", "head": "Int64"})
    return frame.assign(run="one", fraction=np.arange(len(frame)) / 10, tested=True, flags=[None, *[""] * 11])


def test_every_number_stands_at_its_labels() -> None:
    tidy = table()
    data = labelled(tidy)
    assert data["fraction"].dims == ("matrix", "layer", "head", "rank")
    for row in tidy.itertuples():
        head = -1 if pd.isna(row.head) else int(row.head)
        place = {"matrix": row.matrix, "layer": int(row.layer), "head": head, "rank": row.rank}
        assert data["fraction"].sel(place).item() == row.fraction
    assert int(data["fraction"].notnull().sum()) == len(tidy)
    assert {"run", "tested", "flags"} <= set(data.data_vars)


def test_rows_that_no_columns_tell_apart_stay_rows() -> None:
    twice = pd.concat([table(), table()], ignore_index=True)
    assert labelled(twice)["fraction"].dims == ("row",)
    sparse = pd.DataFrame({"a": range(40), "b": range(40), "x": np.arange(40.0)}).assign(a=lambda t: t["a"] // 2)
    assert labelled(sparse)["x"].dims == ("row",)  # 20 × 40 cells for 40 rows
    assert labelled(sparse.iloc[:0])["x"].size == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_has_it(kind: str) -> None:
    made = getattr(importlib.import_module(KINDS[kind]), kind)
    assert issubclass(made, Result)
    assert callable(made.to_xarray)
