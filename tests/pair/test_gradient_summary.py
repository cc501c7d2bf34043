"""With gradients a summary's write rows speak, in the table and in a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tl_asymmetry import analyze_pair


class Moments:
    """δ's second moment: some directions of the stream more than others, every head alike."""

    def gradient_moment(self, layer: int, matrix: str, head: int | None = None) -> torch.Tensor:
        return torch.diag(torch.linspace(1, 3, tiny.D_MODEL, dtype=torch.float64))


def test_write_rows_speak() -> None:
    base = tiny.bridge("gpt2")
    options = {"tokens": tiny.tokens(6, 12), "matrices": ["W_Q", "W_O"], "ranks": [4], "groups": 1, "progress": False}
    aligned = tiny.perturbed(base)
    result, plain = (analyze_pair(base, aligned, gradient=given, **options) for given in (Moments(), None))
    shown, before = result._summary_table(), plain._summary_table()
    for row in shown.itertuples():
        block = result.table.query(f"matrix == '{row.matrix}' and subspace == '{row.subspace}'")
        matched, excess = (
            ("gradient_matched", "gradient_excess") if row.pathway == "write" else ("activation_matched", "excess")
        )
        assert row.expected == pytest.approx((block[matched] * tiny.D_MODEL / 4).median())
        assert row.excess == pytest.approx(block[excess].median())
    write = before["pathway"] == "write"
    assert before.loc[write, ["expected", "excess"]].isna().all(axis=None)
    assert np.isfinite(before.loc[~write, "excess"]).all()
    written = result.table.query("pathway == 'write' and subspace == 'prediction'")
    said = [sentence for sentence in result._headline() if "output's gradients give there" in sentence]
    assert len(said) == 1
    assert f"median excess is {written['gradient_excess'].median():.2f}, from" in said[0]
    assert "No test stands behind" in said[0]
    assert not any("output's gradients give there" in sentence for sentence in plain._headline())
