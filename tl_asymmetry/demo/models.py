"""The demonstration model in its three forms: named tensors, a GPT-2 of `transformers`, a model of TransformerLens.

The files hold tensors under TransformerLens's names and orientation, or the two factors of what a stage adds to them.
`GPT2LMHeadModel` is what every version of TransformerLens can wrap; the two layouts differ by reshapes only, so nothing
is rounded on the way. The unembedding has no bias in a GPT-2, hence `b_U` is zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_asymmetry.arguments import is_device, shown
from tl_asymmetry.demo.tokenizer import BOS, EOS, SPECIALS
from tl_asymmetry.models.loading import bridge_around, has_hooked_transformer, hooked_transformer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

Kind = Literal["auto", "hooked", "bridge"]
Tensors = Mapping[str, Tensor]
"""Weights by TransformerLens name, e.g. `blocks.0.attn.W_Q` `[head, d_model, d_head]`."""


def gpt2_model(config: Mapping[str, Any], tensors: Tensors) -> GPT2LMHeadModel:
    """The same weights as a `GPT2LMHeadModel` with eager attention, in eval mode.

    Raises:
        ValueError: for an unembedding bias, which a GPT-2 cannot hold.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if bool(tensors["unembed.b_U"].any()):
        raise ValueError("expected an unembedding bias of zeros, got another; pass weights trained without one")
    settings: dict[str, Any] = {
        "vocab_size": config["d_vocab"],
        "n_positions": config["n_ctx"],
        "n_embd": config["d_model"],
        "n_layer": config["n_layers"],
        "n_head": config["n_heads"],
        "n_inner": config["d_mlp"],
        "activation_function": config["act_fn"],
        "layer_norm_epsilon": config["eps"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": SPECIALS.index(EOS),
        # No pad_token_id: padding is on the right, where a causal model cannot see it, and transformers would warn.
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    # The constructor draws weights that are overwritten below; the fork keeps the global state as it was.
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(GPT2Config(**settings))
    state = {"transformer.wte.weight": tensors["embed.W_E"], "transformer.wpe.weight": tensors["pos_embed.W_pos"]}
    for layer in range(config["n_layers"]):
        block = {name: tensors[f"blocks.{layer}.{name}"] for name in BLOCK_NAMES}
        there = f"transformer.h.{layer}."
        # [head, d_model, d_head] -> [d_model, (head d_head)], the three side by side.
        qkv = [block[f"attn.W_{name}"].permute(1, 0, 2).flatten(1) for name in "QKV"]
        state[there + "attn.c_attn.weight"] = torch.cat(qkv, dim=1)
        state[there + "attn.c_attn.bias"] = torch.cat([block[f"attn.b_{name}"].flatten() for name in "QKV"])
        state[there + "attn.c_proj.weight"] = block["attn.W_O"].flatten(0, 1)
        state |= {there + theirs: block[ours] for ours, theirs in SAME_SHAPE.items()}
    state |= {"transformer.ln_f.weight": tensors["ln_final.w"], "transformer.ln_f.bias": tensors["ln_final.b"]}
    state["lm_head.weight"] = tensors["unembed.W_U"].T
    model.load_state_dict(state, strict=True)
    return model.eval()


SAME_SHAPE = {
    "attn.b_O": "attn.c_proj.bias",
    "mlp.W_in": "mlp.c_fc.weight",
    "mlp.b_in": "mlp.c_fc.bias",
    "mlp.W_out": "mlp.c_proj.weight",
    "mlp.b_out": "mlp.c_proj.bias",
    "ln1.w": "ln_1.weight",
    "ln1.b": "ln_1.bias",
    "ln2.w": "ln_2.weight",
    "ln2.b": "ln_2.bias",
}
"""Tensors of a block that have one shape in both layouts."""
BLOCK_NAMES = (*(f"attn.{kind}_{name}" for kind in "Wb" for name in "QKV"), "attn.W_O", *SAME_SHAPE)


def read_config(folder: Path) -> dict[str, Any]:
    """The keyword arguments of HookedTransformerConfig in `folder/config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one checkpoint file, float32 on the CPU."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def with_factors(tensors: Tensors, path: Path) -> dict[str, Tensor]:
    """The tensors after a stage that is kept as factors: each one plus `down @ up` of the file, where it has them."""
    factors = read_tensors(path)
    changed = {name.removesuffix(".down") for name in factors if name.endswith(".down")}
    return {
        name: tensor + factors[f"{name}.down"] @ factors[f"{name}.up"] if name in changed else tensor
        for name, tensor in tensors.items()
    }


def lens_model(
    config: Mapping[str, Any],
    tensors: Tensors,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: Kind = "auto",
    device: str | torch.device = "cpu",
) -> Any:
    """A raw TransformerLens model of these weights: nothing folded or centered, eval mode, gradients enabled.

    Args:
        config: as in `config.json`.
        tensors: weights by TransformerLens name.
        tokenizer: that of the pair.
        kind: "hooked" for HookedTransformer (TransformerLens 3), "bridge" for TransformerBridge, "auto" for the
            first that the installed version has.
        device: where the model goes.

    Raises:
        ValueError: for another kind, or "hooked" under TransformerLens 4.
    """
    if not is_device(device):
        raise ValueError(f"expected device as a device, got {shown(device)}; pass 'cpu'")
    if not isinstance(kind, str) or kind not in ("auto", "hooked", "bridge"):
        raise ValueError(f"expected kind 'auto', 'hooked' or 'bridge', got {kind!r}; pass one of the three")
    if kind != "bridge" and has_hooked_transformer():
        return _hooked(config, tensors, tokenizer, device)
    if kind == "hooked":
        raise ValueError(
            "expected a TransformerLens with HookedTransformer (3.x) for kind='hooked', got transformer-lens "
            f"{version('transformer-lens')}; pass kind='bridge' or 'auto'"
        )
    hf_model: Any = gpt2_model(config, tensors)
    return bridge_around(hf_model.to(device), config["model_name"], tokenizer=tokenizer, device=device).eval()


def _hooked(config: Mapping[str, Any], tensors: Tensors, tokenizer: Any, device: str | torch.device) -> Any:
    model = hooked_transformer({**config, "device": str(device)}, tokenizer)
    loaded = model.load_state_dict(dict(tensors), strict=False)
    # Not strict, for the attention masks are in the state but not in the file; every parameter must be.
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters & set(loaded.missing_keys)) + list(loaded.unexpected_keys)
    if missing:
        raise ValueError(f"expected one tensor per parameter, got a difference in {missing}; pass a whole checkpoint")
    return model.eval()
