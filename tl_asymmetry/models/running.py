"""How a model is run: in evaluation mode, by one thread's own hooks, with nothing switched on that moves a hook."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

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


def foreign_hooks(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """What a user has put into a model that may change what it computes, in words: hooks of TransformerLens and torch,
    and modules (sparse autoencoders) in the place of hook points.

    Hooks that the libraries register for themselves are left out.
    """
    found = []
    for name, module in modules:
        if name.rpartition(".")[2].startswith("hook_") and not _is_hook_point(module):
            found.append(f"{type(module).__name__} in the place of {name}")
        own = [hook for kind in _HOOKS for hook in getattr(module, kind).values() if not _of_a_library(hook)]
        handles = [handle for kind in ("fwd_hooks", "bwd_hooks") for handle in getattr(module, kind, ())]
        count = len(own) + sum(not _of_a_bridge(handle) for handle in handles)
        if count:
            found.append(f"{count} {'hook' if count == 1 else 'hooks'} on {name or 'the model'}")
    return found


def foreign_modules(model: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """What a user has put around or in the place of a model's own modules, in words: classes of no library that models
    are made of, torch's where a library has its own (a Sequential around a norm), parametrisations, other forwards."""
    modules = [(name, module) for name, module in modules if ".parametrizations." not in f".{name}"]
    own = {*_LIBRARIES, *(_package(kind) for kind in type(model).__mro__)}
    has_norms = getattr(getattr(model, "cfg", None), "normalization_type", None) is not None
    parents = {id(child): module for _, module in modules for child in module._modules.values()}
    found = []
    for name, module in modules:
        kind, leaf, parent = type(module), name.rpartition(".")[2], parents.get(id(module))
        if "parametrizations" in module._modules:
            found.append(f"a parametrisation of {name}")
        elif _package(kind) not in own or (parent is not None and _is_strange(module, leaf, parent, has_norms)):
            found.append(f"{kind.__name__} in the place of {name}")
        elif "forward" in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate's moves tensors only
            found.append(f"another forward of {name or 'the model'}")
    return found


def _is_strange(module: nn.Module, leaf: str, parent: nn.Module, has_norms: bool) -> bool:
    """Whether a module of torch stands where none of its kind does in a model as it was made."""
    where = type(module).__module__
    if not where.startswith("torch.nn.modules") or where.endswith(".activation"):
        return False
    if _package(type(parent)) == "transformer_lens":
        made = (nn.ModuleList, nn.ModuleDict, nn.Linear, *(() if has_norms else (nn.Identity,)))
        if leaf == "_original_component":
            return isinstance(module, nn.Sequential)
        return not leaf.startswith("hook_") and not isinstance(module, made)  # `foreign_hooks` names hook points
    around = any(type(child).__module__.startswith(_OF_MODELS) for child in module.children())
    return isinstance(module, nn.Sequential) and (around or re.search(_OWN_NAMES, leaf) is not None)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


_LIBRARIES = ("torch", "transformers", "transformers_modules", "transformer_lens")
"""Packages of which the modules of a model that was loaded are."""

_OF_MODELS = ("transformers.models", "transformer_lens")
"""Where modules are defined that no model has inside a Sequential."""

_OWN_NAMES = "norm|ln|lm_head|wte|wpe|embed_tokens"
"""Names of modules that no model has as a Sequential."""


def _is_hook_point(module: nn.Module) -> bool:
    return any(kind.__name__ == "HookPoint" for kind in type(module).__mro__)


def _of_a_library(hook: Any) -> bool:
    module = getattr(getattr(hook, "func", hook), "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0] in ("transformer_lens", "transformers", "tl_asymmetry")


def _of_a_bridge(handle: Any) -> bool:
    """Whether a TransformerBridge registered this hook itself: an MLP in two modules fires its hook points so."""
    return str(getattr(handle.user_hook, "__module__", "")).startswith("transformer_lens.model_bridge")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook for passes of this thread alone: what another thread sends through the same model goes by unseen."""
    owner = threading.get_ident()

    @wraps(hook)
    def see(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return see
