"""Weights of an architecture whose layers differ or that has experts: loaded whole by transformers, then read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.huggingface import PLAIN
from tl_asymmetry.models.loading import bridge_around, transformers_model
from tl_asymmetry.models.readers.base import WeightSource
from tl_asymmetry.models.readers.folder import read_tokenizer
from tl_asymmetry.models.readers.stored import DIMENSIONS
from tl_asymmetry.models.readers.tuners import merged_whole
from tl_asymmetry.models.view import ModelView, Parameters


class LoadedWeights(WeightSource):
    """A model as transformers loads it, in the type it is stored in, on the CPU.

    Checkpoints of mixtures hold their experts otherwise than the model computes with them, and hybrids lay every layer
    out by itself: what transformers makes of the files is what counts, so transformers does it.

    Args:
        name: what to call it.
        model: of transformers, or a TransformerBridge around one.
        note: how it came to be.
        tokenizer: that of its folder.
    """

    kind = "Hugging Face weights"

    def __init__(self, name: str, model: Any, note: str, tokenizer: Any = None) -> None:
        self.name = name
        self._view = view = ModelView(model)
        self.config = getattr(model, "original_model", model).config
        self.n_layers = view.n_layers
        for field in DIMENSIONS:
            setattr(self, field, getattr(view, field))
        self.matrices, self.irregular, self.tied = view.matrices, view.irregular, view.tied
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.tokenizer = tokenizer
        self.notes = (note,)

    def weight(self, layer: int, matrix: str) -> Tensor:
        weight = self._view.weight(layer, matrix)
        return weight.to(product_dtype(weight))

    def latent_gain(self, layer: int, latent: str) -> Tensor | None:
        return self._view.latent_gain(layer, latent)

    def has(self, layer: int, matrix: str) -> bool:
        return self._view.has(layer, matrix)

    def headless(self, *, include_tied: bool = False) -> Parameters:
        return self._view.headless(include_tied=include_tied)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self._view.named_weights()

    def unscaled_weights(self) -> Iterator[tuple[str, Tensor, float]]:
        return self._view.unscaled_weights()


def loaded_folder(name: str, folder: Path, base: Any = None) -> LoadedWeights:
    """A model directory, loaded whole.

    Args:
        name: what to call it.
        folder: where it is.
        base: what it will be compared with. Unless that is a plain model of transformers, this one is wrapped by
            TransformerLens where it can be, so that both have one set of names.

    Raises:
        ValueError: a model that transformers cannot load.
    """
    model = transformers_model(folder)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # a few tokens in any type; the others know no float64
    plain = isinstance(base, ModelView) and base.kind == PLAIN
    note = f"{name!r} was loaded whole: its layers differ, or it has experts or no names in TransformerLens"
    return LoadedWeights(name, model if plain else _wrapped_if_known(model, name), note, read_tokenizer(folder))


def adapted(name: str, folder: Path, kind: str, base: Any) -> LoadedWeights:
    """An adapter on a base whose layers differ: PEFT merges it into a copy of the whole base.

    Args:
        name: what to call it.
        folder: where the adapter is.
        kind: its peft_type.
        base: the model of transformers that it was trained from.

    Raises:
        ValueError: a missing PEFT, an adapter that does not fit.
    """
    twin = copy.deepcopy(base)
    # In 16 bits a small change would be rounded away in the sum.
    twin = twin.to(torch.float32) if twin.dtype.itemsize < 4 else twin
    note = f"{name!r} was merged by PEFT into a copy of the whole base"
    return LoadedWeights(name, merged_whole(twin, folder, kind), note)


def _wrapped_if_known(model: Any, name: str) -> Any:
    """A Bridge around a model, or the model where TransformerLens does not know its architecture."""
    try:
        return bridge_around(model, name, dtype=model.dtype)
    except ValueError:
        return model
