"""What is refused before anything heavy runs. Every message is asserted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tl_asymmetry.models.backward import check_differentiable
from tl_asymmetry.models.checks import (
    check_finite,
    check_pair,
    check_ranks,
    check_raw,
    check_token_count,
    check_tokenizers,
    processing_flags,
)
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.view import ModelView

needs_hooked = pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
FLAGS = tiny.PROCESSING_FLAGS
CHAT_TEMPLATE = "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"


def compatible(architecture: str, **processing: bool) -> ModelView:
    model = tiny.bridge(architecture)
    model.enable_compatibility_mode(disable_warnings=True, **(dict.fromkeys(FLAGS, False) | processing))
    return ModelView(model)


# --- processed weights ---------------------------------------------------------------------------------------------

# what each flag leaves a trace of: centring writes needs a LayerNorm, folding value biases value biases
TRACES = [
    ("gpt2", "fold_ln"), ("neox", "fold_ln"), ("llama", "fold_ln"), ("gemma2", "fold_ln"), ("qwen3", "fold_ln"),
    ("gpt2", "center_writing_weights"), ("neox", "center_writing_weights"), ("phi", "center_writing_weights"),
    ("gpt2", "center_unembed"), ("llama", "center_unembed"), ("gemma1", "center_unembed"),
    ("gpt2", "fold_value_biases"), ("neox", "fold_value_biases"), ("qwen2", "fold_value_biases"),
    ("gpt2", "refactor_factored_attn_matrices"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "flag"), TRACES)
def test_a_processed_bridge_is_refused_and_the_flag_named(architecture: str, flag: str) -> None:
    view = compatible(architecture, **{flag: True})
    assert processing_flags(view)[0] == [flag]
    with pytest.raises(
        ValueError, match=rf"expected raw weights, got TransformerBridge .* processed weights \({flag}\)"
    ):
        check_raw(view)


@needs_hooked
@pytest.mark.parametrize(("architecture", "flag"), TRACES)
def test_a_processed_hooked_transformer_is_refused_and_the_flag_named(architecture: str, flag: str) -> None:
    view = ModelView(tiny.hooked(architecture, **{flag: True}))
    assert processing_flags(view)[0] == [flag]
    text = rf"processed weights \({flag}\); pass HookedTransformer.from_pretrained_no_processing.*{flag}=False"
    with pytest.raises(ValueError, match=text):
        check_raw(view)


def test_the_defaults_of_compatibility_mode_are_all_named() -> None:
    model = tiny.bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(
        ValueError, match="fold_ln, center_writing_weights, center_unembed, fold_value_biases"
    ) as caught:
        check_raw(ModelView(model))
    assert "without enable_compatibility_mode or process_weights" in str(caught.value)


@needs_hooked
def test_the_defaults_of_from_pretrained_are_all_named() -> None:
    view = ModelView(tiny.hooked("gpt2", **dict.fromkeys(FLAGS[:4], True)))
    assert processing_flags(view)[0] == list(FLAGS[:4])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_raw_models_pass(architecture: str, kind: str) -> None:
    assert check_raw(ModelView(tiny.build(architecture, kind))) == []


def test_compatibility_mode_without_processing_passes() -> None:
    assert check_raw(compatible("gpt2")) == []
    model = tiny.bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert check_raw(ModelView(model)) == []


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.TOYS)
def test_untrained_toys_pass(name: str, kind: str) -> None:
    if kind == "bridge" and name not in tiny.NATIVE_TOYS:
        pytest.skip("boot_native cannot build it")
    assert check_raw(ModelView(tiny.toy(name, kind, seed=None))) == []  # gains one, biases zero


@needs_hooked
def test_a_model_trained_without_gains_passes() -> None:
    assert check_raw(ModelView(tiny.toy("plain", "hooked", normalization_type="LNPre"))) == []
    warnings = check_raw(ModelView(tiny.toy("plain", "hooked", normalization_type="RMSPre")))
    assert "RMS norms without gains" in warnings[0]


@needs_hooked
def test_folded_toys_are_told_from_untrained_ones() -> None:
    model = tiny.toy("plain", "hooked")
    model.load_and_process_state_dict(model.state_dict(), **(dict.fromkeys(FLAGS, False) | {"fold_ln": True}))
    assert processing_flags(ModelView(model))[0] == ["fold_ln"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_processing_shows_in_half_precision_too(dtype: torch.dtype) -> None:
    assert check_raw(ModelView(tiny.bridge("gpt2", dtype))) == []
    model = tiny.bridge("gpt2")
    model.enable_compatibility_mode(disable_warnings=True)
    found = processing_flags(ModelView(model.to(dtype)))[0]
    assert set(found) >= {"fold_ln", "center_writing_weights", "fold_value_biases"}


# --- finite weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_tensor_that_is_not_finite_is_named(kind: str) -> None:
    model = tiny.build("llama", kind)
    view = ModelView(model)
    check_finite(view)
    with torch.no_grad():
        view.weight(1, "W_V")[0, 3, 2] = float("nan")
        view.weight(1, "W_V")[0, 3, 4] = float("-inf")
    text = "expected finite weights, got 1 NaN and 1 infinite values in blocks.1.attn.W_V of the base model .*; pass a"
    with pytest.raises(ValueError, match=text):
        check_finite(view, "base model")
    with torch.no_grad():
        view.weight(1, "W_V").zero_()
        model.blocks[0].ln2.w.data[5] = float("inf") if kind == "hooked" else model.blocks[0].ln2.weight.data[5]
        if kind == "bridge":
            model.blocks[0].ln2.weight[5] = float("inf")
    with pytest.raises(ValueError, match="0 NaN and 1 infinite values in blocks.0.ln2.w of the model"):
        check_finite(view)


def test_a_scaled_embedding_is_looked_at_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's is the largest tensor of a small model: a scaled copy would be the peak of every analysis."""
    view = ModelView(tiny.build("gemma3", tiny.KINDS[-1]))
    monkeypatch.setattr(ModelView, "named_weights", lambda _: pytest.fail("copied"))
    check_finite(view)
    check_differentiable(view)


def test_a_finite_tensor_whose_sum_overflows_passes() -> None:
    view = ModelView(tiny.bridge("llama"))
    with torch.no_grad():
        view.weight(0, "W_in").fill_(3e38)
    check_finite(view)


# --- pairs ---------------------------------------------------------------------------------------------------------


def pair(base: str = "gpt2", aligned: str = "gpt2") -> tuple[ModelView, ModelView]:
    return ModelView(tiny.bridge(base)), ModelView(tiny.bridge(aligned, delta=0.01))


def test_one_architecture_passes() -> None:
    assert check_pair(*pair()) == []


@needs_hooked
@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama", "gemma2", "mixtral"])
def test_the_two_kinds_of_one_architecture_pass(architecture: str) -> None:
    base, aligned = ModelView(tiny.hooked(architecture)), ModelView(tiny.bridge(architecture, delta=0.01))
    assert check_pair(base, aligned) == check_pair(aligned, base) == []


@pytest.mark.parametrize(
    ("base", "aligned", "text"),
    [
        ("gpt2", "llama", r"got n_kv_heads 4 \(base, .*\) and 2 \(aligned, .*\); pass the base that"),
        ("llama", "mixtral", r"got d_mlp 96 \(base, .*\) and None \(aligned, .*\); pass the base that"),
        ("gemma2", "llama", r"got d_head 16 \(base, .*\) and 12 \(aligned, .*\); pass the base that"),
        ("neox", "neox_sequential", r"got parallel True \(base, .*\) and False \(aligned, .*\); pass the base that"),
    ],
)
def test_different_architectures_are_refused(base: str, aligned: str, text: str) -> None:
    with pytest.raises(ValueError, match="expected two models of one architecture, " + text):
        check_pair(*pair(base, aligned))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_different_shapes_are_refused(kind: str) -> None:
    def of(**over: Any) -> ModelView:
        return ModelView(tiny.toy("plain", kind, **over))

    with pytest.raises(ValueError, match="got n_layers 2 .* and 3 .*; pass the base"):
        check_pair(of(), of(n_layers=3))
    with pytest.raises(ValueError, match="got d_model 48 .* and 24 .*; pass the base"):
        check_pair(of(), of(d_model=24))
    with pytest.raises(ValueError, match="got norm LN .* and RMS .*; pass the base"):
        check_pair(of(), of(normalization_type="RMS"))
    with pytest.raises(ValueError, match=r"expected as many positions in both models, got n_ctx 64 \(base\) and 32"):
        check_pair(of(), of(n_ctx=32))
    with pytest.raises(
        ValueError, match="expected an aligned vocabulary that begins with the base's 96 tokens, got 90"
    ):
        check_pair(of(), of(d_vocab=90))


def with_tokenizer(tokenizer: Any, d_vocab: int = tiny.D_VOCAB) -> ModelView:
    model = tiny.toy("plain", "bridge", d_vocab=d_vocab)
    model._tokenizer = tokenizer
    return ModelView(model)


def test_an_aligned_vocabulary_with_tokens_added_is_accepted_with_warnings() -> None:
    words = (*tiny.WORDS, "<|im_start|>", "<|im_end|>")
    base, aligned = with_tokenizer(tiny.tokenizer()), with_tokenizer(tiny.tokenizer(words), d_vocab=98)
    warnings = check_pair(base, aligned)
    assert warnings == [
        "the aligned model has 2 more tokens than the base (98 and 96): these rows of its embedding and unembedding "
        "are left out",
        "the aligned tokenizer has 2 added tokens; texts are read with the base's tokenizer",
    ]


def test_different_tokenizers_are_refused() -> None:
    swapped = list(tiny.WORDS)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    base = with_tokenizer(tiny.tokenizer())
    text = (
        r"expected tokenizers with the same tokens, got 2 that differ, the first being 'w7': 10 \(base\) and 11 \(ali"
    )
    with pytest.raises(ValueError, match=text):
        check_tokenizers(base, with_tokenizer(tiny.tokenizer(tuple(swapped), name="swapped")))
    with pytest.raises(
        ValueError, match=r"got 1 that differ, the first being 'w92': 95 \(base\) and missing \(aligned\)"
    ):
        check_tokenizers(base, with_tokenizer(tiny.tokenizer((*tiny.WORDS[:-1], "other"), name="other")))


def test_tokenizers_of_one_vocabulary_that_split_differently_are_refused() -> None:
    words = (*tiny.WORDS[:-2], "quick", "brown")
    base, aligned = (tiny.tokenizer(words, name="split") for _ in range(2))
    from tokenizers.pre_tokenizers import Whitespace

    aligned.backend_tokenizer.pre_tokenizer = Whitespace()  # splits off punctuation as well
    with pytest.raises(ValueError, match="expected tokenizers that split texts alike, got .*; pass models with one"):
        check_tokenizers(with_tokenizer(base), with_tokenizer(aligned))


def test_tokenizers_that_differ_in_what_is_not_used_are_a_note() -> None:
    """Renamed special tokens, where texts use none of them or ids were given."""
    swapped = list(tiny.WORDS)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    base, aligned = with_tokenizer(tiny.tokenizer()), with_tokenizer(tiny.tokenizer(tuple(swapped), name="swapped"))
    for read in ({12, 13}, set()):
        notes = check_tokenizers(base, aligned, read)
        assert notes[0].startswith(
            "the tokenizers have 2 that differ, the first being 'w7': 10 (base) and 11 (aligned)"
        )
    with pytest.raises(ValueError, match="got 1 that differ, the first being 'w8': 11 .base. and 10 .*or tokens= made"):
        check_tokenizers(base, aligned, {11, 12})


def test_a_missing_tokenizer_is_a_warning() -> None:
    base, aligned = with_tokenizer(tiny.tokenizer()), with_tokenizer(None)
    assert check_tokenizers(base, aligned) == [
        "the aligned model has no tokenizer: vocabularies were compared by size only"
    ]
    assert check_tokenizers(aligned, aligned) == []


# --- ranks ----------------------------------------------------------------------------------------------


def test_ranks() -> None:
    assert check_ranks([16, 1, 4, 4], 48) == (1, 4, 16)
    assert check_ranks((47,), 48) == (47,)
    for ranks, got in (([0], "0"), ([4, -1], "-1"), ([48], "48"), ([1.5], "1.5"), ([True], "True")):
        with pytest.raises(
            ValueError, match=rf"expected ranks from 1 to 47 \(d_model - 1\), got {got}; pass such ranks"
        ):
            check_ranks(ranks, 48)
    assert check_ranks(4, 48) == (4,)
    for ranks, got in (([], r"\[\]"), (None, "None"), ("4", "'4'"), (True, "True")):
        with pytest.raises(ValueError, match=rf"expected a list of ranks, got {got}; pass ranks=\[1, 4, 16\]"):
            check_ranks(ranks, 48)


def test_fewer_tokens_than_the_largest_rank_are_refused() -> None:
    check_token_count(16, (1, 16))
    with pytest.raises(
        ValueError, match=r"at least as many tokens as the largest rank \(16\), got 15 .*; pass more texts"
    ):
        check_token_count(15, (1, 16))


# --- loading -------------------------------------------------------------------------------------------------------


def test_open_model_reads_a_directory_raw() -> None:
    model = open_model(str(tiny.hf_directory("gpt2")), torch.float64, device="cpu")
    view = ModelView(model)
    assert view.dtype == torch.float64
    assert check_raw(view) == []
    assert view.self_check(tiny.tokens()) < 1e-12
    assert view.tokenizer is not None


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="expected an existing directory or a name on the Hub, got './nowhere'; pass the"
    ):
        open_model("./nowhere")
    with pytest.raises(
        ValueError, match="expected an existing directory or a name on the Hub, got '.*a/b/c'; pass the"
    ):
        open_model(tmp_path / "a/b/c")
    with pytest.raises(
        ValueError, match="expected a Hugging Face model directory with config.json, got .*; pass a dir"
    ):
        open_model(tmp_path)
    shutil.copy(tiny.hf_directory("gpt2") / "config.json", tmp_path)
    with pytest.raises(ValueError, match="expected a language model that transformers can load, got .*; pass"):
        open_model(tmp_path)
