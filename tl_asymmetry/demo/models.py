"""The demonstration model in its three forms: named tensors, a GPT-2 of `transformers`, a model of TransformerLens.

The files hold tensors under TransformerLens's names and orientation. Training and sampling use `GPT2LMHeadModel`,
which every version of TransformerLens can wrap; the two layouts differ by reshapes only, so nothing is rounded on
the way. The unembedding has no bias in a GPT-2, hence `b_U` is zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from tl_asymmetry.demo.tokenizer import BOS, EOS, SPECIALS, read_tokenizer
from tl_asymmetry.models.loading import bridge_around, has_hooked_transformer, hooked_transformer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

Kind = Literal["auto", "hooked", "bridge"]
Tensors = Mapping[str, Tensor]
"""Weights by TransformerLens name, e.g. `blocks.0.attn.W_Q` `[head, d_model, d_head]`."""


def model_config(d_vocab: int) -> dict[str, Any]:
    """Keyword arguments of HookedTransformerConfig for the demonstration model.

    Args:
        d_vocab: number of tokens.
    """
    return {
        "model_name": "tl-asymmetry-demo",
        "n_layers": 4,
        "d_model": 64,
        "n_ctx": 112,
        "d_head": 16,
        "n_heads": 4,
        "d_mlp": 256,
        "d_vocab": d_vocab,
        "act_fn": "gelu_new",
        "eps": 1e-5,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "init_weights": False,
    }


def initial_tensors(config: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights as GPT-2 has them: normal matrices, writing matrices smaller with depth, no bias.

    The standard deviation is 0.8 / sqrt(d_model), TransformerLens's own default for toy models.

    Args:
        config: as in `config.json`.
        generator: the only source of randomness; drawn from in a fixed order.
    """
    L, d, H, d_head = (config[key] for key in ("n_layers", "d_model", "n_heads", "d_head"))
    d_mlp, V, n_ctx = config["d_mlp"], config["d_vocab"], config["n_ctx"]
    σ = 0.8 / math.sqrt(d)
    σ_out = σ / math.sqrt(2 * L)

    def normal(*shape: int, std: float = σ) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    tensors = {"embed.W_E": normal(V, d), "pos_embed.W_pos": normal(n_ctx, d)}
    for layer in range(L):
        block = {f"attn.W_{name}": normal(H, d, d_head) for name in "QKV"}
        block |= {f"attn.b_{name}": torch.zeros(H, d_head) for name in "QKV"}
        block |= {"attn.W_O": normal(H, d_head, d, std=σ_out), "attn.b_O": torch.zeros(d)}
        block |= {"mlp.W_in": normal(d, d_mlp), "mlp.b_in": torch.zeros(d_mlp)}
        block |= {"mlp.W_out": normal(d_mlp, d, std=σ_out), "mlp.b_out": torch.zeros(d)}
        for norm in ("ln1", "ln2"):
            block |= {f"{norm}.w": torch.ones(d), f"{norm}.b": torch.zeros(d)}
        tensors |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
    tensors |= {"ln_final.w": torch.ones(d), "ln_final.b": torch.zeros(d)}
    tensors |= {"unembed.W_U": normal(d, V), "unembed.b_U": torch.zeros(V)}
    return tensors


# --------------------------------------------------------------------------------------- the GPT-2 layout


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
        block = {name: tensors[f"blocks.{layer}.{name}"] for name in _BLOCK_NAMES}
        there = f"transformer.h.{layer}."
        # [head, d_model, d_head] -> [d_model, (head d_head)], the three side by side.
        qkv = [block[f"attn.W_{name}"].permute(1, 0, 2).flatten(1) for name in "QKV"]
        state[there + "attn.c_attn.weight"] = torch.cat(qkv, dim=1)
        state[there + "attn.c_attn.bias"] = torch.cat([block[f"attn.b_{name}"].flatten() for name in "QKV"])
        state[there + "attn.c_proj.weight"] = block["attn.W_O"].flatten(0, 1)
        state |= {there + theirs: block[ours] for ours, theirs in _SAME.items()}
    state |= {"transformer.ln_f.weight": tensors["ln_final.w"], "transformer.ln_f.bias": tensors["ln_final.b"]}
    state["lm_head.weight"] = tensors["unembed.W_U"].T
    model.load_state_dict(state, strict=True)
    return model.eval()


def tensors_from_gpt2(config: Mapping[str, Any], model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """Inverse of `gpt2_model`, exact: copies on the CPU under TransformerLens's names."""
    H, d, V = config["n_heads"], config["d_model"], config["d_vocab"]
    state = model.state_dict()
    tensors = {"embed.W_E": state["transformer.wte.weight"], "pos_embed.W_pos": state["transformer.wpe.weight"]}
    for layer in range(config["n_layers"]):
        here, there = f"blocks.{layer}.", f"transformer.h.{layer}."
        weights = state[there + "attn.c_attn.weight"].chunk(3, dim=1)
        biases = state[there + "attn.c_attn.bias"].chunk(3)
        for name, weight, bias in zip("QKV", weights, biases, strict=True):
            tensors[f"{here}attn.W_{name}"] = weight.reshape(d, H, -1).permute(1, 0, 2)
            tensors[f"{here}attn.b_{name}"] = bias.reshape(H, -1)
        tensors[here + "attn.W_O"] = state[there + "attn.c_proj.weight"].reshape(H, -1, d)
        tensors |= {here + ours: state[there + theirs] for ours, theirs in _SAME.items()}
    tensors |= {"ln_final.w": state["transformer.ln_f.weight"], "ln_final.b": state["transformer.ln_f.bias"]}
    tensors |= {"unembed.W_U": state["lm_head.weight"].T, "unembed.b_U": torch.zeros(V)}
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


_SAME = {
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
_BLOCK_NAMES = (*(f"attn.{kind}_{name}" for kind in "Wb" for name in "QKV"), "attn.W_O", *_SAME)


# ------------------------------------------------------------------------------------ models of TransformerLens


def read_config(folder: Path) -> dict[str, Any]:
    """The keyword arguments of HookedTransformerConfig in `folder/config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one checkpoint file, float32 on the CPU."""
    return load_file(path)


def lens_model(
    config: Mapping[str, Any],
    tensors: Tensors,
    tokenizer: PreTrainedTokenizerFast,
    *,
    kind: Kind = "auto",
    device: str | torch.device = "cpu",
) -> Any:
    """A raw TransformerLens model of these weights: nothing folded or centred, eval mode, gradients enabled.

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
    if kind not in ("auto", "hooked", "bridge"):
        raise ValueError(f"expected kind 'auto', 'hooked' or 'bridge', got {kind!r}; pass one of the three")
    if kind != "bridge" and has_hooked_transformer():
        return _hooked(config, tensors, tokenizer, device)
    if kind == "hooked":
        raise ValueError(
            "expected a TransformerLens with HookedTransformer (3.x) for kind='hooked', got "
            f"{_lens_version()}; pass kind='bridge' or 'auto'"
        )
    return _bridge(config, tensors, tokenizer, device)


def _hooked(config: Mapping[str, Any], tensors: Tensors, tokenizer: Any, device: str | torch.device) -> Any:
    model = hooked_transformer({**config, "device": str(device)}, tokenizer)
    loaded = model.load_state_dict(dict(tensors), strict=False)
    # Not strict, for the attention masks are in the state but not in the file; every parameter must be.
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(parameters & set(loaded.missing_keys)) + list(loaded.unexpected_keys)
    if missing:
        raise ValueError(f"expected one tensor per parameter, got a difference in {missing}; pass a whole checkpoint")
    return model.eval()


def _bridge(config: Mapping[str, Any], tensors: Tensors, tokenizer: Any, device: str | torch.device) -> Any:
    hf_model: Any = gpt2_model(config, tensors)
    hf_model.to(device)
    return bridge_around(hf_model, config["model_name"], tokenizer=tokenizer, device=device).eval()


def _lens_version() -> str:
    from importlib.metadata import version

    return f"transformer-lens {version('transformer-lens')}"


def read_pair_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, with the context length of the model there."""
    return read_tokenizer(folder / "tokenizer.json", read_config(folder)["n_ctx"])
