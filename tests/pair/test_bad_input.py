"""Everything that api.md lists as bad input is refused by analyze_pair before a forward pass, in words that help."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry import analyze_pair, estimate_pair
from tl_asymmetry.geometry import random_subspace
from tl_asymmetry.models.view import ModelView

pytestmark = pytest.mark.usefixtures("unchecked_types")
needs_hooked = pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
TOKENS = tiny.tokens(6, 12)


@functools.cache
def built(kind: str) -> tuple[Any, Any]:
    """Not to be changed: what is refused is left as it was."""
    return tiny.build("gpt2", kind), tiny.build("gpt2", kind, delta=0.05)


@pytest.fixture(name="pair", params=tiny.KINDS)
def pair_fixture(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return built(request.param)


def refused(text: str, base: Any, aligned: Any, *texts: Any, **options: Any) -> None:
    """The call raises ValueError with this text, and neither model has been run."""
    runs: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: runs.append("run"))
        for model in (base, aligned)
        if isinstance(model, torch.nn.Module)
        for module in model.modules()
    ]
    if not texts and "tokens" not in options:
        options["tokens"] = TOKENS
    with pytest.raises(ValueError, match=text) as caught:
        analyze_pair(base, aligned, *texts, **{"progress": False} | options)
    assert not runs
    assert "; pass " in str(caught.value) or "; leave" in str(caught.value)
    for handle in handles:
        handle.remove()


# --- the two models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_different_architectures(kind: str) -> None:
    refused(
        r"expected two models of one architecture, got n_kv_heads 4 \(base, .*\) and 2 \(aligned, .*\); pass the base",
        tiny.build("gpt2", kind), tiny.build("llama", kind),
    )  # fmt: skip
    refused("expected two models .* got parallel True .* and False", *(
        tiny.build(n, kind) for n in ("neox", "neox_sequential")
    ))  # fmt: skip


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_different_shapes(kind: str) -> None:
    base = tiny.toy("plain", kind)
    for over, text in (
        ({"n_layers": 3}, "got n_layers 2 .* and 3 .*; pass the base that the aligned model was trained from"),
        ({"d_model": 24}, "got d_model 48 .* and 24"),
        ({"d_mlp": 50}, "got d_mlp 96 .* and 50"),
        ({"n_ctx": 32}, r"expected as many positions in both models, got n_ctx 64 \(base\) and 32 \(aligned\); pass"),
    ):
        refused(text, base, tiny.toy("plain", kind, **over))


def with_tokenizer(tokenizer: Any, **over: Any) -> Any:
    model = tiny.toy("plain", "bridge", **over)
    model._tokenizer = tokenizer
    return model


def test_different_tokenizers() -> None:
    swapped = list(tiny.WORDS)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    refused(
        r"expected tokenizers with the same tokens, got 2 that differ, the first being 'w7': 10 \(base\) and 11 "
        r"\(aligned\); pass models with one tokenizer",
        with_tokenizer(tiny.tokenizer()), with_tokenizer(tiny.tokenizer(tuple(swapped), name="swapped")),
        ["w7 w8 w2", "w3 w4"],
    )  # fmt: skip


def test_a_vocabulary_with_tokens_added_is_accepted_with_a_warning() -> None:
    words = (*tiny.WORDS, "<|im_start|>", "<|im_end|>")
    base, aligned = with_tokenizer(tiny.tokenizer()), with_tokenizer(tiny.tokenizer(words), d_vocab=98)
    with pytest.warns(UserWarning, match="has 2 more tokens than the base .* rows .* are left out"):
        result = analyze_pair(base, aligned, tokens=TOKENS, ranks=[4], matrices=["W_O"], progress=False)
    assert any("2 more tokens" in note for note in result.notes)


@pytest.mark.parametrize("role", ["base", "aligned"])
def test_processed_weights(role: str) -> None:
    processed, raw = tiny.bridge("gpt2"), tiny.bridge("gpt2", delta=0.05)
    processed.enable_compatibility_mode(disable_warnings=True)
    pair = (processed, raw) if role == "base" else (raw, processed)
    refused(
        r"expected raw weights, got TransformerBridge .* with processed weights \(fold_ln, .*\); pass a "
        "TransformerBridge.boot_transformers.* without enable_compatibility_mode", *pair,
    )  # fmt: skip


@needs_hooked
@pytest.mark.parametrize("role", ["base", "aligned"])
def test_processed_weights_of_a_hooked_transformer(role: str) -> None:
    processed, raw = tiny.hooked("gpt2", center_writing_weights=True), tiny.hooked("gpt2", delta=0.05)
    pair = (processed, raw) if role == "base" else (raw, processed)
    refused(
        r"expected raw weights, got HookedTransformer .* \(center_writing_weights\); pass "
        r"HookedTransformer.from_pretrained_no_processing\(...\)", *pair,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("role", "value", "got"),
    [("base", math.nan, "1 NaN and 0 infinite"), ("aligned", -math.inf, "0 NaN and 1 infinite")],
)
def test_weights_that_are_not_finite(pair: tuple[Any, Any], role: str, value: float, got: str) -> None:
    broken = tiny.perturbed(pair[role == "aligned"], 0.0)
    with torch.no_grad():
        ModelView(broken).weight(1, "W_O")[2, 3, 4] = value
    refused(
        rf"expected finite weights, got {got} values in blocks.1.attn.W_O of the {role} model .*; pass a model",
        *((pair[0], broken) if role == "aligned" else (broken, pair[1])),
    )


def test_what_is_no_model(pair: tuple[Any, Any]) -> None:
    text = (
        "expected a HookedTransformer, a TransformerBridge or a model of transformers, got {}; pass TransformerBridge"
    )
    refused(text.format("NoneType"), None, pair[1])
    refused(text.format("Linear"), torch.nn.Linear(2, 2), pair[1])


def test_a_directory_that_is_none(pair: tuple[Any, Any], tmp_path: Path) -> None:
    refused("expected an existing directory or a name on the Hub, got './nowhere'; pass the path", pair[0], "./nowhere")
    refused("expected a Hugging Face model directory with config.json, got '.*'; pass a directory", pair[0], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    refused(r"expected weights \(model.safetensors, .*\) in '.*', got none; pass a folder", pair[0], tmp_path)


# --- texts and tokens ------------------------------------------------------------------------------------------------


def test_texts(pair: tuple[Any, Any]) -> None:
    for texts, text in (
        ([], "expected at least one text, got none; pass texts or tokens="),
        (["w1 w2", ""], "expected texts with a token or more, got an empty text at index 1; leave it out"),
        (["w1 w2", " \n "], "expected texts with a token or more, got an empty text at index 1; leave it out"),
        ("w1 w2", r"expected a list of texts, got a single string; pass texts=\[text\]"),
        ([7], "expected texts to be strings or lists of .* messages, got int at index 0; pass strings"),
        (
            [[{"role": "user", "content": "w1"}]],
            "expected a tokenizer with a chat template for the messages at index 0, got one without; pass strings",
        ),
    ):
        refused(text, *pair, texts)


def test_texts_without_a_tokenizer() -> None:
    base, aligned = with_tokenizer(None), with_tokenizer(None)
    text = "expected a model with a tokenizer to read texts, .* has none; pass tokens="
    refused(text, base, aligned, ["w1 w2 w3"])
    refused(text, base, aligned, None)  # the calibration texts are texts as well


def test_texts_and_tokens(pair: tuple[Any, Any]) -> None:
    refused("expected texts or tokens, got both; pass one of them", *pair, ["w1 w2"], tokens=TOKENS)


def test_tokens(pair: tuple[Any, Any]) -> None:
    for tokens, text in (
        (torch.tensor([[3, 96]]), "expected token ids from 0 to 95, got 96; pass tokens made by this model"),
        (torch.tensor([[3, -100]]), "expected token ids from 0 to 95, got -100; pass"),
        (torch.zeros(1, 65, dtype=torch.long), "expected sequences of at most 64 tokens .*, got 65; pass them cut"),
        (torch.zeros(0, 5, dtype=torch.long), "expected at least one sequence of tokens, got none; pass"),
        (torch.zeros(2, 5), r"expected tokens as an integer tensor \[batch, pos\], got torch.float32 \[1, 5\]; pass"),
        (torch.zeros(5, dtype=torch.long), r"expected tokens as an integer tensor .*, got torch.int64 \[5\]; pass"),
        ([["w1"]], "expected sequences of numbers as tokens, got list as row 0; pass token ids"),
    ):
        refused(text, *pair, tokens=tokens)


def test_too_few_tokens(pair: tuple[Any, Any]) -> None:
    text = r"expected at least as many tokens as the largest rank \(16\), got 11 after exclusions; pass more texts"
    refused(text, *pair, tokens=tiny.tokens(1, 12))
    refused(text, *pair, ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11"])
    refused(text, *pair, tokens=TOKENS, max_tokens=12)
    refused("got 0 after exclusions; pass more texts or smaller ranks", *pair, tokens=tiny.tokens(50, 1), ranks=[1])
    enough = {"tokens": tiny.tokens(1, 12), "exclude_first": False, "ranks": [12]}
    analyze_pair(*pair, **enough, matrices=["W_K"], groups=1, progress=False)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ranks": [0]}, r"expected ranks from 1 to 47 \(d_model - 1\), got 0; pass such ranks"),
        ({"ranks": [4, -1]}, "expected ranks from 1 to 47 .*, got -1; pass"),
        ({"ranks": [1, 48]}, "expected ranks from 1 to 47 .*, got 48; pass"),
        ({"ranks": [1.5]}, "expected ranks from 1 to 47 .*, got 1.5; pass"),
        ({"ranks": []}, r"expected a list of ranks, got \[\]; pass ranks="),
        ({"ranks": "4"}, "expected a list of ranks, got '4'; pass ranks="),
        ({"matrices": ["W_Q", "W_gate"]}, "expected matrices among W_Q, .*, got 'W_gate'; pass one of these"),
        ({"matrices": []}, r"expected matrices among W_Q, .*, got \[\]; pass one or several of these"),
        ({"matrices": "WQ"}, "expected matrices among W_Q, .*, got 'WQ'; pass 'W_Q'"),
        (
            {"subspaces": ["attn"]},
            "expected subspaces among attn_in, .*, prediction, embedding, .*, got 'attn'; pass 'attn_in'",
        ),
        ({"subspaces": []}, r"expected at least one subspace among attn_in, .*, got \[\]; leave it out"),
        ({"subspaces": {}}, "expected at least one subspace among .*, got {}; leave it out for the default"),
        (
            {"subspaces": {"a": []}},
            r"expected 'a' as directions \[48\], \[48, k\] or a list of vectors, got list; pass a tensor",
        ),
        (
            {"subspaces": {"a": random_subspace(40, 8, 0)}},
            r"expected 'a' as directions in R\^48, got a subspace of R\^40; pass bases of this model",
        ),
        (
            {"subspaces": {"a": [random_subspace(48, k, 0) for k in (3, 4)]}},
            "expected subspaces of one rank for 'a', got several; pass them truncated",
        ),
        ({"activations": "dpo"}, 'expected activations among "base", "aligned", "both", got \'dpo\'; pass one'),
        ({"groups": 0}, "expected groups >= 1, got 0; pass groups=1 for no intervals, 8 by default"),
        ({"batch_size": 0}, "expected a batch_size of at least 1, got 0; pass batch_size=8"),
        ({"max_tokens": 0}, "expected max_tokens >= 1, got 0; pass None to use every token"),
        ({"gradient": object()}, r"expected gradient with a method gradient_moment\(.*\), got object; pass a gradient"),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    refused(text, *built(tiny.KINDS[0]), **options)


def test_a_point_the_model_does_not_have() -> None:
    base = tiny.bridge("neox")
    refused(r"expected subspaces among attn_in, mlp_in, resid_pre, resid_post, prediction, .*, got 'resid_mid'; pass",
            base, tiny.bridge("neox", delta=0.05), subspaces=["resid_mid"])  # fmt: skip


@pytest.mark.parametrize("call", [analyze_pair, estimate_pair])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ranks": [99]}, "expected ranks from 1 to 47"),
        ({"matrices": ["W_gate"]}, "expected matrices among W_Q, .*, got 'W_gate'"),
        ({"subspaces": ["attn"]}, "expected subspaces among attn_in, .*, got 'attn'"),
    ],
)
def test_arguments_are_checked_before_a_directory_is_loaded(
    call: Any, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=text):
        call(built("bridge")[0], tmp_path / "not there", tokens=TOKENS, progress=False, **options)


def test_iterators_are_as_good_as_lists() -> None:
    pair, options = built("bridge"), {"tokens": TOKENS, "progress": False}
    listed = {"matrices": ["W_Q", "W_O"], "ranks": [1, 4], "subspaces": ["attn_in", "prediction"]}
    result = analyze_pair(*pair, **options, **{name: iter(values) for name, values in listed.items()})
    pd.testing.assert_frame_equal(result.table, analyze_pair(*pair, **options, **listed).table)
    assert {name: result.config["arguments"][name] for name in listed} == listed


def test_estimate_refuses_the_same() -> None:
    base, aligned = built("bridge")
    for options, text in (
        ({"ranks": [0]}, "expected ranks from 1 to 47"),
        ({"tokens": torch.tensor([[96]])}, "expected token ids from 0 to 95, got 96"),
        ({"batch_size": 0}, "expected a batch_size of at least 1, got 0"),
        ({"groups": 0}, "expected groups >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            estimate_pair(base, aligned, **{"tokens": TOKENS} | options)
    with pytest.raises(ValueError, match="expected two models of one architecture"):
        estimate_pair(base, tiny.bridge("llama"), tokens=TOKENS)
