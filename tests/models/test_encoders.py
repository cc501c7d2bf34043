"""BERT-style encoders: the same view of both kinds, exact inputs, and refusals where decoders are meant."""

import pandas as pd
import pytest
import torch

from tests import tiny
from tests.models.test_sites import adapter_of
from tests.tiny_encoder import ENCODER_KINDS, encoder, encoder_tokens, hf_encoder
from tl_asymmetry import ModelView, analyze_pair
from tl_asymmetry.models.texts import batches, token_sequences
from tl_asymmetry.tangents.probe import check_block_outputs

POINTS = ("attn_in", "resid_pre", "resid_post", "z", "mlp_in", "mlp_post")


def seen(view, tokens):
    held = {}
    sites = [(point, layer) for point in POINTS for layer in range(view.n_layers)]
    with torch.no_grad(), view.evaluating(), view.hooks({s: (lambda x, s=s: held.__setitem__(s, x)) for s in sites}):
        logits = view.run(tokens, logits=True)
    return held, logits


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_view_of_an_encoder(kind):
    view = ModelView(encoder(kind))
    assert (view.encoder, view.causal, view.has_masked_lm_head, view.parallel) == (True, False, True, False)
    assert view.matrices == ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
    assert view.key_shift_invariant
    assert not view.has_point("resid_mid")
    assert "post-norm encoder" in view.notes[0]
    assert view.self_check(encoder_tokens()) < 1e-5
    assert view.foreign_hooks() == []  # the Bridge's own on the halves of its MLP are nobody's edit
    check_block_outputs(view, encoder_tokens())


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_points_are_what_hugging_face_computes(kind):
    tokens = encoder_tokens()
    with torch.no_grad():
        expected = hf_encoder(kind)(tokens, output_hidden_states=True)
    held, logits = seen(ModelView(encoder(kind)), tokens)
    assert torch.allclose(logits, expected.logits, atol=1e-5)
    for layer in range(2):
        for point in ("attn_in", "resid_pre"):  # post-norm: W_Q reads the stream itself
            assert torch.allclose(held[point, layer], expected.hidden_states[layer], atol=1e-5)
        assert torch.allclose(held["resid_post", layer], expected.hidden_states[layer + 1], atol=1e-5)
    assert torch.equal(held["resid_post", 0], held["attn_in", 1])


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="HookedEncoder is gone in transformer-lens 4")
def test_both_kinds_hold_the_same_weights():
    bridge, hooked = (ModelView(encoder(kind)) for kind in ("bridge", "hooked"))
    for layer in range(2):
        for matrix in bridge.matrices:
            assert torch.equal(bridge.weight(layer, matrix), hooked.weight(layer, matrix))
    assert torch.equal(bridge.embedding(), hooked.embedding())
    assert torch.equal(bridge.unembedding()[0], hooked.unembedding()[0])


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_a_pair_of_encoders_is_analysed(kind):
    """Reads against their own input, writes against what the block hands on; nothing depends on the batch's padding."""
    base, aligned = encoder(kind), encoder(kind)
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    tokens = [*encoder_tokens(6, 9), *encoder_tokens(6, 5)]
    options = {"tokens": tokens, "matrices": ["W_Q", "W_O", "W_in"], "ranks": [2], "groups": 1, "progress": False}
    one, many = (analyze_pair(base, aligned, batch_size=size, **options) for size in (1, 8))
    own = one.table.query("matrix == 'W_Q' and subspace == 'attn_in'")
    assert own["fraction"].between(0, 1).all()
    assert "resid_post" in set(one.table.query("matrix == 'W_O'")["subspace"])
    pd.testing.assert_series_equal(one.table["fraction"], many.table["fraction"], rtol=1e-5)


def test_texts_stand_between_cls_and_sep():
    view = ModelView(encoder("bridge", tokenizer=True))
    tokenizer = view.tokenizer
    sequences = token_sequences(view, ["w1 w2 w3", "[CLS] w4 [SEP]"], window=4, notes=lambda line: None)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = {w: tokenizer.convert_tokens_to_ids(w) for w in ("w1", "w2", "w3", "w4")}
    assert [s.tolist() for s in sequences] == [
        [cls, ids["w1"], ids["w2"], sep],
        [cls, ids["w3"], sep],
        [cls, ids["w4"], sep],
    ]


def test_batches_of_one_length_need_no_padding():
    sequences = [torch.arange(1, n + 1) for n in (3, 5, 3, 3, 5, 2)]
    got = list(batches(sequences, 2, causal=False))
    assert [tuple(tokens.shape) for tokens, _ in got] == [(1, 2), (2, 3), (1, 3), (2, 5)]
    assert all(bool(mask.all()) for _, mask in got)


def test_an_encoder_without_its_head_says_so():
    view = ModelView(encoder("bridge", head="BertForNextSentencePrediction"))
    assert not view.has_masked_lm_head
    assert not ModelView(tiny.build("gpt2", "bridge")).has_masked_lm_head


def test_a_pre_norm_encoder_is_not_said_to_norm_its_stream():
    """ModernBERT; and its head, as BERT's, has a layer before the unembedding, which a decoder has not."""
    notes = {name: " ".join(ModelView(adapter_of(name).inner).notes) for name in ("modernbert", "bert", "llama")}
    assert "post-norm encoder" not in notes["modernbert"]
    assert "post-norm encoder" in notes["bert"]
    for name, said in notes.items():
        assert ("the head has a layer of its own" in said) == (name != "llama")


def test_what_gemma_4_has_beside_matrices_is_told():
    notes = " ".join(ModelView(adapter_of("gemma4").inner).notes)
    assert "W_O, W_out and per_layer_projection are followed by a norm" in notes
    assert "the last 2 layers use keys and values of earlier layers" in notes
    assert "per-layer embeddings (model.embed_tokens_per_layer.weight)" in notes
