"""What is read is what transformers, or PEFT after merging, would show: over every writer and architecture."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import warnings
from typing import Any

import pytest
import torch

from tests import tiny
from tests.models import corpus
from tl_asymmetry import weights_from
from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.models.view import ModelView

ROUNDING = 5e-7
"""Of a merged weight: PEFT adds in float32 what is read as factors."""


@functools.cache
def base_view(architecture: str) -> ModelView:
    return ModelView(tiny.bridge(architecture))


def shown(architecture: str, written: corpus.Written) -> ModelView:
    """TransformerLens's view of a transformers model that has these very weights."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(tiny.CONFIGS[architecture]())
    if written.tied is not None:
        config.tie_word_embeddings = written.tied
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(written.truth, strict=False)
    assert not unexpected
    assert all(name.startswith(("lm_head", "embed_out")) for name in missing)
    return ModelView(bridge_around(model, "truth"))


def read(written: corpus.Written, architecture: str, base: Any = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return weights_from(written.path, base=base or base_view(architecture))


@pytest.mark.parametrize(("writer", "architecture"), list(corpus.cases()))
def test_what_is_read_is_what_would_be_loaded(writer: str, architecture: str) -> None:
    written = corpus.write(writer, architecture)
    try:
        weights, truth = read(written, architecture), shown(architecture, written)
        tolerance = ROUNDING if weights.only_changes else 0
        base = base_view(architecture)
        for layer in range(truth.n_layers):
            for matrix in truth.matrices:
                theirs = truth.weight(layer, matrix)
                torch.testing.assert_close(weights.weight(layer, matrix), theirs, atol=tolerance, rtol=0)
                change = theirs.double() - base.weight(layer, matrix).double()
                ours = weights.delta(layer, matrix, base).double()
                torch.testing.assert_close(ours, change, atol=ROUNDING, rtol=0)
                assert bool(change.any()) or not bool(ours.any())  # nothing changed where nothing was trained
        ours, theirs = weights.headless(include_tied=True), truth.headless(include_tied=True)
        kept = base.headless(include_tied=True) if weights.only_changes else {}
        stored = {name for name in theirs if name in ours or name in kept}
        without_head = not any(name.startswith(("lm_head", "embed_out")) for name in written.truth)
        assert stored >= set(theirs) - ({"unembed.W_U", "unembed.b_U"} if without_head else set())
        for name in stored:
            mine = ours[name] if name in ours else kept[name]
            torch.testing.assert_close(mine.to(theirs[name]), theirs[name], atol=tolerance, rtol=tolerance, msg=name)
        assert weights.tied == truth.tied
        for note in written.notes:
            assert any(re.search(note, line) for line in weights.notes), (note, weights.notes)
        if not written.base:  # the same without a model: by the configuration alone
            config = base.model.original_model.config
            alone = weights_from(written.path, base=config)
            assert torch.equal(alone.delta(1, "W_Q", base), weights.delta(1, "W_Q", base))
    finally:
        shutil.rmtree(written.path.parent if written.path.is_file() else written.path, ignore_errors=True)


def test_there_are_enough() -> None:
    assert len(list(corpus.cases())) >= 150
