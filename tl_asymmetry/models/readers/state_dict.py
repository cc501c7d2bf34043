"""TransformerLens's own state dicts: a HookedTransformer's, by its parameter names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.models.view import Parameters
from tl_asymmetry.names import ATTENTION, MATRICES, kind_of

MARK = re.compile(r"blocks\.(\d+)\.attn\._?W_Q")
"""A name that only a TransformerLens state dict has."""

_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos", "alibi")


class StateWeights(WeightSource):
    """A HookedTransformer's state dict.

    Shapes and kinds of norm are read off the tensors; what they do not tell (rotary or not, parallel or not) is taken
    from the configuration or the base.

    Args:
        name: what to call it.
        tensors: name → tensor.
        size: bytes of the files; 0 for tensors in memory.
        config: fields of a HookedTransformerConfig, as far as they are known.
        base: the model it will be compared with.

    Raises:
        ValueError: layers that lack a matrix, processed weights.
    """

    kind = "TransformerLens weights"

    def __init__(
        self, name: str, tensors: Mapping[str, Tensor], size: int, config: Mapping[str, Any], base: Weights | None
    ) -> None:
        self.name, self.bytes, self._tensors = name, size, tensors
        layers = {int(found[1]) for key in tensors if (found := re.match(r"blocks\.(\d+)\.", key))}
        self.n_layers = len(layers)
        self.matrices = tuple(m for m in MATRICES if all(self._key(i, m) in tensors for i in range(self.n_layers)))
        if not layers or layers != set(range(self.n_layers)) or not set(ATTENTION) <= set(self.matrices):
            raise ValueError(
                f"expected the attention matrices of every layer in {name!r}, got layers {sorted(layers)} with "
                f"{', '.join(self.matrices) or 'none'}; pass the whole state dict"
            )
        W_Q, W_K = tensors[self._key(0, "W_Q")], tensors[self._key(0, "W_K")]
        self.n_heads, self.d_model, self.d_head = W_Q.shape
        self.n_kv_heads = len(W_K)
        self.d_mlp = tensors[self._key(0, "W_in")].shape[1] if "W_in" in self.matrices else None
        self.d_vocab = tensors["embed.W_E"].shape[0] if "embed.W_E" in tensors else int(config.get("d_vocab", 0))
        self._take_kinds(config, base)
        self.tied = _are_tied(tensors.get("embed.W_E"), tensors.get("unembed.W_U"))

    def _take_kinds(self, config: Mapping[str, Any], base: Weights | None) -> None:
        has = self._tensors.__contains__
        if not has("ln_final.w") and (config.get("normalization_type") or getattr(base, "norm", None)) is not None:
            raise ValueError(
                f"expected raw weights, got a state dict without norm gains in {self.name!r} (fold_ln); pass one saved "
                "from a model loaded without processing"
            )
        told = "LN" if has("ln_final.b") else "RMS" if has("ln_final.w") else None
        self.norm = told
        positional = "standard" if has("pos_embed.W_pos") else getattr(base, "positional", None)
        self.positional = str(config.get("positional_embedding_type", positional))
        self.parallel = bool(config.get("parallel_attn_mlp", getattr(base, "parallel", False)))
        self.causal = config.get("attention_dir", "causal") == "causal" if config else getattr(base, "causal", True)
        positions = self._tensors["pos_embed.W_pos"].shape[0] if has("pos_embed.W_pos") else getattr(base, "n_ctx", 0)
        self.n_ctx = int(config.get("n_ctx", positions))

    def _key(self, layer: int, matrix: str) -> str:
        plain = f"blocks.{layer}.{kind_of(matrix).part}.{matrix}"
        unexpanded = f"blocks.{layer}.{kind_of(matrix).part}._{matrix}"  # keys and values under grouped-query attention
        return unexpanded if unexpanded in self._tensors else plain

    def _read(self, key: str) -> Tensor:
        tensor = self._tensors[key].detach()
        return tensor.to(product_dtype(tensor))

    def weight(self, layer: int, matrix: str) -> Tensor:
        self._require(layer, matrix)
        return self._read(self._key(layer, matrix))

    def headless(self, *, include_tied: bool = False) -> Parameters:
        matrices = {self._key(layer, matrix) for layer in range(self.n_layers) for matrix in self.matrices}
        makers: dict[str, Callable[[], Tensor]] = {}
        for key in self._tensors:
            owner, _, leaf = key.rpartition(".")
            if key not in matrices and leaf not in _BUFFERS:
                makers[f"{owner}.{leaf.removeprefix('_')}"] = partial(self._read, key)
        if self.tied and not include_tied:
            makers.pop("unembed.W_U", None)
        return Parameters(makers)


def _are_tied(embedding: Tensor | None, unembedding: Tensor | None) -> bool:
    """Whether W_U is the transpose of W_E, up to Gemma's factor √d_model (which is rounded)."""
    if embedding is None or unembedding is None or embedding.shape != unembedding.mT.shape:
        return False
    scale = embedding.shape[1] ** 0.5
    rounding = max(1e-6, torch.finfo(embedding.dtype).eps)
    equal = scaled = True
    for i in range(0, len(embedding), 4096):  # in slices: no second copy of a large embedding
        E, U = embedding[i : i + 4096], unembedding[:, i : i + 4096].mT
        equal = equal and torch.equal(E, U)
        scaled = scaled and torch.allclose(E, U * scale, rtol=rounding, atol=0)
        if not (equal or scaled):
            return False
    return True
