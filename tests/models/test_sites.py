"""Sites of transformers models: a head's matrix moves that head alone, experts compute what the mixture computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

from tl_asymmetry.models.huggingface import HuggingFaceAdapter
from tl_asymmetry.models.view import ModelView

WIDTH, HEADS, KV, LAYERS, VOCABULARY = 32, 4, 2, 2, 64
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCABULARY}
LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "head_dim": 8,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NEOX = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
FALCON = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCABULARY,
    "alibi": False, "bias": False, "ffn_hidden_size": 48,
}  # fmt: skip
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MIXTURE = {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": HEADS, "head_dim": 4,
}  # fmt: skip
BERT = NEOX | {"pad_token_id": 0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "bigcode, one key head": ("GPTBigCodeConfig", GPT | {"multi_query": True}),
    "neox": ("GPTNeoXConfig", NEOX),
    "codegen": ("CodeGenConfig", GPT | {"rotary_dim": 4}),
    "opt": ("OPTConfig", {**NEOX, "ffn_dim": 48, "word_embed_proj_dim": WIDTH, "pad_token_id": 0}),
    "falcon 7b": ("FalconConfig", FALCON | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon 40b": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mpt": ("MptConfig", {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "expansion_ratio": 2,
                          "max_seq_len": 64, "vocab_size": VOCABULARY}),
    "llama": ("LlamaConfig", LLAMA),
    "phi3": ("Phi3Config", LLAMA),
    "gemma2": ("Gemma2Config", LLAMA | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    "olmo2": ("Olmo2Config", LLAMA),
    "mixtral": ("MixtralConfig", LLAMA | MIXTURE),
    "gpt-oss": ("GptOssConfig", LLAMA | MIXTURE),
    "qwen3-moe": ("Qwen3MoeConfig", LLAMA | QWEN_MIXTURE),
    "qwen2-moe": ("Qwen2MoeConfig", LLAMA | QWEN_MIXTURE | {"decoder_sparse_step": 2}),
    "qwen3.5": ("Qwen3_5TextConfig", LLAMA | LINEAR),
    "lfm2": ("Lfm2Config", LLAMA | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "falcon-h1": ("FalconH1Config", LLAMA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                  "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 8}),
    "granite 4, dense": ("GraniteMoeHybridConfig", LLAMA | {"num_local_experts": 0, "num_experts_per_tok": 0,
                         "shared_intermediate_size": 48, "layer_types": ["attention"] * 2, "residual_multiplier": 0.2,
                         "mamba_n_heads": 8, "mamba_d_head": 8,
                         "position_embedding_type": "rope"}),
    "deepseek-v3": ("DeepseekV3Config", LLAMA | LATENT | {"moe_intermediate_size": 24, "n_routed_experts": 4,
                    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                    "topk_group": 1}),
    "deepseek-v2, whole queries": ("DeepseekV2Config", LLAMA | LATENT | {"q_lora_rank": None,
                                   "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
                                   "moe_intermediate_size": 24, "n_shared_experts": 1}),
    "gemma4": ("Gemma4TextConfig", LLAMA | {"global_head_dim": 16, "num_global_key_value_heads": 1,
               "num_hidden_layers": 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4,
               "num_kv_shared_layers": 2, "sliding_window": 8,
               "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "llama4": ("Llama4TextConfig", LLAMA | MIXTURE | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
               "num_experts_per_tok": 1, "attention_chunk_size": 16}),
    "bert": ("BertConfig", BERT),
    "modernbert": ("ModernBertConfig", BERT | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
                                               "eos_token_id": 2}),
}  # fmt: skip
ENCODERS = ("bert", "modernbert")


@cache
def adapter_of(name: str) -> HuggingFaceAdapter:
    """A tiny model with random norms and biases, in float64."""
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**options)
    config._experts_implementation = "eager"  # the others know no float64
    torch.manual_seed(0)
    loader = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    model = loader.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale, offset = (0.3, float("norm" in key and key.endswith("weight"))) if parameter.ndim == 1 else (0.2, 0)
            parameter.copy_(offset + scale * noise)
    return HuggingFaceAdapter(model)


def heads_out(adapter: HuggingFaceAdapter, layer: int) -> torch.Tensor:
    """What each head hands to W_O, `[pos, head, d_head]`."""
    seen: list[torch.Tensor] = []
    module, _ = adapter.point(layer, "z")
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        adapter.run(torch.tensor([[5, 9, 11, 33, 2, 7]]), False, layer + 1)
    handle.remove()
    d_head = adapter.sites[layer]["W_O"].weight.shape[1]
    return seen[0].reshape(6, -1, d_head)


PROJECTIONS = [
    (name, matrix)
    for name in MODELS
    for matrix in ("W_Q", "W_K", "W_V")
    if name not in ("falcon 40b", "codegen")  # whose heads are no views
    and (name, matrix) not in (("olmo2", "W_Q"), ("olmo2", "W_K"))  # one norm over all heads
]


@pytest.mark.parametrize(("name", "matrix"), PROJECTIONS)
def test_a_head_is_moved_by_its_own_matrix_alone(name, matrix):
    adapter = adapter_of(name)
    for layer, sites in enumerate(adapter.sites):
        if matrix not in sites:
            continue
        weight, before = sites[matrix].weight, heads_out(adapter, layer)
        served = before.shape[1] // len(weight)
        for head in range(len(weight)):
            kept = weight[head].clone()
            weight[head] *= -1.5
            moved = (heads_out(adapter, layer) - before).abs().amax((0, 2)) > 1e-9
            weight[head] = kept
            expected = torch.zeros(before.shape[1], dtype=torch.bool)
            expected[head * served : (head + 1) * served] = True
            assert torch.equal(moved, expected), (layer, head)


def test_fused_groups_that_are_no_views_lie_where_the_model_looks():
    """Falcon 40B: groups of queries with their key and value; CodeGen: four blocks of queries, values and keys."""
    for name, order in (("falcon 40b", ("W_Q", "W_K", "W_V")), ("codegen", ("W_Q", "W_V", "W_K"))):
        site = adapter_of(name).sites[0]["W_Q"]
        rows = getattr(site.module, site.parameter).detach()
        blocks = rows.unflatten(0, (2 if name == "falcon 40b" else 4, -1))
        sizes = {"W_Q": HEADS // len(blocks) * 8, "W_K": 8, "W_V": 8}
        for part, matrix in zip(blocks[0].split([sizes[m] for m in order]), order, strict=True):
            weight = adapter_of(name).sites[0][matrix].weight
            assert torch.equal(weight[: len(part) // 8].mT.flatten(0, 1), part), (name, matrix)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_map_with_a_side_on_the_stream_is_a_site(name):
    adapter = adapter_of(name)
    for block, sites in zip(adapter.blocks, adapter.sites, strict=True):
        covered = {(id(site.module), site.parameter) for site in sites.values()}
        sizes = {(id(m), n): p.numel() for m in block.modules() for n, p in m._parameters.items() if p is not None}
        share = sum(sizes[key] for key in covered) / sum(sizes.values())
        assert share > (0.8 if "W_DKV" in sites else 0.9), sorted(sites)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_module_that_gives_a_product_gives_that_of_its_matrix(name):
    """Llama 4's router is a linear map that gives scores instead."""
    assert ModelView(adapter_of(name).inner).self_check(torch.tensor([[5, 9, 11, 33, 2, 7]])) < 1e-9


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "qwen2-moe", "deepseek-v3"])
def test_experts_compute_what_the_mixture_computes(name):
    adapter = adapter_of(name)
    layer = next(i for i in range(LAYERS) if adapter.is_moe(i))
    sites = adapter.sites[layer]
    experts = sites["W_in"].module
    seen: list[Any] = []
    handle = experts.register_forward_hook(lambda _module, args, out: seen.append((args, out)))
    with torch.no_grad():
        adapter.run(torch.tensor([[5, 9, 11, 33, 2, 7]]), False, layer + 1)
    handle.remove()
    (x, chosen, weights), out = seen[0]
    expected = torch.zeros_like(out)
    for token in range(len(x)):
        for expert, share in zip(chosen[token].tolist(), weights[token], strict=True):
            gate = x[token] @ sites["W_gate"].weight[expert]
            up = x[token] @ sites["W_in"].weight[expert]
            if name == "gpt-oss":
                gate, up = gate + sites["W_gate"].bias[expert], up + sites["W_in"].bias[expert]
                gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
                hidden = gate * torch.sigmoid(gate * experts.alpha) * (up + 1)
            else:
                hidden = torch.nn.functional.silu(gate) * up
            y = hidden @ sites["W_out"].weight[expert]
            expected[token] += share * (y + (sites["W_out"].bias[expert] if name == "gpt-oss" else 0))
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "mid", "rescaled"),
    [("llama", True, ()), ("gemma2", True, ("W_O", "W_out")), ("olmo2", True, ("W_O", "W_out")), ("neox", False, ()),
     ("falcon 7b", False, ()), ("opt", True, ()), ("bert", False, ()), ("granite 4, dense", True, ()),
     ("lfm2", True, ()), ("gemma4", True, ("W_O", "W_out", "per_layer_projection"))],
)  # fmt: skip
def test_the_stream_between_attention_and_mlp(name, mid, rescaled):
    adapter = adapter_of(name)
    for layer in range(len(adapter.blocks)):
        assert (adapter.point(layer, "resid_mid") is not None) == mid
        assert adapter._anatomy[layer].rescaled == rescaled


def test_function_not_configuration_says_what_is_causal_and_which_norm():
    assert adapter_of("llama").is_causal
    assert not adapter_of("bert").is_causal
    assert adapter_of("llama").final_norm == "RMS"
    assert adapter_of("gpt2").final_norm == "LN"
    assert adapter_of("bert").final_norm is None  # its last norm is the last block's own
    gemma = adapter_of("gemma2")
    weight = gemma.inner.model.norm.weight.detach()
    assert torch.allclose(gemma.final_gain(), 1 + weight, rtol=1e-5)
