"""Weights in files are what a loaded model shows: every architecture, both kinds, bit for bit."""

from __future__ import annotations

import fnmatch
import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests import tiny
from tl_asymmetry import analyze_pair, weights_from
from tl_asymmetry.models.checks import check_pair
from tl_asymmetry.models.readers.blueprint import Blueprint, Skeleton
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.results.provenance import weights_hash

OPTIONS: dict[str, Any] = {"tokens": tiny.tokens(6, 12), "ranks": [4], "groups": 3, "progress": False}
DELTA = 0.05


def copy_of(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target


def rewrite(directory: Path, **changes: torch.Tensor | None) -> Path:
    """Change (or with None leave out) tensors of a single-file directory."""
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})
    return directory


def quiet(*arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return analyze_pair(*arguments, **{**OPTIONS, **options})


def same_tables(one: Any, other: Any, rtol: float = 1e-5) -> None:
    for name in ("table", "asymmetry", "circuits", "other_changes"):
        pd.testing.assert_frame_equal(
            getattr(one, name), getattr(other, name), rtol=rtol, atol=1e-6, check_exact=False, obj=name
        )


@functools.cache
def loaded(name: str, kind: str) -> tuple[Any, Any]:
    """A base, and its analysis with its aligned model."""
    base = tiny.build(name, kind)
    return base, quiet(base, tiny.build(name, kind, delta=DELTA))


@functools.cache
def in_files(name: str) -> Any:
    return weights_from(tiny.hf_directory(name, delta=DELTA))


# --- what a loaded model shows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_directory_reads_as_the_loaded_model(name: str, kind: str) -> None:
    weights, view = in_files(name), ModelView(tiny.build(name, kind, delta=DELTA))
    assert weights.matrices == view.matrices
    for field in (
        "n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "norm", "positional",
        "parallel", "causal", "tied", "dtype",
    ):  # fmt: skip
        assert getattr(weights, field) == getattr(view, field), field
    for layer in range(view.n_layers):
        for matrix in view.matrices:
            assert torch.equal(weights.weight(layer, matrix), view.weight(layer, matrix)), (layer, matrix)
    for tied in (False, True):
        ours, theirs = weights.headless(include_tied=tied), view.headless(include_tied=tied)
        missing = set(theirs) ^ set(ours)
        assert not missing or all("experts" in key or ".mlp." in key for key in missing)
        for key in set(ours) & set(theirs):
            assert torch.equal(ours[key], theirs[key]), key
    if name != "mixtral":
        assert weights_hash(weights) == weights_hash(view)
    if kind == "bridge":  # the other kind has a tokenizer made in memory
        assert not check_pair(view, weights)


def _bloom() -> Any:
    from transformers import BloomConfig

    return BloomConfig(hidden_size=48, n_layer=2, n_head=4, vocab_size=96, bos_token_id=0, eos_token_id=1)


def _falcon() -> Any:
    from transformers import FalconConfig

    return FalconConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, multi_query=True, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip


def _phi3() -> Any:
    from transformers import Phi3Config

    return Phi3Config(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


@pytest.mark.parametrize("config", [_bloom, _falcon, _phi3])
def test_architectures_that_no_table_was_made_for(config: Any, tmp_path: Path) -> None:
    """Other fusions than those above: interleaved with alibi, multi-query, gate and input in one."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    tiny.randomize_(model, 0)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    view = ModelView(TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=torch.float32))
    assert weights_hash(weights_from(tmp_path)) == weights_hash(view)


def _kept(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_blueprint_keeps_no_more_than_its_own_numbers() -> None:
    """A view of row numbers would keep a tensor as large as its matrix for as long as the source is open."""
    blueprint = Blueprint(Skeleton(AutoConfig.from_pretrained(tiny.hf_directory("llama"))))
    assert all(_kept(layout.index) for layout in blueprint.layouts.values())


@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", tiny.KINDS[0]), ("neox", "bridge"), ("gemma2", tiny.KINDS[0]), ("mixtral", "bridge")]
)
def test_the_analysis_is_that_of_two_loaded_models(name: str, kind: str) -> None:
    base, expected = loaded(name, kind)
    streamed = quiet(base, tiny.hf_directory(name, delta=DELTA))
    if name == "mixtral":  # experts are converted on loading, so that transformers does it
        assert any("was loaded whole" in note for note in streamed.notes)
    same_tables(streamed, expected)
    assert streamed.config["models"]["aligned"]["kind"] == "Hugging Face weights"


def test_base_weights_against_themselves() -> None:
    base = tiny.bridge("llama")
    with pytest.warns(UserWarning, match="the two models are identical, weight for weight"):
        result = analyze_pair(base, tiny.hf_directory("llama"), **OPTIONS, matrices=["W_Q"])
    assert result.table["fraction"].isna().all()


def test_shards_and_single_files_are_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny.hf_directory("llama", delta=DELTA)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "torch").mkdir()
    shutil.copy(directory / "config.json", tmp_path / "torch")
    torch.save(load_file(directory / "model.safetensors"), tmp_path / "torch" / "pytorch_model.bin")
    expected = weights_hash(weights_from(directory))
    for source in (
        tmp_path / "shards", tmp_path / "shards" / "model.safetensors.index.json", tmp_path / "torch",
        directory / "model.safetensors", str(directory),
    ):  # fmt: skip
        assert weights_hash(weights_from(source)) == expected


def test_a_file_by_itself_takes_the_bases_architecture(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    shutil.copy(tiny.hf_directory("neox", delta=DELTA) / "model.safetensors", file)
    with pytest.raises(ValueError, match=r"expected config.json \(or adapter_config.json\) beside .*; pass the dir"):
        weights_from(file)
    base, expected = loaded("neox", "bridge")
    same_tables(quiet(base, file), expected)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_the_base_models_prefix(tmp_path: Path, prefix: str) -> None:
    """GPT-2 on the Hub has neither prefix nor head, but buffers of an old version."""
    directory = copy_of(tiny.hf_directory("gpt2", delta=DELTA), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    renamed = {prefix + name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    renamed |= {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}
    save_file(renamed, directory / "model.safetensors")
    assert weights_hash(weights_from(directory)) == weights_hash(weights_from(tiny.hf_directory("gpt2", delta=DELTA)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_storage(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = copy_of(tiny.hf_directory("llama", delta=DELTA), tmp_path / "m")
    stored = {name: t.to(dtype) for name, t in load_file(directory / "model.safetensors").items()}
    save_file(stored, directory / "model.safetensors")
    weights = weights_from(directory)
    W = weights.weight(1, "W_Q")
    assert W.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    original = weights_from(tiny.hf_directory("llama", delta=DELTA)).weight(1, "W_Q")
    assert torch.equal(W, original.to(dtype).to(W.dtype))
    base = tiny.bridge("llama")
    if dtype == torch.bfloat16:
        # The file's 16 bits are found in its numbers, whatever they were loaded as.
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(tmp_path / "wide")
        narrow, wide = (quiet(base, of, matrices=["W_Q", "W_O"]) for of in (directory, tmp_path / "wide"))
        assert narrow.table["rounding_share"].max() > 0
        same_tables(narrow, wide, rtol=1e-12)
        assert narrow.config["models"]["aligned"]["storage"] == "torch.bfloat16"


def test_delta_and_its_table() -> None:
    base, weights = tiny.bridge("qwen3"), weights_from(tiny.hf_directory("qwen3", delta=DELTA))
    view, other = ModelView(base), ModelView(tiny.bridge("qwen3", delta=DELTA))
    with pytest.raises(ValueError, match="expected a base to subtract for Hugging Face weights, got none; pass base="):
        weights.delta(0, "W_Q")
    table = weights.table(base).set_index(["layer", "matrix", "head"])
    for matrix in view.matrices:
        ΔW = weights.delta(1, matrix, base)
        assert torch.equal(ΔW, other.weight(1, matrix) - view.weight(1, matrix))
        for source in (view, weights_from(tiny.hf_directory("qwen3"))):
            assert torch.equal(weights.delta(1, matrix, source), ΔW)
        heads = [(None, ΔW, view.weight(1, matrix))] if ΔW.ndim == 2 else [
            (h, ΔW[h], view.weight(1, matrix)[h]) for h in range(len(ΔW))
        ]  # fmt: skip
        for head, δ, W in heads:
            row = table.loc[(1, matrix, pd.NA if head is None else head)]
            σ = torch.linalg.svdvals(δ.double()).square()
            p = σ / σ.sum()
            assert row["delta_norm"] == pytest.approx(σ.sum().sqrt().item(), rel=1e-5)
            assert row["delta_relative_norm"] == pytest.approx((δ.norm() / W.norm()).item(), rel=1e-5)
            assert row["stable_rank"] == pytest.approx((1 / p.max()).item(), rel=1e-5)
            assert row["effective_rank"] == pytest.approx(torch.special.entr(p).sum().exp().item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"expected a base with W_K of shape \(2, 48, 16\), got \(2, 48, 12\); pass"):
        weights.delta(0, "W_K", tiny.bridge("llama"))
    with pytest.raises(ValueError, match="expected a layer from 0 to 1, got 2; pass"):
        weights.weight(2, "W_Q")
    with pytest.raises(ValueError, match="expected a matrix among W_Q, .*, got 'W_E'; pass"):
        weights.weight(0, "W_E")
    assert weights_from(weights) is weights
    assert "qwen" not in repr(weights) or "2 layers, d_model 48" in repr(weights)


def test_nothing_is_left_behind() -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    Blueprint(Skeleton(tiny.CONFIGS["gpt2"]()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.zeros(1).device.type == "cpu"


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_missing_parameter(tmp_path: Path) -> None:
    directory = copy_of(tiny.hf_directory("llama", delta=DELTA), tmp_path / "m")
    rewrite(directory, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(ValueError, match="got none for 1 of them, the first being model.layers.1.mlp.up_proj.weight;"):
        weights_from(directory)


def test_a_parameter_of_another_shape(tmp_path: Path) -> None:
    directory = copy_of(tiny.hf_directory("llama", delta=DELTA), tmp_path / "m")
    rewrite(directory, **{"model.layers.1.self_attn.k_proj.weight": torch.zeros(12, 48)})
    with pytest.raises(ValueError, match=r"expected model.layers.1.self_attn.k_proj.weight of shape \(24, 48\) by the"):
        weights_from(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_one_tensor(tmp_path: Path, value: float) -> None:
    directory = copy_of(tiny.hf_directory("neox", delta=DELTA), tmp_path / "m")
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    broken = load_file(directory / "model.safetensors")[name].clone()
    broken[20, 3] = value  # rows 12 to 23 are head 0's keys
    rewrite(directory, **{name: broken})
    with pytest.raises(ValueError, match="1 NaN|0 NaN and 1 infinite") as caught:
        quiet(tiny.bridge("neox"), directory)
    assert "blocks.1.attn.W_K of the aligned model" in str(caught.value)


def test_quantised_weights(tmp_path: Path) -> None:
    directory = copy_of(tiny.hf_directory("llama", delta=DELTA), tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="expected weights without quantisation, got"):
        weights_from(directory)
    (directory / "config.json").write_text(json.dumps(config))
    rewrite(directory, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 48, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"got torch.int8 in model.layers.0.mlp.up_proj.weight; pass weights saved"):
        weights_from(directory).weight(0, "W_in")


def test_another_architecture_and_other_activations() -> None:
    base = tiny.bridge("llama")
    with pytest.raises(ValueError, match="expected two models of one architecture, got n_kv_heads"):
        quiet(base, tiny.hf_directory("gpt2"))
    for options in ({"activations": "aligned"}, {"activations": "both"}, {"sensitivity": True}):
        with pytest.raises(ValueError, match="expected an aligned model that can be run, got weights alone .*; pass a"):
            quiet(base, weights_from(tiny.hf_directory("llama", delta=DELTA)), **options)


def test_weights_that_belong_to_something_else_are_doubted() -> None:
    with pytest.warns(UserWarning, match="point elsewhere than the base's .* Pass the base they were trained from"):
        result = analyze_pair(tiny.bridge("llama"), tiny.hf_directory("llama", seed=7), **OPTIONS, matrices=["W_Q"])
    assert any("point elsewhere" in note for note in result.notes)


def test_a_configuration_transformers_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a model_type that transformers .* knows in"):
        weights_from(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="; pass "):
        weights_from(tmp_path)


def test_a_broken_tokenizer_is_said(tmp_path: Path) -> None:
    directory = copy_of(tiny.hf_directory("llama"), tmp_path / "m")
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(Exception, match="tokenizer|EOF|expected"):
        weights_from(directory)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_a_revision_of_a_local_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a name on the Hub for revision='step1', got the local"):
        weights_from(tmp_path, revision="step1")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("source", [None, 3, [1]])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(ValueError, match=f"a state dict or a WeightSource, got {type(source).__name__}"):
        weights_from(source)


def test_a_hub_name_is_downloaded_by_the_hubs_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str], token: str | None) -> str:
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in allow_patterns)
        return str(tiny.hf_directory("llama", delta=DELTA))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert weights_from("someone/some-model", revision="step3").n_layers == 2
    assert asked == [("someone/some-model", "step3")]

    def missing(*_: Any, **__: Any) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ValueError, match="expected a local path or a name that the Hub knows, got 'someone/gone': no"):
        weights_from("someone/gone")


class Hub:
    """A repository in the place of the Hub's client: what matches the patterns is copied into a cache."""

    def __init__(self, files: Path, cache: Path, error: Exception | None = None) -> None:
        self.files, self.cache, self.error = files, cache, error
        self.asked: list[dict[str, Any]] = []

    def __call__(self, name: str, **options: Any) -> str:
        self.asked.append(options)
        if self.error is not None:
            raise self.error
        self.cache.mkdir(exist_ok=True)
        for path in self.files.rglob("*"):
            relative = path.relative_to(self.files).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(relative, pattern) for pattern in options["allow_patterns"]):
                (self.cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / relative)
        return str(self.cache)


def test_a_repository_of_torch_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = tiny.hf_directory("llama", delta=DELTA)
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(source / "config.json", files)
    (files / "modeling.py").write_text("raise SystemExit\n")
    torch.save(load_file(source / "model.safetensors"), files / "pytorch_model.bin")
    torch.save({"lr": 1}, files / "training_args.bin")
    hub = Hub(files, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert weights_hash(weights_from("someone/torch", token="hf_mine")) == weights_hash(weights_from(source))
    assert [asked["token"] for asked in hub.asked] == ["hf_mine"] * 2  # first without torch's files, then with them
    assert not any(pattern.endswith(".bin") for pattern in hub.asked[0]["allow_patterns"])
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_folder_inside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = tiny.hf_directory("llama", delta=DELTA)
    files = tmp_path / "files"
    shutil.copytree(source, files / "step500")
    (files / "README.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(files, tmp_path / "cache"))
    expected = weights_hash(weights_from(source))
    assert weights_hash(weights_from("someone/run", subfolder="step500")) == expected
    assert not (tmp_path / "cache" / "README.json").exists()
    assert weights_hash(weights_from(files, subfolder="step500")) == expected  # and of a local one
    for place in ("someone/run", str(files)):
        with pytest.raises(ValueError, match="expected a folder 'step7' in '.*', got none; pass one that"):
            weights_from(place, subfolder="step7")


def test_what_the_hub_answers_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such name, no such revision, no access, offline with nothing there, and offline with a part of it."""
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/someone/model"))
    told: list[tuple[Exception, str]] = [
        (errors.RepositoryNotFoundError("no", response=answer), "a name that the Hub knows, .* pass token= where the"),
        (
            errors.RevisionNotFoundError("no", response=answer),
            "expected a revision of .*, got 'step3'; pass",
        ),
        (
            errors.GatedRepoError("no", response=answer),
            "expected access to .*, got a gated .*; ask for access",
        ),
        (
            errors.LocalEntryNotFoundError("no"),
            "at revision 'step3' in the cache or a network .*, got neither; pass",
        ),
    ]
    for error, text in told:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, tmp_path / "cache", error))
        with pytest.raises(ValueError, match=text):
            weights_from("someone/model", revision="step3")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tiny.hf_directory("llama") / "config.json", half)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(half, tmp_path / "part"))
    with pytest.raises(ValueError, match="expected weights of .*, got config.json: a download that was"):
        weights_from("someone/model")


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "gemma2"])
def test_a_hooked_transformers_state_dict(name: str, tmp_path: Path) -> None:
    base, aligned = tiny.hooked(name), tiny.hooked(name, delta=DELTA)
    state = {key: value.contiguous() for key, value in aligned.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    view = ModelView(aligned)
    for source in (state, tmp_path / "state.safetensors"):
        weights = weights_from(source, base=base)
        assert weights_hash(weights) == weights_hash(view)
        # what a pair is asked beside its matrices
        for tied in (False, True):
            ours, theirs = weights.headless(include_tied=tied), view.headless(include_tied=tied)
            assert set(ours) == set(theirs)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    if name in ("gpt2", "gemma2"):
        base, expected = loaded(name, "hooked")
        same_tables(quiet(base, state if name == "gpt2" else source), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="expected TransformerLens's parameter names"):
        weights_from({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    del state["blocks.1.attn.W_Q"]
    with pytest.raises(ValueError, match=r"expected the attention matrices of every layer"):
        weights_from(state, base=base)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize(
    "flag", ["fold_ln", "center_writing_weights", "center_unembed", "refactor_factored_attn_matrices"]
)
def test_processed_state_dicts_are_refused(flag: str) -> None:
    state = tiny.hooked("gpt2", delta=DELTA, **{flag: True}).state_dict()
    with pytest.raises(ValueError, match=f"expected raw weights, got .*{flag}.*; pass .*(processing)"):
        quiet(tiny.hooked("gpt2"), state)
