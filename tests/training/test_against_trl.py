"""Data pipeline and losses of preference objectives against trl's own trainers, on the same rows."""

import functools

import pytest
import torch

from tl_asymmetry import ModelView
from tl_asymmetry.demo import demo_gpt2, demo_model, demo_preferences, demo_tokenizer
from tl_asymmetry.objectives import DPO, ORPO, PreferenceBatch
from tl_asymmetry.training.data import as_batches

trl = pytest.importorskip("trl")
ROWS = 6


@functools.cache
def rows():
    return [
        {"prompt": p.prompt, "chosen": f" {p.chosen}", "rejected": f" {p.rejected}"} for p in demo_preferences(ROWS)
    ]


def ours():
    (batch,) = as_batches(
        ModelView(demo_model("base")), rows(), PreferenceBatch, batch_size=ROWS, note=pytest.fail, warn=pytest.fail
    )
    return batch


def settings(tmp_path):
    return {
        "output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "beta": 0.3, "bf16": False,
        "gradient_checkpointing": False, "per_device_train_batch_size": ROWS, "max_length": 112,
    }  # fmt: skip


def collated(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(ROWS)])


@pytest.fixture(name="dataset")
def dataset_fixture():
    from datasets import Dataset

    return Dataset.from_list(rows())


@pytest.mark.filterwarnings("ignore")
def test_dpo(dataset, tmp_path):
    policy, reference = demo_gpt2("dpo"), demo_gpt2("base")
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, args=trl.DPOConfig(**settings(tmp_path)), train_dataset=dataset,
        processing_class=demo_tokenizer(),
    )  # fmt: skip
    inputs, batch = collated(trainer), ours()
    for half, first in ((batch.chosen, 0), (batch.rejected, ROWS)):
        for i, length in enumerate(half.lengths):
            assert torch.equal(inputs["input_ids"][first + i, :length], half.tokens[i, :length])
            assert torch.equal(inputs["completion_mask"][first + i, :length].bool(), half.mask[i, :length])
    theirs = trainer.compute_loss(trainer.model, inputs)
    assert float(theirs) == pytest.approx(float(DPO(demo_gpt2("base"), beta=0.3)(demo_gpt2("dpo"), batch)), rel=1e-5)
    # and the same through TransformerLens
    lens = DPO(ModelView(demo_model("base")), beta=0.3)(ModelView(demo_model("dpo")), batch)
    assert float(theirs) == pytest.approx(float(lens), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_orpo(dataset, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    arguments = ORPOConfig(**settings(tmp_path), max_completion_length=112)
    trainer = ORPOTrainer(
        model=demo_gpt2("dpo"), args=arguments, train_dataset=dataset, processing_class=demo_tokenizer()
    )
    inputs, batch = collated(trainer), ours()
    for i, length in enumerate(batch.chosen.lengths):
        assert torch.equal(inputs["chosen_input_ids"][i, :length], batch.chosen.tokens[i, :length])
        assert torch.equal(inputs["chosen_labels"][i, :length] != -100, batch.chosen.mask[i, :length])
    theirs = trainer.compute_loss(trainer.model.eval(), inputs)
    assert float(theirs) == pytest.approx(float(ORPO(beta=0.3)(demo_gpt2("dpo"), batch)), rel=1e-5)


def test_orpos_odds_ratio_in_float64():
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = torch.tensor([-0.2, -1.5, -3.0, -1e-3]), torch.tensor([-2.0, -0.4, -3.0, -5.0])
    stub = SimpleNamespace(beta=0.7, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)
    p, q = chosen.double().exp(), rejected.double().exp()
    expected = 0.7 * torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
