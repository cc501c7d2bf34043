"""Two models whose configurations differ: each difference is said by its name, and nothing where there is none."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tl_asymmetry import analyze_pair, weights_from
from tl_asymmetry.models.configurations import differing_settings, family_of, strange_families
from tl_asymmetry.models.view import ModelView

CHANGES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "RoPE theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, True),
    "RoPE scaling": (
        "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, False,
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, True),
    "norm epsilon": ("llama", {"rms_norm_eps": 1e-5}, True),
    "attention window": ("mistral", {"sliding_window": 16}, True),
    "attention soft cap": ("gemma2", {"attn_logit_softcapping": 30.0}, True),
    "logit soft cap": ("gemma2", {"final_logit_softcapping": 15.0}, True),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 64}, False),
    "kinds of layers": ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, False),
    "scaled attention scores": ("gpt2", {"scale_attn_weights": False}, False),
}  # fmt: skip
"""Name → architecture, fields of config.json, whether a HookedTransformer tells of it."""


view = functools.cache(lambda architecture, kind: ModelView(tiny.build(architecture, kind)))
"""Looked at, never changed."""


def changed(architecture: str, folder: Path, fields: dict[str, Any]) -> Path:
    shutil.copytree(tiny.hf_directory(architecture, delta=0.05), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_said_by_its_name(name: str, kind: str, tmp_path: Path) -> None:
    architecture, fields, hooked_tells = CHANGES[name]
    base = view(architecture, kind)
    notes = differing_settings(base, weights_from(changed(architecture, tmp_path / "m", fields)))
    if kind == "bridge" or hooked_tells:
        assert len(notes) == 1
        assert notes[0].startswith(f"the two models differ in {name}: ")
    else:
        assert not notes


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_models_of_one_configuration_differ_in_nothing(architecture: str, kind: str) -> None:
    base, bridge = view(architecture, kind), ModelView(tiny.bridge(architecture))
    assert not differing_settings(base, weights_from(tiny.hf_directory(architecture, delta=0.05)))
    assert not differing_settings(base, bridge)
    assert not strange_families(base, bridge)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_two_families_of_one_shape_are_named(kind: str) -> None:
    base, aligned = ModelView(tiny.build("llama", kind)), weights_from(tiny.hf_directory("mistral"))
    said = "the two models are of two families, llama (base) and mistral (aligned): unless one is the other converted"
    assert strange_families(base, aligned)[0].startswith(said)
    assert not strange_families(base, weights_from(tiny.hf_directory("llama")))
    assert family_of(ModelView(tiny.toy(kind=kind))) in (None, "native")


def test_it_stands_in_the_result(tmp_path: Path) -> None:
    folder = changed("llama", tmp_path / "m", {"hidden_act": "gelu", "rms_norm_eps": 1e-5})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"tokens": tiny.tokens(6, 12), "ranks": [1], "matrices": ["W_Q"], "progress": False}
        result = analyze_pair(tiny.bridge("llama"), folder, **options)
    for name in ("activation: silu (base) and gelu (aligned)", "norm epsilon: 1e-06 (base) and 1e-05 (aligned)"):
        assert any(f"the two models differ in {name}" in note for note in result.notes)


def test_a_vocabulary_that_was_trimmed_counts_by_its_common_rows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.hf_directory("llama", delta=0.05))
    whole = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(90)
    model.save_pretrained(tmp_path)
    base = tiny.bridge("llama")
    options = {"tokens": tiny.tokens(6, 12), "ranks": [1], "matrices": ["W_Q", "W_O"], "progress": False}
    with pytest.warns(UserWarning, match="the aligned model has 6 fewer tokens .* these rows of the base's emb"):
        result = analyze_pair(base, tmp_path, **options)
    changes = result.other_changes.set_index("parameter")
    ΔE = whole[:90] - ModelView(base).embedding()[:90]
    assert changes.loc["embed.W_E", "delta_norm"] == pytest.approx(ΔE.norm().item(), rel=1e-5)
    aligned = tiny.bridge("llama", delta=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = analyze_pair(base, aligned, **options)
    torch.testing.assert_close(
        torch.tensor(result.table["fraction"].to_numpy()), torch.tensor(same.table["fraction"].to_numpy())
    )
