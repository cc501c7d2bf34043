"""A real base and what others fine-tuned from it: loads as its README says, and the analysis makes sense of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tl_asymmetry import analyze_pair

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")


def characters(folder: Path, path: Path) -> torch.Tensor:
    """Ids of all characters of a text."""
    vocabulary: Any = json.loads((folder / "raw" / "vocab.json").read_text(encoding="utf-8"))
    vocabulary = vocabulary.get("stoi", vocabulary) if isinstance(vocabulary, dict) else vocabulary
    ids = vocabulary if isinstance(vocabulary, dict) else {c: i for i, c in enumerate(vocabulary)}
    return torch.tensor([ids[c] for c in path.read_text(encoding="utf-8") if c in ids])


def load(folder: Path, name: str) -> Any:
    """The exact HookedTransformer where there is one, else the approximate directory as a Bridge."""
    if not tiny.HOOKED_AVAILABLE:
        from tl_asymmetry.models.loading import open_model

        return open_model(folder / f"hf_{name}_approx", device="cpu")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = json.loads((folder / "tl_config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng():
        model = HookedTransformer(HookedTransformerConfig(**config))
    missing = model.load_state_dict(load_file(folder / f"tl_{name}.safetensors"), strict=False)
    assert not missing.unexpected_keys
    absent = {key.rsplit(".", 1)[-1] for key in missing.missing_keys}
    assert absent <= {"mask", "IGNORE", "b_Q", "b_K", "b_V"}  # the three biases are zero, as they are made
    return model.eval()


def test_own_gpt_pair(real_data: Path) -> None:
    folder = real_data / "own_gpt_pair"
    base, aligned = load(folder, "base"), load(folder, "sft")
    plays = characters(folder, real_data / "text" / "tinyshakespeare.txt")
    held_out = plays[int(0.9 * len(plays)) :]
    windows = held_out[: len(held_out) // 32 * 32].view(-1, 32)
    sample = windows[:: max(1, len(windows) // 600)][:600]
    losses = []
    with torch.no_grad():
        for model in (base, aligned):
            log_p = model(sample).log_softmax(-1)[:, :-1]
            losses.append(-log_p.gather(-1, sample[:, 1:, None]).mean().item())
    assert losses[0] == pytest.approx(1.956, abs=0.1)
    assert losses[1] == pytest.approx(2.817, abs=0.15)  # fine-tuning on other text hurt it

    result = analyze_pair(base, aligned, tokens=sample[:200], progress=False)
    assert result.config["ranks"] == [1, 4, 16]
    table = result.table[result.table["rank"] == result.config["shown_rank"]]
    assert len(table) == 4 * (4 * 4 + 2) * 2
    assert table[["fraction", "relative", "isotropic_p"]].notna().all(axis=None)
    assert table["fraction"].between(0, 1).all()
    assert (table["rounding_share"] == 0).all()
    weights = table.drop_duplicates(["matrix", "layer", "head"])
    relative = (weights["delta_norm"] ** 2).sum() / (
        (weights["delta_norm"] / weights["delta_relative_norm"]) ** 2
    ).sum()
    assert 0.1 < relative**0.5 < 0.4  # 0.184 over all parameters
    reading = table[(table["matrix"] == "W_Q") & (table["subspace"] == "attn_in")]
    assert reading["relative"].median() > 1
    assert (reading["ci_low"] < reading["ci_high"]).all()
    summary = result.summary()
    assert "4 layers × 4 heads, d_model 64; 6200 tokens in 200 sequences" in summary
    assert "Reading, in the 4 leading directions" in summary
