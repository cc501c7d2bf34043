"""The trainers of trl with a LoRA and the recorder as their callback: what is recorded is what their folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.trajectory.test_effective import READING, agree, checkpoint, pretrained
from tests.trajectory.test_recorder import OPTIONS
from tl_asymmetry import TrajectoryRecorder, analyze_trajectory

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

FEW: dict[str, Any] = {**OPTIONS, "ranks": [4], "matrices": ["W_Q", "W_O"]}
PROMPT, GOOD, BAD = "w1 w2 w3", " w4 w5 w6", " w7 w8"
ROWS: dict[str, list[dict[str, Any]]] = {
    "DPO": [{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}] * 4,
    "KTO": [
        {"prompt": PROMPT, "completion": GOOD, "label": True}, {"prompt": PROMPT, "completion": BAD, "label": False}
    ] * 2,
    "GRPO": [{"prompt": PROMPT}] * 4,
}  # fmt: skip


def trainer(kind: str, model: Any, folder: Path, **options: Any) -> Any:
    from datasets import Dataset

    settings: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": 2, "max_steps": 2, "save_steps": 2,
        "learning_rate": 1e-2,
    }  # fmt: skip
    if kind == "GRPO":
        settings |= {"num_generations": 2, "max_completion_length": 4}
        options["reward_funcs"] = lambda completions, **_: [float(i) for i in range(len(completions))]
    else:
        settings["max_length"] = 12
    return getattr(trl, f"{kind}Trainer")(
        model=model, args=getattr(trl, f"{kind}Config")(**settings), train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=tiny.tokenizer(), **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("kind", "way"), [("DPO", "before"), ("KTO", "PeftModel"), ("GRPO", "after")])
def test_a_lora_run_is_recorded_and_read_from_its_folder(kind: str, way: str, tmp_path: Path) -> None:
    """A recorder made before the trainer puts its adapter in, after it did, or of a PeftModel that it is given."""
    model, lora = pretrained("llama"), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    if way == "after":
        training = trainer(kind, model, tmp_path, peft_config=lora)
        recorder = TrajectoryRecorder(training.model, 2, **FEW)
        training.add_callback(recorder)
    else:
        model = peft.get_peft_model(model, lora) if way == "PeftModel" else model
        recorder = TrajectoryRecorder(model, 2, **FEW)
        options = {} if way == "PeftModel" else {"peft_config": lora}
        training = trainer(kind, model, tmp_path, callbacks=[recorder], **options)
    training.train()
    recorded = recorder.result()
    assert recorded.steps == [2]
    assert (recorded.table["delta_norm"] > 0).all()
    agree(recorded, analyze_trajectory(tmp_path, **FEW, progress=False), rtol=2e-4)  # in one line
    tuned = peft.PeftModel.from_pretrained(pretrained("llama"), tmp_path / "checkpoint-2")
    merged = analyze_trajectory({0: checkpoint(pretrained("llama")), 2: checkpoint(tuned)}, **FEW, progress=False)
    agree(recorded, merged, rtol=2e-4, factored=READING)
