"""Pieces of a live model's graph, cut out so that they can be differentiated alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.bridge import mlp_of
from tl_asymmetry.models.running import hooked
from tl_asymmetry.models.view import ModelView

Side = tuple[nn.Module, str]
"""A module, and which of its tensors: "input" or "output"."""
Edit = Callable[[Tensor], Tensor | None]
"""Sees a tensor and may give another in its place."""

_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_in", "mlp_in", "z")
_ATTENTION, _MLP, _ADDED = (
    ("q", "k", "v", "attn_scores", "pattern"),
    ("pre", "pre_linear", "post"),
    ("attn_out", "mlp_out"),
)


def place(view: ModelView, layer: int, name: str) -> Side | None:
    """Where in a block a tensor is to be seen; None where the block has none of that name.

    Args:
        view: the model.
        layer: which block.
        name: a hook point of `ModelView` ("resid_pre", "mlp_in", "z", ...), "q", "k", "v" as projected (before rotation
            and norm), "attn_scores", "pattern", "pre", "pre_linear", "post" of a dense MLP, "mlp_branch" (an MLP's
            output before any norm), or "attn_out", "mlp_out", what is added to the stream.
    """
    adapter = view._adapter
    if name in _STREAM:
        return adapter.point(layer, name)
    if not adapter.names_hooks:
        return None
    block = adapter.blocks[layer]
    if name == "mlp_branch":
        # before the norm that follows the MLP in some models
        after = adapter.norms(layer).get("mlp_post")
        return (after, "input") if after is not None else place(view, layer, "mlp_out")
    if name in _MLP and (not adapter.has_mlp(layer) or adapter.is_moe(layer)):
        return None
    owner = block.attn if name in _ATTENTION else mlp_of(block) if name in _MLP else block
    try:
        module = getattr(owner, f"hook_{name}")
    except AttributeError:  # an alias of the Bridge to what this model does not have
        return None
    return (module, "output") if isinstance(module, nn.Module) else None


def edited(edits: Mapping[Side, Edit]) -> AbstractContextManager[None]:
    """Inside, each function sees its tensor in every forward pass; what it returns, if anything, takes its place."""

    def on_input(edit: Edit) -> Callable[..., Any]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for name in ("query_input", "hidden_states"):
                if name in kwargs:
                    new = edit(kwargs[name])
                    return None if new is None else (args, {**kwargs, name: new})
            new = edit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)

        return see

    def on_output(edit: Edit) -> Callable[..., Any]:
        def see(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                new = edit(output[0])
                return None if new is None else (new, *output[1:])
            return edit(output)

        return see

    seen = {"input": on_input, "output": on_output}
    return hooked([(module, side, seen[side](edit)) for (module, side), edit in edits.items()])


def frozen(view: ModelView) -> AbstractContextManager[None]:
    """No parameter asks for a gradient inside: graphs hold activations alone. Afterwards each is as it was."""
    parameters = {
        id(p): p for module in view._adapter.all_modules() for p in module._parameters.values() if p is not None
    }
    before = [(p, p.requires_grad) for p in parameters.values()]

    def freeze() -> None:
        for p, _ in before:
            p.requires_grad_(False)

    def thaw() -> None:
        for p, needed in before:
            p.requires_grad_(needed)

    return temporarily(freeze, thaw)


class _Reached(Exception):
    """Raised where a forward pass has given all that is wanted, and caught again at once."""


def run_until(view: ModelView, tokens: Tensor, edits: Mapping[Side, Edit], last: Side | None = None) -> None:
    """`run_edited` in evaluation mode, with gradients on and parameters frozen."""
    with torch.enable_grad(), view.evaluating(), frozen(view):
        run_edited(view, tokens, edits, last=last)


def run_edited(
    view: ModelView, tokens: Tensor, edits: Mapping[Side, Edit], *, last: Side | None = None, logits: bool = False
) -> Tensor | None:
    """One forward pass with edits, in the mode the caller has set; cut short behind `last`, one of their places."""
    edits = dict(edits)
    if last is not None:
        edits[last] = _then_stop(edits[last])
    with edited(edits), suppress(_Reached):
        return view.run(tokens, logits=logits)
    return None


def _then_stop(edit: Edit) -> Edit:
    def see(x: Tensor) -> Tensor | None:
        edit(x)
        raise _Reached

    return see


def leaf(x: Tensor) -> Tensor:
    """The same numbers as the start of a new graph."""
    return x.detach().requires_grad_()
