"""Adapters whose change is no product of two factors: PEFT merges them, one module at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.models.readers.files import in_short


@dataclass(frozen=True)
class Tuner:
    """A kind of adapter."""

    prefix: str
    """What the names of its tensors begin with."""
    additive: bool
    """Whether its change does not depend on the weights it is added to."""
    shared: tuple[str, ...] = ()
    """Names of tensors that all its modules share."""


TUNERS: dict[str, Tuner] = {
    "LORA": Tuner("lora_", additive=True),
    "ADALORA": Tuner("lora_", additive=True),
    "LOHA": Tuner("hada_", additive=True),
    "LOKR": Tuner("lokr_", additive=True),
    "VERA": Tuner("vera_lambda_", additive=True, shared=("vera_A", "vera_B")),
    "IA3": Tuner("ia3_", additive=False),
    "OFT": Tuner("oft_", additive=False),
    "BOFT": Tuner("boft_", additive=False),
    "HRA": Tuner("hra_", additive=False),
    "FOURIERFT": Tuner("fourierft_", additive=True),
    "MISS": Tuner("miss_", additive=False),
    "LN_TUNING": Tuner("ln_tuning_", additive=True),
    "TRAINABLE_TOKENS": Tuner("trainable_tokens_", additive=True),
}
"""By PEFT's name, peft_type."""

_OF_OTHER_MODULES = (
    "modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "trainable_token_indices",
    "target_parameters", "layer_replication", "ensure_weight_tying", "corda_config", "eva_config", "loftq_config",
    "lora_ga_config",
)  # fmt: skip


def merged(
    adapter: Mapping[str, Any], module: str, tensors: Mapping[str, Tensor], weight: Tensor, *, turned: bool
) -> Tensor:
    """The weight of one module after PEFT has merged its adapter into it.

    Args:
        adapter: the adapter's configuration.
        module: the module's name in the model, which patterns of ranks are held against.
        tensors: the adapter's tensors of this module, by their names in it (`hada_w1_a`, `vera_lambda_b`).
        weight: the module's own weight, as it is stored.
        turned: whether that is `[in, out]` (GPT-2's Conv1D).

    Raises:
        ValueError: PEFT is not installed, or cannot merge this kind.
    """
    kind = str(adapter["peft_type"])
    peft = _peft(kind)
    config = peft.PeftConfig.from_peft_type(**_for_one_module(adapter, module))
    layer = _layer(weight, turned=turned)
    # Kinds with tensors that all modules share make them as large as the largest module: only this one is there.
    own = {name: _cut(tensor, name, layer) for name, tensor in tensors.items()}
    root = _Tree(module, layer)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), exact_products(weight.device):
        warnings.simplefilter("ignore")
        try:
            tuned = peft.get_peft_model(root, config)
            state = {
                f"base_model.{name}" if name in TUNERS[kind].shared else f"base_model.model.{module}.{name}": tensor
                for name, tensor in own.items()
            }  # fmt: skip
            result: Any = peft.set_peft_model_state_dict(tuned, state)
            if result.unexpected_keys:
                raise ValueError(f"it has no place for {result.unexpected_keys[0]}")
            return tuned.merge_and_unload().get_submodule(module).weight.detach()
        except Exception as error:  # PEFT's own refusals come in many classes
            raise ValueError(
                f"expected an adapter that PEFT {peft.__version__} can merge, got {kind} at {module}: "
                f"{in_short(error)}; pass the merged model (merge_and_unload, save_pretrained)"
            ) from error


def merged_whole(model: Any, folder: Path, kind: str) -> Any:
    """A model after PEFT has merged the adapter of a folder into it, in place.

    Args:
        model: a copy of the base.
        folder: with adapter_config.json.
        kind: its peft_type.

    Raises:
        ValueError: PEFT is not installed, cannot merge this kind, or has no place for one of its tensors.
    """
    peft = _peft(kind)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), exact_products(model.device):
        warnings.simplefilter("ignore")
        try:
            tuned = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(folder)))
            state = peft.load_peft_weights(str(folder), device=str(model.device))
            left = peft.set_peft_model_state_dict(tuned, state).unexpected_keys
            if left:
                raise ValueError(f"the model has no place for {left[0]}")
            return tuned.merge_and_unload()
        except Exception as error:  # PEFT's own refusals come in many classes
            raise ValueError(
                f"expected an adapter that PEFT {peft.__version__} can merge into {type(model).__name__}, got {kind} "
                f"in {folder.name!r}: {in_short(error)}; pass the base that it was trained from, or the merged model "
                "(merge_and_unload, save_pretrained)"
            ) from error


def _peft(kind: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"expected PEFT for an adapter of the kind {kind}, got none installed; install it (pip install peft), or "
            "pass the merged model (merge_and_unload, save_pretrained)"
        ) from error
    return peft


class _Tree(nn.Module):
    """A model of one module, under its full name."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            inner = nn.Module()
            owner.add_module(part, inner)
            owner = inner
        owner.add_module(leaf, layer)


def _layer(weight: Tensor, *, turned: bool) -> nn.Module:
    with torch.device("meta"):
        if turned:
            from transformers.pytorch_utils import Conv1D

            layer: Any = Conv1D(weight.shape[1], weight.shape[0])
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer.bias = nn.Parameter(torch.zeros(weight.shape[1]), requires_grad=False) if turned else None
    return layer


def _cut(tensor: Tensor, name: str, layer: Any) -> Tensor:
    rows, columns = layer.weight.shape
    out, into = (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)
    return tensor[:, :into] if name == "vera_A" else tensor[:out] if name == "vera_B" else tensor


def _for_one_module(adapter: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The adapter's configuration with this module as its only target."""
    config = {key: value for key, value in adapter.items() if key not in _OF_OTHER_MODULES}
    config |= {"target_modules": [module], "inference_mode": True, "base_model_name_or_path": None, "task_type": None}
    config |= {"auto_mapping": None, "bias": "none"}
    if "feedforward_modules" in adapter:
        config["feedforward_modules"] = [module] if _matches(adapter["feedforward_modules"], module) else []
    ranks = adapter.get("rank_pattern") or {}
    # AdaLoRA's are lists by tensor, of which PEFT wants no other module's
    own = {k: rank for k, rank in ranks.items() if not isinstance(rank, list) or k.startswith(f"{module}.")}
    config["rank_pattern"] = own or (None if config["peft_type"] == "ADALORA" else {})
    return config


def _matches(targets: Any, module: str) -> bool:
    """Whether PEFT would choose a module by a list of names or a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())
