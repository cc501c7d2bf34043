"""What cannot be read is named for what it is, and the advice that the message gives works."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.models import corpus
from tl_asymmetry import weights_from
from tl_asymmetry.models.view import ModelView

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


def refused(source: Any, text: str, base: Any = None) -> None:
    with pytest.raises(ValueError, match=text) as refusal:
        weights_from(source, base)
    assert re.fullmatch(r"expected .*, got .*; (pass|put|connect) .*", str(refusal.value))


def same(ours: Any, theirs: Any) -> None:
    """Two sources show the same change of the tiny Llama."""
    base = ModelView(tiny.bridge("llama"))
    for matrix in ("W_Q", "W_out"):
        torch.testing.assert_close(ours.delta(1, matrix, base), theirs.delta(1, matrix, base), atol=5e-7, rtol=0)


@pytest.fixture(name="aligned")
def aligned_fixture() -> Path:
    return tiny.hf_directory("llama", delta=0.05)


@pytest.fixture(name="adapter")
def adapter_fixture(tmp_path: Path) -> corpus.Adapted:
    return corpus.adapted("llama", tmp_path / "adapter")


# --- advice that is taken ---------------------------------------------------------------------------------------------


def test_a_folder_of_checkpoints(tmp_path: Path, aligned: Path) -> None:
    for step in (5, 10):
        shutil.copytree(aligned, tmp_path / f"checkpoint-{step}")
    refused(tmp_path, r"got a folder of checkpoints \(checkpoint-5 to checkpoint-10\); pass one of them")
    same(weights_from(tmp_path / "checkpoint-10"), weights_from(aligned))


def test_factors_without_their_configuration(adapter: corpus.Adapted) -> None:
    """The scale is not in the tensors: nothing is guessed."""
    config = adapter.folder / "adapter_config.json"
    before = weights_from(adapter.folder)
    held = config.read_text()
    config.unlink()
    refused(adapter.folder / ADAPTER, "expected adapter_config.json beside the factors in")
    refused(adapter.folder, "expected adapter_config.json beside the factors in")
    config.write_text(held)
    same(weights_from(adapter.folder / ADAPTER), before)
    refused_model = adapter.folder.with_name("merged")
    corpus_model = adapter.model.merge_and_unload()
    corpus_model.save_pretrained(refused_model)  # the other advice
    same(weights_from(refused_model), before)


def test_a_model_with_an_adapter_beside_it(adapter: corpus.Adapted, aligned: Path) -> None:
    """transformers would add the one to the other, a merged folder has it already: which is meant cannot be told."""
    alone = weights_from(adapter.folder)
    for name in ("config.json", MODEL):
        shutil.copy(aligned / name, adapter.folder)
    refused(adapter.folder, r"got both .*; pass the file of the one that is meant \(adapter_model.* or model.*\)")
    same(weights_from(adapter.folder / ADAPTER), alone)
    same(weights_from(adapter.folder / MODEL), weights_from(aligned))


def test_several_adapters_of_which_none_is_the_default(tmp_path: Path) -> None:
    made = corpus.adapted("llama", tmp_path / "one")
    expected = weights_from(tmp_path / "one")
    made.model.add_adapter("other", made.model.peft_config["default"])
    state = {
        name.replace("default", "first"): tensor.clone()
        for name, tensor in made.model.state_dict().items()
        if "lora_" in name
    }
    two = tmp_path / "two"
    two.mkdir()
    shutil.copy(tmp_path / "one" / "adapter_config.json", two)
    save_file(state, two / ADAPTER)
    refused(two, "expected one adapter, got 2: first, other; pass the folder of one of them, saved with")
    made.model.save_pretrained(tmp_path / "again", selected_adapters=["default"])
    same(weights_from(tmp_path / "again"), expected)


def test_parts_of_zero3(tmp_path: Path, adapter: corpus.Adapted, aligned: Path) -> None:
    state = load_file(aligned / MODEL)
    folder = tmp_path / "model"
    shutil.copytree(aligned, folder)
    save_file({name: torch.zeros(0) for name in state}, folder / MODEL)
    refused(folder, r"got \d+ empty ones, .*DeepSpeed ZeRO-3 .*; pass the folder that zero_to_fp32.py writes")
    torch.save(state, folder / "pytorch_model.bin")  # what zero_to_fp32.py writes
    (folder / MODEL).unlink()
    same(weights_from(folder), weights_from(aligned))
    expected = weights_from(adapter.folder)
    tensors = load_file(adapter.folder / ADAPTER)
    save_file({name: torch.zeros(0) for name in tensors}, adapter.folder / ADAPTER)
    refused(adapter.folder, r"got \d+ empty ones, .*; pass the adapter saved with its parameters gathered")
    save_file(tensors, adapter.folder / ADAPTER)
    same(weights_from(adapter.folder), expected)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (["model.Q4_K_M.gguf"], "a GGUF file of llama.cpp"),
        (["__0_0.distcp", ".metadata"], "shards of torch.distributed.checkpoint"),
        (["global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "a DeepSpeed ZeRO checkpoint"),
        (["tf_model.h5"], "weights of TensorFlow or Flax"),
        (["optimizer.pt", "scheduler.pt"], "the state of an optimiser alone"),
    ],
)
def test_files_of_others(tmp_path: Path, aligned: Path, files: list[str], what: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"GGUF")
    refused(tmp_path, f"expected weights as transformers or PEFT writes them, got {what}.*; pass")
    shutil.copy(aligned / "config.json", tmp_path)
    refused(tmp_path, f"got {what}.*; pass")
    if files[0].endswith(".gguf"):
        refused(tmp_path / files[0], what)
    shutil.copy(aligned / MODEL, tmp_path)  # what each of them is told to be made into
    same(weights_from(tmp_path), weights_from(aligned))


def test_shards_of_fsdp_made_into_one_file(tmp_path: Path, aligned: Path) -> None:
    """The remedy for .distcp, executed: torch's own conversion, and what it writes is read."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    shutil.copy(aligned / "config.json", tmp_path)
    dcp.save({"model": load_file(aligned / MODEL)}, checkpoint_id=str(tmp_path / "pytorch_model_fsdp_0"))
    refused(tmp_path, r"got shards of torch.distributed.checkpoint \(FSDP\) .*; pass one file .*dcp_to_torch_save")
    dcp_to_torch_save(tmp_path / "pytorch_model_fsdp_0", tmp_path / "pytorch_model.bin")
    same(weights_from(tmp_path), weights_from(aligned))


def test_a_linear_where_this_architecture_has_a_conv1d(tmp_path: Path) -> None:
    """nanoGPT's layout of GPT-2: seen by its shapes, and right once it is turned."""
    source = tiny.hf_directory("gpt2", delta=0.05)
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    state = load_file(source / MODEL)
    shutil.copy(source / "config.json", tmp_path)
    other = {f"_orig_mod.{n}": t.T.contiguous() if n.endswith(turned) else t for n, t in state.items()}
    torch.save({"model": other, "iter_num": 5}, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "its transpose, as other code than transformers lays it out; pass the weights")
    back = {n: t.T.contiguous() if n.endswith(turned) else t for n, t in other.items()}
    torch.save({"model": back, "iter_num": 5}, tmp_path / "ckpt.pt")
    assert torch.equal(weights_from(tmp_path / "ckpt.pt").weight(1, "W_K"), weights_from(source).weight(1, "W_K"))


def test_a_missing_parameter_is_shown_beside_the_name_most_like_it(tmp_path: Path, aligned: Path) -> None:
    shutil.copytree(aligned, tmp_path / "m")
    state = load_file(aligned / MODEL)
    save_file({name.replace("up_proj", "up_projection"): t for name, t in state.items()}, tmp_path / "m" / MODEL)
    refused(
        tmp_path / "m", r"first being model.layers.0.mlp.up_proj.weight \(the name .* is model.layers.0.mlp.up_proje"
    )


# --- an adapter and its base ------------------------------------------------------------------------------------------


def recorded(folder: Path, base: str | None) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return folder


def test_a_base_that_is_gone(adapter: corpus.Adapted) -> None:
    expected = weights_from(adapter.folder)
    recorded(adapter.folder, "/content/drive/llama")
    refused(adapter.folder, r"base '/content/drive/llama' to be found .*; pass weights_from\(adapter, base=")
    recorded(adapter.folder, None)
    refused(adapter.folder, r"got none, given or named by it; pass weights_from\(adapter, base=")
    for base in (tiny.bridge("llama"), tiny.CONFIGS["llama"](), tiny.hf_directory("llama")):
        same(weights_from(adapter.folder, base), expected)


def test_a_relative_base_is_one_from_the_adapter(adapter: corpus.Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights_from(adapter.folder)
    relative = os.path.relpath(tiny.hf_directory("llama"), adapter.folder)
    monkeypatch.chdir("/")
    same(weights_from(recorded(adapter.folder, relative)), expected)


def test_nothing_is_fetched_for_an_adapter_whose_base_is_given(
    adapter: corpus.Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    expected = weights_from(adapter.folder)
    asked: list[str] = []

    def fetch(name: Any, **_: Any) -> Any:
        asked.append(str(name))
        return tiny.CONFIGS["llama"]()

    recorded(adapter.folder, "someone/llama-bnb-4bit")
    bases = [tiny.build("llama", kind) for kind in tiny.KINDS]
    view = ModelView(bases[-1])
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fetch)
    for base in bases:
        assert torch.equal(weights_from(adapter.folder, base).delta(1, "W_Q"), expected.delta(1, "W_Q", view))
    assert not asked
    with pytest.warns(UserWarning, match="fetching the configuration of 'someone/llama-bnb-4bit', .*; with base= noth"):
        assert torch.equal(weights_from(adapter.folder).delta(1, "W_Q"), expected.delta(1, "W_Q"))
    assert asked == ["someone/llama-bnb-4bit"]


def test_a_quantised_base_recorded_is_no_obstacle(tmp_path: Path, adapter: corpus.Adapted) -> None:
    expected = weights_from(adapter.folder)
    base = tmp_path / "base"
    shutil.copytree(tiny.hf_directory("llama"), base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config))
    same(weights_from(recorded(adapter.folder, str(base))), expected)
    refused(base, "expected weights without quantisation, got .* with a quantization_config; pass the model saved")


def test_a_base_packed_into_four_bits_stands_beside_the_factors(tmp_path: Path) -> None:
    """The whole state of a QLoRA run: its frozen weights cannot be compared, its factors can be read."""
    expected = weights_from(corpus.adapted("llama", tmp_path / "a").folder)
    folder = corpus.full_state("llama", tmp_path / "full").path
    state = load_file(folder / ADAPTER)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("base_layer.weight"):
            packed[name] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
            packed[f"{name}.absmax"] = torch.zeros(tensor.numel() // 64)
    save_file(state | packed, folder / ADAPTER)
    weights = weights_from(folder, tiny.bridge("llama"))
    same(weights, expected)
    count = sum(name.endswith("base_layer.weight") for name in packed)
    assert any(
        f"{count} copies of frozen weights" in note and "without being compared" in note for note in weights.notes
    )


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma1", "neox"])
def test_a_hooked_transformer_is_a_base_as_a_bridge_is(architecture: str, tmp_path: Path) -> None:
    folder = recorded(corpus.adapted(architecture, tmp_path / "a", bias="all").folder, "/content/gone")
    hooked, bridge = tiny.hooked(architecture), tiny.bridge(architecture)
    ours, theirs = weights_from(folder, hooked), weights_from(folder, bridge)
    assert ours.matrices == theirs.matrices
    for layer in range(2):
        for matrix in ours.matrices:
            assert torch.equal(ours.delta(layer, matrix), theirs.delta(layer, matrix))
    mine, others = ours.headless(), theirs.headless()
    assert set(mine) == set(others)
    assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
def test_a_hooked_transformer_of_no_known_architecture(adapter: corpus.Adapted) -> None:
    recorded(adapter.folder, "/content/gone")
    toy = tiny.toy("rms_rotary_gated_gqa", "hooked")
    refused(adapter.folder, r"expected a base that says which .*; pass weights_from\(adapter, base", toy)
    held = weights_from(adapter.folder, tiny.CONFIGS["llama"]())
    assert held.onto(ModelView(toy)).delta(0, "W_Q").shape == (4, 48, 12)


# --- configurations that lie ------------------------------------------------------------------------------------------

LIES: dict[str, Any] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a layer too many": {"num_hidden_layers": 3},
    "a million million words": {"vocab_size": 10**12},
    "more words than there are": {"vocab_size": 10**7},
    "a string": {"hidden_size": "48"},
    "words for layers": {"num_hidden_layers": "two"},
    "a negative": {"num_attention_heads": -4},
    "zero": {"num_attention_heads": 0},
    "null": {"num_hidden_layers": None},
    "a fraction": {"intermediate_size": 96.5},
    "true": {"num_hidden_layers": True},
    "a list": {"hidden_size": [48]},
    "heads that do not divide": {"num_attention_heads": 5, "head_dim": None},
    "an object": {"vocab_size": {"a": 1}},
    "another model": {"model_type": "no_such_model"},
    "a model of another kind": {"model_type": "t5"},
    "code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
    "an activation that is none": {"hidden_act": "sinus"},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_configuration_that_lies_about_its_tensors(lie: str, tmp_path: Path, aligned: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(aligned, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LIES[lie]))
    (folder / "mine.py").write_text("raise SystemExit('run')\n")
    weights_from(aligned)  # libraries are imported once, not counted here
    start = time.process_time()
    with pytest.raises(ValueError, match="(?s)expected .*, got .*; pass ") as refusal:
        weights_from(folder)
    assert time.process_time() - start < 1
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"a": ' * 100_000 + "1" + "}" * 100_000, '{"num_hidden_layers": 1e400}', "\x00\xff"]
)
def test_a_configuration_that_is_none(text: str, tmp_path: Path, aligned: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(aligned, folder)
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="(?s)expected .*, got .*; pass ") as refusal:
        weights_from(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "lie",
    [
        {"r": "3"}, {"r": -3}, {"lora_alpha": "5"}, {"lora_alpha": None, "r": 0}, {"rank_pattern": {"(": 2}},
        {"alpha_pattern": {"q_proj": "much"}}, {"rank_pattern": [1]}, {"peft_type": 3}, {"peft_type": None},
        {"base_model_name_or_path": 7}, {"modules_to_save": "lm_head"},
    ],
)  # fmt: skip
def test_an_adapter_configuration_that_lies(lie: dict[str, Any], adapter: corpus.Adapted) -> None:
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lie))
    with pytest.raises(ValueError, match="(?s)expected .*, got .*; pass ") as refusal:
        weights_from(adapter.folder, tiny.CONFIGS["llama"]())
    assert str(adapter.folder) in str(refusal.value)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, aligned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asked about: standard input is not read."""
    folder = tmp_path / "m"
    shutil.copytree(aligned, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    path.write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    answers: Callable[[str], str] = lambda prompt: pytest.fail(f"asked {prompt!r}")  # noqa: E731
    monkeypatch.setattr("builtins.input", answers)
    refused(folder, "expected a model_type that transformers .* knows in .*is not run")
    assert not (tmp_path / "ran").exists()


def test_two_stacks_that_take_turns_are_no_one_stream():
    from transformers import AutoModelForCausalLM, HrmTextConfig

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    model = AutoModelForCausalLM.from_config(HrmTextConfig(**sizes, vocab_size=32), attn_implementation="eager")
    with pytest.raises(ValueError, match="expected one stack of layers, got another one like it in HrmText.*H_module"):
        ModelView(model)
