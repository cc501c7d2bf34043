"""What an analysis will hold against what, decided and checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.capture import Capture, Site, balanced_groups, merged
from tl_asymmetry.models.checks import check_ranks, check_token_count
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.settings import PairSettings

STREAM_SUBSPACES = ("attn_in", "mlp_in", "resid_pre", "resid_mid", "resid_post")
"""Subspaces that come from activations, named as their hook points."""


@dataclass(frozen=True)
class Plan:
    """Matrices, ranks and subspaces of one analysis."""

    matrices: tuple[str, ...]
    """In canonical order."""
    ranks: tuple[int, ...]
    """Ascending."""
    subspaces: tuple[str, ...]
    """All names in use."""
    targets: Mapping[str, tuple[str, ...]]
    """For each matrix the subspaces it is held against."""
    given: Mapping[str, Sequence[Subspace]]
    """Subspaces passed by the user, one for each layer."""
    points: tuple[str, ...]
    """Hook points to capture: the subspaces' own and the inputs of read matrices."""
    shown_rank: int
    """The rank to show where only one can be: d//16, or the nearest that every subspace has."""

    def described(self) -> dict[str, Any]:
        """For a result's config."""
        return {
            "matrices": list(self.matrices),
            "ranks": list(self.ranks),
            "shown_rank": self.shown_rank,
            "subspaces": {matrix: list(names) for matrix, names in self.targets.items()},
        }


@dataclass(frozen=True)
class Sources:
    """Captured moments, and the choice among them that the main table is made from."""

    captures: Mapping[str, Capture]
    """By model, "base" and "aligned"."""
    activations: str
    """"base", "aligned" or "both"."""
    exclude_first: bool
    """Whether first positions are left out."""
    intervals: bool
    """Whether there are groups enough for intervals."""

    @cached_property
    def groups(self) -> tuple[Mapping[Site, StreamingMoments], ...]:
        """Moments per group of sequences, as the main table takes them."""
        chosen = [self.captures[name].groups for name in _models(self.activations)]
        if len(chosen) == 1:
            return chosen[0]
        return tuple(
            {site: merged(part[site] for part in group) for site in group[0]} for group in zip(*chosen, strict=True)
        )

    @property
    def tokens(self) -> int:
        """Tokens that count towards the main table."""
        return sum(self.captures[name].tokens for name in _models(self.activations))

    def total(self, site: Site, activations: str, *, exclude_first: bool) -> StreamingMoments:
        """Moments at one site over all groups, under another choice of model and first position."""
        parts = []
        for capture in (self.captures[name] for name in _models(activations)):
            moments = merged(group[site] for group in capture.groups).pooled()
            if exclude_first != self.exclude_first:
                first = merged(group[site] for group in capture.first_positions or ())
                moments = moments.without(first) if exclude_first else moments.merge(first)
            parts.append(moments)
        return merged(parts)


def _models(activations: str) -> tuple[str, ...]:
    return ("base", "aligned") if activations == "both" else (activations,)


def make_plan(view: ModelView, settings: PairSettings, sequences: Sequence[Tensor], notes: Notes) -> Plan:
    """Resolve the defaults and refuse what the model does not have.

    Raises:
        ValueError: an unknown matrix or subspace, a rank out of range or above the number of tokens, a subspace of
            another dimension or too small for every rank.
    """
    d, subspaces = view.d_model, settings.subspaces
    checked_ranks = check_ranks(default_ranks(d) if settings.ranks is None else settings.ranks, d)
    chosen = chosen_matrices(view, settings.matrices)
    given = _given(subspaces, view, min(checked_ranks)) if isinstance(subspaces, Mapping) else {}
    names = _subspace_names(view, subspaces)
    targets = {m: _default_targets(m, view) if subspaces is None else names for m in chosen}
    used = tuple(dict.fromkeys(name for matrix in chosen for name in targets[matrix]))
    inputs = [kind_of(m).point for m in chosen if kind_of(m).reads]
    points = dict.fromkeys([*inputs, *(name for name in used if name in STREAM_SUBSPACES and name not in given)])
    everywhere = [k for k in checked_ranks if all(k <= layers[0].rank for layers in given.values())]
    for name, layers in given.items():
        if layers[0].rank < checked_ranks[-1]:
            notes.warn(f"ranks above {layers[0].rank} are left out for {name!r}, which has no more directions")
    check_token_count(counted_tokens(sequences, settings), checked_ranks)
    return Plan(
        matrices=chosen,
        ranks=checked_ranks,
        subspaces=used,
        targets=targets,
        given=given,
        points=tuple(points),
        shown_rank=min(everywhere, key=lambda k: (abs(k - max(d // 16, 1)), k)),
    )


def counted_tokens(sequences: Sequence[Tensor], settings: PairSettings) -> int:
    """Tokens that count towards the moments of one model."""
    return sum(len(sequence) - settings.exclude_first for sequence in sequences)


def grouped_sequences(
    sequences: Sequence[Int[Tensor, " _pos"]], settings: PairSettings, notes: Notes
) -> tuple[list[list[Int[Tensor, " _pos"]]], bool]:
    """The sequences in groups to be left out one at a time, and whether these are wanted and enough for intervals."""
    grouped = balanced_groups(sequences, settings.groups)
    enough = len(grouped) >= MINIMUM_GROUPS
    if settings.groups > 1 and not enough:
        notes.warn(
            f"intervals need at least {MINIMUM_GROUPS} groups of sequences, got {len(grouped)}: ci_low and ci_high are "
            "NaN; pass more sequences or groups=8"
        )
    return grouped, settings.groups > 1 and enough


def default_ranks(d: int) -> tuple[int, ...]:
    """The distinct values of 1, 4, 16, 64, d//16, d//4 that are ranks of proper subspaces of R^d.

    Example:
        >>> default_ranks(768)
        (1, 4, 16, 48, 64, 192)
    """
    return tuple(sorted({k for k in (1, 4, 16, 64, d // 16, d // 4) if 0 < k < d}))


def chosen_matrices(view: ModelView, matrices: Sequence[str] | None) -> tuple[str, ...]:
    """The matrices asked for, all by default, in canonical order.

    Raises:
        ValueError: one that the model does not have.
    """
    if matrices is None:
        return view.matrices
    unknown = [matrix for matrix in matrices if matrix not in view.matrices]
    if unknown or not matrices or isinstance(matrices, str):
        raise ValueError(
            f"expected matrices among {', '.join(view.matrices)}, got {matrices!r}; pass a list of those the model has"
        )
    return tuple(matrix for matrix in view.matrices if matrix in matrices)


def _subspace_names(
    view: ModelView, subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None
) -> tuple[str, ...]:
    if subspaces is None:
        return ()
    if isinstance(subspaces, Mapping):
        if not subspaces:
            raise ValueError("expected at least one subspace, got an empty mapping; leave it out for the default")
        return tuple(subspaces)
    available = [*(point for point in STREAM_SUBSPACES if view.has_point(point)), "prediction"]
    unknown = [name for name in subspaces if name not in available]
    if unknown or not subspaces or isinstance(subspaces, str):
        raise ValueError(
            f"expected subspaces among {', '.join(available)}, got {subspaces!r}; pass a list of those the model has, "
            "or a mapping from names to Subspace"
        )
    return tuple(dict.fromkeys(subspaces))


def _given(
    subspaces: Mapping[str, Subspace | Sequence[Subspace]], view: ModelView, smallest: int
) -> dict[str, list[Subspace]]:
    given = {}
    for name, value in subspaces.items():
        layers = [value] * view.n_layers if isinstance(value, Subspace) else list(value)
        if len(layers) != view.n_layers:
            raise ValueError(
                f"expected a Subspace, or {view.n_layers} of them, for {name!r}, got {len(layers)}; pass one per layer"
            )
        if len({subspace.rank for subspace in layers}) > 1:
            raise ValueError(f"expected subspaces of one rank for {name!r}, got several; pass them truncated")
        for subspace in layers:
            if subspace.d != view.d_model:
                raise ValueError(
                    f"expected subspaces of R^{view.d_model}, got {name!r} in R^{subspace.d}; pass bases [d_model, k]"
                )
            if subspace.rank < smallest:
                raise ValueError(
                    f"expected {name!r} to have rank {smallest} at least (the smallest of ranks), got {subspace.rank}; "
                    "pass smaller ranks"
                )
        given[name] = layers
    return given


def _default_targets(matrix: str, view: ModelView) -> tuple[str, ...]:
    return view.residual_point(matrix), "prediction"
