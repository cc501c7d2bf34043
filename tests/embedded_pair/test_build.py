"""The trainer of the embedded pair: layouts, sampling, the build, and the log against what the files do."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.embedded_pair.build import Recipe, build
from benchmarks.embedded_pair.encoding import encode_preferences, encode_stories
from benchmarks.embedded_pair.instructions import add_factors, factors_of
from benchmarks.embedded_pair.model import initial_tensors, model_config, tensors_from_gpt2
from benchmarks.embedded_pair.preferences import ending_score, sample_preferences
from benchmarks.embedded_pair.sampling import sample_continuations
from benchmarks.embedded_pair.stories import held_out_texts
from tl_asymmetry import demo
from tl_asymmetry.demo.models import gpt2_model, with_factors
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.training.objectives import DPO, CrossEntropy


def global_state():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


def test_the_gpt2_layout_goes_there_and_back():
    config = model_config(431)
    tensors = initial_tensors(config, seeded("test"))
    # Biases start at zero; give them values, or a wrong order would go unnoticed.
    generator = seeded("biases")
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) if ".b" in name and name != "unembed.b_U" else tensor
        for name, tensor in tensors.items()
    }
    back = tensors_from_gpt2(config, gpt2_model(config, tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_factors_in_a_file_are_those_that_were_trained(tmp_path):
    config = model_config(431)
    tensors = initial_tensors(config, seeded("test"))
    model = gpt2_model(config, tensors).double()
    add_factors(model, 3, seeded("factors"))
    generator = seeded("up")
    with torch.no_grad():  # whole numbers of 1/256, which float16 keeps
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randint(-64, 64, parameter.shape, generator=generator) / 256)
    save_file(factors_of(model, config), tmp_path / "stage.safetensors")
    stage = with_factors(tensors, tmp_path / "stage.safetensors")
    tokens = torch.arange(24).view(2, 12)
    expected, found = (m(tokens).logits for m in (model, gpt2_model(config, stage).double()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    changed = {name for name in tensors if not torch.equal(stage[name], tensors[name])}
    assert changed == {name for name in tensors if ".W_" in name and name.startswith("blocks")}


# ---------------------------------------------------------------------------------------- the log is true


@pytest.mark.parametrize("name", ["base", "dpo"])
def test_the_held_out_loss_is_that_of_the_log(name):
    log = demo.demo_log()
    held_out = log["data"]["held_out"]
    texts = sorted(demo.demo_texts(held_out["stories"], seed=held_out["seed"]), key=len)
    batches = [encode_stories(demo.demo_tokenizer(), texts[i : i + 32]) for i in range(0, len(texts), 32)]
    model, objective = demo.demo_gpt2(name), CrossEntropy()
    counts = [objective.count(batch) for batch in batches]
    with torch.no_grad():
        losses = [objective(model, batch).item() for batch in batches]
    loss = np.average(losses, weights=counts)
    assert loss == pytest.approx(log["models"][name]["held_out_loss"], abs=1e-4)


def test_the_aligned_model_prefers_happy_endings_as_the_log_says():
    pairs = demo.demo_preferences(24, seed=demo.demo_log()["recipe"]["seed"] + 1)
    batch = encode_preferences(demo.demo_tokenizer(), pairs)
    margins = DPO(demo.demo_gpt2("base")).margins(demo.demo_gpt2("dpo"), batch)
    accuracy = (margins > 0).double().mean().item()
    assert accuracy == pytest.approx(demo.demo_log()["preference"]["dpo"]["margin_accuracy"], abs=0.2)


# ------------------------------------------------------------------------------------- pairs and sampling


@pytest.mark.usefixtures("unchecked_types")
def test_the_texts_of_the_package_are_those_of_the_build():
    assert demo.demo_texts(40, seed=2) == held_out_texts(40, seed=2)
    model, tokenizer = demo.demo_gpt2("base"), demo.demo_tokenizer()
    before = global_state()
    sampled = sample_preferences(model, tokenizer, n=2, seed=3, split="held_out", prompts_per_batch=12)
    assert global_state() == before
    assert sampled == demo.demo_preferences(2, seed=3)


def test_pairs_differ_in_score():
    assert all(ending_score(pair.chosen) > ending_score(pair.rejected) for pair in demo.demo_preferences(512))


def test_sampling_does_not_depend_on_the_batch():
    model, tokenizer = demo.demo_gpt2("base"), demo.demo_tokenizer()
    prompts = [tokenizer.encode(text)[:n] for text, n in zip(demo.demo_texts(3, seed=8), (5, 30, 12), strict=True)]
    options = {"end": tokenizer.eos_token_id, "forbidden": [0, 1, 3]}

    def sample(rows):
        return sample_continuations(model, prompts, [seeded("s", i) for i in range(3)], rows=rows, **options)

    together = sample(3)
    assert together == sample(1)
    assert all(row is None or row[-1] == tokenizer.eos_token_id for row in together)


def test_sampling_follows_the_distribution():
    model, tokenizer = demo.demo_gpt2("base"), demo.demo_tokenizer()
    prompt, n = tokenizer.encode("One morning, Mira the baker and her friend Tom met at the"), 400
    sampled = sample_continuations(
        model, [prompt] * n, [seeded("d", i) for i in range(n)], end=tokenizer.eos_token_id, forbidden=[0, 1, 3]
    )
    first = torch.bincount(torch.tensor([row[0] for row in sampled if row]), minlength=431) / n
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    # Five standard errors of a share near one half.
    assert float((first - probabilities).abs().max()) < 5 * 0.5 / n**0.5


# --------------------------------------------------------------------------------------------- the build


TINY = Recipe(
    vocabulary_stories=1000,
    base_steps=6,
    base_batch=4,
    base_warmup=2,
    checkpoints=(0, 2),
    tune_steps=2,
    tune_pairs=2,
    tune_warmup=1,
    sft_steps=2,
    sft_batch=2,
    asked_pairs=4,
    asked_steps=2,
    asked_batch=2,
    held_out_stories=8,
    kept_stories=2,
    kept_pairs=2,
)


@pytest.mark.usefixtures("unchecked_types")
def test_a_build_repeats_bit_for_bit_and_restores_the_settings(tmp_path, monkeypatch):
    # A model of six steps writes no endings to tell apart, so the trained base gives the pairs and the judgement.
    monkeypatch.setattr(
        "benchmarks.embedded_pair.build._Build._pairs",
        lambda self, base, n, **_: demo.demo_preferences(min(n, 4), seed=3),
    )
    for judge in ("_judge_endings", "_judge_following"):
        monkeypatch.setattr(f"benchmarks.embedded_pair.build._Build.{judge}", lambda self, model: {})
    before = global_state()
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    logs = [build(tmp_path / name, TINY, progress=False) for name in "ab"]
    assert logs[0] == logs[1] == json.loads((tmp_path / "a" / "log.json").read_text()) | {"recipe": logs[0]["recipe"]}
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {
        "step0.safetensors",
        "step2.safetensors",
        "base.safetensors",
        "dpo.safetensors",
        "control.safetensors",
        "sft.safetensors",
        "sft_dpo.safetensors",
        "config.json",
        "tokenizer.json",
        "stories.txt.xz",
        "preferences.jsonl.xz",
        "log.json",
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert global_state() == before
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == settings
