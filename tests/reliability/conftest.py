"""A pair of results over which the files of saved results and pages are broken in every way."""

from __future__ import annotations

from typing import Any

import pytest

from tests import tiny
from tl_asymmetry import PairAnalysis, analyze_pair

OPTIONS: dict[str, Any] = {"tokens": tiny.tokens(9, 12), "ranks": [1, 4], "groups": 3, "progress": False}


@pytest.fixture(scope="session")
def results() -> tuple[PairAnalysis, PairAnalysis]:
    """Two analyses of one base, with tables of one shape and other numbers."""
    base = tiny.bridge("gpt2")
    first, second = (
        analyze_pair(base, tiny.perturbed(base, seed=seed), matrices=["W_Q", "W_O"], **OPTIONS) for seed in (1, 2)
    )
    assert not first.table.equals(second.table)
    return first, second
