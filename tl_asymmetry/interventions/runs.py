"""What edits do to a model's predictions: sums over places, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from tl_asymmetry.geometry.divergence import Prediction
from tl_asymmetry.models.edits import RankOneEdit
from tl_asymmetry.models.resume import EditedRuns
from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.objectives import PreferenceBatch

MEASURED = ("kl", "gain", "kl_other", "margin")
"""Columns of what `measure` returns."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Token rows and what is asked of them."""

    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    """Which tokens are targets, predicted from those before them; never the first."""
    signs: Float64[Tensor, " batch"] | None
    """+1 for a chosen, −1 for a rejected continuation; None for a row of plain text."""


def evaluation_batches(
    sequences: Sequence[Int[Tensor, " _pos"]], preferences: PreferenceBatch | None, batch_size: int
) -> list[EvaluationBatch]:
    """Plain text first, then both halves of the preferences."""
    evaluated = []
    for tokens, mask in batches(sequences, batch_size):
        counted = mask.clone()
        counted[:, 0] = False
        evaluated.append(EvaluationBatch(tokens, counted, None))
    for half, sign in () if preferences is None else ((preferences.chosen, 1.0), (preferences.rejected, -1.0)):
        for tokens, mask in zip(half.tokens.cpu().split(batch_size), half.mask.cpu().split(batch_size), strict=True):
            counted = mask.clone()
            counted[:, 0] = False
            signs = torch.full((len(tokens),), sign, dtype=torch.float64)
            evaluated.append(EvaluationBatch(tokens, counted, signs))
    return evaluated


@dataclass
class Baseline:
    """Sums over places of the unedited models, filled as batches pass."""

    places: int = 0
    """Predicted places of plain text."""
    pairs: int = 0
    """Preference pairs."""
    sums: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("log_prob", "gain", "kl_other", "margin"), 0))
    """log_prob: of the targets under the edited model before any edit. gain, margin: how much more the other model
    gives the targets, and chosen over rejected. kl_other: KL(other ‖ original)."""


def measure(
    view: ModelView,
    other: ModelView,
    edits: Sequence[RankOneEdit],
    evaluated: Sequence[EvaluationBatch],
    *,
    d_vocab: int,
    whole: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[Float64[Tensor, "edit measured"], Baseline]:
    """Sums over all places for each edit alone, and those of the unedited models.

    Args:
        view: the model that is edited; as it was afterwards.
        other: the other model of the pair.
        edits: of any layers.
        evaluated: from `evaluation_batches`.
        d_vocab: predictions are compared on the first so many tokens, which both models have.
        whole: run the whole model for each edit.
        advance: called with the number of edits done on a batch.

    Returns:
        KL(original ‖ edited), gain of the targets' log-probability, KL(other ‖ edited), and gain of chosen over
        rejected continuations, columns as in `MEASURED`; and the baseline.
    """
    sums = torch.zeros(len(edits), len(MEASURED), dtype=torch.float64)
    baseline = Baseline()
    layers = sorted({edit.layer for edit in edits})
    placed = [edit.to(view.device) for edit in edits]
    with torch.no_grad(), view.evaluating(), other.evaluating():
        for batch in evaluated:
            places = _Places(batch, d_vocab, view.device)
            theirs = other.run(batch.tokens, logits=True)
            there = Prediction(places.of(theirs))
            del theirs
            runs = EditedRuns(view, batch.tokens, layers, whole=whole)
            here = Prediction(places.of(runs.logits))
            _add_baseline(baseline, batch, places, here, there)
            done = 0
            for stacked in runs.under(placed):
                for logits in stacked:
                    edited = places.of(logits)
                    divergence, gain = here.compare(edited, places.targets)
                    if places.signs is not None:
                        sums[done, 3] += (gain * places.signs).sum().item()
                    else:
                        further, _ = there.compare(edited, places.targets)
                        found = torch.stack([divergence.sum(), gain.sum(), further.sum()])
                        sums[done, :3] += found.cpu()
                    done += 1
                advance(len(stacked))
    return sums, baseline


class _Places:
    """Where predictions are looked at, and what came next there."""

    def __init__(self, batch: EvaluationBatch, d_vocab: int, device: torch.device) -> None:
        self._where = batch.counted[:, 1:].nonzero(as_tuple=True)
        self._d_vocab, self._device = d_vocab, device
        self.targets = batch.tokens[:, 1:][self._where].to(device)
        rows = self._where[0]
        self.signs = None if batch.signs is None else batch.signs[rows].to(device)

    def of(self, logits: Tensor | None) -> Tensor:
        """The logits of those places, `[place, d_vocab]`."""
        assert logits is not None
        rows, positions = (index.to(logits.device) for index in self._where)
        return logits[rows, positions, : self._d_vocab].to(self._device)


def _add_baseline(
    baseline: Baseline, batch: EvaluationBatch, places: _Places, here: Prediction, there: Prediction
) -> None:
    _, gain = here.compare(there.logits, places.targets)
    if batch.signs is not None and places.signs is not None:
        baseline.pairs += int((batch.signs > 0).sum())
        baseline.sums["margin"] += (gain * places.signs).sum().item()
        return
    distance, _ = there.compare(here.logits, places.targets)
    log_prob = here.logits.gather(-1, places.targets.unsqueeze(-1)).squeeze(-1) - here.logits.logsumexp(-1)
    baseline.places += len(places.targets)
    baseline.sums["log_prob"] += log_prob.double().sum().item()
    baseline.sums["gain"] += gain.sum().item()
    baseline.sums["kl_other"] += distance.sum().item()
