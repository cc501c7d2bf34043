"""The trained models: loading, the two kinds, and the log against the files."""

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import tl_asymmetry.demo as demo
from tl_asymmetry.demo.build import Recipe, build
from tl_asymmetry.demo.models import (
    gpt2_model,
    initial_tensors,
    lens_model,
    model_config,
    read_tensors,
    tensors_from_gpt2,
)
from tl_asymmetry.demo.preferences import encode_preferences, ending_score
from tl_asymmetry.demo.sampling import sample_continuations
from tl_asymmetry.demo.tokenizer import encode_stories
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.training.objectives import DPO, CrossEntropy

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

needs_hooked = pytest.mark.skipif(HookedTransformer is None, reason="this TransformerLens has no HookedTransformer")


@pytest.fixture(scope="module")
def batch():
    return encode_stories(demo.demo_tokenizer(), demo.demo_texts(16, seed=3))


def global_state():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


# ------------------------------------------------------------------------------------------------- loading


def test_importing_the_demo_does_not_import_transformer_lens():
    code = (
        "import sys, tl_asymmetry.demo as demo; demo.calibration_texts(); demo.demo_texts(2); "
        "sys.exit('transformer_lens' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def check_raw(model):
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.cfg.normalization_type == "LN"
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_heads) == (4, 64, 4)
    tokens = model.to_tokens("Mira was happy.")
    assert tokens.tolist()[0] == demo.demo_tokenizer().encode("Mira was happy.")


@needs_hooked
def test_the_pair_is_two_raw_hooked_transformers():
    base, aligned = demo.demo_pair()
    for model, name in ((base, "base"), (aligned, "dpo")):
        assert isinstance(model, HookedTransformer)
        check_raw(model)
        tensors = read_tensors(demo._checkpoint(name))
        assert all(torch.equal(parameter, tensors[key]) for key, parameter in model.named_parameters())
    assert not torch.equal(base.blocks[0].attn.W_Q, aligned.blocks[0].attn.W_Q)


def test_the_pair_as_bridges(batch):
    base, _ = demo.demo_pair("bridge")
    check_raw(base)
    tensors = read_tensors(demo._checkpoint("base"))
    for layer in range(4):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(getattr(base.blocks[layer].attn, name), tensors[f"blocks.{layer}.attn.{name}"])
    # In float64, where a wrong layout cannot hide in rounding.
    expected = demo.demo_gpt2("base").double()(batch.tokens).logits
    base.to(torch.float64)
    torch.testing.assert_close(base(batch.tokens), expected, atol=1e-10, rtol=0)


@needs_hooked
@pytest.mark.parametrize("name", ["base", "dpo"])
def test_both_kinds_give_the_same_logits(name, batch):
    hooked, bridge = demo.demo_model(name, "hooked"), demo.demo_model(name, "bridge")
    with torch.no_grad():
        torch.testing.assert_close(hooked(batch.tokens), bridge(batch.tokens), atol=1e-5, rtol=0)


@pytest.mark.skipif(HookedTransformer is not None, reason="this TransformerLens has HookedTransformer")
def test_hooked_is_refused_where_it_was_removed():
    with pytest.raises(ValueError, match=r"expected a TransformerLens with HookedTransformer .*pass kind='bridge'"):
        demo.demo_model("base", "hooked")


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


@pytest.mark.usefixtures("unchecked_types")
def test_loading_and_sampling_leave_the_global_random_state():
    before = global_state()
    demo.demo_pair()
    demo.demo_pair("bridge")
    demo.demo_preferences(2, seed=1)
    assert global_state() == before


@pytest.mark.usefixtures("unchecked_types")
def test_bad_names_are_refused():
    with pytest.raises(ValueError, match=r"expected the name of a demonstration model, got 'x'; pass one of step0, "):
        demo.demo_model("x")
    with pytest.raises(ValueError, match=r"expected kind 'auto', 'hooked' or 'bridge', got 'y'; pass one of the three"):
        lens_model({}, {}, demo.demo_tokenizer(), kind="y")
    with pytest.raises(ValueError, match="expected n >= 1, got 0; pass the number of pairs"):
        demo.demo_preferences(0)
    config = model_config(20)
    tensors = initial_tensors(config, seeded(0))
    tensors["unembed.b_U"] += 1.0
    with pytest.raises(ValueError, match="expected an unembedding bias of zeros, got another; pass weights trained"):
        gpt2_model(config, tensors)


@needs_hooked
def test_a_missing_tensor_is_refused():
    config = model_config(431)
    tensors = initial_tensors(config, seeded(0))
    del tensors["ln_final.w"]
    with pytest.raises(ValueError, match=r"expected one tensor per parameter, got a difference in \['ln_final.w'\]"):
        lens_model(config, tensors, demo.demo_tokenizer(), kind="hooked")


# ---------------------------------------------------------------------------------------- the log is true


def test_the_log_names_every_file_with_its_hash():
    log, folder = demo.demo_log(), demo._data()
    files = {path.name for path in folder.iterdir()} - {"log.json"}
    assert files == set(log["sha256"])
    for name, digest in log["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6


@pytest.mark.parametrize("name", ["base", "dpo"])
def test_the_held_out_loss_is_that_of_the_log(name):
    log = demo.demo_log()
    held_out = log["data"]["held_out"]
    batch = encode_stories(demo.demo_tokenizer(), demo.demo_texts(held_out["stories"], seed=held_out["seed"]))
    with torch.no_grad():
        loss = CrossEntropy()(demo.demo_gpt2(name), batch).item()
    assert loss == pytest.approx(log["models"][name]["held_out_loss"], abs=1e-4)


def test_checkpoints_are_in_order_and_get_better():
    log, checkpoints = demo.demo_log(), demo.demo_checkpoints()
    assert list(checkpoints) == sorted(checkpoints)
    assert list(checkpoints)[0] == 0
    assert list(checkpoints)[-1] == log["recipe"]["base_steps"]
    assert checkpoints[log["recipe"]["base_steps"]].name == "base.safetensors"
    losses = [
        next(m["held_out_loss"] for m in log["models"].values() if m["file"] == path.name)
        for path in checkpoints.values()
    ]
    assert losses == sorted(losses, reverse=True)
    assert set(demo.demo_names()) == set(log["models"])


def test_the_aligned_model_prefers_happy_endings_as_the_log_says():
    pairs = demo.demo_preferences(24, seed=demo.demo_log()["recipe"]["seed"] + 1)
    batch = encode_preferences(demo.demo_tokenizer(), pairs)
    margins = DPO(demo.demo_gpt2("base")).margins(demo.demo_gpt2("dpo"), batch)
    accuracy = (margins > 0).double().mean().item()
    assert accuracy == pytest.approx(demo.demo_log()["preference"]["dpo"]["margin_accuracy"], abs=0.2)


# ------------------------------------------------------------------------------------- pairs and sampling


def test_pairs_are_sampled_from_the_base_and_differ_in_score():
    pairs = demo.demo_preferences(8, seed=2)
    assert pairs[:3] == demo.demo_preferences(3, seed=2)
    assert pairs != demo.demo_preferences(8, seed=3)
    assert all(ending_score(pair.chosen) > ending_score(pair.rejected) for pair in pairs)


def test_sampling_does_not_depend_on_the_batch():
    model, tokenizer = demo.demo_gpt2("base"), demo.demo_tokenizer()
    prompts = [
        tokenizer.encode(text)[:n] for text, n in zip(demo.demo_texts(6, seed=8), (5, 30, 12, 9, 20, 3), strict=True)
    ]
    options = {"end": tokenizer.eos_token_id, "forbidden": [0, 1, 3]}

    def sample(rows):
        return sample_continuations(model, prompts, [seeded("s", i) for i in range(6)], rows=rows, **options)

    together = sample(6)
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
    held_out_stories=8,
)


@pytest.mark.usefixtures("unchecked_types")
def test_a_build_repeats_bit_for_bit_and_restores_the_settings(tmp_path, monkeypatch):
    # A model of six steps writes no endings to tell apart, so the trained base gives the pairs and the judgement.
    monkeypatch.setattr(
        "tl_asymmetry.demo.build._Build._pairs", lambda self, base, **_: demo.demo_preferences(4, seed=5)
    )
    monkeypatch.setattr("tl_asymmetry.demo.build._Build._judge_endings", lambda self, model: {})
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
        "config.json",
        "tokenizer.json",
        "log.json",
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert global_state() == before
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == settings
