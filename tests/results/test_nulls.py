"""The registry of nulls, and the table of what each row is held against."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests import tiny
from tl_asymmetry import analyze_pair
from tl_asymmetry.results.definitions import DEFINITIONS
from tl_asymmetry.results.nulls import NULL_COLUMNS, NULLS, described

KEYS = ["layer", "head", "matrix", "pathway", "subspace", "rank"]


@pytest.fixture(scope="module", name="result")
def result_fixture():
    base, aligned = (tiny.toy("plain", tiny.KINDS[0], seed=seed) for seed in (0, 1))
    return analyze_pair(base, aligned, tokens=tiny.tokens(6, 12), ranks=[1, 3], progress=False)


def of(result, null: str) -> pd.DataFrame:
    """Rows of a null beside the table's rows, in the table's order."""
    rows = result.nulls[result.nulls["null"] == null].drop(columns="excess")
    return result.table.merge(rows, on=KEYS, how="left", validate="one_to_one", suffixes=("", "_null"))


def test_each_null_repeats_what_the_table_says_of_it(result):
    assert list(result.nulls) == list(NULL_COLUMNS)
    table, d = result.table, result.config["shape"]["d_model"]
    isotropic = result.nulls[result.nulls["null"] == "isotropic"].reset_index(drop=True)
    pd.testing.assert_frame_equal(isotropic[KEYS], table[KEYS])
    np.testing.assert_array_equal(isotropic["expected"], table["rank"] / d)
    np.testing.assert_allclose(isotropic["excess"], table["relative"], rtol=1e-12)
    for column, other in (("low", "ci_low"), ("high", "ci_high"), ("p", "isotropic_p"), ("q", "isotropic_q")):
        np.testing.assert_array_equal(isotropic[column], table[other])
    read = table[table["pathway"] == "read"].reset_index(drop=True)
    adam = result.nulls[result.nulls["null"] == "adam"].reset_index(drop=True)  # the optimizer that was asked for
    pd.testing.assert_frame_equal(adam[KEYS], read[KEYS])
    for column, other in (
        ("expected", "activation_matched"), ("excess", "excess"), ("low", "excess_low"), ("high", "excess_high"),
        ("p", "excess_p"), ("q", "excess_q"),
    ):  # fmt: skip
        np.testing.assert_array_equal(adam[column], read[other], err_msg=column)


def test_a_null_has_rows_only_where_it_applies(result):
    assert set(result.nulls["null"]) == {"isotropic", "adam", "sgd", "sign", "muon"}
    assert of(result, "sgd").loc[lambda rows: rows["pathway"] == "write", "expected"].isna().all()


def test_nulls_are_saved_with_the_result(result, tmp_path):
    from tl_asymmetry import PairAnalysis

    again = PairAnalysis.load(result.save(tmp_path / "pair"))
    pd.testing.assert_frame_equal(again.nulls, result.nulls)


def test_described_gives_the_words_in_the_order_of_the_registry(result):
    shuffled = result.nulls.sample(frac=1, random_state=0)
    words = described(shuffled)
    assert list(dict.fromkeys(words["null"])) == ["isotropic", "adam", "sgd", "sign", "muon"]
    assert set(words.loc[words["null"] == "sgd", "label"]) == {NULLS["sgd"].label}
    with pytest.raises(ValueError, match="expected nulls among isotropic, .*, got unheard_of; pass what analyze_pair"):
        described(result.nulls.assign(null="unheard_of"))


def test_every_null_is_defined_on_every_page():
    assert all(key == null.key for key, null in NULLS.items())
    assert {null.definition for null in NULLS.values()} <= set(DEFINITIONS)
