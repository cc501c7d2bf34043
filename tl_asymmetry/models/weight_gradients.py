"""Gradients of a loss in the weights a model really holds, in TransformerLens orientation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.view import ModelView

WeightSite = tuple[int, str]
"""A layer and a matrix."""


class WeightGradients:
    """Differentiates a loss in some weight matrices and in tensors of its graph, and leaves no trace in the model.

    A matrix in TransformerLens orientation is a strided view of a parameter; the same strides on the parameter's
    gradient give the matrix's gradient. Where several parameters share its memory (the Bridge keeps a fused projection
    beside its parts), the gradients of those the loss depends on are added: moving the memory moves them all. `.grad`
    is neither read nor written.

    Args:
        view: the model.
        sites: which matrices.

    Raises:
        ValueError: a matrix that is not a view of a parameter (see `ModelView.weight`).

    Example:
        >>> gradients = WeightGradients(view, [(0, "W_Q")])
        >>> with gradients.tracked():
        ...     loss = view.run(torch.arange(6).view(1, 6), logits=True).square().mean()
        ...     (by_site, _) = gradients.of(loss)
        >>> tuple(by_site[0, "W_Q"].shape)
        (4, 64, 16)
    """

    def __init__(self, view: ModelView, sites: Sequence[WeightSite]) -> None:
        self._view = view
        parameters = [parameter for _, parameter in view._adapter.parameters()]
        self._parameters: dict[int, Tensor] = {}
        self._places: dict[WeightSite, tuple[Tensor, list[int]]] = {}
        for site in sites:
            weight = view.weight(*site)
            owners = [parameter for parameter in parameters if _holds(parameter, weight)]
            self._parameters |= {id(parameter): parameter for parameter in owners}
            self._places[site] = weight, [id(parameter) for parameter in owners]

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Record gradients inside, whatever the caller has switched off; each parameter's flag is put back."""
        before = [(parameter, parameter.requires_grad) for parameter in self._parameters.values()]

        def require() -> None:
            for parameter, _ in before:
                parameter.requires_grad_(True)

        def put_back() -> None:
            for parameter, required in before:
                parameter.requires_grad_(required)

        with temporarily(require, put_back), torch.enable_grad(), torch.autocast(self._view.device.type, enabled=False):
            yield

    def of(
        self, loss: Float[Tensor, ""], tensors: Sequence[Tensor] = ()
    ) -> tuple[dict[WeightSite, Tensor], list[Tensor]]:
        """∂ loss / ∂ W for every site, shaped like `ModelView.weight`, and ∂ loss / ∂ x for tensors of the graph.

        Raises:
            ValueError: a loss that does not depend on one of them.
        """
        wanted = list(self._parameters.values())
        found = torch.autograd.grad(loss, [*wanted, *tensors], allow_unused=True)
        by_parameter = {
            key: _laid_out_like(gradient, parameter)
            for (key, parameter), gradient in zip(self._parameters.items(), found, strict=False)
            if gradient is not None
        }
        by_site = {}
        for site, (weight, owners) in self._places.items():
            parts = [
                by_parameter[key].as_strided(
                    weight.shape, weight.stride(), weight.storage_offset() - self._parameters[key].storage_offset()
                )
                for key in owners
                if key in by_parameter
            ]
            if not parts:
                raise ValueError(
                    f"expected a loss that depends on blocks.{site[0]} {site[1]}, got one that does not; pass the loss "
                    "of a forward pass inside tracked()"
                )
            by_site[site] = sum(parts[1:], parts[0])
        if any(gradient is None for gradient in found[len(wanted) :]):
            raise ValueError("expected tensors the loss depends on, got others; pass tensors of its forward pass")
        return by_site, list(found[len(wanted) :])


def _holds(parameter: Tensor, weight: Tensor) -> bool:
    """Whether every element of a view lies in a parameter's stretch of their common memory."""
    if parameter.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return False
    return parameter.storage_offset() <= weight.storage_offset() and _end(weight) <= _end(parameter)


def _end(tensor: Tensor) -> int:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + reach)


def _laid_out_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the parameter's strides, in memory of its own."""
    if gradient.stride() == parameter.stride() and gradient.storage_offset() == 0:
        return gradient
    buffer = torch.empty_strided(parameter.shape, parameter.stride(), dtype=gradient.dtype, device=gradient.device)
    return buffer.copy_(gradient)
