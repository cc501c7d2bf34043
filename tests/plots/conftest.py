"""The synthetic tables, as fixtures."""

from __future__ import annotations

import pandas as pd
import pytest

from tests.synthetic import make_asymmetry, make_table


@pytest.fixture(name="table")
def table_fixture() -> pd.DataFrame:
    return make_table()


@pytest.fixture(name="grouped")
def grouped_fixture() -> pd.DataFrame:
    """Four query heads, two KV heads."""
    return make_table(kv_heads=2)


@pytest.fixture(name="asymmetry")
def asymmetry_fixture(table: pd.DataFrame) -> pd.DataFrame:
    return make_asymmetry(table)
