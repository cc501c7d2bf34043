"""Directions are looked up once: how often the model is run, its weights are read, the vocabulary is multiplied."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry import PairAnalysis, analyze_pair
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair import lookups as module


@pytest.fixture(scope="module")
def analysed() -> tuple[Any, PairAnalysis]:
    base = tiny.bridge("gpt2")
    aligned = tiny.bridge("gpt2", delta=0.05)
    return base, analyze_pair(base, aligned, tokens=tiny.tokens(4), ranks=[1], groups=1, progress=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Layers of each pass, models hashed, and sizes of what was multiplied."""
    seen: dict[str, list[Any]] = {"passes": [], "hashes": [], "products": []}
    run, hashed, nearest = ModelView.run, module.weights_hash, module._nearest

    def counted_run(view: ModelView, tokens: torch.Tensor, **options: Any) -> Any:
        seen["passes"].append(options["layers"])
        return run(view, tokens, **options)

    def counted_hash(view: ModelView) -> str:
        seen["hashes"].append(view.model)
        return hashed(view)

    def counted_nearest(vectors: torch.Tensor, *rest: Any) -> Any:
        seen["products"].append(len(vectors))
        return nearest(vectors, *rest)

    monkeypatch.setattr(ModelView, "run", counted_run)
    monkeypatch.setattr(module, "weights_hash", counted_hash)
    monkeypatch.setattr(module, "_nearest", counted_nearest)
    return seen


def test_a_pass_serves_all_heads_of_the_layers_it_ran(
    analysed: tuple[Any, PairAnalysis], counted: dict[str, list[Any]]
) -> None:
    base, result = analysed
    result = copy.copy(result)
    first = result.directions(0, "W_Q", 1, model=base)
    assert counted["passes"] == [1]
    result.directions(0, "W_O", 0, model=base)
    result.directions(0, "W_out", model=base)
    assert counted["passes"] == [1]
    result.directions(1, "W_in", model=base)
    result.directions(1, "W_V", 1, model=base)
    assert counted["passes"] == [1, 2]
    assert len(counted["hashes"]) == 1
    vocabularies = len(counted["products"])
    pd.testing.assert_frame_equal(result.directions(0, "W_Q", 1, model=base), first)
    fewer = result.directions(0, "W_Q", 1, n=2, contexts=2, model=base)
    assert list(fewer["embedding_tokens"]) == list(first["embedding_tokens"][:4])
    assert len(counted["products"]) == vocabularies == 5 * (1 if ModelView(base).tied else 2)


def test_more_contexts_than_were_kept_are_looked_up_again(
    analysed: tuple[Any, PairAnalysis], counted: dict[str, list[Any]]
) -> None:
    base, result = analysed
    result = copy.copy(result)
    few = result.directions(1, "W_K", 2, contexts=2, model=base)
    more = result.directions(1, "W_K", 2, contexts=4, model=base)
    assert counted["passes"] == [2, 2]
    assert [row[:2] for row in more["contexts"]] == list(few["contexts"])
    everything = result.directions(1, "W_K", 2, contexts=10**6, model=base)
    assert len(everything["contexts"].iloc[0]) == 4 * 11  # all but the first of 12 tokens in 4 sequences


def test_weights_changed_in_place_are_noticed(
    analysed: tuple[Any, PairAnalysis], counted: dict[str, list[Any]]
) -> None:
    base, result = analysed
    result, base = copy.copy(result), copy.deepcopy(base)
    result.directions(0, "W_Q", 1, model=base)
    result.directions(0, "W_Q", 1, model=base)
    assert len(counted["hashes"]) == 1
    with torch.no_grad():
        ModelView(base).weight(0, "W_Q")[0, 0, 0] += 1
    with pytest.raises(ValueError, match="expected the base model of this analysis, got other weights"):
        result.directions(0, "W_Q", 1, model=base)


@pytest.mark.parametrize("words", [3, 7, 24, 100])
def test_nearest_tokens_in_blocks_are_those_of_one_product(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VOCABULARY_CHUNK", 7)
    monkeypatch.setattr(module, "_CHUNK", 4)
    generator = torch.Generator().manual_seed(words)
    vectors = torch.randn(words, 5, generator=generator)
    vectors[1] = 0
    directions = torch.randn(2, 3, 2, 5, generator=generator)
    tokens, cosines = module._nearest(vectors, directions, 8)
    x = vectors.double().numpy()
    cosine = directions.double().numpy() @ (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)).T
    for sign, s in ((1, 0), (-1, 1)):
        order = np.argsort(-sign * cosine, axis=-1)[..., :8]
        assert np.array_equal(tokens[..., s, :].numpy(), order)
        np.testing.assert_allclose(cosines[..., s, :], sign * np.take_along_axis(cosine, order, -1), atol=1e-6)
