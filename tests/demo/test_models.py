"""The embedded pair and its texts: loading, the two kinds of model, and the log against the files."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from tl_asymmetry import demo
from tl_asymmetry.demo.models import gpt2_model, lens_model, read_config, read_tensors

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

needs_hooked = pytest.mark.skipif(HookedTransformer is None, reason="this TransformerLens has no HookedTransformer")


@pytest.fixture(scope="module")
def tokens():
    return demo.demo_tokenizer()(demo.demo_texts(16, seed=3), padding=True, return_tensors="pt")["input_ids"]


def global_state():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


# ------------------------------------------------------------------------------------------------- loading


def test_importing_the_demo_does_not_import_transformer_lens():
    code = "import sys, tl_asymmetry.demo as demo; demo.demo_texts(2); sys.exit('transformer_lens' in sys.modules)"
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


def test_the_pair_as_bridges(tokens):
    base, _ = demo.demo_pair("bridge")
    check_raw(base)
    tensors = read_tensors(demo._checkpoint("base"))
    for layer in range(4):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            assert torch.equal(getattr(base.blocks[layer].attn, name), tensors[f"blocks.{layer}.attn.{name}"])
    # In float64, where a wrong layout cannot hide in rounding.
    expected = demo.demo_gpt2("base").double()(tokens).logits
    base.to(torch.float64)
    torch.testing.assert_close(base(tokens), expected, atol=1e-10, rtol=0)


@needs_hooked
@pytest.mark.parametrize("name", ["base", "dpo"])
def test_both_kinds_give_the_same_logits(name, tokens):
    hooked, bridge = demo.demo_model(name, "hooked"), demo.demo_model(name, "bridge")
    with torch.no_grad():
        torch.testing.assert_close(hooked(tokens), bridge(tokens), atol=1e-5, rtol=0)


@pytest.mark.skipif(HookedTransformer is not None, reason="this TransformerLens has HookedTransformer")
def test_hooked_is_refused_where_it_was_removed():
    with pytest.raises(ValueError, match=r"expected a TransformerLens with HookedTransformer .*pass kind='bridge'"):
        demo.demo_model("base", "hooked")


@pytest.mark.usefixtures("unchecked_types")
def test_loading_leaves_the_global_random_state():
    before = global_state()
    demo.demo_pair()
    demo.demo_pair("bridge")
    assert global_state() == before


@pytest.mark.usefixtures("unchecked_types")
def test_bad_names_are_refused():
    with pytest.raises(ValueError, match=r"expected the name of a demonstration model, got 'x'; pass one of step0, "):
        demo.demo_model("x")
    with pytest.raises(ValueError, match=r"expected kind 'auto', 'hooked' or 'bridge', got 'y'; pass one of the three"):
        lens_model({}, {}, demo.demo_tokenizer(), kind="y")
    for n in (0, 513):
        with pytest.raises(ValueError, match=f"expected n from 1 to 512, got {n}; pass the number of pairs"):
            demo.demo_preferences(n)
    for n in (-1, 2049):
        with pytest.raises(ValueError, match=f"expected n from 0 to 2048, got {n}; pass the number of stories"):
            demo.demo_texts(n)
    config, tensors = read_config(demo._data()), read_tensors(demo._checkpoint("base"))
    tensors["unembed.b_U"] += 1.0
    with pytest.raises(ValueError, match="expected an unembedding bias of zeros, got another; pass weights trained"):
        gpt2_model(config, tensors)


@needs_hooked
def test_a_missing_tensor_is_refused():
    config, tensors = read_config(demo._data()), read_tensors(demo._checkpoint("base"))
    del tensors["ln_final.w"]
    with pytest.raises(ValueError, match=r"expected one tensor per parameter, got a difference in \['ln_final.w'\]"):
        lens_model(config, tensors, demo.demo_tokenizer(), kind="hooked")


def test_the_chain_s_stages_change_matrices_of_the_blocks_by_factors():
    names = ("base", "sft", "sft_dpo")
    assert list(demo.demo_stages()) == list(names)
    weights = [demo._tensors(name) for name in names]
    for before, after in zip(weights, weights[1:], strict=False):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if name.startswith("blocks") and ".W_" in name}
        step = (after["blocks.2.mlp.W_in"] - before["blocks.2.mlp.W_in"]).double()
        spectrum = torch.linalg.svdvals(step)
        assert spectrum[4] < 1e-4 * spectrum[0]  # of rank 4, but for float32


# ---------------------------------------------------------------------------------------- the log is true


def test_both_stages_end_as_asked_more_often_than_the_base():
    base, sft, last = (sum(demo.demo_log()["following"][name].values()) / 3 for name in ("base", "sft", "sft_dpo"))
    assert base < 0.45 < 0.55 < min(sft, last)


def test_the_log_names_every_file_with_its_hash():
    log, folder = demo.demo_log(), demo._data()
    files = {path.name for path in folder.iterdir()} - {"log.json"}
    assert files == set(log["sha256"])
    for name, digest in log["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6


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


def test_texts_begin_alike_and_seeds_differ():
    for draw, most in ((demo.demo_texts, 512), (demo.demo_preferences, 128)):
        assert draw(8, seed=2)[:3] == draw(3, seed=2)
        assert len({draw(1, seed=seed)[0] for seed in range(64)}) > 60
        blocks = [set(draw(most, seed=seed)) for seed in range(4)]
        assert sum(map(len, blocks)) - len(set.union(*blocks)) < 8  # the stream itself tells a story twice at times
