"""Some live weights of a model as one vector: read, move along a direction, differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_asymmetry.models.view import ModelView

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")
"""Matrices of an attention block."""


class ParameterVector:
    """Weights of a model, in TransformerLens orientation and a fixed order, as one vector θ.

    A weight may be a parameter or a live view of one (as on a TransformerBridge, whose W_Q is a view of the query
    projection): directions are brought into the layout of the parameters behind.

    Args:
        module: the model that owns them.
        weights: live tensors by name, each a view of one floating-point parameter of the model.

    Raises:
        ValueError: no weights, or one that is a copy.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        if not weights:
            raise ValueError("expected at least one weight, got none; pass attention_weights(model)")
        self.module = module
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self.size = sum(weight.numel() for weight in weights.values())
        parameters = {p.untyped_storage().data_ptr(): p for p in module.parameters()}
        self._places: list[tuple[int, torch.Size, tuple[int, ...], int]] = []
        self.owners: list[nn.Parameter] = []
        for name, weight in weights.items():
            owner = parameters.get(weight.untyped_storage().data_ptr())
            if owner is None:
                raise ValueError(f"expected a live view of a parameter for {name}, got a copy; pass raw weights")
            if not any(owner is known for known in self.owners):
                self.owners.append(owner)
            index = next(i for i, known in enumerate(self.owners) if known is owner)
            offset = int(weight.storage_offset()) - int(owner.storage_offset())
            self._places.append((index, weight.shape, weight.stride(), offset))

    def flat(self) -> Float[Tensor, " parameters"]:
        """θ, a copy."""
        return self.gather([owner.detach() for owner in self.owners])

    def gather(self, like_owners: Sequence[Tensor]) -> Float[Tensor, " parameters"]:
        """Tensors in the parameters' layout (gradients, say) as one vector in θ's order."""
        dense = [tensor.contiguous() for tensor in like_owners]
        return torch.cat([self._view(dense[place[0]], place).reshape(-1) for place in self._places])

    def scatter(self, vector: Float[Tensor, " parameters"]) -> list[Tensor]:
        """A direction in θ's order as tensors in the parameters' layout; zero where a parameter is not in θ.

        Raises:
            ValueError: a direction of another length.
        """
        if len(vector) != self.size:
            raise ValueError(
                f"expected a direction of {self.size} numbers, got {len(vector)}; pass one entry a parameter"
            )
        tensors = [torch.zeros_like(owner, memory_format=torch.contiguous_format) for owner in self.owners]
        pieces = vector.split([shape.numel() for _, shape, _, _ in self._places])
        for place, piece in zip(self._places, pieces, strict=True):
            target = self._view(tensors[place[0]], place)
            target.copy_(piece.view(place[1]))
        return tensors

    def add_(self, vector: Float[Tensor, " parameters"], scale: float) -> None:
        """θ ← θ + scale · vector, in the model."""
        with torch.no_grad():
            for owner, change in zip(self.owners, self.scatter(vector), strict=True):
                owner.add_(change, alpha=scale)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Gradients on for every parameter of the model, each one's `requires_grad` and `.grad` as before after."""
        before = [(p, p.requires_grad, p.grad) for p in self.module.parameters()]
        try:
            with torch.enable_grad():
                for parameter, _, _ in before:
                    parameter.requires_grad_(True)
                yield
        finally:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever is done to θ inside, it is bit for bit what it was afterwards."""
        before = [owner.detach().clone() for owner in self.owners]
        try:
            yield
        finally:
            with torch.no_grad():
                for owner, saved in zip(self.owners, before, strict=True):
                    owner.copy_(saved)

    @staticmethod
    def _view(dense: Tensor, place: tuple[int, torch.Size, tuple[int, ...], int]) -> Tensor:
        _, shape, stride, offset = place
        return dense.as_strided(shape, stride, dense.storage_offset() + offset)


def attention_weights(model: Any, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """W_Q, W_K, W_V, W_O of some layers (default all), live, by HookedTransformer's names, no biases."""
    view = ModelView(model)
    chosen = range(view.n_layers) if layers is None else layers
    return {f"blocks.{i}.attn.{name}": view.weight(i, name) for i in chosen for name in ATTENTION}
