"""What training needs of the model: its sizes, its initial weights, and the way back from the GPT-2 layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_asymmetry.demo.models import SAME_SHAPE

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


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
        tensors |= {here + ours: state[there + theirs] for ours, theirs in SAME_SHAPE.items()}
    tensors |= {"ln_final.w": state["transformer.ln_f.weight"], "ln_final.b": state["transformer.ln_f.bias"]}
    tensors |= {"unembed.W_U": state["lm_head.weight"].T, "unembed.b_U": torch.zeros(V)}
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
