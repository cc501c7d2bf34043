"""What a mixture's router decides: the experts that each token is given to, and with what weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

RoutingReader = Callable[["Routing"], None]

Hook = tuple[nn.Module, str, Callable[..., None]]
"""As `running.hooked` takes it."""

_WEIGHS_INPUTS = ("Llama4",)
"""Beginnings of the classes that multiply an expert's input by its weight, all others its output."""


@dataclass(frozen=True)
class Routing:
    """The decisions of one layer's router for the tokens of one batch, sequences one after the other."""

    hidden: Float[Tensor, "token d_model"]
    """What is routed."""
    chosen: Bool[Tensor, "token expert"]
    """Which experts each token is given to."""
    weights: Float[Tensor, "token expert"]
    """What the layer multiplies each expert's output by, for that token; 0 where the expert was not chosen."""
    weighs_inputs: bool = False
    """Whether it is the input that is multiplied (Llama 4)."""

    def inputs(self, expert: int) -> Float[Tensor, "token d_model"]:
        """What an expert multiplies by its matrices, at the tokens that it was given."""
        return self.hidden * self.weights[:, expert, None].to(self.hidden) if self.weighs_inputs else self.hidden


def of_choice(
    hidden: Float[Tensor, "*token d_model"],
    index: Int[Tensor, "token k"],
    weights: Float[Tensor, "token k"],
    experts: int,
) -> Routing:
    """From each token's experts and their weights; an index beyond the last expert is none.

    Example:
        >>> index, weights = torch.tensor([[0, 2], [2, 3]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> routing = of_choice(torch.ones(2, 4), index, weights, experts=3)
        >>> routing.chosen.tolist()
        [[True, False, True], [False, False, True]]
        >>> routing.weights.tolist()
        [[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]]
    """
    index = index.reshape(-1, index.shape[-1])
    spread = weights.new_zeros(len(index), experts + 1)
    return Routing(
        hidden.flatten(0, -2),
        torch.zeros_like(spread, dtype=torch.bool).scatter(1, index, True)[:, :experts],
        spread.scatter(1, index, weights.reshape(index.shape))[:, :experts],
    )


def routing_hooks(experts: nn.Module, count: int, router: nn.Module | None, show: RoutingReader) -> list[Hook]:
    """Hooks on a layer of a transformers model that show its routing; none where the model does not tell it.

    Args:
        experts: the module of all experts of the layer.
        count: how many there are.
        router: the layer's router, as far as it is known.
        show: called in each forward pass.
    """
    if type(experts).__name__.startswith(_WEIGHS_INPUTS):

        def scores(_: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> None:
            show(Routing(args[0].flatten(0, -2), out[0] != 0, out[0], weighs_inputs=True))

        return [] if router is None else [(router, "output", scores)]
    if len(inspect.signature(type(experts).forward).parameters) < 4:  # itself, tokens, indices, weights
        return []

    def choice(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        index = next(t for t in others if not t.is_floating_point())
        show(of_choice(hidden, index, next(t for t in others if t.is_floating_point()), count))

    return [(experts, "input", choice)]
