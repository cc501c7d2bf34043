"""What an analysis will hold against what, decided and checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.subspace import Subspace, as_subspace
from tl_asymmetry.models.capture import (
    Capture,
    Site,
    balanced_groups,
    copies_noted,
    first_of,
    means_of,
    merged,
)
from tl_asymmetry.models.checks import check_ranks, check_token_count
from tl_asymmetry.models.named_subspaces import READY
from tl_asymmetry.models.readers.base import Weights
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import (
    EXPERT_INPUT,
    KEYS_AND_VALUES,
    LATENTS,
    ROUTING,
    canonical,
    expert_input,
    kind_of,
    nearest,
    reads_latent,
)
from tl_asymmetry.notes import Notes
from tl_asymmetry.settings import PairSettings

STREAM_SUBSPACES = ("attn_in", "mlp_in", "resid_pre", "resid_mid", "resid_post")
"""Subspaces that come from activations, named as their hook points."""

TOKENS_PER_DIMENSION, SEQUENCES = 10, 16
"""Under so many tokens for each dimension, or so many sequences, intervals and references are not trusted."""


@dataclass(frozen=True)
class Plan:
    """Matrices, ranks and subspaces of one analysis."""

    matrices: tuple[str, ...]
    """In canonical order."""
    ranks: tuple[int, ...]
    """Ascending: those asked for, and the sizes of given subspaces."""
    measured: Mapping[str, tuple[int, ...]]
    """For each subspace the ranks it is measured at: of a given one its own size, and below it only where it has
    eigenvalues, since otherwise none of its directions comes before another."""
    subspaces: tuple[str, ...]
    """All names in use."""
    targets: Mapping[str, tuple[str, ...]]
    """For each matrix the subspaces it is held against."""
    given: Mapping[str, Sequence[Subspace]]
    """Subspaces passed by the user, one for each layer."""
    points: tuple[str, ...]
    """Hook points to capture: the subspaces' own, the inputs of read matrices, and the routing of mixtures."""
    beside: tuple[str, ...]
    """What is captured besides, so that W_K and W_V are held against all positions: see `capture.first_of`."""
    shown_rank: int
    """The rank to show where only one can be: d//16, or the nearest that all of `shown_first` have."""

    @property
    def shown_first(self) -> list[str]:
        """The subspaces whose ranks decide which one is shown: own ones only where there are no others."""
        return _shown_first(self.subspaces, self.given)

    def described(self) -> dict[str, Any]:
        """For a result's config."""
        return {
            "matrices": list(self.matrices),
            "ranks": list(self.ranks),
            "measured": {name: list(ranks) for name, ranks in self.measured.items()},
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


def check_asked(view: ModelView, settings: PairSettings) -> None:
    """Refuse ranks, matrices and subspaces that no aligned model could make possible: the base alone says so.

    Raises:
        ValueError: as of `make_plan`.
    """
    if settings.ranks is not None:
        check_ranks(settings.ranks, view.d_model)
    chosen_matrices(view, settings.matrices, canonical((*view.matrices, *view.irregular)))
    _chosen_subspaces(view, settings.subspaces)


def make_plan(
    view: ModelView,
    settings: PairSettings,
    sequences: Sequence[Tensor],
    notes: Notes,
    *,
    available: Sequence[str] | None = None,
) -> Plan:
    """Resolve the defaults and refuse what the model does not have.

    Args:
        view: the base.
        settings: what was asked for.
        sequences: what will be run.
        notes: what the reader must know goes there.
        available: matrices to choose from; default those that every layer has in one shape.

    Raises:
        ValueError: an unknown matrix or subspace, a rank out of range or above the number of tokens, a subspace of
            another dimension or too small for every rank.
    """
    d, subspaces = view.d_model, settings.subspaces
    asked = check_ranks(default_ranks(d) if settings.ranks is None else settings.ranks, d)
    chosen = chosen_matrices(view, settings.matrices, available)
    if available is None:
        note_left_out(view, notes)
    names, given = _chosen_subspaces(view, subspaces)
    beside = isinstance(subspaces, Mapping)
    if not beside and given and len(given) == len(names) and not given.keys() <= READY.keys():
        notes.add("only own subspaces are measured: for the default ones beside them pass the mapping by itself")
    targets = {m: (*_default_targets(m, view), *names) if beside or subspaces is None else names for m in chosen}
    targets = {m: tuple(name for name in of if _applies(name, m, view)) for m, of in targets.items()}
    if not any(targets.values()):
        raise ValueError(
            f"expected a matrix that {' or '.join(names)} applies to, got {', '.join(chosen)}; pass other matrices or "
            "subspaces"
        )
    if alone := [m for m in chosen if not targets[m]]:
        notes.add(f"left out, since {' and '.join(names)} do not apply to them: {', '.join(alone)}")
    chosen = tuple(m for m in chosen if targets[m])
    used = tuple(dict.fromkeys(name for matrix in chosen for name in targets[matrix]))
    inputs = [kind_of(m).point for m in chosen if kind_of(m).reads]
    points = dict.fromkeys([*inputs, *(name for name in used if name in STREAM_SUBSPACES and name not in given)])
    points |= dict.fromkeys(_routed_points(view, chosen, used))
    measured = {
        name: _own_ranks(given[name], asked) if name in given
        else _latent_ranks(view, name, settings.ranks) if name in LATENTS else asked
        for name in used
    }  # fmt: skip
    for name in used:
        if not measured[name]:
            notes.add(f"{name!r} is no wider than the smallest rank asked for: what is held against it has no rows")
    ranks = tuple(sorted({k for own in measured.values() for k in own}))
    everywhere = [k for k in ranks if all(k in measured[name] for name in _shown_first(used, given))] or ranks
    if points:
        check_token_count(counted_tokens(sequences, settings), asked)
    return Plan(
        matrices=chosen,
        ranks=ranks,
        measured=measured,
        subspaces=used,
        targets=targets,
        given=given,
        points=tuple(points),
        beside=_beside(view, chosen, settings),
        shown_rank=min(everywhere, key=lambda k: (abs(k - max(d // 16, 1)), k)),
    )


def _routed_points(view: ModelView, matrices: Sequence[str], subspaces: Sequence[str]) -> Iterator[str]:
    """What is captured of mixtures: what each expert is given, and where it is asked for its inputs."""
    experts = max((view.experts(matrix) or 0 for matrix in matrices), default=0)
    if any(view.shows(layer, ROUTING) for layer in range(view.n_layers) if experts):
        yield ROUTING
        yield from map(expert_input, range(experts)) if EXPERT_INPUT in subspaces else ()


def _shown_first(used: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    return [name for name in used if name not in given and name not in LATENTS] or list(used)


def _beside(view: ModelView, matrices: Sequence[str], settings: PairSettings) -> tuple[str, ...]:
    """Keys and values have gradients at every position, the first one too, whatever the subspaces leave out."""
    of_keys = [matrix for matrix in matrices if matrix in KEYS_AND_VALUES]
    names = [*dict.fromkeys(first_of(kind_of(matrix).point) for matrix in of_keys if settings.exclude_first)]
    if view.key_shift_invariant and "W_K" in matrices:
        names.append(means_of("attn_in"))
    return tuple(names)


def too_few(tokens: int, sequences: int, d: int) -> bool:
    """Whether intervals and references rest on too few tokens, or too few sequences, to be trusted."""
    return tokens < TOKENS_PER_DIMENSION * d or sequences < SEQUENCES


def counted_tokens(sequences: Sequence[Tensor], settings: PairSettings) -> int:
    """Tokens that count towards the moments of one model."""
    return sum(len(sequence) - settings.exclude_first for sequence in sequences)


def grouped_sequences(
    sequences: Sequence[Int[Tensor, " _pos"]], settings: PairSettings, notes: Notes
) -> tuple[list[list[Int[Tensor, " _pos"]]], bool]:
    """The sequences in groups to be left out one at a time, and whether these are wanted and enough for intervals."""
    grouped = balanced_groups(sequences, settings.groups)
    if settings.groups > 1 and (note := copies_noted(sequences)):
        notes.warn(note)
    enough = len(grouped) >= MINIMUM_GROUPS
    if settings.groups > 1 and not enough:
        notes.warn(
            f"intervals need at least {MINIMUM_GROUPS} groups of sequences, got {len(grouped)}: ci_low and ci_high are "
            "NaN; pass more sequences or groups=8"
        )
    contents = {tuple(sorted(tuple(sequence.tolist()) for sequence in group)) for group in grouped}
    if settings.groups > 1 and enough and len(contents) == 1:
        notes.warn(
            "all groups of sequences hold the same texts: nothing is known of other texts, and all intervals are NaN; "
            "pass different texts"
        )
        enough = False
    return grouped, settings.groups > 1 and enough


def default_ranks(d: int) -> tuple[int, ...]:
    """The distinct values of 1, 4, 16, 64, d//16, d//4 that are ranks of proper subspaces of R^d.

    Example:
        >>> default_ranks(768)
        (1, 4, 16, 48, 64, 192)
    """
    return tuple(sorted({k for k in (1, 4, 16, 64, d // 16, d // 4) if 0 < k < d}))


def matrices_of_both(base: ModelView, aligned: Weights, notes: Notes) -> tuple[str, ...]:
    """What can be compared, in canonical order: irregular matrices too, where both sides show them."""
    irregular = [matrix for matrix in base.irregular if matrix in aligned.irregular]
    missing = [matrix for matrix in base.irregular if matrix not in irregular]
    if missing:
        notes.add(f"left out, since {public_name(aligned.name)!r} does not show them: {', '.join(missing)}")
    return canonical((*base.matrices, *irregular))


def chosen_matrices(
    view: Weights, matrices: str | Sequence[str] | None, available: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The matrices asked for, one or several, of those available (that every layer has); all by default, in order.

    Raises:
        ValueError: one that the model does not have.
    """
    there = view.matrices if available is None else available
    others = view.irregular if available is None else ()
    if not there:
        if others:
            raise ValueError(
                f"expected matrices that every layer has in one shape, got none in {view.name!r}; pass it to "
                f"analyze_pair, which takes those of single layers ({', '.join(others)})"
            )
        raise ValueError(
            f"expected a model with named matrices on its residual stream, got {view.name!r} with none; pass a "
            "transformer"
        )
    if matrices is None:
        return tuple(there)
    listed = [matrices] if isinstance(matrices, str) else list(matrices) if isinstance(matrices, Iterable) else []
    unknown = [matrix for matrix in listed if matrix not in there]
    if unknown and unknown[0] in others:
        raise ValueError(
            f"expected matrices that every layer has in one shape ({', '.join(there)}), got {unknown[0]!r}, which not "
            "every layer has, of which each expert has its own or which reads a latent; pass one of these, or use "
            "analyze_pair, which takes it"
        )
    if unknown or not listed:
        what = nearest(unknown[0], there) if unknown else "one or several of these"
        raise ValueError(
            f"expected matrices among {', '.join(there)}, got {unknown[0] if unknown else matrices!r}; pass {what}"
        )
    return tuple(matrix for matrix in there if matrix in listed)


def note_left_out(view: Weights, notes: Notes) -> None:
    """Say which matrices an analysis of regular ones leaves out, and what takes them."""
    latent = [matrix for matrix in view.irregular if reads_latent(matrix)]
    others = [matrix for matrix in view.irregular if matrix not in latent]
    for left_out, why in ((others, "not every layer has in one shape"), (latent, "read a latent and not the stream")):
        if left_out:
            notes.add(f"{', '.join(left_out)}, which {why}, are left out; analyze_pair takes them")


def _chosen_subspaces(view: ModelView, subspaces: Any) -> tuple[tuple[str, ...], dict[str, list[Subspace]]]:
    """The names of what is measured, and those subspaces among them that were given, one for each layer."""
    if subspaces is None:
        return (), {}
    available = [point for point in STREAM_SUBSPACES if view.has_point(point)]
    available += ["prediction"] if view.has_unembedding else []
    available += [latent for latent in LATENTS if any(view.shows(layer, latent) for layer in range(view.n_layers))]
    available += [EXPERT_INPUT] if any(view.shows(layer, ROUTING) for layer in range(view.n_layers)) else []
    everything = [*available, *READY]
    listed = [subspaces] if isinstance(subspaces, str | Mapping) else subspaces
    if not isinstance(listed, Iterable) or isinstance(listed, Tensor):
        listed = []
    names: list[str] = []
    given: dict[str, list[Subspace]] = {}
    for entry in listed:
        if isinstance(entry, Mapping):
            names += list(entry)
            given |= {name: _of_every_layer(name, value, view) for name, value in entry.items()}
        elif isinstance(entry, str) and entry in READY:
            names.append(entry)
            given[entry] = READY[entry](view)
        elif entry in available:
            names.append(entry)
        else:
            raise ValueError(
                f"expected subspaces among {', '.join(everything)}, got {entry!r}; pass {nearest(entry, everything)} "
                'or a mapping from names to your own directions, such as {"refusal": vector}'
            )
    if not names:
        raise ValueError(
            f"expected at least one subspace among {', '.join(everything)}, got {subspaces!r}; leave it out for the "
            "default"
        )
    return tuple(dict.fromkeys(names)), given


def _of_every_layer(name: Any, value: Any, view: ModelView) -> list[Subspace]:
    """Own directions, the same in every layer or one list, matrix or `Subspace` for each."""
    plain = name.strip().lower() if isinstance(name, str) else ""
    if not plain or plain in (*STREAM_SUBSPACES, "prediction", EXPERT_INPUT, *LATENTS, *READY):
        raise ValueError(
            f"expected own subspaces under names of their own, got {name!r}, which is "
            f"{'the name of a built-in one' if plain else 'none'}; pass another name"
        )
    by_layer = not isinstance(value, Subspace) and not hasattr(value, "ndim") and _is_by_layer(value)
    if by_layer and len(value) != view.n_layers:
        raise ValueError(
            f"expected one subspace, or {view.n_layers} of them, for {name!r}, got {len(value)}; pass one per layer"
        )
    layers = [as_subspace(one, view.d_model, name=name) for one in (value if by_layer else [value])]
    if len({subspace.rank for subspace in layers}) > 1:
        raise ValueError(f"expected subspaces of one rank for {name!r}, got several; pass them truncated")
    if layers[0].rank >= view.d_model and layers[0].eigenvalues is None:
        raise ValueError(
            f"expected fewer than {view.d_model} directions for {name!r}, got all of them in no order; pass fewer, or "
            "a Subspace with eigenvalues"
        )
    return layers if by_layer else layers * view.n_layers


def _is_by_layer(values: Any) -> bool:
    """Whether a list holds a subspace for each layer rather than the directions of one."""
    return isinstance(values, Iterable) and any(isinstance(v, Subspace) or getattr(v, "ndim", 1) == 2 for v in values)


def _own_ranks(layers: Sequence[Subspace], asked: Sequence[int]) -> tuple[int, ...]:
    """The ranks a given subspace is measured at."""
    size, d = layers[0].rank, layers[0].d
    ordered = all(subspace.eigenvalues is not None for subspace in layers)
    return tuple(sorted({k for k in asked if k < size and ordered} | ({size} if size < d else set())))


def _applies(subspace: str, matrix: str, view: ModelView) -> bool:
    """Whether a matrix can be held against a subspace: against a latent what reads it, and that alone."""
    if reads_latent(matrix) or subspace in LATENTS:
        return subspace == kind_of(matrix).point
    return subspace != EXPERT_INPUT or bool(view.experts(matrix))


def _latent_ranks(view: ModelView, latent: str, asked: Sequence[int] | None) -> tuple[int, ...]:
    """The ranks that a latent is measured at: those asked for below its width, by default as of a stream so wide."""
    widths = [view.latent_width(layer, latent) for layer in range(view.n_layers)]
    width = min(width for width in widths if width)
    return default_ranks(width) if asked is None else tuple(sorted({k for k in asked if k < width}))


def _default_targets(matrix: str, view: ModelView) -> tuple[str, ...]:
    return view.residual_point(matrix), *(["prediction"] if view.has_unembedding else [])
