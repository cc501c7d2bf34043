"""What an analysis of weight deltas is asked to do, and the opening of the two models: each said once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.checks import check_pair, check_raw, check_subtractable, finite_check
from tl_asymmetry.models.configurations import differing_settings
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import Weights, WeightSource, opened
from tl_asymmetry.names import nearest
from tl_asymmetry.notes import Notes
from tl_asymmetry.results.provenance import described, pair_names, weights_hash

OPTIMIZERS = ("sgd", "adam", "muon")
"""Optimisers whose input-matched reference is known."""

ACTIVATIONS = ("base", "aligned", "both")
"""Whose activations may define the subspaces."""

_SELF_CHECK_TOKENS = 16


@runtime_checkable
class GradientMoments(Protocol):
    """What a gradient covariance must offer to serve as a matched reference."""

    def gradient_moment(self, layer: int, matrix: str, head: int | None = None) -> Tensor:
        """Uncentred second moment of the upstream gradient δ, `[d, d]`, float64 on CPU."""
        ...


@runtime_checkable
class PermutedGradients(Protocol):
    """What a gradient covariance may offer besides: fractions of gradients with δ permuted over tokens."""

    def permuted_fractions(self, layer: int, matrix: str, basis: Float[Tensor, "d_model k"]) -> Tensor | None:
        """Fractions in the leading 1 … k directions, `[draw, head, k]`; None where there are no draws."""
        ...


@runtime_checkable
class WeightedInputs(Protocol):
    """What a gradient covariance may offer besides: inputs of read matrices weighted by their gradients."""

    def weighted_input(self, layer: int, matrix: str, head: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Σ_t ‖δ_t‖² a_t a_tᵀ and Σ_t ‖δ_t‖ a_t, scaled alike, by one head's δ or all heads'; None where there are
        none."""
        ...


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """What `analyze_pair` is asked to do; its docstring says more of each.

    Raises:
        ValueError: what can be chosen for no model.
    """

    matrices: Sequence[str] | None = None
    """Which matrices; None: all that the model has."""
    ranks: Sequence[int] | None = None
    """Which ranks; None: the default for its width."""
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None
    """Names, or a mapping from names to subspaces; None: the default of each matrix."""
    optimizer: str = "adam"
    """Whose input-matched reference is shown: one of `OPTIMIZERS`."""
    exclude_first: bool = True
    """Leave the first position of each sequence out."""
    centered: bool = False
    """Covariance instead of the uncentred second moment."""
    batch_size: int = 8
    """Sequences per forward pass."""
    max_tokens: int | None = None
    """Use no more tokens than this."""
    groups: int = 8
    """Groups of sequences for the jackknife."""
    activations: str = "base"
    """Whose activations define the subspaces: one of `ACTIVATIONS`."""
    gradient: GradientMoments | None = None
    """Output-gradient second moments."""
    sensitivity: bool = False
    """Keep moments and projections under the other choices of subspace."""
    layers_per_pass: int | None = None
    """Layers whose moments are held at once; None: as many as fit."""
    distributed: bool = True
    """Share the work with the other processes of torch.distributed."""
    names: Sequence[str] | None = None
    """What the two models are called; None: what they call themselves."""
    seed: int = 0
    """Of all draws."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        for name in ("matrices", "ranks", "subspaces"):
            if isinstance(given := getattr(self, name), Iterator):  # read once, recorded and checked more often
                object.__setattr__(self, name, list(given))
        if self.gradient is not None and not isinstance(self.gradient, GradientMoments):
            raise ValueError(
                "expected gradient with a method gradient_moment(layer, matrix, head), got "
                f"{type(self.gradient).__name__}; pass a gradient covariance"
            )
        for name, allowed in (("activations", ACTIVATIONS), ("optimizer", OPTIMIZERS)):
            if (given := getattr(self, name)) not in allowed:
                choices = ", ".join(f'"{choice}"' for choice in allowed)
                raise ValueError(f"expected {name} among {choices}, got {given!r}; pass {nearest(given, allowed)}")
        pair_names(self.names)
        if self.groups < 1:
            raise ValueError(f"expected groups >= 1, got {self.groups}; pass groups=1 for no intervals, 8 by default")
        if self.batch_size < 1:
            raise ValueError(f"expected a batch_size of at least 1, got {self.batch_size}; pass batch_size=8")

    @property
    def captured(self) -> tuple[str, ...]:
        """The models whose activations are wanted, "base" and "aligned"."""
        return ("base", "aligned") if self.sensitivity or self.activations == "both" else (self.activations,)

    def described(self) -> dict[str, Any]:
        """Every setting, JSON-ready."""
        return described(**{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True)
class OpenPair:
    """Two models that can be compared, and the tokens that they will read."""

    base: ModelView
    """The base."""
    aligned: Weights
    """The aligned model, loaded or in files."""
    sequences: list[Int[Tensor, " _pos"]]
    """Token ids on CPU."""
    notes: Notes
    """Collects what the result must say."""

    @property
    def loaded(self) -> tuple[ModelView, ModelView]:
        """Both models, opened to be run both."""
        if not isinstance(self.aligned, ModelView):
            raise RuntimeError("the aligned model was not opened to be run")
        return self.base, self.aligned

    def checked_hashes(self, *, run: bool = True) -> dict[str, str]:
        """Refuse weights that are not finite, raw, and what the model computes with; both hashes.

        One pass over all tensors of both: those in files are read from disk.

        Args:
            run: run a few tokens to see what a loaded model computes with.
        """
        pair = (("base", self.base), ("aligned", self.aligned))
        hashes = {name: checked_hash(weights, f"{name} model", warn=self.notes.warn) for name, weights in pair}
        for _, weights in pair:  # only now: nothing is run where weights are refused
            if run and isinstance(weights, ModelView):
                check_products(weights, self.sequences[0])
        if hashes["base"] == hashes["aligned"]:
            self.notes.warn(
                "the two models are identical, weight for weight: every delta is zero and every fraction NaN"
            )
        return hashes


def open_pair(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    max_tokens: int | None = None,
    run_aligned: bool = False,
    check: Callable[[ModelView], object] | None = None,
) -> OpenPair:
    """See two models as one pair and read the tokens; nothing is run, and no weight is read yet.

    Args:
        model_base: a model, loaded or by its folder or name on the Hub.
        model_aligned: the same, or whatever `weights_from` reads.
        texts, tokens, mask: what to read.
        max_tokens: no more than this.
        run_aligned: the aligned model must be one that can be run, since its activations are wanted.
        check: refuses what was asked of this base, before the aligned model is opened, which may be a download.

    Raises:
        ValueError: models that cannot be compared, tokens that cannot be read.
    """
    base, notes = ModelView(model_base), Notes()
    check_subtractable(base)
    if check is not None:
        check(base)
    sequences = token_sequences(base, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
    aligned = opened(model_aligned, base, runs=run_aligned)
    if run_aligned and (highest := max(int(sequence.max()) for sequence in sequences)) >= aligned.d_vocab:
        raise ValueError(
            f"expected token ids below the aligned model's {aligned.d_vocab}, which reads them as well, got {highest}; "
            'pass activations="base"'
        )
    read = {int(token) for sequence in sequences for token in sequence.unique()} if tokens is None else set()
    for warning in check_pair(base, aligned, read):
        notes.warn(warning)
    of_aligned = aligned.notes if isinstance(aligned, WeightSource) else ()
    for note in (*base.notes, *of_aligned, *differing_settings(base, aligned)):
        notes.add(note.replace(aligned.name, public_name(aligned.name)))  # which may be a whole path
    return OpenPair(base, aligned, sequences, notes)


def checked_hash(weights: Weights, role: str, *, warn: Callable[[str], None]) -> str:
    """Refuse weights that are not finite and raw; their hash, made in the same pass.

    Args:
        weights: loaded or in files.
        role: what messages call them, such as "base model".
        warn: takes what cannot be told from the weights.

    Raises:
        ValueError: naming the first tensor with NaN, or the processing.
    """
    weights_xxh3 = weights_hash(weights, each=finite_check(weights, role))
    for warning in check_raw(weights):
        warn(warning)
    return weights_xxh3


def check_products(view: ModelView, tokens: Int[Tensor, " pos"]) -> None:
    """Refuse a model that computes with other matrices than it shows, or with other inputs: a few tokens are run.

    Raises:
        ValueError: naming the product that differs.
    """
    with torch.no_grad():
        view.self_check(tokens[:_SELF_CHECK_TOKENS].unsqueeze(0))
