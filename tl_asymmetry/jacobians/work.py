"""Which way a Jacobian is computed, whether that way is right, and how much of it fits into memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.arguments import shown
from tl_asymmetry.geometry.memory import free_memory
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.geometry.token_jacobians import TokenJacobian
from tl_asymmetry.models.block_jacobians import (
    ATTENTION,
    MLP,
    OWN_PATTERN,
    PARTS,
    GraphJacobian,
    NoClosedForm,
    SummedAttention,
    SummedBlock,
    part_ends,
    part_graph,
    traced_blocks,
)
from tl_asymmetry.models.checks import check_finite
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.notes import Notes

SOURCES = {
    "same": "same-position ∂ out[t] / ∂ in[t]",
    "sum": "summed over sources Σ_s ∂ out[t] / ∂ in[s]",
}
"""The two kinds of Jacobian, and what each is."""

METHODS = ("auto", "einsum", "autograd")

POINTWISE = ("mlp", "ln", "ln2")
"""Parts in which every token depends on itself alone."""
_CHECK_TOKENS, _CHECK_POSITIONS = 16, 3
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-4}
_COARSE_TOLERANCE = 0.1
_SHARE = 0.25
"""Of free memory, for what is at work at once."""
_MOST_BYTES = 1 << 30
"""Beyond this, more at once is not faster."""


def working_dtype(view: ModelView) -> torch.dtype:
    """What Jacobians are computed in: float32, or float64 for a float64 model."""
    return product_dtype(torch.empty(0, dtype=view.dtype))


@dataclass(frozen=True)
class Request:
    """One call's question."""

    view: ModelView
    layers: tuple[int, ...]
    part: str
    sources: str
    positions: tuple[int, ...] | None
    """Which positions, as asked for; None: all."""
    where: tuple[int, ...]
    """The positions in a sequence of one length, none negative."""

    def of(self, length: int) -> Request:
        """The question about a sequence of another length."""
        return replace(self, where=chosen_positions(length, self.positions))

    @property
    def summed(self) -> bool:
        """Whether sources are summed; a part that acts token by token has one source."""
        return self.sources == "sum" and self.part not in POINTWISE


def make_request(
    view: ModelView,
    sequences: Sequence[Int[Tensor, " _pos"]],
    layers: int | Sequence[int] | None,
    part: str,
    sources: str,
    positions: int | Sequence[int] | None,
) -> Request:
    """Check what does not need the model to run; the request is that of the longest sequence.

    Raises:
        ValueError: an unknown part, kind, layer or position, a part the model does not have, or weights that are not
            finite.
    """
    if part not in PARTS:
        raise ValueError(f"expected a part among {', '.join(PARTS)}, got {part!r}; pass one of these")
    if sources not in SOURCES:
        raise ValueError(f'expected sources "same" or "sum", got {sources!r}; pass sources="same"')
    chosen = chosen_layers(view, layers)
    for layer in chosen:
        part_ends(view, layer, part)
    check_finite(view)
    asked = None if positions is None else tuple(_integers(positions, "positions"))
    lengths = sorted({len(sequence) for sequence in sequences})
    for length in lengths:
        where = chosen_positions(length, asked)
    return Request(view, chosen, part, sources, asked, where)


def chosen_layers(view: ModelView, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, all by default; negative ones count from the end."""
    if layers is None:
        return tuple(range(view.n_layers))
    L = view.n_layers
    listed = _integers(layers, "layers")
    wrong = [layer for layer in listed if not -L <= layer < L]
    if wrong:
        raise ValueError(f"expected layers from 0 to {L - 1}, got {wrong[0]}; pass such layers")
    return tuple(dict.fromkeys(layer % L for layer in listed))


def chosen_positions(length: int, positions: int | Sequence[int] | None) -> tuple[int, ...]:
    """The positions asked for, all by default; negative ones count from the end."""
    if positions is None:
        return tuple(range(length))
    listed = _integers(positions, "positions")
    wrong = [position for position in listed if not -length <= position < length]
    if wrong:
        raise ValueError(
            f"expected positions from 0 to {length - 1} (the sequences have {length} tokens), got {wrong[0]}; pass "
            "such positions"
        )
    return tuple(dict.fromkeys(position % length for position in listed))


def _integers(given: Any, what: str) -> list[int]:
    """A whole number, or a list, range, array or vector of them, as a list."""
    values = given.tolist() if hasattr(given, "tolist") else given
    values = [values] if isinstance(values, Integral) else values
    if not isinstance(values, Sequence) or not values or not all(map(_is_index, values)):
        raise ValueError(f"expected a list of {what}, got {shown(given)}; pass {what}=[0] or leave it out")
    return [int(value) for value in values]


def _is_index(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# --- which way ---------------------------------------------------------------------------------------------------


def chosen_method(request: Request, tokens: Int[Tensor, " pos"], method: str, notes: Notes, *, seed: int) -> str:
    """ "einsum" where the closed form holds and agrees with autograd on a few tokens, else "autograd".

    Raises:
        ValueError: an unknown method; "einsum" asked for where it does not hold.
    """
    if method not in METHODS:
        raise ValueError(f"expected a method among {', '.join(METHODS)}, got {method!r}; pass one of these")
    if method == "autograd":
        return method
    try:
        error = disagreement(request, tokens[:_CHECK_TOKENS], seed=seed)
        tolerance = tolerance_of(request.view.dtype)
        fault = None if error <= tolerance else f"it is {error:.2g} off autograd (relative; at most {tolerance:g})"
    except NoClosedForm as found:
        fault = str(found)
    if fault is None:
        return "einsum"
    if method == "einsum":
        raise ValueError(f"expected a block with a closed form, but {fault}; pass method='autograd'")
    notes.warn(f"Jacobians are computed by autograd, since the closed form does not hold here: {fault}")
    return "autograd"


def tolerance_of(dtype: torch.dtype) -> float:
    """How far the two ways may be apart, relatively, in a model of that type.

    Hugging Face's models compute norms and softmax in float32 whatever their type.
    """
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def disagreement(request: Request, tokens: Int[Tensor, " pos"], *, seed: int) -> float:
    """Largest relative difference between the two ways, over the layers, at a few positions along a random vector."""
    n = len(tokens)
    where = tuple(sorted({0, n // 2, n - 1}))[:_CHECK_POSITIONS]
    short = replace(request, where=where)
    generator = torch.Generator().manual_seed(seed)
    d, worst = request.view.d_model, 0.0
    vectors = torch.randn(len(where), 1, d, generator=generator, dtype=torch.float64)
    for (_, closed), (_, graph) in zip(closed_forms(short, tokens), by_autograd(short, tokens, chunk=8), strict=True):
        x = vectors.to(graph.start.device, product_dtype(graph.start))
        if isinstance(closed, TokenJacobian):
            mine, other = closed.pull(x), graph.pull(x)
        else:
            mine, other = closed.push(x[0].mT), graph.push_everywhere(x[0].mT)
        error = float((mine - other).norm() / other.norm().clamp_min(torch.finfo(other.dtype).tiny))
        if not error <= worst:
            worst = error
    return worst


Closed = TokenJacobian | SummedAttention | SummedBlock


def closed_forms(
    request: Request, tokens: Int[Tensor, " pos"], *, layers_at_once: int | None = None
) -> Iterator[tuple[int, Closed]]:
    """The part's Jacobian at the request's positions of one sequence, layer by layer, in factors."""
    attends = request.part in ("block", "attn")
    needs = {
        *((ATTENTION,) if attends else ()),
        *((OWN_PATTERN,) if attends and not request.summed else ()),
        *((MLP,) if request.part in ("block", "mlp") else ()),
    }
    where = list(request.where)
    step = layers_at_once or len(request.layers)
    for start in range(0, len(request.layers), step):
        layers = request.layers[start : start + step]
        for layer, block in traced_blocks(request.view, tokens, layers, needs=frozenset(needs)):
            match request.part:
                case "block":
                    yield layer, (block.summed_block(where) if request.summed else block.block().at(where))
                case "attn" if request.summed:
                    yield layer, block.summed_attention(where)
                case "attn" if block.attention is not None:
                    yield layer, block.attention.at(where)
                case "mlp" if block.mlp is not None:
                    yield layer, block.mlp.at(where)
                case _:
                    norm = block.norms["attn_pre" if request.part == "ln" else "mlp_pre"]
                    yield layer, norm.at(where)


def by_autograd(request: Request, tokens: Int[Tensor, " pos"], *, chunk: int) -> Iterator[tuple[int, GraphJacobian]]:
    """The same by autograd, for any architecture."""
    for layer in request.layers:
        yield layer, part_graph(request.view, tokens, layer, request.part, request.where, chunk=chunk)


# --- how much at once --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What is held at once, in bytes."""

    chunk: int
    """How many units are at work at once."""
    unit: str
    """What a unit is: "tokens", "columns" or "backward passes"."""
    working: int
    """Of the units at work."""
    held: int
    """Of the result."""
    graph: int
    """Of one sequence's factors and graphs, all layers that are traced together."""
    layers_at_once: int
    """Layers traced in one forward pass."""
    free: int | None
    """What was free beforehand, on the model's device; None where unknown."""

    def described(self) -> dict[str, Any]:
        """For a result's config."""
        return {
            "chunk": self.chunk, "chunk_of": self.unit, "working_bytes": self.working, "held_bytes": self.held,
            "graph_bytes": self.graph, "free_bytes": self.free,
        }  # fmt: skip


def plan_memory(request: Request, length: int, method: str, *, matrices: int, chunk: int | None) -> MemoryPlan:
    """Estimate what a call holds, choose how much is at work at once, and refuse what cannot fit.

    Args:
        request: the question.
        length: of the longest sequence.
        method: "einsum" or "autograd".
        matrices: d × d matrices in the result.
        chunk: how many units to have at work at once; None chooses.

    Raises:
        ValueError: chunk < 1, or more memory needed than there is: says how much, and what to lower.
    """
    view, n = request.view, length
    size = working_dtype(view).itemsize
    d, m, inner = view.d_model, view.d_mlp or 4 * view.d_model, view.n_heads * view.d_head
    gated = 2 if "W_gate" in view.matrices else 1
    scores = view.n_heads * n * n
    if method == "autograd":
        unit, numbers, most = "backward passes", n * (10 * d + 4 * m + 4 * inner) + 4 * scores, d * len(request.where)
    elif request.summed:
        unit, numbers, most = "columns", n * (4 * d + 2 * m + 12 * inner) + 4 * scores, d
    else:
        unit, numbers, most = "tokens", 4 * d * d + (gated + 1) * m * d + 2 * inner * d, len(request.where)
    per_layer = size * (n * (6 * d + 6 * inner + inner * view.d_head + 3 * m) + 4 * scores)
    free = free_memory(view.device)
    budget = _MOST_BYTES if free is None else min(_MOST_BYTES, int(_SHARE * free))
    if chunk is not None and chunk < 1:
        raise ValueError(f"expected a chunk of at least 1, got {chunk}; pass None to have it chosen")
    at_once = chunk or max(1, min(most, budget // (numbers * size)))
    layers_at_once = max(1, min(len(request.layers), budget // per_layer))
    held = matrices * d * d * size
    plan = MemoryPlan(at_once, unit, at_once * numbers * size, held, layers_at_once * per_layer, layers_at_once, free)
    on_cpu = free_memory(torch.device("cpu"))
    needs = {"the model's device": (plan.working + plan.graph, free), "the CPU": (held, on_cpu)}
    if view.device.type == "cpu":
        needs = {"the CPU": (plan.working + plan.graph + held, free)}
    for place, (needed, there) in needs.items():
        if there is not None and needed > there:
            raise ValueError(
                f"expected a call that fits into the {_gigabytes(there)} free on {place}, got one that needs about "
                f"{_gigabytes(needed)} ({matrices} matrices of {d} × {d} in the result: {_gigabytes(held)}); pass "
                'reduce="mean", fewer layers, positions or sequences, shorter sequences, or a smaller chunk'
            )
    return plan


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def mean_summed(jacobian: SummedAttention | SummedBlock | GraphJacobian, like: Tensor, chunk: int) -> Tensor:
    """The average over tokens of a Jacobian summed over sources, `chunk` columns at a time."""
    if isinstance(jacobian, GraphJacobian):
        return torch.cat([columns.mean(0) for columns in summed_columns(jacobian, like, chunk)], -1)
    return torch.cat([jacobian.mean_push(columns) for columns in like.split(chunk, -1)], -1)


def summed_columns(
    jacobian: SummedAttention | SummedBlock | GraphJacobian, like: Float[Tensor, "d d"], chunk: int
) -> Iterator[Float[Tensor, "token d c"]]:
    """The columns of a Jacobian summed over sources, for every token, `chunk` at a time: `like` is the identity."""
    for columns in like.split(chunk, -1):
        yield jacobian.push_everywhere(columns) if isinstance(jacobian, GraphJacobian) else jacobian.push(columns)
