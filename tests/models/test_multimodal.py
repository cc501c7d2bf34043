"""The language model inside a multimodal one: from folders, from adapters, live; nothing is installed for it."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tl_asymmetry import weights_from
from tl_asymmetry.models.loading import bridge_around, open_model
from tl_asymmetry.models.view import ModelView

peft = pytest.importorskip("peft")

_TEXT: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, head_dim=12,
)  # fmt: skip
_VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
_QWEN_VISION: dict[str, Any] = dict(
    depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48, patch_size=14
)
_QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 3], "rope_theta": 10000.0}}


def _gemma3() -> Any:
    from transformers import Gemma3Config

    text = _TEXT | dict(query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"])
    return Gemma3Config(
        text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=10, boi_token_index=11,
        eoi_token_index=12, tie_word_embeddings=True,
    )  # fmt: skip


def _mistral3() -> Any:
    from transformers import Mistral3Config

    vision = _VISION | dict(head_dim=16, model_type="pixtral")
    text = _TEXT | {"model_type": "mistral"}
    return Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig

    text = {name: value for name, value in _TEXT.items() if name != "head_dim"} | _QWEN_ROPE
    return Qwen2_5_VLConfig(text_config=text, vision_config=_QWEN_VISION, image_token_id=10, video_token_id=11)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig

    vision = _QWEN_VISION | {"deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=_TEXT | _QWEN_ROPE, vision_config=vision, image_token_id=10, video_token_id=11)


CONFIGS = {"gemma3": _gemma3, "mistral3": _mistral3, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}
SAME_CLASS = {"gemma3": "Gemma3", "mistral3": "Mistral", "qwen2_5_vl": "Qwen2", "qwen3_vl": "Qwen3"}


@functools.cache
def multimodal(name: str, delta: float = 0.0) -> Path:
    """A folder with a whole multimodal model."""
    from transformers import AutoModelForImageTextToText

    folder = Path(tempfile.mkdtemp(dir=tiny.hf_directory("gpt2").parent))
    with torch.random.fork_rng():
        model = AutoModelForImageTextToText.from_config(CONFIGS[name](), attn_implementation="eager")
    tiny.randomize_(model, 0)
    tiny.perturb_(model, delta, 1)
    model.save_pretrained(folder)
    return folder


def language_model(name: str, model: Any) -> ModelView:
    """The language model alone, in a class of its own."""
    import transformers

    kind = getattr(transformers, f"{SAME_CLASS[name]}ForCausalLM")
    fields = model.config.get_text_config().to_dict()
    fields.pop("rope_parameters"), fields.pop("model_type")
    fields["tie_word_embeddings"] = model.config.tie_word_embeddings
    with torch.random.fork_rng():
        alone = kind._from_config(kind.config_class(**fields), attn_implementation="eager")
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    alone.config.architectures = [kind.__name__]
    return ModelView(bridge_around(alone, "language model"))


def loaded(name: str, delta: float = 0.0) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(multimodal(name, delta), dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_reads_as_its_language_model(name: str) -> None:
    weights, truth = weights_from(multimodal(name, 0.05)), language_model(name, loaded(name, 0.05))
    assert weights.matrices == truth.matrices
    assert weights.tied == truth.tied
    for layer in range(2):
        for matrix in truth.matrices:
            assert torch.equal(weights.weight(layer, matrix), truth.weight(layer, matrix)), (layer, matrix)
    ours, theirs = weights.headless(include_tied=True), truth.headless(include_tied=True)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    apart = [note for note in weights.notes if "have no place in a language model of 2 layers" in note]
    assert len(apart) == 1  # all of the vision tower
    assert "vis" in apart[0]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_an_adapter_of_a_multimodal_model(name: str, tmp_path: Path) -> None:
    """Its factors in the vision tower are left aside; those in the language model are PEFT's merged change."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        targets = r".*(q_proj|down_proj|out_proj|linear_fc1)"
        model = peft.get_peft_model(loaded(name), peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        truth = language_model(name, model.merge_and_unload())
    base = language_model(name, loaded(name))
    for weights in (weights_from(tmp_path, multimodal(name)), weights_from(tmp_path, base)):
        for layer in range(2):
            for matrix in ("W_Q", "W_K", "W_out"):
                change = truth.weight(layer, matrix) - base.weight(layer, matrix)
                torch.testing.assert_close(weights.delta(layer, matrix), change, atol=5e-7, rtol=0)
                assert bool(change.any()) == (matrix != "W_K")
        assert sum("left aside" in note for note in weights.notes) == 1


def test_live_as_from_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torchvision that can be imported TransformerLens wraps the whole, and the view is the folder's."""
    import huggingface_hub

    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("something would be installed"))
    # TransformerLens 4 asks the hub for a processor, five minutes long where there is no network.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = loaded("gemma3", 0.05)
    model.set_attn_implementation("eager")
    view, weights = ModelView(bridge_around(model, "whole")), weights_from(multimodal("gemma3", 0.05))
    assert view.n_layers == weights.n_layers == 2
    for layer in range(2):
        for matrix in weights.matrices:
            assert torch.equal(weights.weight(layer, matrix), view.weight(layer, matrix)), (layer, matrix)
    same = weights_from(multimodal("gemma3", 0.05) / "model.safetensors", view)
    assert torch.equal(same.weight(1, "W_Q"), view.weight(1, "W_Q"))


@pytest.mark.skipif("torchvision" in sys.modules, reason="torchvision is there")
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens runs pip by itself where torchvision is missing, which may replace torch under a running one."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("something would be installed"))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    for boot in (lambda: open_model(multimodal(name)), lambda: bridge_around(loaded(name), "whole")):
        with pytest.raises(ValueError, match=r"^expected torchvision for the multimodal .*pip install torchvision"):
            boot()
    weights_from(multimodal(name))  # files need none of it
    language_model(name, loaded(name))  # and so does the language model alone, as the message says
