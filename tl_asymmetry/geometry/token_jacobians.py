"""Jacobians of a transformer block, token by token, from the tensors of one forward pass; knows no model.

Each class is the same-position Jacobian `J[t, i, j] = ∂ out[t]_i / ∂ in[t]_j` of one part at several tokens t, kept
in factors. It can be applied from either side (`pull`: X J, `push`: J Y), averaged without being formed (`mean`), or
formed (`dense`). A norm is a scaling and one or two rank-one terms and is never formed; a head is d_model × d_head
factors; an MLP is its two matrices with the activation's slopes between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Tokens = slice | list[int]
"""Which tokens: a slice or their indexes."""

_ROWS_AT_ONCE = 1 << 24
"""Numbers in the largest intermediate of an average."""


@runtime_checkable
class TokenJacobian(Protocol):
    """What every part of a block can do."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        ...

    def at(self, tokens: Tokens) -> TokenJacobian:
        """The Jacobians of some of the tokens."""
        ...

    def pull(self, rows: Float[Tensor, "token r out"]) -> Float[Tensor, "token r in"]:
        """`rows[t] @ J[t]`: cotangents taken back through the part."""
        ...

    def push(self, columns: Float[Tensor, token in c]) -> Float[Tensor, "token out c"]:
        """`J[t] @ columns[t]`: tangents taken through the part."""
        ...

    def dense(self) -> Float[Tensor, "token out in"]:
        """The matrices themselves."""
        ...

    def mean(self, chunk: int = 1) -> Float[Tensor, "out in"]:
        """Their average over the tokens; `chunk` matrices at a time where it has to be formed."""
        ...


# --- norms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormJacobian:
    """LayerNorm or RMSNorm, with gain or without: N = diag(γ) (C − x̂x̂ᵀ/d) / σ.

    x̂ = C x / σ, σ² = mean((C x)²) + ε, C = I − 11ᵀ/d for LayerNorm and I for RMSNorm. ε enters through σ alone.
    """

    unit: Float[Tensor, "token d"]
    """x̂: the input centred (LayerNorm) and divided by σ."""
    scale: Float[Tensor, " token"]
    """σ."""
    gain: Float[Tensor, " d"] | None
    """γ as multiplied (Gemma's 1 + w); None where it is folded into the weights or absent."""
    centered: bool
    """Whether the mean over d is subtracted: LayerNorm."""

    @classmethod
    def of_input(
        cls,
        x: Float[Tensor, "token d"],
        scale: Float[Tensor, " token"],
        gain: Float[Tensor, " d"] | None,
        centered: bool,
    ) -> NormJacobian:
        """From a norm's input and its σ (ε included)."""
        x = x - x.mean(-1, keepdim=True) if centered else x
        return cls(x / scale.unsqueeze(-1), scale, gain, centered)

    @property
    def tokens(self) -> int:
        return len(self.scale)

    def at(self, tokens: Tokens) -> NormJacobian:
        return replace(self, unit=self.unit[tokens], scale=self.scale[tokens])

    def pull(self, rows: Float[Tensor, "token r d"]) -> Float[Tensor, "token r d"]:
        x = self.unit.unsqueeze(-2)
        rows = self.folded(rows)
        inner = (rows * x).mean(-1, keepdim=True)
        return torch.addcmul(rows, inner, x, value=-1).div_(self.scale[:, None, None])

    def push(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token d c"]:
        x = self.unit.unsqueeze(-1)
        if self.centered:
            columns = columns - columns.mean(-2, keepdim=True)
        inner = (columns * x).mean(-2, keepdim=True)
        columns = torch.addcmul(columns, inner, x, value=-1).div_(self.scale[:, None, None])
        return columns if self.gain is None else columns * self.gain.unsqueeze(-1)

    def push_into(self, W: Float[Tensor, "d e"], columns: Float[Tensor, "d c"]) -> Float[Tensor, "token e c"]:
        """Wᵀ N[t] · columns for the same tangents at every token: one product, and a rank-one term for each token."""
        constant = self.folded(W.mT) @ columns
        along = self.weighted(self.unit) @ W
        inner = self.unit @ columns / self.unit.shape[-1]
        pushed = torch.addcmul(constant, along.unsqueeze(-1), inner.unsqueeze(-2), value=-1)
        return pushed.div_(self.scale[:, None, None])

    def dense(self) -> Float[Tensor, "token d d"]:
        eye = torch.eye(self.unit.shape[-1], dtype=self.unit.dtype, device=self.unit.device)
        return self.pull(eye.expand(self.tokens, -1, -1))

    def mean(self, chunk: int = 1) -> Float[Tensor, "d d"]:
        x, s = self.unit, self.scale.reciprocal()
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return self.folded(eye) * s.mean() - self.weighted(x).mT @ (x * s.unsqueeze(-1)) / x.numel()

    def folded(self, rows: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """rows · diag(γ) C: the part of N that is the same for all tokens, σ apart."""
        rows = self.weighted(rows)
        return rows - rows.mean(-1, keepdim=True) if self.centered else rows

    def weighted(self, rows: Float[Tensor, "*any d"]) -> Float[Tensor, "*any d"]:
        """rows · diag(γ)."""
        return rows if self.gain is None else rows * self.gain


# --- attention --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionJacobian:
    """Attention's output at t against its own input at t; the norm before it apart.

    Per head, with A the pattern and z = Σ_s A[t, s] v[s] the head's output before W_O,

        J_h = W_Oᵀ (A[t, t] W_Vᵀ + ∂z/∂q W_Qᵀ + ∂z/∂k W_Kᵀ):

    the value that t takes from itself, and the pattern's own derivative through t's query (which moves its weight on
    every source) and through its key (which moves its weight on itself: rank one, along v[t] − z[t]).
    """

    own_weight: Float[Tensor, "token head"]
    """A[t, t]."""
    query: Float[Tensor, "token head d_head d_head"]
    """∂z[t]/∂q[t], q the query as projected, before rotation and norm."""
    key_out: Float[Tensor, "token head d_head"]
    """∂z[t]/∂k[t] = key_out key_inᵀ, k the key as projected: this its left factor,"""
    key_in: Float[Tensor, "token head d_head"]
    """and this its right one."""
    W_Q: Float[Tensor, "head d d_head"]
    W_K: Float[Tensor, "head d d_head"]
    """Expanded to the query heads under grouped-query attention; W_V as well."""
    W_V: Float[Tensor, "head d d_head"]
    W_O: Float[Tensor, "head d_head d"]

    @property
    def tokens(self) -> int:
        return len(self.own_weight)

    def at(self, tokens: Tokens) -> AttentionJacobian:
        return replace(
            self, own_weight=self.own_weight[tokens], query=self.query[tokens], key_out=self.key_out[tokens],
            key_in=self.key_in[tokens],
        )  # fmt: skip

    def head(self, head: int) -> AttentionJacobian:
        """One head's contribution; the contributions of all heads sum to the whole."""
        one = slice(head, head + 1)
        return AttentionJacobian(
            self.own_weight[:, one], self.query[:, one], self.key_out[:, one], self.key_in[:, one],
            self.W_Q[one], self.W_K[one], self.W_V[one], self.W_O[one],
        )  # fmt: skip

    def pull(self, rows: Float[Tensor, "token r d"]) -> Float[Tensor, "token r d"]:
        return self.pull_heads((rows @ self.W_O.flatten(0, 1).mT).unflatten(-1, self.W_O.shape[:2]))

    def pull_heads(self, rows: Float[Tensor, "token r head d_head"]) -> Float[Tensor, "token r d"]:
        """From cotangents of the heads' outputs z."""
        value = rows * self.own_weight[:, None, :, None]
        query = torch.einsum("trhi,thij->trhj", rows, self.query)
        key = (rows * self.key_out.unsqueeze(1)).sum(-1, keepdim=True) * self.key_in.unsqueeze(1)
        return sum(
            part.flatten(-2) @ W.transpose(-1, -2).flatten(0, 1)
            for part, W in ((value, self.W_V), (query, self.W_Q), (key, self.W_K))
        )  # type: ignore[return-value]

    def push(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token d c"]:
        return self.W_O.flatten(0, 1).mT @ self.push_heads(columns).flatten(1, 2)

    def push_heads(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token head d_head c"]:
        """Tangents of the heads' outputs z."""
        heads = self.W_V.shape[0], self.W_V.shape[2]
        v, q, k = (
            (W.transpose(-1, -2).flatten(0, 1) @ columns).unflatten(1, heads) for W in (self.W_V, self.W_Q, self.W_K)
        )
        own = v * self.own_weight[..., None, None] + self.query @ q
        return own + self.key_out.unsqueeze(-1) * (self.key_in.unsqueeze(-2) @ k)

    def dense(self) -> Float[Tensor, "token d d"]:
        Vᵀ, Qᵀ, Kᵀ = (W.mT for W in (self.W_V, self.W_Q, self.W_K))
        inner = self.query @ Qᵀ
        inner += self.own_weight[..., None, None] * Vᵀ
        inner += self.key_out.unsqueeze(-1) * torch.einsum("thj,hjd->thd", self.key_in, Kᵀ).unsqueeze(-2)
        return self.W_O.flatten(0, 1).mT @ inner.flatten(1, 2)

    def mean(self, chunk: int = 1) -> Float[Tensor, "d d"]:
        return _mean_attention(self, None)


# --- MLP --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLPJacobian:
    """J = W_outᵀ Σ_b diag(slope_b) W_bᵀ, b over the input matrices (W_in; W_gate too in a gated MLP).

    slope_b = ∂ hidden / ∂ (input W_b), both sides elementwise: φ'(pre) for a plain MLP; φ'(gate) · linear for W_gate
    and φ(gate) for W_in in a gated one.
    """

    slopes: tuple[Float[Tensor, "token d_mlp"], ...]
    """One for each input matrix."""
    reads: tuple[Float[Tensor, "d d_mlp"], ...]
    """The input matrices."""
    W_out: Float[Tensor, "d_mlp d"]

    @property
    def tokens(self) -> int:
        return len(self.slopes[0])

    def at(self, tokens: Tokens) -> MLPJacobian:
        return replace(self, slopes=tuple(slope[tokens] for slope in self.slopes))

    def pull(self, rows: Float[Tensor, "token r d"]) -> Float[Tensor, "token r d"]:
        hidden = rows @ self.W_out.mT
        parts = zip(self.slopes, self.reads, strict=True)
        return sum((hidden * slope.unsqueeze(1)) @ W.mT for slope, W in parts)  # type: ignore[return-value]

    def push(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token d c"]:
        parts = zip(self.slopes, self.reads, strict=True)
        return self.W_out.mT @ sum(slope.unsqueeze(-1) * (W.mT @ columns) for slope, W in parts)

    def dense(self) -> Float[Tensor, "token d d"]:
        parts = zip(self.slopes, self.reads, strict=True)
        return self.W_out.mT @ sum(slope.unsqueeze(-1) * W.mT for slope, W in parts)

    def mean(self, chunk: int = 1) -> Float[Tensor, "d d"]:
        return _mean_mlp(self, None)


# --- a part with its norms, and a whole block -------------------------------------------------------------------


@dataclass(frozen=True)
class BranchJacobian:
    """What attention or MLP adds to the stream, against the stream it reads: norm before, part, norm after (if any)."""

    before: NormJacobian | None
    part: TokenJacobian
    after: NormJacobian | None = None

    @property
    def tokens(self) -> int:
        return self.part.tokens

    def at(self, tokens: Tokens) -> BranchJacobian:
        before, after = (None if norm is None else norm.at(tokens) for norm in (self.before, self.after))
        return BranchJacobian(before, self.part.at(tokens), after)

    def head(self, head: int) -> BranchJacobian:
        """One head's contribution (of a branch whose part is attention); a norm after it is linear, and taken along."""
        if not isinstance(self.part, AttentionJacobian):
            raise ValueError(f"expected attention, got {type(self.part).__name__}; pass the attention branch")
        return replace(self, part=self.part.head(head))

    def pull(self, rows: Float[Tensor, "token r d"]) -> Float[Tensor, "token r d"]:
        if self.after is not None:
            rows = self.after.pull(rows)
        rows = self.part.pull(rows)
        return rows if self.before is None else self.before.pull(rows)

    def push(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token d c"]:
        if self.before is not None:
            columns = self.before.push(columns)
        columns = self.part.push(columns)
        return columns if self.after is None else self.after.push(columns)

    def dense(self) -> Float[Tensor, "token d d"]:
        J = self.part.dense()
        if self.before is not None:
            J = self.before.pull(J)
        return J if self.after is None else self.after.push(J)

    def mean(self, chunk: int = 1) -> Float[Tensor, "d d"]:
        if self.after is None and isinstance(self.part, AttentionJacobian):
            return _mean_attention(self.part, self.before)
        if self.after is None and isinstance(self.part, MLPJacobian):
            return _mean_mlp(self.part, self.before)
        return mean_of_dense(self, chunk)


@dataclass(frozen=True)
class BlockJacobian:
    """A residual block: (I + J_mlp)(I + J_attn) in series, I + J_attn + J_mlp in parallel."""

    attention: BranchJacobian
    mlp: BranchJacobian | None
    """None in an attention-only model."""
    parallel: bool

    @property
    def tokens(self) -> int:
        return self.attention.tokens

    def at(self, tokens: Tokens) -> BlockJacobian:
        mlp = None if self.mlp is None else self.mlp.at(tokens)
        return BlockJacobian(self.attention.at(tokens), mlp, self.parallel)

    def pull(self, rows: Float[Tensor, "token r d"]) -> Float[Tensor, "token r d"]:
        if self.mlp is None:
            return rows + self.attention.pull(rows)
        if self.parallel:
            return rows + self.attention.pull(rows) + self.mlp.pull(rows)
        rows = rows + self.mlp.pull(rows)
        return rows + self.attention.pull(rows)

    def push(self, columns: Float[Tensor, "token d c"]) -> Float[Tensor, "token d c"]:
        attended = columns + self.attention.push(columns)
        if self.mlp is None:
            return attended
        return attended + self.mlp.push(columns if self.parallel else attended)

    def dense(self) -> Float[Tensor, "token d d"]:
        J = self.attention.dense()
        J.diagonal(dim1=-2, dim2=-1).add_(1)
        if self.mlp is None:
            return J
        M = self.mlp.dense()
        # out of place: baddbmm would read J while it writes it
        return J + M if self.parallel else torch.baddbmm(J, M, J)

    def mean(self, chunk: int = 1) -> Float[Tensor, "d d"]:
        attention, mlp = self.attention, self.mlp
        exact_forms = (
            isinstance(attention.part, AttentionJacobian)
            and attention.after is None
            and (mlp is None or self.parallel or averages_exactly(mlp))
        )
        if not exact_forms:
            return mean_of_dense(self, chunk)
        J = attention.mean()
        J.diagonal().add_(1)
        if mlp is None:
            return J
        J = J + mlp.mean()
        return J if self.parallel else J + _mean_product(mlp, attention)


def averages_exactly(mlp: BranchJacobian) -> bool:
    """Whether averages through an MLP need nothing formed: plain or gated, with at most a norm before it."""
    return isinstance(mlp.part, MLPJacobian) and mlp.after is None


def mean_of_dense(jacobian: TokenJacobian, chunk: int) -> Float[Tensor, "out in"]:
    """The average where no closed form of it is known: `chunk` matrices at a time, summed in float64."""
    total: Tensor | None = None
    dtype = torch.float32
    for start in range(0, jacobian.tokens, chunk):
        J = jacobian.at(slice(start, min(start + chunk, jacobian.tokens))).dense()
        dtype = J.dtype
        part = J.sum(0, dtype=torch.float64)
        total = part if total is None else total + part
    assert total is not None
    return (total / jacobian.tokens).to(dtype)


# --- averages without forming anything --------------------------------------------------------------------------
#
# A token's Jacobian is constants times scalars of that token, plus rank-one terms: the average of each is one product
# of token-by-something matrices. What would be O(tokens · d³) is O(tokens · d_mlp · d · d_head) at most.


def _mean_attention(part: AttentionJacobian, before: NormJacobian | None) -> Float[Tensor, "d d"]:
    """mean_t W_Oᵀ B[t] N[t], B the inner factor of `AttentionJacobian.dense`."""
    s = _inverse_scale(part.own_weight, before)
    V, Q, K = (_folded(W.mT, before) for W in (part.W_V, part.W_Q, part.W_K))
    n = part.tokens
    value = (s @ part.own_weight)[:, None, None] * V
    query = torch.einsum("t,thij->hij", s, part.query) @ Q
    key = torch.einsum("t,thi,thj->hij", s, part.key_out, part.key_in) @ K
    inner = (value + query + key).flatten(0, 1) / n
    if before is not None:
        β = _along_unit(part, before)
        inner = inner - (β * s.unsqueeze(-1)).mT @ before.unit / before.unit.numel()
    return part.W_O.flatten(0, 1).mT @ inner


def _mean_mlp(part: MLPJacobian, before: NormJacobian | None) -> Float[Tensor, "d d"]:
    """mean_t W_outᵀ Σ_b diag(slope_b) W_bᵀ N[t]."""
    s = _inverse_scale(part.slopes[0], before)
    inner = None
    for slope, W in zip(part.slopes, part.reads, strict=True):
        term = ((s @ slope) / part.tokens).unsqueeze(-1) * _folded(W.mT, before)
        if before is not None:
            along = slope * (before.weighted(before.unit) @ W) * s.unsqueeze(-1)
            term = term - along.mT @ before.unit / before.unit.numel()
        inner = term if inner is None else inner + term
    assert inner is not None
    return part.W_out.mT @ inner


def _mean_product(mlp: BranchJacobian, attention: BranchJacobian) -> Float[Tensor, "d d"]:
    """mean_t J_mlp[t] J_attn[t]: the average of a product is not the product of averages.

    J_mlp J_attn = W_outᵀ diag(slope) (Wᵀ N₂ W_Oᵀ) (B N₁). The bracket in the middle is a constant matrix P
    [d_mlp, heads · d_head], over σ₂, minus a rank-one term; B N₁ is per head a scalar times W_Vᵀ, a d_head × d_head
    matrix times W_Qᵀ, and rank-one terms.
    """
    head_part, hidden_part = attention.part, mlp.part
    assert isinstance(head_part, AttentionJacobian)
    assert isinstance(hidden_part, MLPJacobian)
    norm1, norm2 = attention.before, mlp.before
    s1, s2 = _inverse_scale(head_part.own_weight, norm1), _inverse_scale(head_part.own_weight, norm2)
    V, Q, K = (_folded(W.mT, norm1) for W in (head_part.W_V, head_part.W_Q, head_part.W_K))
    W_O = head_part.W_O.flatten(0, 1)
    heads = head_part.W_O.shape[:2]
    query = head_part.query * s1[:, None, None, None]
    key_out = head_part.key_out * s1[:, None, None]
    β = None if norm1 is None else _along_unit(head_part, norm1) * s1.unsqueeze(-1)
    inner = None
    for slope, W in zip(hidden_part.slopes, hidden_part.reads, strict=True):
        a = slope * s2.unsqueeze(-1)
        P = _folded(W.mT, norm2) @ W_O.mT
        P_heads = P.unflatten(-1, heads)
        value = P_heads * (a.mT @ (head_part.own_weight * s1.unsqueeze(-1))).unsqueeze(-1)
        term = value.flatten(1) @ V.flatten(0, 1)
        term += _through_queries(a, P_heads, query).flatten(1) @ Q.flatten(0, 1)
        through_key = torch.stack(
            [(a * (key_out[:, h] @ P_heads[:, h].mT)).mT @ head_part.key_in[:, h] for h in range(heads[0])], 1
        )
        term += through_key.flatten(1) @ K.flatten(0, 1)
        if norm1 is not None and β is not None:
            term -= (a * (β @ P.mT)).mT @ norm1.unit / norm1.unit.shape[-1]
        if norm2 is not None:
            along = a * (norm2.weighted(norm2.unit) @ W) / norm2.unit.shape[-1]
            row = head_part.pull_heads((norm2.unit @ W_O.mT).unflatten(-1, heads).unsqueeze(1))
            row = row if norm1 is None else norm1.pull(row)
            term -= along.mT @ row.squeeze(1)
        inner = term if inner is None else inner + term
    assert inner is not None
    return hidden_part.W_out.mT @ inner / head_part.tokens


def mean_mlp_push(
    mlp: BranchJacobian,
    columns: Float[Tensor, "d c"],
    heads: Float[Tensor, "token inner c"],
    W_O: Float[Tensor, "inner d"],
) -> Float[Tensor, "d c"]:
    """mean_t J_mlp[t] (columns + W_Oᵀ heads[t]): averaged before W_out, and W_O taken into W_in once for all tokens.

    Of an MLP that `averages_exactly`.
    """
    part, norm = mlp.part, mlp.before
    assert isinstance(part, MLPJacobian)
    s = _inverse_scale(part.slopes[0], norm)
    inner = None if norm is None else (norm.unit @ columns + torch.einsum("ti,tic->tc", norm.unit @ W_O.mT, heads))
    hidden = None
    for slope, W in zip(part.slopes, part.reads, strict=True):
        a = slope * s.unsqueeze(-1)
        folded = _folded(W.mT, norm)
        P = folded @ W_O.mT
        term = (folded @ columns) * a.sum(0).unsqueeze(-1)
        step = max(1, _ROWS_AT_ONCE // (len(P) * columns.shape[-1]))
        for start in range(0, part.tokens, step):
            some = slice(start, start + step)
            term += torch.einsum("tm,tmc->mc", a[some], P @ heads[some])
        if norm is not None and inner is not None:
            term -= (a * (norm.weighted(norm.unit) @ W)).mT @ inner / norm.unit.shape[-1]
        hidden = term if hidden is None else hidden + term
    assert hidden is not None
    return part.W_out.mT @ hidden / part.tokens


def _through_queries(
    a: Float[Tensor, "token d_mlp"],
    P: Float[Tensor, "d_mlp head d_head"],
    query: Float[Tensor, "token head d_head d_head"],
) -> Float[Tensor, "d_mlp head d_head"]:
    """Σ_t,i a[t, m] P[m, h, i] query[t, h, i, j], head by head and in slices of m, by products alone."""
    n, heads, e, _ = query.shape
    rows = max(1, _ROWS_AT_ONCE // (e * e))
    out = torch.empty_like(P)
    for h in range(heads):
        flat = query[:, h].reshape(n, e * e)
        for start in range(0, len(P), rows):
            part = slice(start, start + rows)
            summed = (a[:, part].mT @ flat).unflatten(-1, (e, e))
            out[part, h] = (P[part, h].unsqueeze(1) @ summed).squeeze(1)
    return out


def _along_unit(part: AttentionJacobian, before: NormJacobian) -> Float[Tensor, "token rows"]:
    """B[t] (γ ∘ x̂[t]): what the norm's rank-one term meets."""
    return part.push_heads(before.weighted(before.unit).unsqueeze(-1)).flatten(1)


def _inverse_scale(like: Tensor, norm: NormJacobian | None) -> Float[Tensor, " token"]:
    return like.new_ones(len(like)) if norm is None else norm.scale.reciprocal()


def _folded(rows: Tensor, norm: NormJacobian | None) -> Tensor:
    return rows if norm is None else norm.folded(rows)
