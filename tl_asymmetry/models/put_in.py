"""What stands in a model that is not its own: hooks, modules around or in the place of its own, un-merged adapters,
packed weights, what stands for weights that are elsewhere."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn


def refuse_unmerged(model: Any) -> None:
    """Refuse adapters beside the weights: a model computes with them, and the weights do not show them.

    Raises:
        ValueError: naming the first.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    found = next((name for name, module in modules if {"base_layer", "lora_A"} & module._modules.keys()), "")
    if found:
        raise ValueError(
            f"expected a model whose adapters are merged into its weights, got PEFT's un-merged {found}; pass "
            "model.merge_and_unload(), or the adapter's folder as the aligned side"
        )


def refuse_packed(model: Any) -> None:
    """Refuse matrices that are packed to fewer than 8 bits an entry: no part of one can be told.

    Raises:
        ValueError: naming the first.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if not isinstance(module, nn.Linear) or (weight := module._parameters.get("weight")) is None:
            continue
        if not weight.is_floating_point() and weight.numel() != module.in_features * module.out_features:
            raise ValueError(
                f"expected matrices with an entry for each pair of an input and an output, got {name} packed into "
                f"{tuple(weight.shape)} {weight.dtype}; pass the model loaded without quantisation, or, for its "
                "activations, in 8 bits"
            )


def refuse_elsewhere(name: str, weight: Tensor, where: str) -> None:
    """Refuse what stands for a weight that is elsewhere: offloaded, or shared out over processes.

    Raises:
        ValueError: naming it.
    """
    if weight.is_meta:
        raise ValueError(
            f"expected weights in memory, got none for {name} of {where}: offloaded weights are there only while their "
            'module runs; load it without offloading (device_map="auto" with memory for all of it, or device_map="cpu")'
        )
    if type(weight.data).__name__ == "DTensor":
        raise ValueError(
            f"expected whole weights, got this process's part of {name} of {where} (tensor parallelism, tp_plan); load "
            "it with device_map instead, or run save_moments where it fits and pass moments="
        )


def foreign_hooks(model: nn.Module) -> list[str]:
    """What a user has put into a model that may change what it computes, in words: hooks of TransformerLens and torch,
    and modules (sparse autoencoders) in the place of hook points.

    Hooks that the libraries register for themselves are left out.
    """
    found = []
    for name, module in _named_modules(model):
        if name.rpartition(".")[2].startswith("hook_") and not _is_hook_point(module):
            found.append(f"{type(module).__name__} in the place of {name}")
        own = [hook for kind in _HOOKS for hook in getattr(module, kind).values() if not _of_a_library(hook)]
        handles = [handle for kind in ("fwd_hooks", "bwd_hooks") for handle in getattr(module, kind, ())]
        count = len(own) + sum(not _of_a_bridge(handle) for handle in handles)
        if count:
            found.append(f"{count} {'hook' if count == 1 else 'hooks'} on {name or 'the model'}")
    return found


def foreign_modules(model: nn.Module) -> list[str]:
    """What a user has put around or in the place of a model's own modules, in words: classes of no library that models
    are made of, torch's where a library has its own (a Sequential around a norm), parametrisations, other forwards."""
    modules = [(name, module) for name, module in _named_modules(model) if ".parametrizations." not in f".{name}"]
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


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model with a name, those of the model that it wraps included, each once."""
    roots = (getattr(model, "original_model", None), model)
    return list({id(m): (name, m) for root in roots if root is not None for name, m in root.named_modules()}.values())
