"""What is read is what transformers, or PEFT after merging, would show: over every writer and architecture."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.models import corpus
from tl_asymmetry import analyze_pair, weights_from
from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.models.readers.files import TensorFiles
from tl_asymmetry.models.view import ModelView

ROUNDING = 5e-7
"""Of a merged weight: PEFT adds in float32 what is read as factors."""


@functools.cache
def base_view(architecture: str) -> ModelView:
    return ModelView(tiny.bridge(architecture))


def untrained(architecture: str, tied: bool | None) -> tuple[Any, dict[str, Any]]:
    """A transformers model, and its parameters by their names."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(tiny.CONFIGS[architecture]())
    if tied is not None:
        config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model, dict(model.named_parameters(remove_duplicate=False))


@functools.cache
def live_view(architecture: str, tied: bool | None) -> tuple[ModelView, dict[str, Any]]:
    model, parameters = untrained(architecture, tied)
    return ModelView(bridge_around(model, "truth")), parameters


def shown(architecture: str, written: corpus.Written) -> ModelView:
    """TransformerLens's view of a transformers model that has these very weights."""
    split = architecture == "neox"  # query, key and value become copies, which do not follow: a view for every case
    seen, parameters = (untrained if split else live_view)(architecture, written.tied)
    assert written.truth.keys() <= parameters.keys()
    assert all(name.startswith(("lm_head", "embed_out")) for name in parameters.keys() - written.truth.keys())
    with torch.no_grad():
        for name, tensor in written.truth.items():
            parameters[name].copy_(tensor)
    return ModelView(bridge_around(seen, "truth")) if split else seen


def read(written: corpus.Written, architecture: str, base: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return weights_from(written.path, base=base or base_view(architecture))


@pytest.mark.parametrize(("writer", "architecture"), list(corpus.cases()))
def test_what_is_read_is_what_would_be_loaded(writer: str, architecture: str) -> None:
    written = corpus.write(writer, architecture)
    try:
        weights, truth = read(written, architecture), shown(architecture, written)
        tolerance = ROUNDING if weights.only_changes else 0
        base = base_view(architecture)
        for layer in range(truth.n_layers):
            for matrix in truth.matrices:
                theirs = truth.weight(layer, matrix)
                torch.testing.assert_close(weights.weight(layer, matrix), theirs, atol=tolerance, rtol=0)
                change = theirs.double() - base.weight(layer, matrix).double()
                ours = weights.delta(layer, matrix, base).double()
                torch.testing.assert_close(ours, change, atol=ROUNDING, rtol=0)
                assert bool(change.any()) or not bool(ours.any())  # nothing changed where nothing was trained
        ours, theirs = weights.headless(include_tied=True), truth.headless(include_tied=True)
        kept = base.headless(include_tied=True) if weights.only_changes else {}
        stored = {name for name in theirs if name in ours or name in kept}
        without_head = not any(name.startswith(("lm_head", "embed_out")) for name in written.truth)
        assert stored >= set(theirs) - ({"unembed.W_U", "unembed.b_U"} if without_head else set())
        for name in stored:
            mine = ours[name] if name in ours else kept[name]
            torch.testing.assert_close(mine.to(theirs[name]), theirs[name], atol=tolerance, rtol=tolerance, msg=name)
        assert weights.tied == truth.tied
        for note in written.notes:
            assert any(re.search(note, line) for line in weights.notes), (note, weights.notes)
        if not written.base:  # the same without a model: by the configuration alone
            config = base.model.original_model.config
            alone = weights_from(written.path, base=config)
            assert torch.equal(alone.delta(1, "W_Q", base), weights.delta(1, "W_Q", base))
    finally:
        shutil.rmtree(written.path.parent if written.path.is_file() else written.path, ignore_errors=True)


def test_there_are_enough() -> None:
    assert len(set(corpus.cases())) == len(list(corpus.cases())) >= 150


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was read nothing is held: one stored tensor is alive at a time, of an adapter one module's factors."""
    alive: dict[int, int] = {}
    most = 0
    read_one = TensorFiles.__getitem__

    def counted(files: TensorFiles, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read_one(files, name)
        storage, key = tensor.untyped_storage(), len(alive) + most * 10**6
        alive[key] = storage.nbytes()
        weakref.finalize(storage, alive.pop, key)
        most = max(most, sum(alive.values()))
        return tensor

    model = weights_from(tiny.hf_directory("llama", delta=0.05))
    adapter = weights_from(corpus.full_state("llama", tmp_path).path)
    monkeypatch.setattr(TensorFiles, "__getitem__", counted)
    base = base_view("llama")
    largest = {"model": 96 * 48 * 4, "adapter": 2 * 3 * 96 * 4}
    for name, weights in (("model", model), ("adapter", adapter)):
        most = 0
        for layer in range(2):
            for matrix in weights.matrices:
                weights.delta(layer, matrix, base)
        assert not alive
        assert 0 < most <= largest[name]


# --- from end to end -------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"tokens": tiny.tokens(6, 12), "ranks": [4], "groups": 3, "progress": False}


def analyzed(base: Any, aligned: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return analyze_pair(base, aligned, **OPTIONS, **options)


def same_numbers(ours: Any, theirs: Any) -> None:
    for column in ("fraction", "delta_norm", "delta_relative_norm"):
        np.testing.assert_allclose(ours.table[column], theirs.table[column], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_qlora_adapter(kind: str, tmp_path: Path) -> None:
    """Trained on a quantised base that is somewhere else, saved in bfloat16 by unsloth; the base in memory is a
    HookedTransformer as well as a Bridge."""
    written = corpus.unsloth("llama", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    base = tiny.build("llama", kind)
    result = analyzed(base, written.path)
    source = weights_from(written.path, base)
    moved = tiny.bridge("llama")
    with torch.no_grad():
        for layer in range(2):
            for matrix in source.matrices:
                ModelView(moved).weight(layer, matrix).add_(source.delta(layer, matrix))
    same_numbers(result, analyzed(base, moved))
    changed = result.table[result.table["matrix"].isin(["W_Q", "W_K", "W_O", "W_in", "W_out"])]
    assert (changed["delta_norm"] > 0).all()
    assert any("trained from 'unsloth/some-model-bnb-4bit'" in note for note in result.notes)


def test_a_chat_adapter_with_its_embeddings(tmp_path: Path) -> None:
    """Two tokens added, embedding and head trained whole: the matrices are read, the rest is in other_changes."""
    import peft

    model = corpus.hf_model("llama")
    model.resize_token_embeddings(98)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    base = tiny.bridge("llama")
    ours, theirs = (analyzed(base, tmp_path / name, matrices=["W_Q", "W_V"]) for name in ("adapter", "merged"))
    same_numbers(ours, theirs)
    for parameter in ("embed.W_E", "unembed.W_U"):
        rows = [r.other_changes.set_index("parameter").loc[parameter] for r in (ours, theirs)]
        assert rows[0]["delta_norm"] == pytest.approx(rows[1]["delta_norm"], rel=1e-6)
        assert rows[0]["delta_norm"] > 0.1
    assert any("the aligned model has 2 more tokens than the base (98 and 96)" in note for note in ours.notes)


def test_a_merged_folder_with_leftovers(tmp_path: Path) -> None:
    aligned = corpus.hf_model("llama", delta=0.05)
    written = corpus.left_over_factors(aligned, tmp_path)
    options: dict[str, Any] = {"matrices": ["W_Q", "W_in"]}
    result = analyzed(tiny.bridge("llama"), written.path, **options)
    same_numbers(result, analyzed(tiny.bridge("llama"), tiny.bridge("llama", delta=0.05), **options))
    assert any("2 tensors of" in note and "left aside" in note for note in result.notes)
