"""One pass over the texts: activations become second moments inside the hooks, and are gone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.memory import return_freed_memory
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.precision import LARGEST_SQUARE, SMALLEST_SQUARE, with_fresh_settings
from tl_asymmetry.models.processes import ALONE, Processes
from tl_asymmetry.models.routing import Routing, RoutingReader
from tl_asymmetry.models.texts import batches, token_sequences
from tl_asymmetry.models.view import ModelView, overflowed
from tl_asymmetry.names import EXPERT_INPUT, LATENTS, POINTS, ROUTING, expert_input
from tl_asymmetry.notes import warn

Site = tuple[str, int]
"""A hook point and a layer; or what `capture` keeps beside it, `first_of` or `means_of` a hook point."""


def first_of(point: str) -> str:
    """The name under which the moments of each sequence's first position are kept, where it does not count."""
    return f"{point}_first"


def means_of(point: str) -> str:
    """The name under which Σ_s n_s x̄_s x̄_sᵀ over sequences s, all positions, is kept: moments of rows √n_s x̄_s."""
    return f"{point}_means"


@dataclass(frozen=True)
class Capture:
    """Moments of one model's activations, by site, kept apart for groups of sequences."""

    groups: tuple[dict[Site, StreamingMoments], ...]
    """Per group of sequences: moments of the tokens that count."""
    first_positions: tuple[dict[Site, StreamingMoments], ...] | None
    """Per group: moments of the first position of each sequence, where they were asked for."""
    tokens: int
    """Number of tokens that count, in all groups."""
    sequences: int
    """Number of sequences."""


def merged(parts: Iterable[StreamingMoments]) -> StreamingMoments:
    """The moments of all parts together; the parts stay as they are."""
    first, *rest = parts
    total = StreamingMoments(first.d, sequences=first.sequences).merge(first)
    for part in rest:
        total.merge(part)
    return total


@checked
@with_fresh_settings
def capture_moments(
    model: Any,
    hook_points: str | Site | Sequence[str | Site],
    texts: Any = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    max_tokens: int | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[Site, StreamingMoments]:
    """Mean, second moment and covariance of the activations at some hook points, in one forward pass.

    The tensors are reduced inside the hooks on their device; the result is on CPU. The model is run in evaluation
    mode, without gradients, up to its last block, and comes back as it was.

    Args:
        model: a HookedTransformer or TransformerBridge.
        hook_points: names out of `attn_in, mlp_in, resid_pre, resid_mid, resid_post, z, mlp_post` (every layer), or
            pairs `(name, layer)`; one or a list. "z" is taken with its heads side by side, `[n_heads · d_head]`.
        texts: strings or lists of chat messages; without texts and tokens the package's calibration texts.
        tokens: token ids instead, `[batch, pos]`, sequences of different lengths, or what a tokenizer returns.
        mask: which tokens are real, of the shape of `tokens`: False at padding.
        max_tokens: use no more tokens than this.
        exclude_first: leave the first position of each sequence out.
        batch_size: sequences per forward pass; the result does not depend on it.
        progress: show a progress bar.

    Returns:
        `{(name, layer): StreamingMoments}`.

    Raises:
        ValueError: a point the model does not have, activations that float32 cannot square, or what `token_sequences`
            refuses.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> tokens = torch.arange(4, 28).view(2, 12)
        >>> moments = capture_moments(demo_model("base"), "attn_in", tokens=tokens, progress=False)
        >>> moments["attn_in", 0].count
        22
    """
    view = ModelView(model)
    if not isinstance(hook_points, Iterable):
        raise ValueError(f'expected hook_points as names or pairs, got {shown(hook_points)}; pass "attn_in"')
    single = isinstance(hook_points, str) or (isinstance(hook_points, tuple) and isinstance(hook_points[-1], int))
    sites: list[Any] = [
        site
        for point in ([hook_points] if single else hook_points)
        for site in ([(point, layer) for layer in range(view.n_layers)] if isinstance(point, str) else [point])
    ]
    for site in sites:
        if not isinstance(site, tuple | list) or len(site) != 2 or not isinstance(site[1], int):
            raise ValueError(f'expected hook_points as names or pairs, got {site!r}; pass "attn_in" or ("attn_in", 0)')
        if _is_routed(str(site[0])):
            raise ValueError(f"expected a point among {', '.join(POINTS)}, got {site[0]!r}; pass one of these")
    if not sites:
        raise ValueError('expected hook_points with a name or more, got none; pass "attn_in"')
    sequences = token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=warn)
    captured = capture(view, [sequences], sites, exclude_first=exclude_first, batch_size=batch_size, progress=progress)
    return captured.groups[0]


def capture(
    view: ModelView,
    groups: Sequence[Sequence[Int[Tensor, " _pos"]]],
    sites: Sequence[Site],
    *,
    exclude_first: bool,
    first_positions: bool = False,
    beside: Sequence[str] = (),
    batch_size: int,
    progress: bool,
    processes: Processes = ALONE,
) -> Capture:
    """Moments at `sites` for each group of sequences; the groups never share a forward pass.

    The model is run no further than the last layer among the sites.

    Of "routing" the rows are, for each token, which experts it is given to (1 or 0) and beside that their weights; of
    an expert's input those tokens alone that it is given.

    Args:
        view: the model.
        groups: sequences of token ids, already grouped.
        sites: `(point, layer)` pairs; "routing" and `expert_input` where the view shows them.
        exclude_first: whether the first position of each sequence is left out of the moments.
        first_positions: keep the moments of the first positions as well, apart.
        beside: `first_of` and `means_of` points to keep among the moments, where the point is among the sites.
        batch_size: sequences per forward pass.
        progress: show a progress bar.
        processes: processes that share the sequences of each group; all get the moments of all.

    Raises:
        ValueError: activations that overflow, or whose squares float32 cannot hold.
    """
    shares = [processes.share(group) for group in groups]
    shown = progress and processes.is_first
    bar = tqdm(total=sum(map(len, shares)), desc="activations", unit="seq", disable=not shown)
    layers = 1 + max((layer for _, layer in sites), default=0)
    routed = {layer: _experts_among(sites, layer) for point, layer in sites if _is_routed(point)}
    passing = [site for site in sites if not _is_routed(site[0])]
    counted: list[dict[Site, StreamingMoments]] = []
    firsts: list[dict[Site, StreamingMoments]] = []
    with bar, torch.no_grad(), view.evaluating():
        for group in shares:
            moments = {site: _begun(view, site, counted) for site in sites}
            first = {site: _begun(view, site, firsts) for site in passing} if first_positions else {}
            extra = {
                (name, layer): _begun(view, (point, layer), counted, (name, layer))
                for point, layer in passing
                for name in (first_of(point), means_of(point))
                if name in beside
            }
            for tokens, mask in batches(group, batch_size, causal=view.causal):
                keep = mask.clone()
                if exclude_first:
                    keep[:, 0] = False
                readers = {
                    (point, layer): _reader(
                        moments[point, layer],
                        [m for m in (first.get((point, layer)), extra.get((first_of(point), layer))) if m is not None],
                        extra.get((means_of(point), layer)),
                        keep.to(view.device),
                        mask.to(view.device),
                    )
                    for point, layer in passing
                }
                deciding = {
                    layer: _routing_reader(moments, layer, experts, keep.flatten().to(view.device))
                    for layer, experts in routed.items()
                }
                with view.hooks(readers), view.routings(deciding):
                    view.run(tokens.to(view.device), layers=layers)
                bar.update(len(tokens))
            # A finished group leaves the device: only one group's moments are ever held there.
            counted.append({site: processes.summed(m.cpu()) for site, m in (moments | extra).items()})
            firsts.append({site: processes.summed(m.cpu()) for site, m in first.items()})
            for site in sites:
                _check_size(view, site, counted[-1][site])
            return_freed_memory()
    lengths = [len(sequence) - exclude_first for group in groups for sequence in group]
    return Capture(tuple(counted), tuple(firsts) if first_positions else None, sum(lengths), len(lengths))


def _check_size(view: ModelView, site: Site, moments: StreamingMoments) -> None:
    """Refuse activations of which sums of squares have no digits: infinite ones, and such as overflow or vanish."""
    if not moments.count:
        return
    size, single = moments.mean_square, view.dtype != torch.float64
    if not math.isfinite(size) or (single and size > LARGEST_SQUARE):
        raise ValueError(overflowed(view, f"{site[0]!r} of layer {site[1]}"))
    if single and 0 < size < SMALLEST_SQUARE:
        raise ValueError(
            f"expected activations whose squares float32 can hold, got some of about {size**0.5:.0e} in {site[0]!r} of "
            f"layer {site[1]}; pass the model in float64 (model.double())"
        )


def balanced_groups(sequences: Sequence[Tensor], groups: int) -> list[list[Tensor]]:
    """Whole sequences in groups with about the same number of tokens each; never an empty one. See `group_numbers`."""
    numbers = group_numbers(sequences, groups)
    return [
        [sequence for sequence, number in zip(sequences, numbers, strict=True) if number == group]
        for group in range(max(numbers) + 1)
    ]


def group_numbers(sequences: Sequence[Tensor], groups: int) -> list[int]:
    """The group of each sequence: blocks in the order of the sequences, balanced by tokens, copies in one group.

    A group that is left out is to show what other texts would have given; copies that stay in would hide it.
    """
    families = copies(sequences)
    sizes = torch.zeros(max(families) + 1, dtype=torch.float64)
    for family, sequence in zip(families, sequences, strict=True):
        sizes[family] += len(sequence)
    groups, count = min(groups, len(sizes)), len(sizes)
    # A family belongs to the block in which its middle token falls.
    middle = ((sizes.cumsum(0) - sizes / 2) / sizes.sum()).tolist()
    block_of: list[int] = []
    for i, place in enumerate(middle):
        # Leave at least one for every block to come, and start no block before the one ahead has one.
        block = max(min(int(place * groups), groups - 1), groups - (count - i))
        block_of.append(min(block, block_of[-1] + 1 if block_of else 0))
    return [block_of[family] for family in families]


def copies(sequences: Sequence[Tensor]) -> list[int]:
    """Numbers, from 0 in the order of the sequences, that are equal for copies and near copies: for sequences that have
    more than half of their tokens in common from the beginning on, the first token aside."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tolist())
    root = list(range(len(sequences)))
    for before, after in pairwise(order):  # what begins alike is neighbours in this order
        a, b = sequences[before], sequences[after]
        shorter = min(len(a), len(b))
        differ = (a[:shorter] != b[:shorter]).nonzero()
        common = int(differ[0]) if len(differ) else shorter
        if len(a) == len(b) == common or 2 * (common - 1) > max(len(a), len(b)) - 1:
            root[after] = root[before]
    found: dict[int, int] = {}
    return [found.setdefault(family, len(found)) for family in root]


def copies_noted(sequences: Sequence[Tensor]) -> str | None:
    """What a result must say of copies among its sequences, if there are any."""
    families = copies(sequences)
    more = len(families) - len(set(families))
    if not more:
        return None
    return (
        f"{more} of {len(families)} sequences are copies of others, or begin as they do for more than half: no further "
        "evidence, so they stay in one group"
    )


def _begun(
    view: ModelView, site: Site, done: Sequence[Mapping[Site, StreamingMoments]], key: Site | None = None
) -> StreamingMoments:
    """Moments without rows; beside those of the groups that are done, so that all are added up as they are."""
    if done:
        return done[0][key or site].beside()
    point, layer = site
    if point == ROUTING:
        return StreamingMoments(2 * view.expert_count(layer))
    if point in LATENTS:
        return StreamingMoments(view.latent_width(layer, point))
    widths = {"z": view.n_heads * view.d_head, "mlp_post": view.d_mlp or 0}
    return StreamingMoments(widths.get(point, view.d_model))


def _is_routed(point: str) -> bool:
    return point == ROUTING or point.startswith(EXPERT_INPUT)


def _experts_among(sites: Sequence[Site], layer: int) -> list[int]:
    """The experts of a layer whose inputs are wanted."""
    return [int(point.rpartition(":")[2]) for point, of in sites if of == layer and point.startswith(EXPERT_INPUT)]


def _routing_reader(
    moments: Mapping[Site, StreamingMoments], layer: int, experts: Sequence[int], keep: Bool[Tensor, " token"]
) -> RoutingReader:
    def read(routing: Routing) -> None:
        counted = keep.to(routing.hidden.device)
        if (ROUTING, layer) in moments:
            decided = torch.cat([routing.chosen, routing.weights], -1).double()  # counts are to be exact
            moments[ROUTING, layer].update(decided, counted)
        for expert in experts:
            given = counted & routing.chosen[:, expert]
            moments[expert_input(expert), layer].update(routing.inputs(expert), given)

    return read


def _reader(
    moments: StreamingMoments,
    firsts: Sequence[StreamingMoments],
    means: StreamingMoments | None,
    keep: Bool[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
) -> Callable[[Tensor], None]:
    def read(x: Tensor) -> None:
        x = x.flatten(2)  # the heads of "z" side by side
        moments.update(x, keep.to(x.device))
        for first in firsts:
            first.update(x[:, 0])
        if means is not None:
            counted = real.to(x.device).unsqueeze(-1)
            total = torch.where(counted, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum(1, dtype=torch.float64)
            means.update(total / counted.sum(1).double().sqrt())

    return read
