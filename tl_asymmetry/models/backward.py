"""The two sides of every weight gradient, as a backward pass goes by: inputs a and upstream gradients δ, per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_asymmetry.models.graphs import frozen
from tl_asymmetry.models.routed import RoutedReader, bare_products, expert_products
from tl_asymmetry.models.running import hooked
from tl_asymmetry.models.view import ModelView, Projection, Reader, first_tensor
from tl_asymmetry.names import kind_of

Outer = tuple[int, str]
"""A layer and a matrix."""

OuterReader = Callable[[int, Outer, Tensor, Tensor], None]
"""Called with the number of the forward pass, the layer and matrix, a and δ of one batch."""


class Backward:
    """The forward passes recorded so far, and the backward pass through them. Made by `outer_products`."""

    def __init__(self) -> None:
        self.starts: list[Tensor] = []
        """The residual stream before the first block, one for each forward pass with gradients."""

    @property
    def passes(self) -> int:
        """Forward passes with gradients so far."""
        return len(self.starts)

    def run(self, loss: Tensor) -> None:
        """Backpropagate a scalar to the beginning of every recorded pass; the readers are called on the way.

        Raises:
            ValueError: a loss that does not depend on any recorded pass.
        """
        if not self.starts or not loss.requires_grad:
            raise ValueError(
                "expected a loss that depends on the model, got one without a gradient; pass an objective that calls "
                "the model with gradients enabled"
            )
        torch.autograd.grad(loss, self.starts, allow_unused=True)


@contextmanager
def outer_products(
    view: ModelView, sites: Sequence[Outer], reader: OuterReader, routed: RoutedReader | None = None
) -> Iterator[Backward]:
    """Show a reader, for every weight matrix, its input a and its upstream gradient δ = ∂L/∂(a W + b).

    `∂L/∂W = Σ_t a_t δ_tᵀ` over the tokens of a pass, exactly. δ of W_Q, W_K, W_V is taken before any query-key norm and
    before rotary positions (under grouped-query attention, at the key-value head: the sum over the query heads it
    serves), δ of W_in and W_gate at the pre-activation, δ of W_O and W_out before any norm that follows them. a is
    `[batch, pos, d_model]`, for W_O `[batch, pos, n_heads, d_head]`, for W_out `[batch, pos, d_mlp]`; δ is
    `[batch, pos, heads, d_head]` for W_Q, W_K, W_V, else `[batch, pos, d_model or d_mlp]`. Both are detached and alive
    for the call only.

    Inside, the model's parameters do not require gradients, so that none is ever made for a weight: the graph starts at
    the residual stream before the first block. Afterwards every parameter requires what it did and holds the `.grad` it
    did; hooks are removed, whatever ends the context. Forward passes without gradients (a reference model that is the
    model itself) are not recorded. A matrix that the loss does not depend on is not shown.

    Args:
        view: the model, in the mode the caller wants.
        sites: layers and matrices.
        reader: see `OuterReader`; passes count from 0 within the context.
        routed: the same of experts, which see the tokens that are routed to them: see `routed.RoutedReader`.

    Yields:
        A `Backward`, whose `run(loss)` does the backward pass.

    Raises:
        ValueError: inference mode, or a matrix whose product the model does not expose; experts without `routed`.

    Example:
        >>> from tl_asymmetry.training.objectives import CrossEntropy, TokenBatch
        >>> tokens = torch.arange(4, 24).view(2, 10)
        >>> seen = {}
        >>> def show(index, site, a, δ):
        ...     seen[site] = (tuple(a.shape), tuple(δ.shape))
        >>> with outer_products(view, [(0, "W_Q"), (3, "W_out")], show) as backward:
        ...     backward.run(CrossEntropy()(view, TokenBatch(tokens, tokens > 0)))
        >>> seen[0, "W_Q"], seen[3, "W_out"]
        (((2, 10, 64), (2, 10, 4, 16)), ((2, 10, 256), (2, 10, 64)))
    """
    check_differentiable(view)
    backward = Backward()
    inputs: dict[tuple[str, int], Tensor] = {}
    of_experts = [(layer, matrix) for layer, matrix in sites if view.unit(layer, matrix) == "expert"]
    if of_experts and routed is None:
        raise ValueError(f"expected matrices that every token meets, got the experts' {of_experts[0][1]}; pass others")
    others = [site for site in sites if site not in of_experts]
    whole = [site for site in others if view.projection(*site) is not None or view.multiplied(*site) is None]
    bare = [site for site in others if site not in whole]
    points: dict[tuple[str, int], Reader] = {
        point: partial(_keep, inputs, point)
        for point in ((kind_of(matrix).point, layer) for layer, matrix in whole)
        if not view.inputs_at_products
    }
    products = [
        (_projection(view, *site)[0], "output", partial(_watch, view, backward, inputs, site, reader)) for site in whole
    ]
    with (
        frozen(view),
        view.hooks(points),
        hooked([_start(view, backward), *products]),
        expert_products(view, of_experts, backward.starts, routed),
        bare_products(view, bare, backward.starts, reader),
        torch.enable_grad(),
    ):
        yield backward


def check_differentiable(view: ModelView) -> None:
    """Refuse a call in inference mode, and a model that was made in it.

    Raises:
        ValueError: saying which of the two, and what to do.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "expected gradients to be possible, got a call inside torch.inference_mode(); leave that context (no_grad "
            "may stay)"
        )
    for name, weight, _ in view.unscaled_weights():
        if weight.is_inference():
            raise ValueError(
                f"expected a model that can be differentiated, got inference tensors ({name}); load the model outside "
                "torch.inference_mode()"
            )


def _keep(inputs: dict[tuple[str, int], Tensor], key: tuple[str, int], x: Tensor) -> None:
    if torch.is_grad_enabled():
        inputs[key] = x.detach()


def _start(view: ModelView, backward: Backward) -> tuple[nn.Module, str, Callable[..., Any]]:
    """Cut the graph off below the first block, and begin it anew: out of place, so that nobody's tensor changes."""
    module, side = view.module_at("resid_pre", 0)

    def begin(x: Tensor) -> Tensor:
        start = x.detach().requires_grad_()
        backward.starts.append(start)
        return start

    def at_output(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return begin(output) if torch.is_grad_enabled() else None

    def at_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        x = begin(first_tensor(args, kwargs))
        return (args, {**kwargs, "hidden_states": x}) if "hidden_states" in kwargs else ((x, *args[1:]), kwargs)

    return module, side, at_output if side == "output" else at_input


def _projection(view: ModelView, layer: int, matrix: str) -> Projection:
    projection = view.projection(layer, matrix)
    if projection is None:
        raise ValueError(
            f"expected a model that exposes the product of {matrix} in layer {layer}, got none; pass matrices without "
            f"{matrix!r}"
        )
    return projection


def _watch(
    view: ModelView,
    backward: Backward,
    inputs: dict[tuple[str, int], Tensor],
    site: Outer,
    reader: OuterReader,
    _: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    """See a product on its way forward, and ask for its gradient on the way back."""
    y = output[0] if isinstance(output, tuple) else output
    if not (torch.is_grad_enabled() and y.requires_grad):
        return
    layer, matrix = site
    index, kind = backward.passes - 1, kind_of(matrix)
    part = _projection(view, layer, matrix)[1]
    shape = view.weight(layer, matrix).shape
    heads, width = shape[0] if kind.heads else 1, shape[-1]
    if view.inputs_at_products:  # a model may call what reads one input in any order
        own = shape[:2] if kind.input_axis == "head" else shape[-2:-1]
        a = args[0].detach().reshape(*backward.starts[index].shape[:2], *own)
    else:
        a = inputs[kind.point, layer]

    def show(δ: Tensor) -> None:
        δ = part(δ.detach())
        if kind.output_axis == "head":
            # a HookedTransformer may repeat key-value heads before the hook (ungroup_grouped_query_attention)
            δ = δ.reshape(*a.shape[:2], heads, -1, width).sum(3)
        else:
            δ = δ.reshape(*a.shape[:2], width)  # OPT's MLP sees batch and positions in one
        reader(index, site, a, δ)

    y.register_hook(show)
