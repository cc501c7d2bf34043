"""What edits do to a model's predictions: sums over places, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from tl_asymmetry.geometry.divergence import Prediction
from tl_asymmetry.models.resume import EditedRuns, Trial, layers_of
from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.objectives import PreferenceBatch

MEASURED = ("kl", "gain", "kl_other", "margin")
"""Columns of what `measure` returns."""

_FLOATS_OF_STREAMS = 1 << 24
_FLOATS_OF_LOGITS = 1 << 23
_LOGITS_AT_ONCE = 9
"""Of two unedited models logits and probabilities; of an edit logits as they came, cut, and what is made of them."""


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
    trials: Sequence[Trial],
    evaluated: Sequence[EvaluationBatch],
    *,
    outputs: int,
    whole: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> tuple[Float64[Tensor, "trial measured"], Baseline]:
    """Sums over all places for each trial alone, and those of the unedited models.

    Beside the two models and a pass through their blocks, `memory_needed` bytes are held, whatever the vocabulary.

    Args:
        view: the model that is edited; as it was afterwards.
        other: the other model of the pair.
        trials: edits, or groups of edits made together, of any layers.
        evaluated: from `evaluation_batches`.
        outputs: predictions are compared on the first so many tokens, which both models can predict. Where some target
            is not among them, gains and margins are NaN.
        whole: run the whole model for each trial.
        advance: called with the number of trials done on a batch.

    Returns:
        KL(original ‖ edited), gain of the targets' log-probability, KL(other ‖ edited), and gain of chosen over
        rejected continuations, columns as in `MEASURED`; and the baseline.
    """
    sums = torch.zeros(len(trials), len(MEASURED), dtype=torch.float64)
    baseline = Baseline()
    layers = sorted({layer for trial in trials for layer in layers_of(trial)[:1]})
    with torch.no_grad(), view.evaluating(), other.evaluating():
        for batch in evaluated:
            places = _Places(batch, outputs, view.device)
            theirs = EditedRuns(other, batch.tokens, (), places.where, whole=whole)
            ours = EditedRuns(view, batch.tokens, layers, places.where, whole=whole)
            at_once = max(1, _FLOATS_OF_STREAMS // max(1, ours.final.numel()))
            for start in range(0, max(1, len(trials)), at_once):
                group = trials[start : start + at_once]
                finals = [final for stacked in ours.under(group) for final in stacked]
                for piece in torch.arange(len(places)).split(places.at_once):
                    here, there = (Prediction(places.of(runs, runs.final[piece])) for runs in (ours, theirs))
                    if start == 0:
                        places.add_baseline(baseline, piece, here, there)
                    for first in range(0, len(finals), places.stacked(piece)):
                        some = torch.stack(finals[first : first + places.stacked(piece)])[:, piece]
                        for i, edited in enumerate(places.of(ours, some), start + first):
                            sums[i] += places.compared(piece, here, there, edited).cpu()
                advance(len(group))
    return sums, baseline


def memory_needed(view: ModelView, batch: EvaluationBatch, outputs: int, *, whole: bool = False) -> int:
    """Bytes that `measure` holds at its peak on a batch, beside the models and a pass through their blocks."""
    places = int(batch.counted.sum())
    width = outputs if whole else view.d_model
    size = 8 if view.dtype == torch.float64 else 4
    streams = max(_FLOATS_OF_STREAMS, places * width) + 2 * places * width
    return size * (streams + _LOGITS_AT_ONCE * min(places, max(1, _FLOATS_OF_LOGITS // outputs)) * outputs)


class _Places:
    """Where predictions are looked at, and what came next there."""

    def __init__(self, batch: EvaluationBatch, outputs: int, device: torch.device) -> None:
        rows, positions = batch.counted[:, 1:].nonzero(as_tuple=True)
        self.where = rows, positions
        self.at_once = max(1, _FLOATS_OF_LOGITS // outputs)
        self._outputs, self._device = outputs, device
        self._targets = batch.tokens[rows, positions + 1].to(device)
        self._predictable = bool((self._targets < outputs).all())
        self._signs = None if batch.signs is None else batch.signs[rows].to(device)
        self._pairs = 0 if batch.signs is None else int((batch.signs > 0).sum())

    def __len__(self) -> int:
        return len(self._targets)

    def stacked(self, piece: Tensor) -> int:
        """How many trials' logits at a piece of the places are made at once."""
        return max(1, self.at_once // len(piece))

    def of(self, runs: EditedRuns, final: Tensor) -> Tensor:
        """Logits of the tokens that are compared, `[..., place, outputs]`."""
        return runs.logits(final)[..., : self._outputs].to(self._device)

    def compared(self, piece: Tensor, here: Prediction, there: Prediction, edited: Tensor) -> Tensor:
        """Sums over a piece of the places, in the order of `MEASURED`."""
        divergence, gain = self._compare(here, edited, piece)
        zero = divergence.new_zeros(())
        if self._signs is not None:
            return torch.stack([zero, zero, zero, (gain * self._signs[piece]).sum()])
        further, _ = self._compare(there, edited, piece)
        return torch.stack([divergence.sum(), gain.sum(), further.sum(), zero])

    def add_baseline(self, baseline: Baseline, piece: Tensor, here: Prediction, there: Prediction) -> None:
        """Add what the unedited models predict at a piece of the places."""
        _, gain = self._compare(here, there.logits, piece)
        if self._signs is not None:
            baseline.pairs += self._pairs if bool((piece == 0).any()) else 0
            baseline.sums["margin"] += (gain * self._signs[piece]).sum().item()
            return
        distance, _ = self._compare(there, here.logits, piece)
        baseline.places += len(piece)
        baseline.sums["log_prob"] += self._log_prob(here, piece).sum().item()
        baseline.sums["gain"] += gain.sum().item()
        baseline.sums["kl_other"] += distance.sum().item()

    def _compare(self, prediction: Prediction, logits: Tensor, piece: Tensor) -> tuple[Tensor, Tensor]:
        if self._predictable:
            return prediction.compare(logits, self._targets[piece])
        divergence, _ = prediction.compare(logits, torch.zeros_like(self._targets[piece]))
        return divergence, torch.full_like(divergence, math.nan)

    def _log_prob(self, prediction: Prediction, piece: Tensor) -> Tensor:
        if not self._predictable:
            return torch.full((len(piece),), math.nan, dtype=torch.float64)
        logits = prediction.logits
        of_targets = logits.gather(-1, self._targets[piece].unsqueeze(-1)).squeeze(-1)
        return (of_targets - logits.logsumexp(-1)).double()
