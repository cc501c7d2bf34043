"""Some live weights of a model as one vector: read, move along a direction, differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import ATTENTION


class ParameterVector:
    """Weights of a model, in TransformerLens orientation and a fixed order, as one vector θ.

    A weight may be a parameter, or a view of the memory of one or several: on a TransformerBridge W_Q is a view of the
    query projection, which in GPT-2 lies with keys and values inside one joint parameter. What counts is the memory:
    gradients of all parameters that look at it are added up.

    Args:
        module: the model that owns them.
        weights: live tensors by name, each in the memory of a parameter of the model.

    Raises:
        ValueError: no weights, or one that is a copy.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        if not weights:
            raise ValueError("expected at least one weight, got none; pass attention_weights(model)")
        self.module = module
        self._weights = [weight.detach() for weight in weights.values()]
        self.size = sum(weight.numel() for weight in self._weights)
        memories = {_memory(weight) for weight in self._weights}
        self.owners: list[nn.Parameter] = [p for p in module.parameters() if _memory(p) in memories]
        owned = {_memory(p) for p in self.owners}
        for name, weight in weights.items():
            if _memory(weight) not in owned:
                raise ValueError(f"expected a live view of a parameter for {name}, got a copy; pass raw weights")

    @property
    def device(self) -> torch.device:
        """Where the first weight lies."""
        return self._weights[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first weight."""
        return self._weights[0].dtype

    def flat(self) -> Float[Tensor, " parameters"]:
        """θ, a copy."""
        return torch.cat([weight.reshape(-1) for weight in self._weights])

    def gather(self, gradients: Sequence[Tensor | None]) -> Float[Tensor, " parameters"]:
        """Gradients of `owners` (None for one that was not used) as one vector in θ's order."""
        images = self._images()
        for owner, gradient in zip(self.owners, gradients, strict=True):
            if gradient is not None:
                _window(images[_memory(owner)], owner).add_(gradient)
        return torch.cat([_window(images[_memory(weight)], weight).reshape(-1) for weight in self._weights])

    def scatter(self, vector: Float[Tensor, " parameters"]) -> list[Tensor]:
        """A direction in θ's order as tensors in the shapes of `owners`; zero where an owner is not in θ.

        Raises:
            ValueError: a direction of another length.
        """
        images = self._images()
        for weight, piece in zip(self._weights, self._pieces(vector), strict=True):
            _window(images[_memory(weight)], weight).copy_(piece)
        return [_window(images[_memory(owner)], owner) for owner in self.owners]

    def add_(self, vector: Float[Tensor, " parameters"], scale: float) -> None:
        """θ ← θ + scale · vector, in the model."""
        with torch.no_grad():
            for weight, piece in zip(self._weights, self._pieces(vector), strict=True):
                weight.add_(piece, alpha=scale)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Gradients on for every parameter of the model, each one's `requires_grad` and `.grad` as before after."""
        before = [(p, p.requires_grad, p.grad) for p in self.module.parameters()]

        def require() -> None:
            for parameter, _, _ in before:
                parameter.requires_grad_(True)

        def put_back() -> None:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient

        with torch.inference_mode(False), torch.enable_grad(), temporarily(require, put_back):
            yield

    def restored(self) -> AbstractContextManager[None]:
        """Whatever is done to θ inside, it is bit for bit what it was afterwards."""
        before = [(weight, weight.clone()) for weight in self._weights]

        def put_back() -> None:
            while before:
                weight, saved = before[-1]
                weight.copy_(saved)
                before.pop()

        return temporarily(lambda: None, put_back)

    def _images(self) -> dict[int, Tensor]:
        """Zeros for each memory that holds a weight."""
        return {
            _memory(owner): torch.zeros(
                owner.untyped_storage().nbytes() // owner.element_size(), dtype=owner.dtype, device=owner.device
            )
            for owner in self.owners
        }

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        if len(vector) != self.size:
            raise ValueError(
                f"expected a direction of {self.size} numbers, got {len(vector)}; pass one entry a parameter"
            )
        pieces = vector.to(self.device, self.dtype).split([weight.numel() for weight in self._weights])
        return [piece.view(weight.shape) for piece, weight in zip(pieces, self._weights, strict=True)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _window(image: Tensor, like: Tensor) -> Tensor:
    """The part of a memory's image that `like` looks at, in its shape."""
    return image.as_strided(like.size(), like.stride(), like.storage_offset())


def attention_weights(model: Any, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """W_Q, W_K, W_V, W_O of some layers (default all), live, by HookedTransformer's names, no biases."""
    view = ModelView(model)
    chosen = range(view.n_layers) if layers is None else layers
    return {f"blocks.{i}.attn.{name}": view.weight(i, name) for i in chosen for name in ATTENTION}
