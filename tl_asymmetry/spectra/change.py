"""ΔW of one matrix, whole or as the thin factors of an adapter, asked the same questions either way."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.factored import factored_svd
from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.geometry.rounding import coarser, storage_dtype
from tl_asymmetry.geometry.spectral_frame import at_random_orientation, spectral_frame
from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.names import kind_of


@dataclass(frozen=True)
class Change:
    """ΔW = left · rightᵀ of each head, in TransformerLens orientation; whole where `right` is None (the identity)."""

    left: Float[Tensor, "head m r"]
    """ΔW itself, or the factor on its rows."""
    right: Float[Tensor, "head n r"] | None
    """The factor on its columns."""
    stored: torch.dtype | None = None
    """The coarser of the two weights' storage formats; None for factors, whose product was never stored."""

    @cached_property
    def energy(self) -> Float64[Tensor, " head"]:
        """‖ΔW‖²."""
        if self.right is None:
            return self.left.double().square().sum((-2, -1))
        return (_gram(self.left) * _gram(self.right)).sum((-2, -1)).clamp(min=0)

    @cached_property
    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """U `[head, m, r]`, σ `[head, r]` descending and V `[head, n, r]` with ΔW = U diag(σ) Vᵀ, float64."""
        if self.right is not None:
            return factored_svd(self.left, self.right)
        frame = spectral_frame(self.left)
        r = frame.values.shape[-1]
        return frame.left(r), frame.values, frame.right(r)

    @cached_property
    def purity(self) -> Float64[Tensor, " head"]:
        """tr (ΔW ΔWᵀ)² / ‖ΔW‖⁴: 1 for rank 1, 1/rank for a flat spectrum; NaN for a zero delta."""
        if self.right is None:
            wide = self.left.shape[-1] > self.left.shape[-2]
            return _gram(self.left.mT if wide else self.left).square().sum((-2, -1)) / self.energy.square()
        σ = self.decomposed[1]
        return σ.pow(4).sum(-1) / σ.square().sum(-1).square()

    def between(self, U: Float64[Tensor, "head m k"], V: Float64[Tensor, "head n k"]) -> Float64[Tensor, "head k k"]:
        """Uᵀ ΔW V."""
        with exact_products(self.left.device):
            rows = U.mT @ self.left.double()
            return rows @ (V if self.right is None else self.right.double().mT @ V)

    def left_profile(self, U: Float64[Tensor, "head m k"]) -> Float64[Tensor, "head k"]:
        """‖u_iᵀ ΔW‖² of each column."""
        with exact_products(self.left.device):
            rows = U.mT @ self.left.double()
        return rows.square().sum(-1) if self.right is None else ((rows @ _gram(self.right)) * rows).sum(-1)

    def right_profile(self, V: Float64[Tensor, "head n k"]) -> Float64[Tensor, "head k"]:
        """‖ΔW v_i‖² of each column."""
        if self.right is None:
            with exact_products(self.left.device):
                return (self.left.double() @ V).square().sum(-2)
        return Change(self.right, self.left).left_profile(V)

    def inner(self, W: Float[Tensor, "head m n"]) -> Float64[Tensor, " head"]:
        """⟨ΔW, W⟩."""
        if self.right is None:
            return (self.left.double() * W.double()).sum((-2, -1))
        with exact_products(W.device):
            return ((W.double().mT @ self.left.double()) * self.right.double()).sum((-2, -1))

    def times(self, other: Change) -> Float64[Tensor, " head"]:
        """⟨ΔW, ΔW'⟩."""
        if self.right is None or other.right is None:
            return self.inner(other.left) if other.right is None else other.inner(self.left)
        with exact_products(self.left.device):
            sides = [a.double().mT @ b.double() for a, b in ((self.left, other.left), (self.right, other.right))]
        return (sides[0] * sides[1]).sum((-2, -1))

    def added_to(self, W: Float[Tensor, "head m n"]) -> Float[Tensor, "head m n"]:
        """W + ΔW, in the precision of the delta."""
        W = W.to(product_dtype(W, self.left))
        return W + self.left if self.right is None else W + (self.left @ self.right.mT).to(W.dtype)

    def turned(self, generator: np.random.Generator) -> Change:
        """The same singular values at a random orientation on both sides."""
        if self.right is None:
            return Change(at_random_orientation(self.left, generator), None)
        left, right = (at_random_orientation(side, generator, axes=(-2,)) for side in (self.left, self.right))
        return Change(left, right)


def change_of(base: Weights, aligned: Weights, layer: int, matrix: str) -> Change:
    """The change of one matrix: by factors where the aligned weights come as such, else by subtraction."""
    factors = aligned.factors(layer, matrix) if isinstance(aligned, WeightSource) else None
    if factors is None:
        W, other = heads_first(base.weight(layer, matrix)), heads_first(aligned.weight(layer, matrix))
        dtype = product_dtype(W, other)
        stored = coarser(storage_dtype(W), storage_dtype(other))
        return Change(other.to(W.device, dtype) - W.to(dtype), None, stored)
    residual = factors.residual.expand(len(factors.other), -1, -1)
    return Change(factors.other, residual) if kind_of(matrix).writes else Change(residual, factors.other)


def heads_first(weight: Tensor) -> Float[Tensor, "head m n"]:
    """A matrix with an axis of heads in front, of length 1 where it has none; a view without gradient."""
    weight = weight.detach()
    return weight.unsqueeze(0) if weight.ndim == 2 else weight


def _gram(side: Tensor) -> Float64[Tensor, "head r r"]:
    with exact_products(side.device):
        return side.double().mT @ side.double()
