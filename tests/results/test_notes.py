"""Warnings point at the line that called the package."""

from __future__ import annotations

import linecache

import pytest
import torch

from tests import tiny
from tl_asymmetry import analyze_pair, gradient_covariance
from tl_asymmetry.notes import Notes
from tl_asymmetry.training.batches import TokenBatch
from tl_asymmetry.training.objectives import CrossEntropy


def blamed(caught: pytest.WarningsRecorder) -> set[str]:
    """The source lines that warnings are shown at."""
    return {linecache.getline(w.filename, w.lineno).strip() for w in caught}


def test_a_warning_points_at_the_callers_line() -> None:
    """However deep inside it is said: in the opening of a pair, in a plan, in an engine of another room."""
    model, tokens = tiny.bridge("gpt2"), tiny.tokens(2, 12)
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with pytest.warns(UserWarning, match="the two models are identical|intervals need at least 3") as caught:
        analyze_pair(model, model, tokens=tokens, ranks=[4], progress=False)
    assert len(caught) >= 2
    assert blamed(caught) == {"analyze_pair(model, model, tokens=tokens, ranks=[4], progress=False)"}
    with pytest.warns(UserWarning, match="intervals need at least 3") as caught:
        gradient_covariance(model, CrossEntropy(), [batch], progress=False)
    assert blamed(caught) == {"gradient_covariance(model, CrossEntropy(), [batch], progress=False)"}


def test_what_holds_of_both_models_is_said_once() -> None:
    notes = Notes()
    for line in ("W_O is followed by a norm", "of one alone", "W_O is followed by a norm"):
        notes.add(line)
    assert notes.lines == ["W_O is followed by a norm", "of one alone"]
