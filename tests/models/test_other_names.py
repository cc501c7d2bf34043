"""What a Bridge names otherwise than the model, or not at all: views and folders show what the model itself has."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tests.models.test_sites import BERT, LLAMA, adapter_of
from tl_asymmetry.models.checks import check_shapes
from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import weights_from

MODELS = {
    "granite 4, dense": lambda: adapter_of("granite 4, dense").inner,
    "modernbert, decoder": lambda: transformers.ModernBertDecoderForCausalLM._from_config(
        transformers.ModernBertDecoderConfig(**LLAMA), attn_implementation="eager", dtype=torch.float64
    ).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bridge_and_a_folder_show_the_mlps_that_the_model_has(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    live = ModelView(model)
    bridged = ModelView(bridge_around(copy.deepcopy(model), "tiny", dtype=torch.float64))
    stored = weights_from(tmp_path)
    check_shapes(live, stored)
    assert live.matrices == bridged.matrices == stored.matrices
    assert {"W_in", "W_gate", "W_out"} <= set(live.matrices)
    for layer in range(live.n_layers):
        for matrix in live.matrices:
            for other in (bridged, stored):
                torch.testing.assert_close(other.weight(layer, matrix), live.weight(layer, matrix), rtol=0, atol=0)
    assert not any(fused in extra for fused in ("Wi", "input_linear", "output_linear") for extra in bridged.headless())
    assert bridged.self_check(torch.arange(3, 11).unsqueeze(0)) < 1e-8


def test_an_encoder_decoder_in_a_bridge_is_refused_by_name():
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=64)
    model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="got the encoder-decoder T5ForConditionalGeneration; pass a decoder"):
        ModelView(bridge_around(model, "tiny"))


def test_a_bert_with_a_causal_head_and_its_folder_are_one_architecture(tmp_path):
    model = transformers.BertLMHeadModel(transformers.BertConfig(**BERT)).eval()
    model.save_pretrained(tmp_path)
    live = ModelView(model)
    stored = weights_from(tmp_path, base=live)
    check_shapes(live, stored)
    assert stored.norm is None
    assert stored.matrices == live.matrices


TIED = {
    "mpt": lambda: adapter_of("mpt").inner,
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**LLAMA | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True})
    ).eval(),
}


@pytest.mark.parametrize("name", TIED)
def test_the_tied_embedding_of_a_folder_is_that_of_the_plain_model(name, tmp_path):
    model = TIED[name]()
    model.save_pretrained(tmp_path)
    live = ModelView(model)
    stored = weights_from(tmp_path, base=live)
    assert live.tied
    for include_tied, names in ((False, {"embed.W_E"}), (True, {"embed.W_E", "unembed.W_U"})):
        ours, theirs = (weights.headless(include_tied=include_tied) for weights in (live, stored))
        assert names == {"embed.W_E", "unembed.W_U"} & set(theirs) == {"embed.W_E", "unembed.W_U"} & set(ours)
        for extra in names:
            torch.testing.assert_close(theirs[extra], ours[extra], rtol=0, atol=0)
