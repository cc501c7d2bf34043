"""Weights of an architecture whose layers differ or that has experts: loaded whole by transformers, then read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.huggingface import PLAIN
from tl_asymmetry.models.loading import bridge_around, transformers_model
from tl_asymmetry.models.readers.base import WeightSource
from tl_asymmetry.models.readers.folder import read_tokenizer
from tl_asymmetry.models.readers.stored import DIMENSIONS
from tl_asymmetry.models.view import ModelView, Parameters


class LoadedWeights(WeightSource):
    """A model directory as transformers loads it, in the type it is stored in, on the CPU.

    Checkpoints of mixtures hold their experts otherwise than the model computes with them, and hybrids lay every layer
    out by itself: what transformers makes of the files is what counts, so transformers does it.

    Args:
        name: what to call it.
        folder: where it is.
        base: what it will be compared with. Unless that is a plain model of transformers, this one is wrapped by
            TransformerLens where it can be, so that both have one set of names.

    Raises:
        ValueError: a model that transformers cannot load.
    """

    kind = "Hugging Face weights"

    def __init__(self, name: str, folder: Path, base: Any = None) -> None:
        self.name = name
        model = transformers_model(folder, dtype="auto")
        plain = isinstance(base, ModelView) and base.kind == PLAIN
        self._view = view = ModelView(model if plain else _wrapped_if_known(model, name))
        self.config = model.config
        self.n_layers = view.n_layers
        for field in DIMENSIONS:
            setattr(self, field, getattr(view, field))
        self.matrices, self.irregular, self.tied = view.matrices, view.irregular, view.tied
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.tokenizer = read_tokenizer(folder)
        self.notes = (f"{name!r} was loaded whole: its layers differ, or it has experts",)

    def weight(self, layer: int, matrix: str) -> Tensor:
        weight = self._view.weight(layer, matrix)
        return weight.to(product_dtype(weight))

    def has(self, layer: int, matrix: str) -> bool:
        return self._view.has(layer, matrix)

    def headless(self, *, include_tied: bool = False) -> Parameters:
        return self._view.headless(include_tied=include_tied)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._view.named_weights()


def _wrapped_if_known(model: Any, name: str) -> Any:
    """A Bridge around a model, or the model where TransformerLens does not know its architecture."""
    try:
        return bridge_around(model, name, dtype=model.dtype)
    except ValueError:
        return model
