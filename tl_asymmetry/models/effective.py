"""A model in training as it computes now: a copy in which adapters and parametrisations have become plain weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.models.readers.base import Factors
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LowRank:
    """A parameter as an adapter gives it: what is frozen, and the change as two thin factors in float32."""

    frozen: Tensor
    """The parameter without its adapter."""
    rows: Float[Tensor, "rows r"]
    """Left factor, the scale included."""
    columns: Float[Tensor, "columns r"]
    """Right factor: the parameter is frozen + rows · columnsᵀ."""


class EffectiveView(ModelView):
    """A view of what a model in training computes with, and of what adapters add to it as factors.

    Args:
        model: a HookedTransformer, a TransformerBridge or a transformers model, in whatever wrappers. The first two
            are seen as they are; of the last a copy is made, in float32 where it is in half precision, its adapters
            merged one module at a time, and a TransformerBridge put around the copy.
        tokenizer: of a transformers model, which does not know its own.

    Raises:
        ValueError: something else; weights that are sharded or quantised; a TransformerLens model with adapters or
            parametrisations inside.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        bare = unwrapped(model)
        self._low_rank: dict[int, LowRank] = {}
        if isinstance(bare, nn.Module):
            _refuse_shards(bare)
        if hasattr(bare, "cfg"):
            _refuse_wrapped_modules(bare)
            super().__init__(bare)
            return
        if not hasattr(bare, "config") or not isinstance(bare, nn.Module):
            raise ValueError(
                "expected a HookedTransformer, a TransformerBridge or a transformers model, got "
                f"{type(bare).__name__}; pass the model that is being trained"
            )
        _refuse_quantised(bare)
        twin: Any = copy.deepcopy(bare)  # without the gradients, which a copied parameter does not have
        twin.__dict__.pop("forward", None)  # a launcher's, which runs the model that was copied
        first = next(bare.parameters())
        if first.dtype in _HALF:
            twin = twin.float()
        self._low_rank = _plain(twin)
        if hasattr(twin, "set_attn_implementation"):
            twin.set_attn_implementation("eager")
        config: Any = bare.config
        name = str(getattr(config, "_name_or_path", "") or config.model_type)
        bridge = bridge_around(twin, name, device=first.device, dtype=next(twin.parameters()).dtype)
        # only now: TransformerLens would set up the user's own
        bridge.tokenizer = tokenizer
        super().__init__(bridge.eval())

    def factored(self, layer: int, matrix: str) -> tuple[Tensor, Factors] | None:
        """A matrix as frozen weights and an adapter's change; None where no adapter of two factors stands there."""
        if not self._low_rank:
            return None
        weight, slot = self.weight_and_slot(layer, matrix)
        parameter = slot.module._parameters[slot.name]
        assert parameter is not None
        held = self._low_rank.get(parameter.untyped_storage().data_ptr())
        if held is None or held.frozen.shape != parameter.shape:
            return None
        # Which entry of the parameter each entry of the matrix is.
        place = torch.arange(parameter.numel(), device=weight.device)
        place = place.as_strided(weight.shape, weight.stride(), weight.storage_offset() - parameter.storage_offset())
        row, column = place // parameter.shape[1], place % parameter.shape[1]
        if weight.ndim == 2:
            row, column = row.unsqueeze(0), column.unsqueeze(0)
        if kind_of(matrix).writes:
            row, column = row.mT, column.mT
        # Residual axis second to last now: of one head it indexes rows or columns of the parameter.
        on_rows = bool((row[:, :, :1] == row).all())
        residual, other = (held.rows, held.columns) if on_rows else (held.columns, held.rows)
        along, across = (row, column) if on_rows else (column, row)
        frozen = held.frozen.as_strided(
            weight.shape, weight.stride(), weight.storage_offset() - parameter.storage_offset()
        )
        return frozen, Factors(residual[along[0, :, 0]], other[across[:, 0, :]])


def unwrapped(model: Any) -> Any:
    """Without what stands around a whole model: torch.compile, DistributedDataParallel, a PeftModel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None and hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            inner = model.get_base_model()
        if inner is None:
            return model
        model = inner


def _plain(model: nn.Module) -> dict[int, LowRank]:
    """Merge adapters, work parametrisations out and take compiled modules from their wrappers, in place.

    Returns:
        Of each parameter with an adapter that is a product of two factors these, by the parameter's storage.
    """
    low_rank: dict[int, LowRank] = {}
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _work_out(module)
    for parent, name, child in _wrapped(model):
        inner: Any = child
        if "_orig_mod" in inner._modules:
            inner = inner._orig_mod
        elif hasattr(inner, "unload_and_optionally_merge_module"):
            inner = inner.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif hasattr(inner, "get_base_layer"):
            base = inner.get_base_layer()
            factors = _factors(inner)
            frozen = None if factors is None else base.weight.detach().clone()
            inner.merge(safe_merge=False, adapter_names=None)
            if factors is not None and frozen is not None:
                low_rank[base.weight.untyped_storage().data_ptr()] = LowRank(frozen, *factors)
            inner = base
        parent._modules[name] = inner
    if hasattr(model, "peft_config"):
        del model.peft_config
    return low_rank


def _work_out(module: nn.Module) -> None:
    """Put what its parametrisations make into plain parameters.

    Not `remove_parametrizations`: a copy shares its class with the module that it was copied from, which that changes.
    """
    made: Any = module._modules["parametrizations"]
    values = {name: getattr(module, name).detach().clone() for name in made}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _wrapped(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module that stands in front of another one, with its parent and name, outermost ones alone."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _wraps(child) and not _wraps(parent):
                yield parent, name, child


def _wraps(module: nn.Module) -> bool:
    return (
        "_orig_mod" in module._modules
        or hasattr(module, "unload_and_optionally_merge_module")
        or (hasattr(module, "get_base_layer") and hasattr(module, "merge"))
    )


def _factors(layer: Any) -> tuple[Tensor, Tensor] | None:
    """The change of a layer's weight as rows · columnsᵀ, if its active adapters are plain LoRA."""
    active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
    if layer.merged or not active or len(active) < len(layer.active_adapters):
        return None
    variants: Mapping[str, Any] = getattr(layer, "lora_variant", {})
    if any(name in variants or getattr(layer, "lora_bias", {}).get(name) for name in active):
        return None
    sides = []
    for name in active:
        A, B = (getattr(layer, side)[name].weight.detach().float() for side in ("lora_A", "lora_B"))
        if A.ndim != 2 or B.ndim != 2:
            return None
        sides.append((layer.scaling[name] * B, A.mT))
    rows, columns = (torch.cat(parts, -1) for parts in zip(*sides, strict=True))
    return (columns, rows) if getattr(layer, "fan_in_fan_out", False) else (rows, columns)


def _refuse_wrapped_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _wraps(module) or parametrize.is_parametrized(module):
            raise ValueError(
                f"expected a TransformerLens model of plain parameters, got {type(module).__name__} at {name}; pass "
                "the transformers model that is being trained, with its adapters"
            )


def _refuse_shards(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_fsdp_wrapped_module") or type(module).__name__.startswith("FSDP"):
            raise ValueError(
                f"expected whole parameters, got FSDP's shards at {name or 'the model'}; pass the checkpoints that the "
                "training saves to analyze_trajectory"
            )
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"expected whole parameters, got a shard in {name}; pass the checkpoints that the training saves to "
                "analyze_trajectory"
            )


def _refuse_quantised(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise ValueError(
                f"expected floating-point weights of 16 bits or more, got {parameter.dtype} in {name}; pass the "
                "checkpoints of the training to analyze_trajectory, with base= the model in 16 bits"
            )
