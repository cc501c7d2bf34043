"""Models by their folder or name on the Hub: opened as they are stored, refused in words that are true."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests import tiny
from tests.models.test_sites import BERT, LLAMA
from tests.models.test_weights import Hub
from tests.reliability.test_no_code_from_files import CODE
from tl_asymmetry import ModelView, PairAnalysis, activation_shift, analyze_pair, rank_one_study, weights_from
from tl_asymmetry.cli import main
from tl_asymmetry.geometry import capture_moments
from tl_asymmetry.models import loading
from tl_asymmetry.models.huggingface import PLAIN
from tl_asymmetry.models.loading import open_model, opened_model

DELTA = 0.03
OPTIONS: dict[str, Any] = {"tokens": tiny.tokens(3, 12), "ranks": [4], "groups": 1, "progress": False}


@pytest.fixture(scope="module")
def folders() -> tuple[Path, Path]:
    return tiny.hf_directory("llama"), tiny.hf_directory("llama", delta=DELTA)


def test_two_folders_give_what_two_models_give(folders: tuple[Path, Path]) -> None:
    options: dict[str, Any] = OPTIONS | {"matrices": ["W_Q", "W_in", "W_out"]}
    by_folder = analyze_pair(*map(str, folders), **options)
    loaded = analyze_pair(*map(open_model, folders), **options)
    pd.testing.assert_frame_equal(by_folder.table, loaded.table)
    assert [by_folder.config["models"][side]["name"] for side in ("base", "aligned")] == [f.name for f in folders]
    variants: dict[str, Any] = OPTIONS | {"activations": "both", "sensitivity": True, "matrices": ["W_K", "W_O"]}
    both = analyze_pair(*folders, **variants)
    of_models = analyze_pair(*map(open_model, folders), **variants)
    pd.testing.assert_frame_equal(both.table, of_models.table)


def test_other_analyses_take_folders(folders: tuple[Path, Path]) -> None:
    models = [open_model(folder) for folder in folders]
    options: dict[str, Any] = {"tokens": tiny.tokens(2, 8), "progress": False}
    shifts = [activation_shift(*pair, **options) for pair in (folders, models)]
    pd.testing.assert_frame_equal(shifts[0].table, shifts[1].table)
    studies = [rank_one_study(*pair, sites="L0H1.W_O", draws=3, **options) for pair in (folders, models)]
    pd.testing.assert_frame_equal(studies[0].table, studies[1].table)


def test_the_command_line_takes_a_folder_as_the_base(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairAnalysis, "to_html", lambda _self, path: path)  # pages are drawn elsewhere
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n", encoding="utf-8")
    words = ["analyze", *map(str, folders), "--texts", str(tmp_path / "texts.txt"), "--ranks", "1", "--groups", "1"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    config = PairAnalysis.load(tmp_path / "out").config
    assert [config["models"][side]["name"] for side in ("base", "aligned")] == [f.name for f in folders]


def test_a_model_is_opened_in_the_dtype_that_it_is_stored_in(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    view = ModelView(tmp_path)
    assert (view.dtype, view.kind, view.tokenizer) == (torch.bfloat16, "TransformerBridge", None)
    wide = ModelView(model.float())
    like = ModelView(tmp_path, like=wide)
    assert (like.dtype, like.kind) == (torch.float32, PLAIN)
    assert torch.equal(like.weight(0, "W_Q"), view.weight(0, "W_Q").float())
    assert not like.model.training


def test_a_name_on_the_hub(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folders[0], tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    view = ModelView("someone/base")
    assert view.name == "someone/base"
    assert view.tokenizer.encode("w1") == ModelView(folders[0]).tokenizer.encode("w1")
    assert torch.equal(view.weight(1, "W_out"), ModelView(folders[0]).weight(1, "W_out"))
    assert not any(pattern.endswith(".py") for asked in hub.asked for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["./nowhere", "no/such/folder", "model.safetensors", "a name with spaces"])
def test_what_is_no_folder_and_no_name(name: str, folders: tuple[Path, Path]) -> None:
    for pair in ((name, folders[1]), (folders[0], name)):
        with pytest.raises(ValueError, match=r"expected an existing directory or a name on the Hub, got .*; pass the"):
            analyze_pair(*pair, **OPTIONS)


def test_code_of_its_own_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    shutil.copytree(tiny.hf_directory("llama"), tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(CODE)
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "unheard_of"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected .*trust_remote_code=True"):
        analyze_pair(tmp_path / "model", tiny.hf_directory("llama"), **OPTIONS)
    assert not list(tmp_path.rglob("ran"))


# --- parts of a model -------------------------------------------------------------------------------------------------


def test_a_folder_without_all_of_its_weights_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers would draw what is missing at random."""
    shutil.copytree(folders[0], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"expected every parameter of .*, got none for 1 .*layers.1.mlp.up_proj.weight"
    ):
        ModelView(tmp_path / "model")


HEADLESS = {
    "sentences": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "rewards": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=1)),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_an_unembedding_is_held_against_its_streams(name: str, tmp_path: Path) -> None:
    """Its head is not drawn at random, and nothing is said of predictions that it does not make."""
    model = HEADLESS[name]().eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "aligned")
    view = ModelView(tmp_path / "base")
    assert not view.has_unembedding
    result = analyze_pair(tmp_path / "base", tmp_path / "aligned", **OPTIONS | {"tokens": tiny.tokens(3, 8) % 60})
    assert set(result.table["subspace"]) == {
        "attn_in",
        "mlp_in",
        *{"resid_mid", "resid_post"} & set(result.table["subspace"]),
    }
    assert result.table["fraction"].between(0, 1).all()
    assert "rediction" not in result.summary()
    with pytest.raises(ValueError, match="expected subspaces among"):
        analyze_pair(tmp_path / "base", tmp_path / "aligned", subspaces="prediction", **OPTIONS)


# --- what TransformerLens makes of it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["other logits", "does not run"])
def test_a_bridge_that_computes_otherwise_is_not_taken(
    fault: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = loading.bridge_around

    def wrong(model: Any, *arguments: Any, **options: Any) -> Any:
        bridge = wrap(model, *arguments, **options)
        if fault == "other logits":
            bridge.blocks[0].ln1.register_forward_hook(lambda module, args, out: 2 * out)
        else:
            bridge.blocks[0].register_forward_pre_hook(lambda module, args: args[0].nothing)
        return bridge

    monkeypatch.setattr(loading, "bridge_around", wrong)
    with pytest.warns(UserWarning, match=f"is read as transformers has it, since its TransformerBridge .*{fault}"):
        view = ModelView(folders[0])
    assert view.kind == PLAIN
    assert view.tokenizer is not None
    assert fault in view.notes[0]
    own = transformers.AutoModelForCausalLM.from_pretrained(folders[0], attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(view(tiny.tokens()), own(tiny.tokens()).logits)


def test_what_transformer_lens_does_not_know_is_read_as_transformers_has_it(tmp_path: Path) -> None:
    config = transformers.Lfm2Config(**LLAMA | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3})
    transformers.Lfm2ForCausalLM(config).eval().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, notes = opened_model(tmp_path)
    view = ModelView(model)
    assert notes == ()
    assert view.tokenizer is not None
    assert view.self_check(tiny.tokens() % view.d_vocab) < 1e-5


# --- quantised --------------------------------------------------------------------------------------------------------


class Int8(nn.Linear):
    """A linear map kept in 8 bits with one scale, as quantisers keep it."""

    def __init__(self, linear: nn.Linear, *, packed: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().max() / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight.flatten()[::2].reshape(-1, 1) if packed else weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x) * self.scale).mT


def quantised(folder: Path, *, packed: bool = False) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Int8(module, packed=packed))
    return model


def test_a_quantised_base_gives_activations_and_no_deltas(folders: tuple[Path, Path]) -> None:
    model = quantised(folders[0])
    moments = capture_moments(model, "attn_in", tokens=tiny.tokens(), progress=False)["attn_in", 1]
    whole = capture_moments(open_model(folders[0]), "attn_in", tokens=tiny.tokens(), progress=False)["attn_in", 1]
    assert 0 < (moments.second_moment - whole.second_moment).norm() < 0.1 * whole.second_moment.norm()
    with pytest.raises(ValueError, match=r"expected weights that can be subtracted, got the quantised .*torch.int8 in"):
        analyze_pair(model, folders[1], **OPTIONS)


def test_packed_weights_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"expected matrices with an entry .*q_proj packed into .*; pass the model loaded"
    ):
        ModelView(quantised(folders[0], packed=True))


def test_a_quantised_folder_is_refused_as_a_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^expected .*(quantis|bitsandbytes).*; pass"):
        analyze_pair(tmp_path / "model", folders[1], **OPTIONS)
    with pytest.raises(ValueError, match="expected weights without quantisation"):
        weights_from(tmp_path / "model")
