"""How a model is run: in evaluation mode, by one thread's own hooks, with nothing switched on that moves a hook."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tl_asymmetry.interrupts import interrupts_wait, temporarily

HOOK_FLAGS = (
    "use_attn_result", "use_attn_in", "use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention",
)  # fmt: skip
"""Options of TransformerLens under which tensors pass other hooks or have other shapes; the model computes the same."""


@dataclass
class _Mode:
    """What was changed for a model while it is being evaluated, by however many threads."""

    holders: set[object] = field(default_factory=set)
    training: list[tuple[nn.Module, bool]] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


_modes: WeakKeyDictionary[nn.Module, _Mode] = WeakKeyDictionary()
_lock = threading.RLock()


def evaluation(model: Any, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Evaluation mode (no dropout) and no `HOOK_FLAGS` inside; afterwards, when no thread evaluates it any more, the
    model is as it was.

    Args:
        model: a model, of TransformerLens or another.
        modules: all of its modules, those it wraps included.
    """
    me = object()

    def enter() -> None:
        with _lock:
            mode = _modes.setdefault(model, _Mode())
            if not mode.holders:
                mode.training = [(module, module.training) for module in modules]
                mode.flags = [flag for flag in HOOK_FLAGS if getattr(getattr(model, "cfg", None), flag, False)]
            mode.holders.add(me)
            for module, _ in mode.training:
                if module.training:  # to set what a module has takes ten times as long as to look
                    module.training = False
            for flag in mode.flags:
                _switch(model, flag, False)

    def leave() -> None:
        with _lock:
            mode = _modes.get(model, _Mode())
            mode.holders.discard(me)
            if mode.holders:
                return
            for module, training in mode.training:
                if module.training != training:
                    module.training = training
            for flag in mode.flags:
                _switch(model, flag, True)
            _modes.pop(model, None)

    return temporarily(enter, leave)


def _switch(model: Any, flag: str, on: bool) -> None:
    """By the model's own method where it has one: a Bridge keeps copies of its configuration."""
    setter = getattr(model, f"set_{flag}", None)
    if setter is None:
        setattr(model.cfg, flag, on)
    else:
        setter(on)


def hooked(hooks: Iterable[tuple[nn.Module, str, Callable[..., Any]]]) -> AbstractContextManager[None]:
    """Hooks for as long as the block lasts, each for passes of this thread alone; no others are touched.

    Args:
        hooks: module, "input" (called with module, args, kwargs) or "output" (module, args, output), function.
    """
    handles: list[Any] = []

    def put() -> None:
        with interrupts_wait():
            for module, side, hook in hooks:
                if side == "input":
                    handles.append(module.register_forward_pre_hook(own_thread(hook), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(own_thread(hook)))

    def take() -> None:
        for handle in handles:
            handle.remove()

    return temporarily(put, take)


def own_positions(model: Any, batch: int) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
    """A hook that keeps a TransformerBridge's position embeddings those of this pass, for `hooked`; none elsewhere.

    The Bridge expands them to the size of the batch that any thread sent last: a single sequence would go on as two.
    """
    positions = getattr(model, "pos_embed", None)

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        expanded = isinstance(output, Tensor) and output.ndim > 1 and output.stride(0) == 0
        return output[:1] if expanded and len(output) != batch else None

    return [(positions, "output", keep)] if isinstance(positions, nn.Module) else []


def own_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook for passes of this thread alone: what another thread sends through the same model goes by unseen."""
    owner = threading.get_ident()

    @wraps(hook)
    def see(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return see
