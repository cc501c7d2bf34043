"""What every source of weights offers, a file as well as a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.factored import factored_svd
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.readers.spectra import DELTA_NUMBERS, delta_numbers, eigenvalues
from tl_asymmetry.models.view import ModelView, Parameters
from tl_asymmetry.names import MATRICES, kind_of


@dataclass(frozen=True)
class Factors:
    """A matrix's change as a product of two thin ones: ΔW_h = residual · other_hᵀ, the scale included."""

    residual: Float[Tensor, "d_model r"]
    """The side on the residual stream, the same for all heads."""
    other: Float[Tensor, "head other r"]
    """The other side; one head for a matrix of the MLP."""

    def product(self, matrix: str) -> Float[Tensor, "*head rows columns"]:
        """ΔW in TransformerLens orientation."""
        change = self.other @ self.residual.mT if kind_of(matrix).writes else self.residual @ self.other.mT
        return change if kind_of(matrix).heads else change.squeeze(0)


class WeightSource:
    """Weights in files, read one tensor at a time, in TransformerLens orientation. Made by `weights_from`.

    Has what `ModelView` has, as far as weights alone can tell; it cannot be run.
    """

    kind: str
    """What it was read from: "Hugging Face weights", "LoRA adapter", "TransformerLens weights"."""
    name: str
    """The path or hub name."""
    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    """Key and value heads per layer."""
    d_head: int
    """Width of one head."""
    d_mlp: int | None
    """Hidden width of the MLP; None where there is no dense MLP."""
    d_vocab: int
    """Number of token embeddings."""
    n_ctx: int
    """Longest sequence."""
    norm: str | None
    """Kind of the final norm: "LN", "RMS", None."""
    positional: str
    """Positional embedding."""
    parallel: bool
    """Whether attention and MLP read the same stream."""
    causal: bool
    """Whether a position sees only itself and earlier ones."""
    tied: bool
    """Whether the unembedding is the embedding."""
    matrices: tuple[str, ...]
    """The matrices that every layer has, in one shape."""
    irregular: tuple[str, ...] = ()
    """Those that some layers lack or have in another shape, or of which each expert has its own."""
    notes: tuple[str, ...] = ()
    """What was left out or is to be known of these files."""
    only_changes: bool = False
    """Whether what `headless` does not list is the base's own, unchanged (an adapter)."""
    config: Any = None
    """The transformers configuration that the weights are of, where there is one."""
    tokenizer: Any = None
    """The tokenizer beside the weights, or None."""
    bytes: int
    """Size of the files."""
    dtype: torch.dtype = torch.float32
    """Data type of the tensors given out."""
    device = torch.device("cpu")
    """Where they are."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind} {self.name!r}, {self.n_layers} layers, d_model {self.d_model})"

    def weight(self, layer: int, matrix: str) -> Tensor:
        """A matrix `[head, d_model, d_head]`, W_O `[head, d_head, d_model]`, W_in and W_gate `[d_model, d_mlp]`,
        W_out `[d_mlp, d_model]`; W_K and W_V per KV head. Float32 (float64 if stored so), read now.

        Raises:
            ValueError: no such layer or matrix; an adapter that was given no base.
        """
        raise NotImplementedError

    def has(self, layer: int, matrix: str) -> bool:
        """Whether a layer has a matrix of that name."""
        return 0 <= layer < self.n_layers and matrix in self.matrices

    def delta(self, layer: int, matrix: str, base: Any = None) -> Tensor:
        """W − W_base in float32, the shape of `weight`.

        Args:
            layer: which layer.
            matrix: its name.
            base: a model, a `ModelView` or another source; an adapter needs none.

        Raises:
            ValueError: no base where one is needed, or one of another shape.
        """
        if base is None:
            raise ValueError(f"expected a base to subtract for {self.kind}, got none; pass base=")
        mine, theirs = self.weight(layer, matrix), as_weights(base).weight(layer, matrix).detach()
        if mine.shape != theirs.shape:
            raise ValueError(
                f"expected a base with {matrix} of shape {tuple(mine.shape)}, got {tuple(theirs.shape)}; pass the base "
                "that these weights were trained from"
            )
        dtype = product_dtype(mine, theirs)
        return mine.to(theirs.device, dtype) - theirs.to(dtype)

    def factors(self, layer: int, matrix: str) -> Factors | None:
        """The change as two thin factors, where it is known as such (an adapter); None elsewhere."""
        return None

    def latent_gain(self, layer: int, latent: str) -> Tensor | None:
        """As `ModelView.latent_gain`; None of weights without latents."""
        return None

    def onto(self, base: Any) -> WeightSource:
        """The same source with a base to add its changes to, where it is one of changes and has none."""
        return self

    def headless(self, *, include_tied: bool = False) -> Parameters:
        """All parameters that are no matrix, by HookedTransformer's names, each read when it is looked up.

        Embeddings come in the type they are stored in: they are the largest tensors, and only compared in pieces.

        Args:
            include_tied: list `unembed.W_U` also where it is the embedding.
        """
        raise NotImplementedError

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, the matrices first, named as `ModelView.named_weights` names them."""
        for layer in range(self.n_layers):
            for matrix in self.matrices:
                yield f"blocks.{layer}.{kind_of(matrix).part}.{matrix}", self.weight(layer, matrix)
        yield from self.headless().items()

    def unscaled_weights(self) -> Iterator[tuple[str, Tensor, float]]:
        """As `ModelView.unscaled_weights`; in files a tensor is read when it is asked for, and multiplied then."""
        for name, weight in self.named_weights():
            yield name, weight, 1.0

    def table(self, base: Any = None) -> pd.DataFrame:
        """What the delta of every head is like, by itself: no activations, no subspace.

        Args:
            base: what to subtract; an adapter needs none (without one its relative norms are NaN).

        Returns:
            One row per layer × matrix × head: `layer, matrix, head` (the KV head for W_K and W_V, NA for the MLP),
            `delta_norm, delta_relative_norm, stable_rank, effective_rank` (of the eigenvalues of ΔW ΔWᵀ; NaN for a
            matrix that did not change).
        """
        base = None if base is None else as_weights(base)
        rows = [
            (layer, matrix, None if kind_of(matrix).heads is None else head, *numbers)
            for layer in range(self.n_layers)
            for matrix in self.matrices
            for head, numbers in enumerate(self._numbers(layer, matrix, base))
        ]
        table = pd.DataFrame(rows, columns=["layer", "matrix", "head", *DELTA_NUMBERS])
        return table.astype({"layer": "Int64", "head": "Int64", **dict.fromkeys(DELTA_NUMBERS, "float64")})

    def _numbers(self, layer: int, matrix: str, base: Weights | None) -> list[list[float]]:
        """`DELTA_NUMBERS` of every head."""
        factors = self.factors(layer, matrix)
        if factors is None:
            λ = eigenvalues(self.delta(layer, matrix, base))
        else:
            λ = factored_svd(factors.residual.unsqueeze(0), factors.other)[1].square()
        return delta_numbers(λ, None if base is None else base.weight(layer, matrix).detach())

    def _require(self, layer: int, matrix: str) -> None:
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"expected a layer from 0 to {self.n_layers - 1}, got {layer}; pass one of these")
        if matrix not in self.matrices:
            known = ", ".join(m for m in MATRICES if m in self.matrices)
            raise ValueError(f"expected a matrix among {known}, got {matrix!r}; pass one these weights have")


Weights = ModelView | WeightSource
"""The weights of one model, loaded or in files."""


def as_weights(source: Any) -> Weights:
    """A model as its view; views and sources as they are."""
    return source if isinstance(source, Weights) else ModelView(source)
