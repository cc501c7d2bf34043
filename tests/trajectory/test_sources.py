"""Whatever `weights_from` reads is a checkpoint of a trajectory: adapters, folders, shards, files, state dicts."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests import tiny
from tests.trajectory.test_effective import READING, SOME, agree, checkpoint, pretrained
from tests.trajectory.test_recorder import FEW, train
from tl_asymmetry import analyze_trajectory
from tl_asymmetry.trajectory.checkpoints import checkpoints_of, made_model

peft = pytest.importorskip("peft")


def test_a_lora_run_is_analysed_from_its_folder(tmp_path: Path) -> None:
    """In the order of the steps and not of the names, behind the model that the adapters say they are of."""
    model = pretrained("llama")
    kept = {0: checkpoint(model)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))

    def after(step: int) -> None:
        if step in (2, 10):
            adapted.save_pretrained(tmp_path / f"checkpoint-{step}")
            kept[step] = checkpoint(adapted)

    train(adapted, 10, after=after)
    result = analyze_trajectory(tmp_path, **SOME, progress=False)
    assert (result.config["steps"], result.checkpoints["previous_step"].tolist()[1:]) == ([0, 2, 10], [0, 2])
    agree(result, analyze_trajectory(kept, **SOME, progress=False), rtol=2e-4, factored=READING)
    assert (result.table["rounding_share"] == 0).all()
    few = analyze_trajectory(tmp_path, **FEW, progress=False).table
    for base in (str(tiny.hf_directory("llama")), kept[0]):
        given = analyze_trajectory(tmp_path, base=base, **FEW, progress=False)
        pd.testing.assert_frame_equal(given.table, few, check_exact=True)
    with pytest.raises(
        ValueError, match="expected a model that can be run, got weights alone .*; pass base= or a whole"
    ):
        analyze_trajectory(tmp_path, **FEW, subspaces_from="each", progress=False)


def test_files_are_what_loaded_models_are(tmp_path: Path) -> None:
    """Folders without a tokenizer, shards, one file, state dicts: bit for bit, hashes included."""
    from safetensors.torch import save_file

    models: dict[int, Any] = {}
    for step in (0, 5, 10, 15):
        models[step] = pretrained("gpt2")
        if step:
            tiny.perturb_(models[step], 0.01, step)
    models[0].save_pretrained(tmp_path / "checkpoint-0")
    models[5].save_pretrained(tmp_path / "checkpoint-5", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint-5").glob("*.safetensors"))) > 1
    models[10].save_pretrained(tmp_path / "checkpoint-10")
    file = tmp_path / "checkpoint-10" / "model.safetensors"
    expected = analyze_trajectory(
        {s: checkpoint(m) for s, m in models.items()}, **FEW, reference="both", progress=False
    )
    whole = {name: t.clone() for name, t in models[15].state_dict().items() if name != "lm_head.weight"}
    save_file(whole, tmp_path / "last.safetensors")
    run = {0: tmp_path / "checkpoint-0", 5: tmp_path / "checkpoint-5", 10: file, 15: tmp_path / "last.safetensors"}
    result = analyze_trajectory(run, **FEW, reference="both", progress=False)
    for name in ("table", "asymmetry", "curves"):
        pd.testing.assert_frame_equal(getattr(result, name), getattr(expected, name), check_exact=True)
    assert result.checkpoints["weights_xxh3"].equals(expected.checkpoints["weights_xxh3"])


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
def test_state_dicts_follow_a_first_whole_model() -> None:
    model = tiny.hooked("gpt2")
    first = copy.deepcopy(model)
    run: dict[int, Any] = {0: first}
    for step in (1, 2):
        tiny.perturb_(model, 0.01, step)
        run[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = analyze_trajectory(run, **FEW, progress=False)
    assert result.steps == [1, 2]
    assert (result.table["delta_norm"] > 0).all()
    last = analyze_trajectory({0: first, 2: model}, **FEW, progress=False).table
    there = result.table.query("step == 2").reset_index(drop=True)
    pd.testing.assert_frame_equal(there, last, check_exact=True)


def test_texts_are_read_with_the_given_tokenizer(tmp_path: Path) -> None:
    model = pretrained("llama")
    for step in (0, 1):
        model.save_pretrained(tmp_path / f"checkpoint-{step}")
        tiny.perturb_(model, 0.01, 1)
    texts = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(10 + i)) for i in range(6)]
    options: dict[str, Any] = {"ranks": [4], "matrices": ["W_O"], "groups": 3, "progress": False}
    result = analyze_trajectory(tmp_path, texts, tokenizer=tiny.tokenizer(), **options)
    assert result.config["tokens"] == sum(len(text.split()) for text in texts)
    with pytest.raises(ValueError, match="expected a model with a tokenizer to read texts"):
        analyze_trajectory(tmp_path, texts, **options)


def test_a_folder_without_checkpoints_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match="expected a folder with directories named like checkpoint-500, got .*; pass"
        ):
            list(checkpoints_of(folder))


def test_a_large_model_is_gone_when_its_turn_is_over() -> None:
    """One that refers to itself, as models do, before Python's own collector comes."""
    model = torch.nn.Linear(2100, 2100)
    vars(model)["itself"] = [model]
    held = [model]
    gone = weakref.ref(model)
    del model
    gc.disable()
    try:
        with made_model(held.pop):
            assert gone() is not None
        assert gone() is None
    finally:
        gc.enable()
