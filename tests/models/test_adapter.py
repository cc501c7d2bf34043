"""Adapters against PEFT itself: what merge_and_unload makes of a base is what our factors say."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tl_asymmetry import analyze_pair, weights_from
from tl_asymmetry.geometry import stable_rank
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.deltas import FactoredDelta, measure_change, measure_delta
from tl_asymmetry.results.provenance import weights_hash

peft = pytest.importorskip("peft")

OPTIONS: dict[str, Any] = {"tokens": tiny.tokens(6, 12), "ranks": [4], "groups": 3, "progress": False}

TARGETS = {
    "gpt2": ["c_attn", "c_fc", "attn.c_proj"],
    "neox": ["query_key_value", "dense", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "gate_proj"],
    "phi": ["q_proj", "dense", "fc1"],
    "gptj": ["k_proj", "v_proj", "fc_out"],
    "mixtral": ["q_proj", "v_proj"],
}
"""Modules to adapt: fused ones, Conv1D, grouped keys and values, the MLP."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r".*\.1\.self_attn\.o_proj": 5}, "alpha_pattern": {"k_proj": 7, "up_proj": 1}
    },
    "bias": {"bias": "all"},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "wide": {"r": 20},
    "whole": {"modules_to_save": ["v_proj"]},
}  # fmt: skip


@functools.cache
def adapted(name: str, variant: str = "plain") -> tuple[Path, Path]:
    """An adapter with random factors, and the merged model that PEFT makes of it, each in a directory."""
    from transformers import AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp(dir=tiny.hf_directory(name).parent))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(tiny.hf_directory(name), dtype=torch.float32)
        options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[name], "task_type": "CAUSAL_LM"}
        options |= {"fan_in_fan_out": name == "gpt2"} | VARIANTS[variant]
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter) if "lora_A" not in key else 0)
        model.save_pretrained(folder / "adapter")
        model.merge_and_unload().save_pretrained(folder / "merged")
        tiny.tokenizer().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def quiet(*arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return analyze_pair(*arguments, **{**OPTIONS, **options})


CASES = [(name, "plain") for name in TARGETS] + [("gpt2", "bias")]
CASES += [("llama", variant) for variant in VARIANTS if variant not in ("plain", "bias", "whole")]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_deltas_are_those_of_pefts_merged_model(name: str, variant: str) -> None:
    adapter, merged = adapted(name, variant)
    base, view = ModelView(tiny.bridge(name)), weights_from(merged)
    alone, bound = weights_from(adapter), weights_from(adapter, base=base)
    changed = 0
    for layer in range(2):
        for matrix in base.matrices:
            truth = view.weight(layer, matrix).double() - base.weight(layer, matrix).double()
            ΔW = alone.delta(layer, matrix)
            torch.testing.assert_close(ΔW.double(), truth, atol=3e-7, rtol=0)  # merged weights are rounded to float32
            torch.testing.assert_close(bound.weight(layer, matrix), view.weight(layer, matrix), atol=3e-7, rtol=0)
            changed += bool(ΔW.any())
            factors = alone.factors(layer, matrix)
            assert factors is not None
            assert factors.residual.shape[1] in (0, 2, 3, 5, 20)
            assert factors.residual.dtype == torch.float32
    assert changed >= 2 * len(TARGETS[name])
    ours, theirs = bound.headless(include_tied=True), view.headless(include_tied=True)
    for key in theirs:
        if key in ours:
            assert torch.equal(ours[key], theirs[key]), key
        elif "expert" not in key and ".mlp.gate" not in key:
            assert torch.equal(base.headless(include_tied=True)[key], theirs[key]), key
    assert (variant in ("bias", "saved")) == bool(len(ours))


def without_own_reference(frame: pd.DataFrame) -> pd.DataFrame:
    """An adapter is measured against what its A reads: excesses without that reference, and no tests.

    Those against chance go too: a subtraction of rounded weights leaves noise in every direction.
    """
    excess = ["excess", "excess_low", "excess_high"]
    frame = frame.drop(columns=["p_method", "isotropic_p", "isotropic_q", "excess_p", "excess_q"])
    frame[excess] = frame[excess].mul(frame["activation_matched"], axis=0)
    frame["flags"] = frame["flags"].where(frame["delta_norm"] > 0, "")  # without factors there is no reference to flag
    return frame.drop(columns="activation_matched")


@pytest.mark.parametrize(
    ("name", "variant", "kind"),
    [("gpt2", "plain", tiny.KINDS[0]), ("neox", "plain", "bridge"), ("llama", "saved", tiny.KINDS[0])],
)
def test_the_analysis_is_that_of_the_merged_model(name: str, variant: str, kind: str) -> None:
    adapter, merged = adapted(name, variant)
    base = tiny.build(name, kind)
    factored, dense = quiet(base, adapter), quiet(base, merged)
    assert any("rounding_share is 0" in note for note in factored.notes)
    for table in ("table", "asymmetry", "circuits", "other_changes"):
        ours, theirs = getattr(factored, table), getattr(dense, table)
        if table == "table":
            ours, theirs = without_own_reference(ours), without_own_reference(theirs)
        elif table == "asymmetry":
            ours, theirs = (
                frame.assign(log2_excess=frame["log2_expected"] + frame["log2_excess"]).drop(columns="log2_expected")
                for frame in (ours, theirs)
            )
        pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=1e-3, check_exact=False, obj=table)
    np.testing.assert_allclose(factored.table["fraction"], dense.table["fraction"], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(factored.table["delta_norm"], dense.table["delta_norm"], rtol=1e-5, atol=1e-6)
    reads = ~factored.table["matrix"].isin(["W_O", "W_out"]) & (factored.table["delta_norm"] > 0)
    own, every = (result.table["activation_matched"][reads] for result in (factored, dense))
    assert own.notna().all()
    assert not np.isclose(own, every, rtol=1e-3).any()
    np.testing.assert_allclose(factored.table["ci_low"], dense.table["ci_low"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("matrix", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"])
def test_factored_numbers_are_those_of_the_dense_delta(matrix: str) -> None:
    """The same change, once as factors and once multiplied out in float64."""
    adapter, _ = adapted("llama")
    base = ModelView(tiny.bridge("llama", dtype=torch.float64))
    weights = weights_from(adapter, base=base)
    for layer in range(2):
        thin = measure_change(base, weights, layer, matrix, seed=0)
        assert isinstance(thin, FactoredDelta)
        factors = weights.factors(layer, matrix)
        assert factors is not None
        change = type(factors)(factors.residual.double(), factors.other.double()).product(matrix)
        W = base.weight(layer, matrix)
        dense = measure_delta(matrix, W, W + change, seed=0)
        for field in ("base_energy", "energy", "shrink", "spectrum"):
            ours, theirs = getattr(thin.numbers, field), getattr(dense.numbers, field)
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max() + 1))
        Q = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
        torch.testing.assert_close(thin.energies(Q), dense.energies(Q), rtol=1e-9, atol=1e-13)
        for side in ("directions", "partners"):
            ours, theirs = getattr(thin.numbers, side), getattr(dense.numbers, side)
            assert ours.shape == theirs.shape
            assert ours.dtype == torch.float32
            eye = torch.eye(ours.shape[1]).expand(len(ours), -1, -1)
            torch.testing.assert_close(ours @ ours.mT, eye, atol=1e-5, rtol=0)
            rank = min(3, ours.shape[1]) if bool(change.any()) else 0
            torch.testing.assert_close(ours[:, :rank], theirs[:, :rank], atol=1e-4, rtol=0)


def test_a_matrix_that_is_replaced_whole() -> None:
    adapter, merged = adapted("llama", "whole")
    base = tiny.bridge("llama")
    weights, truth = weights_from(adapter, base=base), weights_from(merged)
    assert weights.factors(0, "W_V") is None
    assert torch.equal(weights.weight(1, "W_V"), truth.weight(1, "W_V"))
    assert not torch.equal(weights.weight(1, "W_V"), ModelView(base).weight(1, "W_V"))
    assert torch.equal(weights.delta(1, "W_V", base), truth.delta(1, "W_V", base))
    with pytest.raises(ValueError, match="expected a base to subtract for LoRA adapter, got none; pass base="):
        weights.delta(1, "W_V")
    rows = [quiet(base, other, matrices=["W_V"]).table for other in (adapter, merged)]
    np.testing.assert_allclose(rows[0]["fraction"], rows[1]["fraction"], rtol=1e-6)


def test_an_untouched_matrix_is_zero() -> None:
    adapter, _ = adapted("llama")
    result = quiet(tiny.bridge("llama"), adapter, matrices=["W_Q", "W_V", "W_gate"])
    rows = result.table[result.table["matrix"].isin(["W_V", "W_gate"])]
    assert (rows["delta_norm"] == 0).all()
    assert rows[["fraction", "relative", "rounding_share"]].isna().all(axis=None)
    assert any("W_V, W_gate are the same in both models" in note for note in result.notes)


def test_modules_are_listed_whole() -> None:
    weights = weights_from(adapted("gpt2")[0])
    modules = weights.modules().set_index("module")
    for layer in range(2):
        row = modules.loc[f"transformer.h.{layer}.attn.c_attn"]
        heads = [weights.delta(layer, matrix).double() for matrix in ("W_Q", "W_K", "W_V")]
        fused = torch.cat([W.transpose(0, 1).flatten(1) for W in heads], 1)
        λ = torch.linalg.svdvals(fused).square()
        assert row["rank"] == 3
        assert row["scale"] == pytest.approx(5 / 3)
        assert row["delta_norm"] == pytest.approx(λ.sum().sqrt().item(), rel=1e-6)
        assert row["stable_rank"] == pytest.approx(stable_rank(λ).item(), rel=1e-6)


def test_the_table_needs_no_base() -> None:
    weights = weights_from(adapted("llama")[0])
    table = weights.table()
    assert table["delta_relative_norm"].isna().all()
    assert len(table) == 2 * (4 + 2 + 2 + 4 + 3)
    row = table[(table["layer"] == 1) & (table["matrix"] == "W_K") & (table["head"] == 1)].iloc[0]
    λ = torch.linalg.svdvals(weights.delta(1, "W_K")[1].double()).square()
    assert row["delta_norm"] == pytest.approx(λ.sum().sqrt().item(), rel=1e-6)
    assert row["stable_rank"] == pytest.approx(stable_rank(λ).item(), rel=1e-6)
    with pytest.raises(ValueError, match="expected a base to add the adapter .* to, got none; pass base="):
        weights.weight(0, "W_Q")
    assert weights.table(tiny.bridge("llama"))["delta_relative_norm"].notna().all()
    on_files = weights_from(adapted("llama")[0], base=tiny.hf_directory("llama"))  # no model anywhere
    merged = weights_from(adapted("llama")[1])
    torch.testing.assert_close(on_files.weight(1, "W_Q"), merged.weight(1, "W_Q"), atol=3e-7, rtol=0)


def test_the_scale_counts_as_part_of_the_adapter(tmp_path: Path) -> None:
    adapter = altered(tmp_path, lora_alpha=6)
    one, other = weights_from(adapted("llama")[0]), weights_from(adapter)
    torch.testing.assert_close(other.delta(0, "W_Q"), 6 / 5 * one.delta(0, "W_Q"))
    assert weights_hash(one) != weights_hash(other)


def test_an_adapter_of_another_base_is_noted() -> None:
    weights = weights_from(adapted("llama")[0], base=tiny.bridge("llama", seed=4))
    assert any("the adapter says that it was trained from" in note for note in weights.notes)
    assert len(weights_from(adapted("llama")[0], base=tiny.bridge("llama")).notes) == 1


# --- what is refused -------------------------------------------------------------------------------------------------


def altered(tmp_path: Path, name: str = "llama", tensors: Any = None, **config: Any) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(adapted(name)[0], folder)
    document = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(document | config))
    if tensors is not None:
        path = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)
    return folder


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"use_dora": True},
            "expected the tensors of model.layers.0.* tells of, got lora_A, lora_B; pass",
        ),
        ({"layer_replication": [[0, 1]]}, "got layer_replication"),
        ({"alora_invocation_tokens": [1]}, "got alora_invocation_tokens"),
        (
            {"peft_type": "PROMPT_TUNING"},
            "got peft_type 'PROMPT_TUNING' in .*; pass the merged",
        ),
        ({"init_lora_weights": "loftq"}, "got init_lora_weights='loftq'"),
        ({"r": 8}, "expected factors of rank 8 for model.layers.0.* by the configuration of .*, got 3; pass"),
        (
            {"base_model_name_or_path": None},
            "expected a base for the adapter .*, got none, given .*; pass weights_from",
        ),
        (
            {"base_model_name_or_path": "./gone"},
            r"base './gone' to be found .*; pass weights_from",
        ),
    ],
)
def test_what_cannot_be_merged_into_single_matrices(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        weights_from(altered(tmp_path, **config))


def test_a_dora_adapter_with_the_configuration_of_another(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.hf_directory("llama"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(document | {"use_dora": False}))
    with pytest.raises(ValueError, match="tells of, got lora_A, lora_B, lora_magnitude_vector; pass the adapter saved"):
        weights_from(tmp_path)


@pytest.mark.parametrize(
    ("name", "base"), [("llama", "gpt2"), ("gpt2", "llama"), ("neox", "llama"), ("llama", "qwen3")]
)
def test_an_adapter_for_another_architecture(name: str, base: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"expected (an adapter for|base_model.*of shape|the adapter's conf).*; pass the (adapter|base)",
    ):
        weights_from(adapted(name)[0], base=tiny.bridge(base))


_LLAMA = "base_model.model."
_Q = _LLAMA + "model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("added", "text"),
    [
        ({_Q: None}, "expected the tensors of model.layers.0.self_attn.q_proj that"),
        ({_Q: (3, 40)}, r"expected .*q_proj.lora_A.weight of shape \(3, 48\) .*, got \(3, 40\)"),
        ({_LLAMA + "model.norm.weight": (1,)}, r"expected .*model.norm.weight of shape \(48,\)"),
    ],
)
def test_tensors_that_do_not_belong(tmp_path: Path, added: dict[str, Any], text: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        new = {name: torch.zeros(shape) for name, shape in added.items() if shape is not None}
        return {name: t for name, t in (tensors | new).items() if added.get(name, ()) is not None}

    with pytest.raises(ValueError, match=text):
        weights_from(altered(tmp_path, tensors=change))


def test_nan_in_a_factor(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    adapter = altered(tmp_path, tensors=lambda t: t | {name: t[name].index_fill(0, torch.tensor(3), math.nan)})
    with pytest.raises(ValueError, match=f"got 3 NaN and 0 infinite values in {name} of the aligned model"):
        quiet(tiny.bridge("llama"), adapter)


# --- made by others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [("step1000", (1.84, 1.12, 1.04)), ("step500", (1.86, 1.11, 1.04))])
def test_an_adapter_aligned_with_kto(real_data: Path, step: str, expected: tuple[float, ...]) -> None:
    from transformers import GPT2Config

    weights = weights_from(real_data / "kto_gpt2_lora" / "raw" / step, base=GPT2Config())
    modules = weights.modules().set_index("module")
    for layer, rank in zip((0, 5, 11), expected, strict=True):
        assert round(modules.loc[f"transformer.h.{layer}.attn.c_attn", "stable_rank"], 2) == rank
    if step == "step1000":
        norms = modules["delta_norm"].iloc[[0, 5, 11]].round(2).tolist()
        assert norms == [3.53, 5.81, 9.81]
    table = weights.table()
    assert len(table) == 12 * (4 * 12 + 2)
    adapted_rows = table[table["matrix"].isin(["W_Q", "W_K", "W_V"])]
    assert adapted_rows["stable_rank"].between(1, 16).all()
    assert (table[~table["matrix"].isin(["W_Q", "W_K", "W_V"])]["delta_norm"] == 0).all()
    # The squared norms of heads add up to the fused module's.
    total = adapted_rows[adapted_rows["layer"] == 5]["delta_norm"].pow(2).sum() ** 0.5
    assert total == pytest.approx(modules.loc["transformer.h.5.attn.c_attn", "delta_norm"], rel=1e-5)


def test_own_gpt_and_stories_as_state_dicts(real_data: Path) -> None:
    for folder, file, shape in (("own_gpt_pair", "tl_sft", (4, 64, 16)), ("stories260K", "tl_model", (8, 64, 8))):
        weights = weights_from(real_data / folder / f"{file}.safetensors")
        assert tuple(weights.weight(0, "W_Q").shape) == shape
    sft, base = (weights_from(real_data / "own_gpt_pair" / f"tl_{name}.safetensors") for name in ("sft", "base"))
    shift = sum(float(sft.delta(i, m, base).square().sum()) for i in range(4) for m in sft.matrices)
    size = sum(float(base.weight(i, m).square().sum()) for i in range(4) for m in base.matrices)
    assert 0.1 < (shift / size) ** 0.5 < 0.4
    stories, hf = (weights_from(real_data / "stories260K" / name) for name in ("tl_model.safetensors", "hf"))
    assert (stories.n_kv_heads, hf.n_kv_heads, hf.d_mlp) == (4, 4, 172)
    for matrix in ("W_V", "W_O", "W_in", "W_gate", "W_out"):  # queries and keys are permuted for half-split rotation
        torch.testing.assert_close(stories.weight(3, matrix), hf.weight(3, matrix), atol=1e-6, rtol=1e-5)
