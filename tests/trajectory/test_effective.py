"""What a recorder takes for the weights is what the model computes with: the checkpoint of the same step, merged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests import tiny
from tests.trajectory.test_recorder import FEW, OPTIONS, train
from tl_asymmetry import TrajectoryAnalysis, TrajectoryRecorder, analyze_trajectory
from tl_asymmetry.models.effective import EffectiveView
from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.models.view import ModelView

peft = pytest.importorskip("peft")
READING = ("W_Q", "W_K", "W_V", "W_gate", "W_in")
BOTH: dict[str, Any] = {**OPTIONS, "ranks": [4], "reference": "both"}
SOME = BOTH | {"matrices": ["W_Q", "W_O", "W_in", "W_out"]}  # the others are read alike


def pretrained(name: str, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny.hf_directory(name)).to(dtype)


def checkpoint(model: Any) -> Any:
    """A copy as `analyze_trajectory` opens a checkpoint: whole matrices in float32."""
    twin = copy.deepcopy(model).float()
    twin = twin.merge_and_unload() if hasattr(twin, "merge_and_unload") else twin
    twin.set_attn_implementation("eager")
    return bridge_around(twin, "checkpoint")


def agree(recorded: TrajectoryAnalysis, truth: TrajectoryAnalysis, rtol: float, factored: Sequence[str] = ()) -> None:
    """The same tables, but that read matrices which changed in factors alone are not tested against their inputs."""
    for name in ("table", "asymmetry", "curves"):
        ours, theirs = (getattr(result, name).drop(columns=LEFT_OUT, errors="ignore") for result in (recorded, truth))
        if name == "table":
            theirs = untested(theirs, theirs["matrix"].isin(factored))
        # the asymmetry is a logarithm: what is relative in its terms is absolute in it
        atol = max(rtol, 1e-6) if name == "asymmetry" else 1e-6
        pd.testing.assert_frame_equal(ours, theirs, rtol=rtol, atol=atol, obj=name)


def untested(table: pd.DataFrame, rows: pd.Series) -> pd.DataFrame:
    """What a table says where there is no reference for the test: an adapter's own one needs more than is held."""
    verdicts = dict.fromkeys(("beyond", "less than trained", "as trained"), "concentrated")
    return table.assign(
        excess_p=table["excess_p"].mask(rows),
        excess_q=table["excess_q"].mask(rows),
        vs_reference=table["vs_reference"].mask(rows, ""),
        verdict=table["verdict"].mask(rows, table["verdict"].replace(verdicts)),
    )


# Draws and storage: what follows from the last digits, and from bits that a change in factors does not have.
LEFT_OUT = ["isotropic_p", "isotropic_q", "isotropic_z", "p_method", "rounding_share", "fraction_unrounded", "flags"]


@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    [
        ("llama", "before", torch.float32), ("llama", "after", torch.bfloat16), ("llama", "PeftModel", torch.float32),
        ("gpt2", "before", torch.bfloat16),  # whose query, key and value are one module
    ],
)  # fmt: skip
def test_lora_is_recorded_as_its_merged_checkpoints(name: str, way: str, dtype: torch.dtype) -> None:
    """Whether the recorder was made before or after PEFT put its modules into the model, or of the PeftModel."""
    model, options = pretrained(name, dtype), BOTH if (name, way) == ("llama", "before") else SOME
    recorder = TrajectoryRecorder(model, 2, **options) if way == "before" else None
    kept = {0: checkpoint(model)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    recorder = recorder or TrajectoryRecorder(adapted if way == "PeftModel" else model, 2, **options)

    def after(step: int) -> None:
        if recorder.step(step):
            kept[step] = checkpoint(adapted)

    train(adapted, 4, after=after)
    result = recorder.result()
    factored = ["W_in"] if name == "gpt2" else READING
    truth = analyze_trajectory(kept, **options, progress=False)
    agree(result, truth, rtol=2e-3 if dtype == torch.bfloat16 else 2e-4, factored=factored)
    assert result.table["delta_relative_norm"].between(1e-4, 0.2).all()
    if name == "llama":  # nothing stored was subtracted
        assert (result.table["rounding_share"] == 0).all()
        spectra = result.delta_spectrum("W_out", "first")
        assert (spectra[..., 4:] == 0).all()  # of rank 4 exactly, in factors


def test_an_interval_of_a_lora_run_is_the_difference_of_its_products() -> None:
    model = pretrained("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
    recorder = TrajectoryRecorder(adapted, 1, **{**OPTIONS, "reference": "previous"}, matrices=["W_O"])
    products: list[torch.Tensor] = []

    def after(step: int) -> None:
        recorder.step(step)
        layer = adapted.base_model.model.model.layers[1].self_attn.o_proj
        products.append(layer.get_delta_weight("default").detach().double())

    train(adapted, 2, after=after)
    d_head = pretrained("llama").config.head_dim
    change = (products[1] - products[0]).unflatten(1, (-1, d_head)).transpose(0, 1)  # [head, d_model, d_head]
    rows = recorder.result().table.query("step == 2 and layer == 1 and rank == 1 and subspace == 'prediction'")
    np.testing.assert_allclose(rows["delta_norm"], change.norm(dim=(1, 2)), rtol=1e-5)


def test_dora_and_modules_saved_whole_are_merged() -> None:
    model = pretrained("llama")
    kept = {0: checkpoint(model)}
    recorder = TrajectoryRecorder(model, 2, **SOME)
    options = {"use_dora": True, "target_modules": ["q_proj", "o_proj"], "modules_to_save": ["down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))

    def after(step: int) -> None:
        if recorder.step(step):
            kept[step] = checkpoint(adapted)

    train(adapted, 2, after=after)
    agree(recorder.result(), analyze_trajectory(kept, **SOME, progress=False), rtol=1e-12)


class Scaled(nn.Module):
    """A parametrisation: the weight times a trained number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.gain


def test_parametrisations_are_worked_out() -> None:
    model = pretrained("llama")
    projection = model.model.layers[0].self_attn.q_proj
    torch.nn.utils.parametrize.register_parametrization(projection, "weight", Scaled())
    recorder = TrajectoryRecorder(model, 1, **OPTIONS, matrices=["W_Q"])
    with torch.no_grad():
        projection.parametrizations.weight[0].gain.fill_(1.1)
    recorder.step(1)
    rows = recorder.result().table
    np.testing.assert_allclose(rows.query("layer == 0")["delta_relative_norm"], 0.1, rtol=1e-5)
    assert (rows.query("layer == 1")["delta_norm"] == 0).all()
    assert torch.nn.utils.parametrize.is_parametrized(projection)
    assert torch.equal(projection.weight, projection.parametrizations.weight.original * 1.1)


def test_compiled_layers_and_distributed_data_parallel(tmp_path: Path) -> None:
    model = pretrained("llama")
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )  # fmt: skip
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        recorder, plain = TrajectoryRecorder(wrapped, 1, **FEW), pretrained("llama")
        other = TrajectoryRecorder(plain, 1, **FEW)
        for changed in (model, plain):
            with torch.no_grad():
                for i, parameter in enumerate(changed.parameters()):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
                    parameter.add_(noise, alpha=0.01)
        recorder.step(1)
        other.step(1)
        agree(recorder.result(), other.result(), rtol=0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="TransformerLens 4 has no HookedTransformer")
def test_a_sharded_hooked_transformer_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )  # fmt: skip
    try:
        sharded = fully_shard(tiny.hooked("gpt2"))
        with pytest.raises(
            ValueError, match="expected whole parameters, got FSDP's shards at the model; pass the check"
        ):
            EffectiveView(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_in_bfloat16_agrees_with_its_own_checkpoints(tmp_path: Path) -> None:
    """Activations in float32 on both ways."""
    model = pretrained("gpt2", torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint-0")
    options = BOTH | {"matrices": ["W_V", "W_O", "W_in"]}  # of a split module, of one that writes, of one that reads
    recorder = TrajectoryRecorder(model, 2, **options)

    def after(step: int) -> None:
        if recorder.step(step):
            model.save_pretrained(tmp_path / f"checkpoint-{step}")

    train(model, 4, after=after)
    folders = [tmp_path / f"checkpoint-{step}" for step in (0, 2, 4)]
    truth = analyze_trajectory(folders, **options, progress=False)
    for name in ("table", "asymmetry", "curves"):
        pd.testing.assert_frame_equal(getattr(recorder.result(), name), getattr(truth, name), check_exact=True)
    assert recorder.result().checkpoints["weights_xxh3"].equals(truth.checkpoints["weights_xxh3"])


def test_weights_that_are_not_what_the_model_computes_with_are_refused_at_every_recording() -> None:
    model = tiny.bridge("gpt2")
    recorder = TrajectoryRecorder(model, 1, **FEW)
    found = ModelView(model).projection(1, "W_O")
    assert found is not None
    handle = found[0].register_forward_hook(lambda _, args, out: 1.5 * out)
    with pytest.raises(ValueError, match="times its input to give what the model computes"):
        recorder.record(1)
    handle.remove()
    recorder.record(1)


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(ValueError, match="or a transformers model, got Linear; pass the model that is being trained"):
        EffectiveView(nn.Linear(2, 2))
    model = tiny.bridge("gpt2")
    nn.utils.parametrizations.weight_norm(next(m for m in model.modules() if isinstance(m, nn.Linear)))
    with pytest.raises(ValueError, match="expected a TransformerLens model of plain parameters, got .*; pass the tran"):
        EffectiveView(model)
    quantised = pretrained("gpt2")
    quantised.lm_head.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="16 bits or more, got torch.int8 in .*weight; pass the checkpoints"):
        EffectiveView(quantised)


def test_every_record_goes_to_a_log() -> None:
    model, records = tiny.bridge("gpt2"), list[dict[str, float]]()
    recorder = TrajectoryRecorder(model, 1, **FEW, log=records.append)
    for step in (1, 2):
        tiny.perturb_(model, 0.01, step)
        recorder.step(step)
    curves = recorder.result().curves.query("matrix == 'W_K' and subspace == 'attn_in'")
    assert [record["step"] for record in records] == [1, 2]
    assert [record["W_K/attn_in/relative"] for record in records] == curves["relative"].tolist()
    assert all(record["seconds"] > 0 for record in records)
    assert all(isinstance(value, int | float) for record in records for value in record.values())
    with pytest.MonkeyPatch.context() as patch:  # another process than the first
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        recorder.record(3)
    assert len(records) == 2
    assert recorder.result().steps == [1, 2, 3]
    with pytest.raises(ValueError, match="expected log as a function of a record, got str; pass"):
        TrajectoryRecorder(model, 1, **FEW, log="wandb")  # type: ignore[arg-type]
