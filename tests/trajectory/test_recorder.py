"""TrajectoryRecorder: what it records is what checkpoints would have given, and training does not notice."""

from __future__ import annotations

import copy
import functools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.killing import Fatal
from tests.trajectory.test_trajectory import identical
from tl_asymmetry import TrajectoryAnalysis, TrajectoryRecorder, analyze_trajectory
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.store import StoreReader

TOKENS = tiny.tokens(9, 12)
OPTIONS: dict[str, Any] = {"tokens": TOKENS, "ranks": [1, 4], "groups": 3}
FEW = OPTIONS | {
    "matrices": ["W_K", "W_O"],
    "ranks": [4],
}  # where the subject is not the numbers: a quarter of the time
ONE = FEW | {"matrices": ["W_O"]}


def hf_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.hf_directory("gpt2"), attn_implementation="sdpa")


def model_of(kind: str) -> Any:
    return hf_model() if kind == "transformers" else tiny.build("gpt2", kind)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    out = model(tokens)
    return getattr(out, "logits", out)


def train(model: Any, steps: int, *, start: int = 0, after: Any = lambda step: None) -> None:
    """AdamW on random tokens, in training mode, with dropout where the model has it; the batch follows the step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for step in range(start + 1, start + steps + 1):
        batch = tiny.tokens(4, 12, seed=step)
        loss = torch.nn.functional.cross_entropy(logits(model, batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(step)


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, OPTIONS | {"ranks": [4]} if kind == "bridge" else FEW) for kind in (*tiny.KINDS, "transformers")],
)
def test_what_is_recorded_is_what_checkpoints_would_have_given(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = model_of(kind)
    kept = {0: copy.deepcopy(model)}
    recorder = TrajectoryRecorder(model, 2, **options, reference="both")

    def after(step: int) -> None:
        assert recorder.step(step) == (step % 2 == 0)
        if step % 2 == 0:
            for block in getattr(model, "blocks", []):
                for module in block.modules():
                    if getattr(module, "_pattern", None) is not None:
                        module._pattern = None  # the Bridge keeps its last pattern, with its graph: not copyable
            kept[step] = copy.deepcopy(model)

    train(model, 4, after=after)
    result = recorder.result()
    assert result.steps == [2, 4]
    if kind == "transformers":
        kept = {step: wrapped(held) for step, held in kept.items()}
    expected = analyze_trajectory(kept, **options, reference="both", progress=False)
    for name in ("table", "asymmetry", "curves"):
        pd.testing.assert_frame_equal(getattr(result, name), getattr(expected, name), check_exact=True)
    assert result.checkpoints["weights_xxh3"].tolist() == expected.checkpoints["weights_xxh3"].tolist()


def wrapped(model: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    model.set_attn_implementation("eager")
    name = str(tiny.hf_directory("gpt2"))
    return TransformerBridge.boot_transformers(name, hf_model=model, device="cpu", dtype=torch.float32)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", [*tiny.KINDS, "transformers"])
def test_training_does_not_notice(kind: str, tmp_path: Path) -> None:
    """The same weights bit for bit, the same random numbers, gradients, modes and names, recorded or not."""
    ends, states = [], []
    for recording in (False, True):
        model = model_of(kind)
        names = list(model.state_dict())
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        model.train()
        next(model.modules()).training = True
        if recording:
            recorder = TrajectoryRecorder(model, 2, tmp_path / "run", **FEW, reference="both", subspaces_from="each")
            with recorder:
                train(model, 5, after=recorder.step)
        else:
            train(model, 5)
        ends.append(weights(model))
        states.append(
            (
                torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()),  # noqa: NPY002
                [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()],
                [len(m._forward_pre_hooks) for m in model.modules()], [p.requires_grad for p in model.parameters()],
                [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
            )
        )  # fmt: skip
        assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert states[0] == states[1]


def recorded(store: Path | None, kept: dict[int, Any]) -> TrajectoryAnalysis:
    model = tiny.bridge("gpt2").eval()
    with TrajectoryRecorder(model, 2, store, **ONE, reference="both") as recorder:

        def after(step: int) -> None:
            kept[step] = weights(model)
            recorder.step(step)

        sgd(model, 0, 6, after)
        return recorder.result()


@functools.cache
def undisturbed() -> tuple[TrajectoryAnalysis, dict[int, Any]]:
    kept: dict[int, Any] = {}
    return recorded(None, kept), kept


@pytest.mark.parametrize("at", [3, 8, 11, 15, 20, 25])
def test_a_killed_training_goes_on(at: int, tmp_path: Path) -> None:
    """SIGKILL while it records; then the training, resumed from its own checkpoint, ends with the same table."""
    folder, (expected, kept) = tmp_path / "run", undisturbed()
    child = os.fork()
    if child == 0:
        try:
            Fatal(at).install()
            recorded(folder, {})
        finally:
            os._exit(1)
    died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert died
    # the training's own checkpoint is that of the last recorded step
    done = StoreReader(folder).steps if (folder / "store.json").exists() else []
    resume = done[-1] if done else 0
    model = tiny.bridge("gpt2").eval()
    if resume:
        give(model, kept[resume])
    with TrajectoryRecorder(model, 2, folder, **ONE, reference="both", step=resume) as recorder:
        sgd(model, resume, 6, recorder.step)
        result = recorder.result()
    identical(result, expected, config=False)
    assert {p.name for p in folder.glob("parts/previous-*")} == {"previous-6.safetensors"}


def give(model: Any, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def sgd(model: Any, start: int, stop: int, after: Any) -> None:
    """Plain gradient steps: nothing but the weights carries over from one step to the next."""
    for step in range(start + 1, stop + 1):
        batch = tiny.tokens(4, 12, seed=step)
        loss = torch.nn.functional.cross_entropy(logits(model, batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.05 * gradient
        after(step)


def test_a_training_rolled_back_records_those_steps_again(tmp_path: Path) -> None:
    model = tiny.bridge("gpt2").eval()
    kept = {}
    with TrajectoryRecorder(model, 2, tmp_path / "run", **FEW) as recorder:
        sgd(model, 0, 6, lambda step: (kept.__setitem__(step, weights(model)), recorder.step(step)))
        expected = recorder.result()
    give(model, kept[3])
    with TrajectoryRecorder(model, 2, tmp_path / "run", **FEW, step=3) as recorder:
        assert recorder.result().steps == [2]  # 4 and 6 were of the training that was given up
        sgd(model, 3, 4, recorder.step)
        assert recorder.result().steps == [2, 4]
        sgd(model, 4, 6, recorder.step)
        identical(recorder.result(), expected, config=False)
    # interval deltas need weights that only the last recording has kept
    options = FEW | {"reference": "previous"}
    model = tiny.bridge("gpt2").eval()
    with TrajectoryRecorder(model, 2, tmp_path / "interval", **options) as recorder:
        sgd(model, 0, 6, recorder.step)
    give(model, kept[3])
    with pytest.raises(ValueError, match="expected the weights of step 2, the last recording before step 3, got none"):
        TrajectoryRecorder(model, 2, tmp_path / "interval", **options, step=3)
    give(model, kept[4])
    with TrajectoryRecorder(model, 2, tmp_path / "interval", **options, step=4) as recorder:  # that recording's weights
        sgd(model, 4, 6, recorder.step)
        assert recorder.result().steps == [2, 4, 6]


def test_other_models_and_stores_are_refused(tmp_path: Path) -> None:
    model = tiny.bridge("gpt2")
    TrajectoryRecorder(model, 2, tmp_path / "run", **FEW).close()
    with pytest.raises(ValueError, match="expected the weights that the store .* begins with at step 0, got others"):
        TrajectoryRecorder(tiny.perturbed(model), 2, tmp_path / "run", **FEW)
    with pytest.raises(ValueError, match=r"got others: .*, ranks \(\[4\] there, \[1\] here\)"):
        TrajectoryRecorder(model, 2, tmp_path / "run", **(FEW | {"ranks": [1]}))
    analyze_trajectory({0: model, 1: tiny.perturbed(model)}, store=tmp_path / "sweep", progress=False, **FEW)
    with pytest.raises(ValueError, match="expected a store that a recorder began, got .* without the weights"):
        TrajectoryRecorder(tiny.perturbed(model), 2, tmp_path / "sweep", **FEW, step=1)
    with pytest.raises(ValueError, match="expected every >= 1, got 0"):
        TrajectoryRecorder(model, 0, **FEW)
    with pytest.raises(ValueError, match="expected on_error to be one of raise, warn, got 'ignore'"):
        TrajectoryRecorder(model, 2, **FEW, on_error="ignore")
    with pytest.raises(ValueError, match="expected a HookedTransformer, a TransformerBridge or a transformers model"):
        TrajectoryRecorder(torch.nn.Linear(2, 2), 2, **FEW)
    recorder = TrajectoryRecorder(model, 2, **FEW)
    with pytest.raises(ValueError, match="expected a recorded step, got none up to step 1"):
        recorder.step(1) or recorder.result()
    with pytest.raises(ValueError, match="expected a step after 0, the one recorded before, got 0"):
        recorder.record(0)


def test_a_nan_stops_the_training_or_is_left_out() -> None:
    for on_error in ("raise", "warn"):
        model = tiny.bridge("gpt2").eval()
        recorder = TrajectoryRecorder(model, 2, **FEW, on_error=on_error)
        sgd(model, 0, 2, recorder.step)
        ModelView(model).weight(0, "W_O")[0, 1, 1] = torch.nan
        if on_error == "raise":
            with pytest.raises(ValueError, match=r"1 NaN and 0 infinite values in blocks\.0\.attn\.W_O of the checkp"):
                recorder.step(4)
        else:
            with pytest.warns(UserWarning, match=r"step 4 was not recorded: expected finite weights"):
                assert not recorder.step(4)
            assert "step 4 was not recorded" in recorder.result().notes[-1]
        assert recorder.result().steps == [2]


def test_a_transformers_model_without_a_name_reads_texts_with_the_given_tokenizer() -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"]())
    texts = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(10 + i)) for i in range(6)]
    tokenizer = tiny.tokenizer()
    before = dict(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.all_special_tokens
    recorder = TrajectoryRecorder(model, 1, texts=texts, tokenizer=tokenizer, ranks=[4], groups=3)
    tiny.perturb_(model, 0.02, 1)
    recorder.step(1)
    result = recorder.result()
    assert result.config["tokens"] == sum(len(text.split()) for text in texts)
    assert before == (dict(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.all_special_tokens)
    with pytest.raises(ValueError, match="expected a model with a tokenizer to read texts"):
        TrajectoryRecorder(model, 1, texts=texts)


def test_wrappers_are_seen_through() -> None:
    model = hf_model()
    plain = TrajectoryRecorder(model, 1, **FEW)
    compiled = TrajectoryRecorder(torch.compile(model, backend="eager"), 1, **FEW)
    tiny.perturb_(model, 0.02, 1)
    for recorder in (plain, compiled):
        recorder.step(1)
    pd.testing.assert_frame_equal(plain.result().table, compiled.result().table, check_exact=True)


def test_as_a_callback_of_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 64

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            row = tiny.tokens(1, 12, seed=i)[0]
            return {"input_ids": row, "labels": row}

    def trainer(model: Any, recorder: TrajectoryRecorder, steps: int) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "training"), max_steps=steps, per_device_train_batch_size=4, save_steps=4,
            report_to=[], disable_tqdm=True, use_cpu=True, seed=0, logging_steps=1000,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=Batches(), callbacks=[recorder])

    torch.manual_seed(0)
    model = hf_model()
    with TrajectoryRecorder(model, 2, tmp_path / "run", **FEW, reference="both") as recorder:
        trainer(model, recorder, 5).train()
        assert recorder.result().steps == [2, 4, 5]  # the end of the training as well
    model = hf_model()
    with TrajectoryRecorder(model, 2, tmp_path / "run", **FEW, reference="both") as recorder:
        trainer(model, recorder, 8).train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-4"))
        result = recorder.result()
    assert result.steps == [2, 4, 6, 8]
    assert result.checkpoints["previous_step"].tolist() == [pd.NA, 0, 2, 4, 6]
    assert (result.table["delta_norm"] > 0).all()
