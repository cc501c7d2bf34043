"""Verdicts over all choices of subspace, against a naive recount."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry import PairAnalysis, analyze_pair
from tl_asymmetry.geometry import prediction_subspace
from tl_asymmetry.geometry.hierarchy import hierarchy
from tl_asymmetry.geometry.nulls import IsotropicNull
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.deltas import residual_first
from tl_asymmetry.pair.stability import STABILITY_COLUMNS
from tl_asymmetry.plots import stability_figure

CHOICES = ["activations", "centered", "first_position", "fold_norm"]
KEYS = ["layer", "head", "matrix", "subspace", "rank"]
TOKENS = tiny.tokens(9, 12)


@functools.cache
def models() -> tuple[Any, Any]:
    """Besides noise one head writes along the leading predicted direction, which all choices of unembedding hold and
    some choices of activations."""
    base, aligned = (tiny.build("llama", tiny.KINDS[-1], delta=δ) for δ in (0.0, 0.05))
    leading = prediction_subspace(base).basis[:, 0].float()
    with torch.no_grad():
        for layer in range(tiny.N_LAYERS):
            ModelView(aligned).weight(layer, "W_O")[2] += leading
    return base, aligned


@functools.cache
def analysed() -> PairAnalysis:
    return analyze_pair(
        *models(), tokens=TOKENS, ranks=[1, 4], groups=1, matrices=["W_Q", "W_K", "W_O", "W_in"], sensitivity=True,
        progress=False,
    )  # fmt: skip


@functools.cache
def judged() -> pd.DataFrame:
    return analysed().stability()


def test_every_number_is_that_of_a_naive_recount():
    result = analysed()
    stability, variants = judged(), result.sensitivity()
    assert list(stability.columns) == list(STABILITY_COLUMNS)
    assert len(stability) == variants[KEYS].drop_duplicates().shape[0]
    of_analysis = {k: families(result.table, k) for k in (1, 4)}
    for (matrix, subspace, k), rows in variants.groupby(["matrix", "subspace", "rank"]):
        if (matrix, k) not in (("W_Q", 1), ("W_in", 1), ("W_O", 4)):  # exact p, and Beta or draws: a sample of each
            continue
        own, q = of_analysis[k], {}
        for _, block in rows.groupby(CHOICES):
            p, pooled = zip(*(own | {(matrix, subspace): evidence(block, matrix, k)}).values(), strict=True)
            names = list(own)
            tree = hierarchy(dict(zip(names, p, strict=True)), dict(zip(names, pooled, strict=True)))
            q |= dict(zip(block.index, tree.head_q[matrix, subspace].flatten(), strict=True))
        for key, block in rows.groupby(["layer", "head"], dropna=False):
            told = stability[(stability["matrix"] == matrix) & (stability["subspace"] == subspace)]
            told = told[(told["rank"] == k) & (told["layer"] == key[0])]
            told = told[told["head"].isna() if pd.isna(key[1]) else told["head"] == key[1]].iloc[0]
            share = np.mean([q[i] < 0.05 for i in block.index])
            assert told["variants"] == len(block)
            assert told["low"] == block["relative"].min()
            assert told["high"] == block["relative"].max()
            assert told["median"] == pytest.approx(block["relative"].median())
            assert told["significant"] == pytest.approx(share)
            assert told["verdict"] == {0.0: "not", 1.0: "concentrated"}.get(share, "depends")
            lowest = block.loc[block["relative"].idxmin()]
            assert told["low_variant"].startswith(lowest["activations"])
            assert ("uncentred" not in told["low_variant"]) == lowest["centered"]
    assert set(stability["verdict"]) == {"not", "depends", "concentrated"}


def families(table: pd.DataFrame, k: int) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """p of heads and of heads pooled of the analysis's own families, from the weights."""
    at = table[table["rank"] == k]
    return {
        (str(matrix), str(subspace)): evidence(rows, str(matrix), k)
        for (matrix, subspace), rows in at.groupby(["matrix", "subspace"], sort=False)
    }


def evidence(rows: pd.DataFrame, matrix: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """One call of the null for each head, and for each layer's heads side by side; rows are layers × heads."""
    null = IsotropicNull(tiny.D_MODEL, seed=0)
    fraction = rows["fraction"].to_numpy(float).reshape(tiny.N_LAYERS, -1)
    heads, pooled = np.full(fraction.shape, np.nan), np.full(tiny.N_LAYERS, np.nan)
    for layer in range(tiny.N_LAYERS):
        change = deltas()[matrix, layer]
        energy = change.square().sum((-2, -1)).numpy()
        for head in range(fraction.shape[1]):
            heads[layer, head] = tail(null, change[head], k, fraction[layer, head])
        if fraction.shape[1] > 1:
            whole = (fraction[layer] * energy).sum() / energy.sum()
            pooled[layer] = tail(null, change.transpose(0, 1).flatten(1), k, whole)
    return heads, pooled


def tail(null: IsotropicNull, change: torch.Tensor, k: int, fraction: float) -> float:
    spectrum = torch.linalg.svdvals(change).square()
    return null.tail(spectrum[None], k, torch.tensor([fraction], dtype=torch.float64))[0][0]


@functools.cache
def deltas() -> dict[tuple[str, int], torch.Tensor]:
    """ΔW as [head, d_model, other], in float64."""
    base, aligned = map(ModelView, models())
    return {
        (matrix, layer): residual_first(matrix, aligned.weight(layer, matrix).double() - base.weight(layer, matrix))
        for matrix in base.matrices
        for layer in range(tiny.N_LAYERS)
    }


def test_the_analysis_itself_is_among_the_variants():
    result = analysed()
    stability = judged().merge(result.table, on=KEYS, suffixes=("", "_own"))
    np.testing.assert_array_equal(stability["relative"], stability["relative_own"])
    np.testing.assert_array_equal(stability["isotropic_q"], stability["isotropic_q_own"])
    assert (stability["low"] <= stability["relative"] * (1 + 1e-5)).all()
    assert (stability["high"] >= stability["relative"] * (1 - 1e-5)).all()
    certain = stability[stability["verdict"] == "concentrated"]
    assert (certain["isotropic_q"] < 0.05).all()
    assert not (stability[stability["verdict"] == "not"]["isotropic_q"] < 0.05).any()


def test_experts_have_their_own_rows():
    mixture = tiny.bridge("mixtral"), tiny.bridge("mixtral", delta=0.05)
    options = {"tokens": tiny.tokens(9, 12), "ranks": [4], "groups": 1, "matrices": ["W_in", "W_router"]}
    stability = analyze_pair(*mixture, **options, sensitivity=True, progress=False).stability()
    experts = stability[stability["matrix"] == "W_in"].drop_duplicates(["layer", "expert"])
    assert experts[["layer", "expert"]].values.tolist() == [[layer, e] for layer in range(2) for e in range(3)]
    assert stability.loc[stability["matrix"] == "W_router", "expert"].isna().all()
    assert (stability["low"] < stability["high"]).all()


def test_a_zero_delta_has_no_verdict():
    kind = tiny.KINDS[-1]
    base = tiny.build("gpt2", kind)
    with pytest.warns(UserWarning, match="identical"):
        same = analyze_pair(
            base,
            base,
            tokens=tiny.tokens(9, 12),
            ranks=[4],
            groups=1,
            sensitivity=True,
            progress=False,
            matrices=["W_K", "W_O"],
        )
    stability = same.stability()
    assert set(stability["verdict"]) == {"none"}
    assert set(stability["low_variant"]) == {""}
    assert "delta is zero" in same.plot_sensitivity().layout.annotations[0].text.replace("<br>", " ")


def test_without_sensitivity_the_message_says_what_to_pass():
    kind = tiny.KINDS[-1]
    plain = analyze_pair(
        tiny.build("gpt2", kind), tiny.build("gpt2", kind, delta=0.05), tokens=tiny.tokens(9, 12), ranks=[4], groups=1,
        progress=False, matrices=["W_O"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="pass sensitivity=True to analyze_pair"):
        plain.plot_sensitivity()


def test_figure_draws_ranges_and_verdicts_by_symbol():
    stability = judged()
    figure = stability_figure(stability, matrix="W_O", rank=4)
    shown = [t for t in figure.data if t.visible]
    assert len(shown) == 1
    rows = stability[(stability["matrix"] == "W_O") & (stability["rank"] == 4)]
    rows = rows[rows["subspace"] == rows["subspace"].iloc[0]].sort_values(["median", "layer"])
    trace = shown[0]
    np.testing.assert_allclose(trace.y, rows["relative"], rtol=1e-5)
    np.testing.assert_allclose(np.array(trace.y) + trace.error_y.array, rows["high"], rtol=1e-5)
    np.testing.assert_allclose(np.array(trace.y) - trace.error_y.arrayminus, rows["low"], rtol=1e-5)
    names = {"concentrated": "circle", "depends": "diamond-open", "not": "circle-open"}
    assert list(trace.marker.symbol) == [names[v] for v in rows["verdict"]]
    assert "1 = chance" in re.sub("<[^>]*>", " ", figure.layout.title.text)
    both = stability_figure(stability, matrix="W_O")
    for step, k in zip(both.layout.sliders[0].steps, (1, 4), strict=True):
        alone = stability_figure(stability, matrix="W_O", rank=k)
        for i, target in enumerate(step.args[1]):
            assert list(step.args[0]["y"][i]) == list(alone.data[target].y)
            assert list(step.args[0]["error_y.array"][i]) == list(alone.data[target].error_y.array)
    menu = both.layout.updatemenus[0]
    assert [sum(b.args[0]["visible"]) for b in menu.buttons] == [1] * len(menu.buttons)
    with pytest.raises(ValueError, match="expected matrix to be one of 'W_Q', .* got 'W_X'"):
        stability_figure(stability, matrix="W_X")
    with pytest.raises(ValueError, match="expected a table with the columns verdict"):
        stability_figure(stability.drop(columns="verdict"))
