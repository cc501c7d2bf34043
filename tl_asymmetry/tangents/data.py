"""The tokens of a tangent analysis: what the model reads, what it must predict, and how frequent each token is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.arguments import shown
from tl_asymmetry.geometry.strata import frequency_strata
from tl_asymmetry.models.capture import copies_noted, group_numbers
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.masking import mask_tokens

INPUT, ORIGINAL, TARGET, COUNTED, STRATUM, GROUP = range(6)
"""Columns of a packed sequence."""


@dataclass(frozen=True)
class TangentData:
    """Fixed for all checkpoints of an analysis."""

    sequences: tuple[Int[Tensor, "_pos column"], ...]
    """One row a position: token read, token meant, whether it is predicted, whether it counts, stratum, group."""
    log_frequency: Float[Tensor, " d_vocab"]
    """Natural log of each token's share of the corpus; −inf where it does not occur."""
    edges: tuple[tuple[float, float], ...]
    """Lowest and highest log-frequency of each stratum, rarest first; one entry without strata."""
    groups: int
    """Groups of sequences, for intervals."""
    targets: int
    """Predicted tokens."""
    counted: int
    """Tokens that count towards activations."""

    @property
    def strata(self) -> int:
        """How many strata are told apart; 1 where none are."""
        return len(self.edges)


def tangent_data(
    view: ModelView,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None,
    tokens: Any,
    mask: Any,
    *,
    max_tokens: int | None,
    exclude_first: bool,
    strata: int,
    frequencies: Tensor | None,
    groups: int,
    mask_token: int | None,
    mask_share: float,
    seed: int,
    notes: Callable[[str], None],
) -> TangentData:
    """Tokenise, draw the masks of an encoder, and sort the tokens into strata.

    Raises:
        ValueError: an encoder without a mask token, texts too short for the strata, or what `token_sequences` refuses.
    """
    originals = token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=notes)
    special = _special(view, mask_token) if view.encoder else frozenset()
    kept = [s for s in originals if (any(int(t) not in special for t in s) if view.encoder else len(s) > 1)]
    if len(kept) < len(originals):
        notes(f"{len(originals) - len(kept)} of {len(originals)} sequences have no token to predict and are left out")
    if not kept:
        raise ValueError("expected sequences with a token to predict, got none; pass longer texts")
    packed = [
        _packed(view, s, special, exclude_first, mask_token=mask_token, share=mask_share, seed=seed) for s in kept
    ]
    counts = _corpus_counts(view, packed, frequencies)
    stratum = frequency_strata(counts, strata) if strata else torch.zeros(len(counts), dtype=torch.int64)
    log_frequency = (counts / counts.sum()).log()
    number = group_numbers([s[:, ORIGINAL] for s in packed], groups)
    if groups > 1 and (note := copies_noted([s[:, ORIGINAL] for s in packed])):
        notes(note)
    for sequence, group in zip(packed, number, strict=True):
        sequence[:, STRATUM] = stratum[sequence[:, ORIGINAL]]
        sequence[:, GROUP] = group
    unknown = sum(int(((s[:, STRATUM] < 0) & (s[:, COUNTED] > 0)).sum()) for s in packed)
    if unknown:
        notes(f"{unknown} tokens do not occur in frequencies= and are in no stratum")
    targets = sum(int(s[:, TARGET].sum()) for s in packed)
    counted = sum(int(s[:, COUNTED].sum()) for s in packed)
    return TangentData(tuple(packed), log_frequency, _edges(log_frequency, stratum), max(number) + 1, targets, counted)


def _special(view: ModelView, mask_token: int | None) -> frozenset[int]:
    if mask_token is None:
        raise ValueError(
            f"expected a mask token for the encoder {view.name!r}, whose tokenizer has none; pass mask_token="
        )
    if not 0 <= mask_token < view.d_vocab:
        raise ValueError(f"expected mask_token from 0 to {view.d_vocab - 1}, got {mask_token}; pass the encoder's own")
    return frozenset(getattr(view.tokenizer, "all_special_ids", ())) | {mask_token}


def _packed(
    view: ModelView, tokens: Tensor, special: frozenset[int], exclude_first: bool, *, mask_token: int | None,
    share: float, seed: int,
) -> Tensor:  # fmt: skip
    """A sequence with its columns; stratum and group are filled in later."""
    columns = torch.zeros(len(tokens), 6, dtype=torch.int64)
    columns[:, ORIGINAL] = columns[:, INPUT] = tokens
    columns[:, COUNTED] = 1
    if exclude_first:
        columns[0, COUNTED] = 0
    if mask_token is None:
        columns[1:, TARGET] = 1
        return columns
    inputs, targets = mask_tokens(
        tokens, mask_token=mask_token, d_vocab=view.d_vocab, special=special, share=share, seed=seed
    )
    columns[:, INPUT], columns[:, TARGET] = inputs, targets.long()
    if exclude_first:  # [CLS] and [SEP] collect attention as a decoder's first token does
        columns[:, COUNTED] *= torch.tensor([int(t) not in special for t in tokens])
    return columns


def _corpus_counts(view: ModelView, packed: Sequence[Tensor], frequencies: Tensor | None) -> Tensor:
    """How often each token occurs: in `frequencies`, or among the tokens that count."""
    if frequencies is None:
        seen = torch.cat([s[:, ORIGINAL][s[:, COUNTED] > 0] for s in packed])
        return torch.bincount(seen, minlength=view.d_vocab).double()
    if not isinstance(frequencies, Tensor):
        raise ValueError(
            f"expected frequencies as a tensor of {view.d_vocab} counts of token ids, got {shown(frequencies)}; pass "
            "one, or leave it out"
        )
    if frequencies.shape != (view.d_vocab,) or not bool(((frequencies >= 0) & frequencies.isfinite()).all()):
        raise ValueError(
            f"expected frequencies as {view.d_vocab} finite counts of token ids, none negative, got shape "
            f"{tuple(frequencies.shape)} beginning with {frequencies.flatten()[:3].tolist()}; "
            f"pass torch.bincount(corpus, minlength={view.d_vocab})"
        )
    return frequencies.cpu().double()


def _edges(log_frequency: Tensor, stratum: Tensor) -> tuple[tuple[float, float], ...]:
    edges = []
    for number in range(int(stratum.max()) + 1):
        inside = log_frequency[(stratum == number) & log_frequency.isfinite()]
        edges.append((inside.min().item(), inside.max().item()))
    return tuple(edges)
