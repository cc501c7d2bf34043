"""From a live model to the factors of its blocks' Jacobians: one forward pass, cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.geometry.batched_autograd import pull_batch, push_batch
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.geometry.token_jacobians import (
    AttentionJacobian,
    BlockJacobian,
    BranchJacobian,
    MLPJacobian,
    NormJacobian,
    TokenJacobian,
    Tokens,
    averages_exactly,
    mean_mlp_push,
    mean_of_dense,
)
from tl_asymmetry.models.graphs import Edit, Side, leaf, place, run_until
from tl_asymmetry.models.view import ModelView

_NUMBERS_AT_ONCE = 1 << 26
"""Numbers in the largest batched tensor of a backward pass through attention."""


class NoClosedForm(ValueError):
    """A block is not built from the parts whose Jacobians are known in closed form."""


@dataclass(frozen=True)
class SummedAttention:
    """What attention adds at t against the same change of the stream at every source: Σ_s ∂ out[t] / ∂ in[s].

    Only tangents can be taken through: each goes through every source's own norm and projections, then through
    attention's core at once.
    """

    before: NormJacobian | None
    """The norm of every source; of all positions, whatever the tokens asked for."""
    core: _AttentionCore
    after: NormJacobian | None
    where: Tokens
    """The positions asked for."""

    def push(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "token d c"]:
        """The same tangents at every source, taken through to the tokens asked for."""
        out = self.W_O.mT @ self.push_heads(columns)
        return out if self.after is None else self.after.at(self.where).push(out)

    def mean_push(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "d c"]:
        """The average of `push` over the tokens asked for."""
        if self.after is not None:
            return self.push(columns).mean(0)
        return self.W_O.mT @ self.push_heads(columns).mean(0)

    @property
    def W_O(self) -> Float[Tensor, "inner d"]:
        """Of all heads side by side."""
        return self.core.W["W_O"].flatten(0, 1)

    def push_heads(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "token inner c"]:
        """What the heads' outputs, side by side, answer at the tokens asked for."""
        core, tangents = self.core, []
        for name in ("W_Q", "W_K", "W_V"):
            W = core.W[name].transpose(0, 1).flatten(1)
            if self.before is None:
                projected = (W.mT @ columns).expand(core.n, -1, -1)
            else:
                projected = self.before.push_into(W, columns)
            tangents.append(projected.unflatten(1, (-1, core.e)).permute(3, 0, 1, 2))
        z = core.push(*tangents)[:, self.where]
        return z.flatten(2).permute(1, 2, 0).contiguous()


@dataclass(frozen=True)
class SummedBlock:
    """A block against the same change of its input at every source; what follows attention acts token by token."""

    attention: SummedAttention
    mlp: BranchJacobian | None
    """Of the tokens asked for."""
    parallel: bool

    def push(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "token d c"]:
        """The same tangents at every source, taken through to the tokens asked for."""
        attended = columns + self.attention.push(columns)
        if self.mlp is None:
            return attended
        return attended + self.mlp.push(columns.expand_as(attended) if self.parallel else attended)

    def mean_push(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "d c"]:
        """The average of `push` over the tokens asked for."""
        attention, mlp = self.attention, self.mlp
        if mlp is None:
            return columns + attention.mean_push(columns)
        if self.parallel or attention.after is not None or not averages_exactly(mlp):
            return self.push(columns).mean(0)
        heads = attention.push_heads(columns)
        attended = columns + attention.W_O.mT @ heads.mean(0)
        return attended + mean_mlp_push(mlp, columns, heads, attention.W_O)


@dataclass(frozen=True)
class TracedBlock:
    """The factors of one block's Jacobians at every position of one sequence; what was not asked for is None."""

    norms: Mapping[str, NormJacobian]
    """By where they stand: "attn_pre", "attn_post", "mlp_pre", "mlp_post"."""
    attention: BranchJacobian | None
    """What attention adds, by the token's own stream."""
    mlp: BranchJacobian | None
    """What the MLP adds; None in an attention-only model too."""
    core: _AttentionCore | None
    parallel: bool

    def block(self) -> BlockJacobian:
        """The whole block at every position, against itself."""
        assert self.attention is not None
        return BlockJacobian(self.attention, self.mlp, self.parallel)

    def summed_attention(self, where: Tokens) -> SummedAttention:
        """What attention adds at some positions, against every source."""
        assert self.core is not None
        return SummedAttention(self.norms.get("attn_pre"), self.core, self.norms.get("attn_post"), where)

    def summed_block(self, where: Tokens) -> SummedBlock:
        """The block at some positions, against every source."""
        mlp = None if self.mlp is None else self.mlp.at(where)
        return SummedBlock(self.summed_attention(where), mlp, self.parallel)


ATTENTION, OWN_PATTERN, MLP = "attention", "own pattern", "mlp"
"""What to trace beside the norms: attention's core, the derivative of a token's own attention, the MLP."""


def traced_blocks(
    view: ModelView, tokens: Int[Tensor, " pos"], layers: Sequence[int], *, needs: frozenset[str]
) -> Iterator[tuple[int, TracedBlock]]:
    """The factors of some blocks' Jacobians, from one forward pass over one sequence, one block after the other.

    Read from the model: the norms' inputs and scales, the pattern's diagonal. Differentiated by autograd, each alone
    between two cuts: the heads' outputs z by q, k and v (softmax, rotation, query-key norm, soft cap, sinks, whatever
    lies between), and the MLP's hidden layer by its inputs (any elementwise activation).

    Args:
        view: the model.
        tokens: one sequence.
        layers: which blocks.
        needs: of `ATTENTION`, `OWN_PATTERN` and `MLP`, what is wanted.

    Raises:
        NoClosedForm: a block that is not norm, attention, norm, MLP as known here.
    """
    collected: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    edits: dict[Side, Edit] = {}
    for layer, kept in collected.items():
        edits |= _cuts(view, layer, kept, needs)
    run_until(view, tokens.unsqueeze(0), edits)
    for layer in layers:
        yield layer, _assemble(view, layer, collected.pop(layer), needs)


# --- one pass ------------------------------------------------------------------------------------------------------


def _cuts(view: ModelView, layer: int, kept: dict[str, Tensor], needs: frozenset[str]) -> dict[Side, Edit]:
    """What to watch in one block, and where to part its graph."""

    def keep(name: str) -> Edit:
        def see(x: Tensor) -> None:
            kept[name] = x.detach()

        return see

    def watch(name: str) -> Edit:
        def see(x: Tensor) -> None:
            kept[name] = x

        return see

    def start(name: str) -> Edit:
        def see(x: Tensor) -> Tensor:
            kept[name] = leaf(x)
            return kept[name]

        return see

    def end(name: str) -> Edit:
        def see(x: Tensor) -> Tensor:
            kept[name] = x
            return x.detach()

        return see

    wanted: list[tuple[str, Edit]] = []
    if not view._adapter.names_hooks:
        raise NoClosedForm("a transformers model has no hook points between its modules")
    if ATTENTION in needs:
        wanted += [*((name, start(name)) for name in ("q", "k", "v")), ("z", end("z")), ("pattern", keep("pattern"))]
        if place(view, layer, "attn_scores") is not None:
            wanted.append(("attn_scores", watch("attn_scores")))
    if MLP in needs and view._adapter.has_mlp(layer):
        if place(view, layer, "pre") is None:  # a mixture of experts
            wanted += [("mlp_in", start("mlp_in")), ("mlp_branch", end("mlp_branch"))]
        else:
            wanted += [("pre", start("pre")), ("post", end("post"))]
            if "W_gate" in view.matrices:
                wanted.append(("pre_linear", start("pre_linear")))
    edits: dict[Side, Edit] = {}
    for name, edit in wanted:
        where = place(view, layer, name)
        if where is None:
            raise NoClosedForm(f"layer {layer} shows no {name!r}")
        edits[where] = edit
    norms: dict[str, Any] = view._adapter.norms(layer)
    for position, norm in norms.items():
        for side, name in (((norm, "input"), f"{position}.in"), ((norm.hook_scale, "output"), f"{position}.scale")):
            edits[side] = _both(edits.get(side), keep(name))
    return edits


def _both(first: Edit | None, second: Edit) -> Edit:
    """Two readers of one tensor, neither of which edits it."""

    def see(x: Tensor) -> None:
        if first is not None:
            first(x)
        second(x)

    return see


def _assemble(view: ModelView, layer: int, kept: dict[str, Tensor], needs: frozenset[str]) -> TracedBlock:
    dtype = product_dtype(*(x for x in kept.values()))
    norms: dict[str, NormJacobian] = {}
    for position, module in view._adapter.norms(layer).items():
        gain, centered = view._adapter.norm_form(module)
        if f"{position}.in" not in kept or f"{position}.scale" not in kept:
            raise NoClosedForm(f"layer {layer} does not run its norm {position}")
        norms[position] = NormJacobian.of_input(
            kept[f"{position}.in"][0].to(dtype), kept[f"{position}.scale"][0, :, 0].to(dtype),
            None if gain is None else gain.detach().to(dtype), centered,
        )  # fmt: skip
    core, attention, mlp = None, None, None
    if ATTENTION in needs:
        core = _AttentionCore(view, layer, kept)
        if OWN_PATTERN in needs:
            attention = BranchJacobian(norms.get("attn_pre"), core.same_position(), norms.get("attn_post"))
    if MLP in needs and view._adapter.has_mlp(layer):
        part = _dense_mlp(view, layer, kept) if "pre" in kept else _experts(kept, layer)
        mlp = BranchJacobian(norms.get("mlp_pre"), part, norms.get("mlp_post"))
    return TracedBlock(norms, attention, mlp, core, view.parallel)


# --- attention between q, k, v and z -------------------------------------------------------------------------------


class _AttentionCore:
    """Attention from the projected q, k, v to the heads' outputs z: the model's own graph, cut at both ends."""

    def __init__(self, view: ModelView, layer: int, kept: dict[str, Tensor]) -> None:
        missing = [name for name in ("q", "k", "v", "z", "pattern") if name not in kept]
        if missing:
            raise NoClosedForm(f"layer {layer} never showed {', '.join(missing)}")
        self.q, self.k, self.v, self.z = (kept[name] for name in ("q", "k", "v", "z"))
        self.pattern, self.scores = kept["pattern"][0], kept.get("attn_scores")
        self.n = self.q.shape[1]
        self.dtype = product_dtype(self.z)
        W = {name: view.weight(layer, name).to(self.dtype) for name in ("W_Q", "W_K", "W_V", "W_O")}
        self.heads, self.kv_heads, self.e = len(W["W_Q"]), len(W["W_K"]), W["W_Q"].shape[-1]
        sizes = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "z": self.heads}
        for name, heads in sizes.items():
            if getattr(self, name).numel() != self.n * heads * self.e:
                raise NoClosedForm(f"layer {layer} has {name} of shape {tuple(kept[name].shape)}, not {heads} heads")
        if self.pattern.shape != (self.heads, self.n, self.n):
            raise NoClosedForm(f"layer {layer} has a pattern of shape {tuple(self.pattern.shape)}")
        if not self.z.requires_grad:
            raise NoClosedForm(f"the heads' outputs of layer {layer} have no history")
        self.W = W
        self.group = self.heads // self.kv_heads
        self.chunk = max(1, _NUMBERS_AT_ONCE // (self.heads * self.n * self.n))

    def same_position(self) -> AttentionJacobian:
        """The factors of attention's same-position Jacobian."""
        key_out, key_in = self._by_key()
        return AttentionJacobian(
            own_weight=self.pattern.diagonal(dim1=-2, dim2=-1).mT.to(self.dtype),
            query=self._by_query(), key_out=key_out, key_in=key_in, W_Q=self.W["W_Q"],
            W_K=self.W["W_K"].repeat_interleave(self.group, 0), W_V=self.W["W_V"].repeat_interleave(self.group, 0),
            W_O=self.W["W_O"],
        )  # fmt: skip

    def _by_query(self) -> Float[Tensor, "pos head d_head d_head"]:
        """∂z[t]/∂q[t]: z[t] sees no other query, so one cotangent serves all positions and heads at once."""
        e = self.e
        unit = torch.eye(e, dtype=self.z.dtype, device=self.z.device)[:, None, None, None, :]
        cotangents = unit.expand(e, 1, self.n, self.heads, e).reshape(e, *self.z.shape)
        (rows,) = pull_batch(self.z, [self.q], cotangents, chunk=self.chunk)
        return rows.reshape(e, self.n, self.heads, e).permute(1, 2, 0, 3).to(self.dtype)

    def _by_key(self) -> tuple[Float[Tensor, "pos head d_head"], Float[Tensor, "pos head d_head"]]:
        """∂z[t]/∂k[t]: the score S[t, t] moves z[t] along v[t] − z[t] and nowhere else, so this has rank one.

        ∂z[t]/∂S[t, t] = A[t, t] (v[t] − z[t]), and ∂S[t, t]/∂k[t] is one backward pass from the scores' diagonal, for
        each of the query heads that share a key.
        """
        if not self._scores_are_live():
            return self._by_key_from_outputs()
        assert self.scores is not None
        v = self.v.detach().reshape(self.n, self.kv_heads, self.e).repeat_interleave(self.group, 1)
        own = self.pattern.diagonal(dim1=-2, dim2=-1).mT.to(self.dtype).unsqueeze(-1)
        out = own * (v - self.z.detach().reshape(self.n, self.heads, self.e)).to(self.dtype)
        into = torch.zeros_like(out)
        for member in range(self.group):
            diagonal = torch.zeros_like(self.scores)
            diagonal[:, member :: self.group] = torch.eye(self.n, dtype=diagonal.dtype, device=diagonal.device)
            (rows,) = torch.autograd.grad(self.scores, self.k, diagonal, retain_graph=True)
            into[:, member :: self.group] = rows.reshape(self.n, self.kv_heads, self.e).to(self.dtype)
        return out, into

    def _scores_are_live(self) -> bool:
        """Whether the scores that were seen are those whose softmax is the pattern, on the way from k."""
        S = self.scores
        if S is None or not S.requires_grad or S.shape[1:] != self.pattern.shape:
            return False
        return torch.allclose(torch.softmax(S.detach()[0], -1), self.pattern.to(S.dtype), rtol=1e-3, atol=1e-5)

    def _by_key_from_outputs(self) -> tuple[Float[Tensor, "pos head d_head"], Float[Tensor, "pos head d_head"]]:
        """∂z[t]/∂k[t] = w ρᵀ with w = (v[t] − z[t]) / ‖·‖, where the scores are not seen (or there are sinks).

        One cotangent for each t, w at t, tells ρ; for each query head that shares the key apart.
        """
        heads = (self.n, self.heads, self.e)
        v = self.v.detach().reshape(self.n, self.kv_heads, self.e).repeat_interleave(self.group, 1)
        w = v - self.z.detach().reshape(heads)
        w = w / w.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        ρ = torch.zeros(heads, dtype=self.dtype, device=w.device)
        at = torch.arange(self.n, device=w.device)
        for member in range(self.group):
            shared = torch.zeros_like(w)
            shared[:, member :: self.group] = w[:, member :: self.group]
            for start in range(0, self.n, self.chunk):
                here = at[start : start + self.chunk]
                cotangents = w.new_zeros(len(here), *heads)
                cotangents[torch.arange(len(here), device=w.device), here] = shared[here]
                (rows,) = pull_batch(
                    self.z, [self.k], cotangents.reshape(len(here), *self.z.shape), chunk=len(here)
                )  # fmt: skip
                rows = rows.reshape(len(here), self.n, self.kv_heads, self.e)
                ρ[here, member :: self.group] = rows[torch.arange(len(here), device=w.device), here].to(self.dtype)
        return w.to(self.dtype), ρ

    def push(
        self,
        q: Float[Tensor, "c pos head d_head"],
        k: Float[Tensor, "c pos kv_head d_head"],
        v: Float[Tensor, "c pos kv_head d_head"],
    ) -> Float[Tensor, "c pos head d_head"]:
        """Tangents of all queries, keys and values together, taken through to the heads' outputs."""
        tangents = [t.to(x.dtype).reshape(len(t), *x.shape) for t, x in ((q, self.q), (k, self.k), (v, self.v))]
        z = push_batch(self.z, [self.q, self.k, self.v], tangents, chunk=self.chunk)
        return z.reshape(len(z), self.n, self.heads, self.e).to(self.dtype)


# --- MLPs ----------------------------------------------------------------------------------------------------------


def _experts(kept: dict[str, Tensor], layer: int) -> TokenJacobian:
    """An MLP without a closed form, differentiated alone; every token by itself."""
    if not {"mlp_in", "mlp_branch"} <= set(kept) or not kept["mlp_branch"].requires_grad:
        raise NoClosedForm(f"the MLP of layer {layer} has no history")
    return GraphJacobian.of_tokens(kept["mlp_in"], kept["mlp_branch"])


def _dense_mlp(view: ModelView, layer: int, kept: dict[str, Tensor]) -> MLPJacobian:
    """An MLP's slopes by one backward pass through its elementwise part."""
    post = kept["post"]
    dtype = product_dtype(post)
    if not post.requires_grad:
        raise NoClosedForm(f"the hidden layer of layer {layer} has no history")
    inputs = {"W_gate": kept["pre"], "W_in": kept["pre_linear"]} if "pre_linear" in kept else {"W_in": kept["pre"]}
    slopes = torch.autograd.grad(post, list(inputs.values()), torch.ones_like(post), allow_unused=True)
    if any(slope is None for slope in slopes):
        raise NoClosedForm(f"the hidden layer of layer {layer} does not depend on its inputs")
    return MLPJacobian(
        tuple(slope[0].to(dtype) for slope in slopes),
        tuple(view.weight(layer, name).to(dtype) for name in inputs),
        view.weight(layer, "W_out").to(dtype),
    )


@dataclass(frozen=True)
class GraphJacobian:
    """Same-position Jacobians of any piece of a live graph, by autograd.

    Where every token depends on itself alone (`pointwise`: an MLP, a norm, experts) one cotangent serves all tokens at
    once; else each token takes a pass of its own.
    """

    start: Tensor
    """The piece's input `[1, pos, d]`, where the graph begins."""
    end: Tensor
    """Its output `[1, pos, d]`."""
    where: tuple[int, ...]
    """Positions."""
    pointwise: bool
    chunk: int = 64
    """Backward passes at once."""

    @classmethod
    def of_tokens(cls, start: Tensor, end: Tensor, *, chunk: int = 64) -> GraphJacobian:
        """Of a piece in which every token depends on itself alone."""
        return cls(start, end, tuple(range(start.shape[1])), True, chunk)

    @property
    def tokens(self) -> int:
        return len(self.where)

    def at(self, tokens: Tokens) -> GraphJacobian:
        chosen = self.where[tokens] if isinstance(tokens, slice) else tuple(self.where[t] for t in tokens)
        return replace(self, where=chosen)

    def pull(self, rows: Float[Tensor, "token r d"]) -> Float[Tensor, "token r d"]:
        return self._through(rows, forward=False)

    def push(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token d c"]:
        return self._through(columns.mT, forward=True).mT

    def push_everywhere(self, columns: Float[Tensor, "d c"]) -> Float[Tensor, "token d c"]:
        """The same tangents at every position of the sequence, taken through to the positions asked for."""
        tangents = columns.mT[:, None, None, :].expand(-1, *self.start.shape).to(self.start.dtype)
        out = push_batch(self.end, [self.start], [tangents], chunk=self.chunk)
        return out[:, 0, list(self.where)].permute(1, 2, 0).to(product_dtype(out))

    def _through(self, vectors: Float[Tensor, "token n d"], *, forward: bool) -> Float[Tensor, "token n d"]:
        source, target = (self.start, self.end) if forward else (self.end, self.start)
        tokens, n, _ = vectors.shape
        where = torch.tensor(self.where, device=source.device)
        dtype = product_dtype(vectors)
        if self.pointwise:
            parts = []
            for some in vectors.split(self.chunk, 1):
                batch = source.new_zeros(some.shape[1], *source.shape)
                batch[:, 0, where] = some.transpose(0, 1).to(source.dtype)
                parts.append(self._products(batch, forward)[:, 0, where].transpose(0, 1).to(dtype))
            return torch.cat(parts, 1)
        out = vectors.new_empty(tokens, n, target.shape[-1])
        for first in range(0, tokens * n, self.chunk):
            flat = torch.arange(first, min(first + self.chunk, tokens * n), device=source.device)
            token, row, each = flat // n, flat % n, torch.arange(len(flat), device=source.device)
            batch = source.new_zeros(len(flat), *source.shape)
            batch[each, 0, where[token]] = vectors[token, row].to(source.dtype)
            out[token, row] = self._products(batch, forward)[each, 0, where[token]].to(dtype)
        return out

    def _products(self, batch: Tensor, forward: bool) -> Tensor:
        if forward:
            return push_batch(self.end, [self.start], [batch], chunk=self.chunk)
        return pull_batch(self.end, [self.start], batch, chunk=self.chunk)[0]

    def dense(self) -> Float[Tensor, "token d d"]:
        d, dtype = self.end.shape[-1], product_dtype(self.end)
        eye = torch.eye(d, dtype=dtype, device=self.end.device)
        return self.pull(eye.expand(self.tokens, -1, -1))

    def mean(self, chunk: int = 1) -> Float[Tensor, "d d"]:
        if not self.pointwise:
            return mean_of_dense(self, 1)  # `chunk` counts matrices, and each is many backward passes
        d, dtype = self.end.shape[-1], product_dtype(self.end)
        rows = torch.eye(d, dtype=dtype, device=self.end.device).split(self.chunk)
        parts = [self.pull(some.expand(self.tokens, -1, -1)).mean(0, dtype=torch.float64) for some in rows]
        return torch.cat(parts).to(dtype)


def part_graph(
    view: ModelView, tokens: Int[Tensor, " pos"], layer: int, part: str, where: Sequence[int], *, chunk: int
) -> GraphJacobian:
    """One part of one block, cut out of a forward pass over one sequence.

    Args:
        view: the model.
        tokens: the sequence.
        layer: which block.
        part: a key of `PARTS`.
        where: positions.
        chunk: backward passes at once.

    Raises:
        ValueError: a part the model does not have.
    """
    begin, finish, pointwise = part_ends(view, layer, part)
    kept: dict[str, Any] = {}

    def see_start(x: Tensor) -> Tensor:
        kept["start"] = leaf(x)
        return kept["start"]

    def see_end(x: Tensor) -> None:
        kept["end"] = x

    run_until(view, tokens.unsqueeze(0), {begin: see_start, finish: see_end}, last=finish)
    return GraphJacobian(kept["start"], kept["end"], tuple(where), pointwise, chunk)


@dataclass(frozen=True)
class StreamGraph:
    """The stream behind some blocks and at the end, in one graph that begins behind the first of them."""

    streams: Mapping[int, Tensor]
    """By layer, what leaves its block `[1, pos, d]`."""
    final: Tensor
    """What leaves the last block `[1, pos, d]`, before the final norm."""

    def pull(self, cotangents: Float[Tensor, "n one pos d"], *, chunk: int) -> dict[int, Float[Tensor, "n one pos d"]]:
        """Cotangents of the final stream taken back to every layer's."""
        found = pull_batch(self.final, list(self.streams.values()), cotangents, chunk=chunk)
        return dict(zip(self.streams, found, strict=True))


def stream_graph(view: ModelView, tokens: Int[Tensor, " pos"], layers: Sequence[int]) -> StreamGraph:
    """Everything behind the lowest of some layers, cut out of one forward pass over one sequence."""
    kept: dict[int, Tensor] = {}
    last = view.n_layers - 1

    def watch(layer: int) -> Edit:
        def see(x: Tensor) -> Tensor | None:
            kept[layer] = leaf(x) if layer == min(layers) else x
            return kept[layer] if layer == min(layers) else None

        return see

    edits: dict[Side, Edit] = {}
    for layer in sorted({*layers, last}):
        where = place(view, layer, "resid_post")
        assert where is not None
        edits[where] = watch(layer)
    run_until(view, tokens.unsqueeze(0), edits)
    return StreamGraph({layer: kept[layer] for layer in layers}, kept[last])


PARTS = ("block", "attn", "mlp", "ln", "ln2")
"""Parts of a block that have a Jacobian of their own."""


def part_ends(view: ModelView, layer: int, part: str) -> tuple[Side, Side, bool]:
    """Where a part begins and ends, and whether it acts token by token.

    Raises:
        ValueError: an unknown part, or one the model does not have.
    """
    begin, finish = _ends(view, layer, part)
    if begin is None or finish is None:
        there = [p for p in PARTS if None not in _ends(view, layer, p)]
        raise ValueError(f"expected a part that layer {layer} has, got {part!r}; pass one of {', '.join(there)}")
    return begin, finish, part in ("mlp", "ln", "ln2")


def _ends(view: ModelView, layer: int, part: str) -> tuple[Side | None, Side | None]:
    norms = view._adapter.norms(layer)
    norm = {"ln": norms.get("attn_pre"), "ln2": norms.get("mlp_pre")}.get(part)
    if part == "block":
        return place(view, layer, "resid_pre"), place(view, layer, "resid_post")
    if part == "attn":
        return place(view, layer, "resid_pre"), place(view, layer, "attn_out")
    if part == "mlp" and view._adapter.has_mlp(layer):
        return place(view, layer, "resid_pre" if view.parallel else "resid_mid"), place(view, layer, "mlp_out")
    return (None, None) if norm is None else ((norm, "input"), (norm, "output"))
