"""Which rank-1 edit to make, and which ones to hold it against: algebra on vectors and second moments.

The intervention and its matched controls are named by arXiv 2605.16600; the formulas are ours, since the paper's are
not public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tl_asymmetry.arguments import check_draws, checked, shown
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.precision import exact_products, product_dtype, with_fresh_settings
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace
from tl_asymmetry.models.edits import HeadEdit, MatrixEdit, RankOneEdit
from tl_asymmetry.models.texts import check_tokens
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of

CONTROL_KINDS = ("undo_matched", "random", "complement", "low_variance", "equal_variance", "permuted_heads")
"""What `matched_controls` can make."""

EXCHANGEABLE = ("undo_matched",)
"""Kinds that undo (or install) as much of the delta as the edit itself, so that a rank among them is a test."""

LONGEST_UNDOING = 1.5
"""By how much one direction of an undo-matched control may be overdone; beyond it the control is a subspace."""

VARIANCE_TOLERANCE = 0.05
"""How near a control's variance must come to the target's to count as equal."""

_SAME_PART = 1e-6
_TILTS = (-64.0, 64.0)
_HALVINGS = 44


# --- edits ------------------------------------------------------------------------------------------------------


@checked
@with_fresh_settings
def closed_form_edit(
    layer: int,
    matrix: str,
    head: int | None,
    key: Float[Tensor, " inputs"],
    shift: Float[Tensor, " outputs"],
    second_moment: StreamingMoments | Float[Tensor, "inputs inputs"] | None = None,
    *,
    ridge: float = 1e-3,
) -> RankOneEdit:
    """The edit that moves the output at one input by exactly `shift`, and all other outputs as little as may be.

    ΔW = k̂ uᵀ with k̂ = C⁻¹k / (kᵀC⁻¹k): k ΔW = u, and of all ΔW with that property it has the least expected squared
    displacement of outputs, tr(ΔWᵀ C ΔW); with C = I the least norm. (The derivation is that of rank-one model
    editing, Meng et al. 2022, eq. 2.)

    Args:
        layer, matrix, head: where, as in `RankOneEdit`.
        key: k, the matrix's input: d_model long for a read matrix, d_head or d_mlp for W_O or W_out. `input_at` gives
            that of a position in a prompt.
        shift: u, what the output is to move by: d_head or d_mlp long for a read matrix, d_model for a write matrix.
        second_moment: C, uncentred, of the matrix's input (for W_O that of its own head); the identity without.
        ridge: C + ridge · (tr C / d) · I is used, so that C may be singular.

    Returns:
        A float64 edit on CPU of scale 1.

    Raises:
        ValueError: a key or shift of zeros, NaN or another length; a C that is not symmetric, not finite, or not
            positive definite after the ridge.

    Example:
        >>> key, shift = torch.randn(64), torch.randn(16)
        >>> edit = closed_form_edit(0, "W_Q", 1, key, shift)
        >>> torch.allclose(key.double() @ edit.change(), shift.double())
        True
    """
    k, u = (_direction(vector, name).double().cpu() for vector, name in ((key, "key"), (shift, "shift")))
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"expected a ridge of 0 or more, got {ridge}; pass 1e-3 for the usual one")
    x = k if second_moment is None else _solve(_matrix(second_moment, len(k)), k, ridge)
    # Scaled before the product: C may be tiny or huge.
    x = x / x.norm()
    k_hat = x / (k @ x)
    residual, other = (k_hat, u) if kind_of(matrix).reads else (u, k_hat)
    return RankOneEdit(layer, matrix, head, residual, other)


@checked
@with_fresh_settings
def input_at(
    model: Any,
    tokens: Int[Tensor, " pos"] | Sequence[int],
    layer: int,
    matrix: str,
    head: int | None = None,
    position: int = -1,
) -> Float[Tensor, " inputs"]:
    """What a matrix gets as its input at one position of a prompt: the key of a `closed_form_edit`.

    Args:
        model: a HookedTransformer or TransformerBridge, or a `ModelView` of one.
        tokens: the prompt's token ids.
        layer, matrix, head: where; the head matters for W_O alone, whose input is the head's own.
        position: which token, negative from the end.

    Raises:
        ValueError: no such layer, matrix, head or position.

    Example:
        >>> input_at(model, [5, 6, 7], 0, "W_O", head=2).shape
        torch.Size([16])
    """
    view = model if isinstance(model, ModelView) else ModelView(model)
    try:
        prompt = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own words
        raise ValueError(f"expected tokens as whole numbers [pos], got {shown(tokens)}; pass token ids") from error
    if prompt.ndim != 1 or not -len(prompt) <= position < len(prompt):
        raise ValueError(f"expected a position in a prompt of one dimension, got {position} in shape "
                         f"{tuple(prompt.shape)}; pass tokens [pos] and a position among them")  # fmt: skip
    check_tokens(view, prompt.unsqueeze(0))
    if matrix not in view.matrices:
        raise ValueError(f"expected a matrix among {', '.join(view.matrices)}, got {matrix!r}; pass one this model has")
    if matrix == "W_O" and (head is None or not 0 <= head < view.n_heads):
        raise ValueError(f"expected a head from 0 to {view.n_heads - 1} for W_O, got {head}; pass one of these")
    seen: list[Tensor] = []
    with torch.no_grad(), view.evaluating(), view.hooks({(kind_of(matrix).point, layer): seen.append}):
        view.run(prompt.unsqueeze(0))
    x = seen[0][0, position]
    return (x[head] if matrix == "W_O" else x).clone()


@checked
@with_fresh_settings
def head_delta(
    model_base: Any, model_aligned: Any, layer: int, matrix: str, head: int | None = None
) -> Float[Tensor, "rows columns"]:
    """W_aligned − W_base of one head (or of an MLP matrix), in TransformerLens orientation, float32 or float64."""
    views = (m if isinstance(m, ModelView) else ModelView(m) for m in (model_base, model_aligned))
    W, W_aligned = (view.weight(layer, matrix) for view in views)
    if head is not None:
        if W.ndim == 2 or not 0 <= head < len(W):
            wanted = "head=None (a matrix of the MLP)" if W.ndim == 2 else f"a head from 0 to {len(W) - 1}"
            raise ValueError(f"expected {wanted} for {matrix}, got {head}; pass that")
        W, W_aligned = W[head], W_aligned[head]
    dtype = product_dtype(W, W_aligned)
    return W_aligned.to(W.device, dtype) - W.to(dtype)


@checked
@with_fresh_settings
def removal_edit(
    layer: int,
    matrix: str,
    head: int | None,
    delta: Float[Tensor, "rows columns"],
    direction: Float[Tensor, " d_model"],
) -> RankOneEdit:
    """For the aligned model: takes out of ΔW what it reads, or writes, along a direction q of the residual stream.

    Read matrices become `W_aligned − q qᵀ ΔW`, write matrices `W_aligned − ΔW q qᵀ`; q is brought to unit length. Of
    all changes along q this one leaves the least of ΔW, and afterwards qᵀ(W − W_base) = 0 (or (W − W_base) q = 0).

    Args:
        layer, matrix, head: where, as in `RankOneEdit`.
        delta: ΔW of that head in TransformerLens orientation, d_model first for a read matrix, last for a write one;
            `head_delta` gives it.
        direction: q.

    Returns:
        An edit with `residual` q, `other` what ΔW does along it, and scale −1. Where ΔW does nothing along q, `other`
        is zero.

    Raises:
        ValueError: a direction of zeros, NaN or another length than the delta's d_model axis.

    Example:
        >>> delta, q = head_delta(base, aligned, 2, "W_O", 1), torch.randn(64)
        >>> left = delta.double() + removal_edit(2, "W_O", 1, delta, q).change()
        >>> bool((left @ q.double()).abs().max() < 1e-7)
        True
    """
    return insertion_edit(layer, matrix, head, delta, direction).scaled(-1.0)


@checked
@with_fresh_settings
def insertion_edit(
    layer: int,
    matrix: str,
    head: int | None,
    delta: Float[Tensor, "rows columns"],
    direction: Float[Tensor, " d_model"],
) -> RankOneEdit:
    """For the base model: puts in what ΔW reads, or writes, along a direction; see `removal_edit`. Scale +1."""
    q = _direction(direction, "direction").to(delta.device)
    ΔW = delta.detach().to(product_dtype(delta))
    if not bool(ΔW.isfinite().all()):
        raise ValueError("expected a finite delta, got NaN or infinite entries; pass weights of sound models")
    ΔW = _residual_first(matrix, ΔW)
    if ΔW.ndim != 2 or len(ΔW) != len(q):
        axis = "last" if kind_of(matrix).writes else "first"
        raise ValueError(
            f"expected a direction as long as the delta's {axis} axis, got {len(q)} and shape {tuple(delta.shape)}; "
            "pass the delta of one head in TransformerLens orientation and a direction [d_model]"
        )
    q = (q.double() / q.double().norm()).to(ΔW)
    with exact_products(ΔW.device):
        return RankOneEdit(layer, matrix, head, q, ΔW.mT @ q)


# --- controls ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MatchedControls(Sequence[HeadEdit]):
    """Edits to hold another one against: a sequence of them, and how well they match. Made by `matched_controls`."""

    kind: str
    """One of `CONTROL_KINDS`."""
    edits: tuple[HeadEdit, ...]
    """One for each draw: a `RankOneEdit`, or a `MatrixEdit` where the control is a subspace."""
    norm_matched: bool
    """Whether all have the Frobenius norm of the edit they are held against."""
    norm_ratios: Float64[Tensor, " draw"]
    """Their norms over its norm."""
    overlap: float
    """Mean squared cosine between the residual directions of two draws: 1/d for independent ones in R^d; near 1 the
    draws are almost one and the same, and a p-value from them says less than their number. NaN for one draw, for
    permuted heads and for subspaces."""

    @overload
    def __getitem__(self, index: int) -> HeadEdit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[HeadEdit, ...]: ...
    def __getitem__(self, index: int | slice) -> HeadEdit | tuple[HeadEdit, ...]:
        return self.edits[index]

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[HeadEdit]:
        return iter(self.edits)


@checked
@with_fresh_settings
def matched_controls(
    edit: RankOneEdit,
    kind: str = "undo_matched",
    draws: int = 20,
    seed: int = 0,
    *,
    delta: Float[Tensor, "rows columns"] | None = None,
    second_moment: StreamingMoments | Subspace | Float[Tensor, "d_model d_model"] | None = None,
    heads: int | None = None,
) -> MatchedControls:
    """Edits that differ from `edit` in nothing but the direction of `residual` (or in the head), equally large.

    Args:
        edit: what they are held against; q is its residual direction.
        kind: "undo_matched": takes out (or puts in) as much of ΔW as the edit does, ‖qᵀΔW‖, along a Haar-random r
            instead of q: c · r rᵀΔW with c = ‖qᵀΔW‖ / ‖rᵀΔW‖; where c would be above 1.5, so that r would be overdone,
            along a random subspace of just as many directions as that takes, the last of them in part. Only these are
            exchangeable with the edit, where q does no more for each unit undone than a random direction: the others
            keep `other` and so inject a foreign product that undoes nothing. "random": a Haar-random direction.
            "complement": a random one orthogonal to q. "low_variance": the eigenvectors of C with the lowest
            eigenvalues (any basis of its null space, where it has one), signs random. "equal_variance": a random r ⟂ q,
            tilted towards directions of more or less variance until rᵀCr = qᵀCq; where no r ⟂ q comes within 5 % (q is
            a top principal component), a random r ⟂ q scaled to equal rᵀCr, with `norm_matched` False.
            "permuted_heads": the same edit at another head of the same matrix and layer, each head at most once.
        draws: how many.
        seed: equal seeds give equal controls for the same site and kind; sites and kinds do not share draws.
        delta: ΔW of that head in TransformerLens orientation, of which the edit removes or inserts the part along q;
            needed by "undo_matched".
        second_moment: C, uncentred, on the residual stream's side: of the matrix's input for a read matrix, of the
            stream it writes into for a write matrix. A `Subspace` with all its eigenvalues saves solving for them.
            Needed by the two kinds of variance.
        heads: how many heads the matrix has; needed by "permuted_heads".

    Returns:
        The controls, float64 on CPU.

    Raises:
        ValueError: an unknown kind, draws < 1 or more than there are, ΔW, C or `heads` missing where needed, C of
            another size, an edit that is no part of ΔW.

    Example:
        >>> delta = head_delta(base, aligned, 2, "W_O", 1)
        >>> edit = removal_edit(2, "W_O", 1, delta, torch.randn(64))
        >>> controls = matched_controls(edit, "undo_matched", 5, seed=1, delta=delta)
        >>> len(controls), max(abs(control.norm / edit.norm - 1) for control in controls) < 1e-9
        (5, True)
    """
    if kind not in CONTROL_KINDS:
        raise ValueError(f"expected a kind among {', '.join(CONTROL_KINDS)}, got {kind!r}; pass one of these")
    check_draws(draws)
    generator = seeded("controls", seed, edit.layer, edit.matrix, edit.head, kind)
    edit = replace(edit.to("cpu"), residual=edit.residual.cpu().double())
    if kind == "permuted_heads":
        return _permuted_heads(edit, draws, heads, generator)
    if kind == "undo_matched":
        return _undo_matched(edit, draws, delta, generator)
    length, d = edit.residual.norm(), len(edit.residual)
    q = edit.residual / length
    if kind in ("random", "complement"):
        R = torch.randn(draws, d, dtype=torch.float64, generator=generator)
        scales = torch.ones(draws, dtype=torch.float64)
        R = _unit(R if kind == "random" else _without(R, q))
    else:
        if second_moment is None:
            raise ValueError(f"expected the second moment that {kind!r} controls are matched by, got none; pass "
                             "second_moment=")  # fmt: skip
        λ, V = _spectrum(second_moment, d)
        if kind == "low_variance":
            R, scales = _lowest(V, draws, generator)
        else:
            R, scales = _of_equal_variance(q, λ, V, draws, generator)
    return MatchedControls(
        kind=kind,
        edits=tuple(edit.with_residual(length * scale * r) for scale, r in zip(scales, R, strict=True)),
        norm_matched=bool((scales == 1).all()),
        norm_ratios=scales,
        overlap=_overlap(R),
    )


def _undo_matched(edit: RankOneEdit, draws: int, delta: Tensor | None, generator: torch.Generator) -> MatchedControls:
    """As much of ΔW undone along random directions as the edit undoes along its own."""
    if delta is None:
        raise ValueError("expected the delta that 'undo_matched' controls undo as much of, got none; pass delta=")
    ΔW = _residual_first(edit.matrix, delta).double().cpu()
    if ΔW.ndim != 2 or len(ΔW) != len(edit.residual):
        raise ValueError(
            f"expected the delta of one head with d_model {len(edit.residual)} in TransformerLens orientation, got "
            f"{tuple(delta.shape)}; pass head_delta(model_base, model_aligned, ...)"
        )
    undone, part = edit.scale * edit.other.double() * edit.residual.norm(), ΔW.mT @ _unit(edit.residual)
    wanted = undone.norm()
    if not bool((undone @ part).abs() >= (1 - _SAME_PART) * wanted * part.norm()) or wanted == 0:
        raise ValueError(
            "expected an edit that takes out or puts in what the delta does along its direction, got another one; pass "
            "one of removal_edit or insertion_edit"
        )
    sign = torch.sign(undone @ part)
    return MatchedControls(
        kind="undo_matched",
        edits=tuple(_undoing(edit, ΔW, wanted, sign, generator) for _ in range(draws)),
        norm_matched=True,
        norm_ratios=torch.ones(draws, dtype=torch.float64),
        overlap=math.nan,
    )


def _undoing(
    edit: RankOneEdit, ΔW: Float64[Tensor, "d_model other"], wanted: Tensor, sign: Tensor, generator: torch.Generator
) -> HeadEdit:
    """One control: a direction, or where that would be overdone a subspace, along which ΔW changes by `wanted`."""
    d = len(ΔW)
    r = _unit(torch.randn(d, dtype=torch.float64, generator=generator))
    part = ΔW.mT @ r
    c = (wanted / part.norm()).item()
    if c <= LONGEST_UNDOING:
        return RankOneEdit(edit.layer, edit.matrix, edit.head, r, c * part, sign.item())
    share = (wanted.square() / ΔW.square().sum()).item()
    count = min(d, math.ceil(1.2 * share * d) + 8)
    while True:
        # The first direction stays r: drawing more of them does not depend on what came before.
        others = torch.randn(d, count - 1, dtype=torch.float64, generator=generator)
        R = torch.linalg.qr(torch.cat([r.unsqueeze(-1), others], -1)).Q
        parts = R.mT @ ΔW
        reached = parts.square().sum(-1).cumsum(0)
        if count == d or bool(reached[-1] >= wanted.square()):
            break
        count = min(d, 2 * count)
    last = min(int((reached < wanted.square()).sum()), d - 1)
    before = reached[last - 1] if last else reached.new_zeros(())
    fraction = ((wanted.square() - before) / parts[last].square().sum()).clamp(0, 1).sqrt()
    parts[last] *= fraction
    change = sign * (R[:, : last + 1] @ parts[: last + 1])
    return MatrixEdit(edit.layer, edit.matrix, edit.head, change if kind_of(edit.matrix).reads else change.mT)


def _permuted_heads(edit: RankOneEdit, draws: int, heads: int | None, generator: torch.Generator) -> MatchedControls:
    if edit.head is None or heads is None or edit.head >= heads:
        got = "a matrix of the MLP" if edit.head is None else f"head {edit.head} and heads={heads}"
        raise ValueError(f"expected an edit of a head, and heads= how many there are, got {got}; pass both")
    if draws >= heads:
        raise ValueError(f"expected at most {heads - 1} draws, one for each other head, got {draws}; pass fewer")
    others = torch.tensor([h for h in range(heads) if h != edit.head])
    chosen = others[torch.randperm(len(others), generator=generator)[:draws]].tolist()
    return MatchedControls(
        kind="permuted_heads",
        edits=tuple(replace(edit, head=h) for h in chosen),
        norm_matched=True,
        norm_ratios=torch.ones(draws, dtype=torch.float64),
        overlap=math.nan,
    )


def _lowest(V: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if draws > V.shape[1]:
        raise ValueError(f"expected at most {V.shape[1]} draws, one for each eigenvector, got {draws}; pass fewer")
    signs = torch.randint(0, 2, (draws, 1), generator=generator) * 2.0 - 1
    return V[:, -draws:].flip(-1).mT * signs, torch.ones(draws, dtype=torch.float64)


def _of_equal_variance(
    q: Tensor, λ: Tensor, V: Tensor, draws: int, generator: torch.Generator
) -> tuple[Float64[Tensor, "draw d"], Float64[Tensor, " draw"]]:
    """Unit directions orthogonal to q, and what to scale them by for a variance equal to q's."""
    c = V.mT @ q
    # Drawn before the change of basis: which eigenvectors stand for a repeated eigenvalue then does not matter.
    G = torch.randn(draws, len(q), dtype=torch.float64, generator=generator) @ V
    wanted = (λ * c.square()).sum()
    high, low = (_extreme_variance(λ, c, largest) for largest in (True, False))
    if low * (1 - VARIANCE_TOLERANCE) <= wanted <= high / (1 - VARIANCE_TOLERANCE):
        tilted = _tilted(G, λ, c, wanted)
        if tilted is not None:
            return tilted @ V.mT, torch.ones(draws, dtype=torch.float64)
    R = _unit(_without(G, c))
    return R @ V.mT, (wanted / (λ * R.square()).sum(-1)).sqrt()


def _tilted(G: Tensor, λ: Tensor, c: Tensor, wanted: Tensor) -> Tensor | None:
    """Directions P(λᵗ ∘ g), P the projection off c, with t such that their variance is as wanted; None if for some
    draw there is no such t.

    λᵗ shifts weight towards large (t > 0) or small eigenvalues, smoothly over the whole spectrum.
    """
    logs = λ.clamp(min=λ[0] * 1e-12).log()
    logs = logs - logs[0]

    def direction(t: Tensor) -> Tensor:
        exponents = t.unsqueeze(-1) * logs
        return _unit(_without(G * (exponents - exponents.amax(-1, keepdim=True)).exp(), c))

    def variance(t: Tensor) -> Tensor:
        return (λ * direction(t).square()).sum(-1)

    low, high = (torch.full((len(G),), t, dtype=torch.float64) for t in _TILTS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = variance(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    R = direction(high)
    # Where even the strongest tilt falls short by less than 5 %, it is near enough.
    near = ((λ * R.square()).sum(-1) / wanted - 1).abs() <= VARIANCE_TOLERANCE
    return R if bool(near.all()) else None


def _extreme_variance(λ: Tensor, c: Tensor, largest: bool) -> Tensor:
    """The largest (or smallest) variance of a unit vector orthogonal to c, in eigencoordinates, λ descending.

    By interlacing it lies between the two outermost eigenvalues; the secular function Σ c_i² / (λ_i − μ) changes sign
    there (Golub 1973).
    """
    if not largest:
        return -_extreme_variance(-λ.flip(0), c.flip(0), True)
    low, high = λ[1], λ[0]
    for _ in range(_HALVINGS):
        μ = (low + high) / 2
        terms = c.square() / (λ - μ)
        # 0 / 0 where an eigenvalue of no weight is met exactly
        above = torch.where(c == 0, torch.zeros_like(terms), terms).sum() < 0
        low, high = torch.where(above, μ, low), torch.where(above, high, μ)
    return low


def _residual_first(matrix: str, ΔW: Tensor) -> Tensor:
    return ΔW.mT if kind_of(matrix).writes else ΔW


def _overlap(R: Tensor) -> float:
    if len(R) < 2:
        return math.nan
    cosines = (R @ R.mT).square()
    return ((cosines.sum() - cosines.diagonal().sum()) / (len(R) * (len(R) - 1))).item()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def _without(rows: Tensor, q: Tensor) -> Tensor:
    """The rows' parts orthogonal to a unit vector; twice is enough (Kahan, in Parlett 1980)."""
    for _ in range(2):
        rows = rows - (rows @ q).unsqueeze(-1) * q
    return rows


# --- what was given ---------------------------------------------------------------------------------------------


def _direction(vector: Tensor, name: str) -> Tensor:
    if not isinstance(vector, Tensor) or vector.ndim != 1:
        got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"expected {name} as a vector, got {got}; pass a one-dimensional tensor")
    vector = vector.detach()
    if not bool(vector.isfinite().all()):
        raise ValueError(f"expected a finite {name}, got NaN or infinite entries; pass a finite vector")
    if not bool(vector.any()):
        raise ValueError(f"expected a {name} of some length, got a vector of zeros; pass another one")
    return vector


def _matrix(moments: StreamingMoments | Tensor, d: int) -> Float64[Tensor, "d d"]:
    C = (moments if isinstance(moments, Tensor) else moments.second_moment).detach().double().cpu()
    if C.shape != (d, d):
        raise ValueError(f"expected a second moment [{d}, {d}], got {tuple(C.shape)}; pass that of the same vectors")
    if not bool(C.isfinite().all()):
        raise ValueError("expected a finite second moment, got NaN or infinite entries; pass sound moments")
    if not torch.allclose(C, C.mT, rtol=1e-4, atol=1e-6 * C.abs().max().item()):
        raise ValueError("expected a symmetric second moment, got another matrix; pass Σ x xᵀ / n")
    return (C + C.mT) / 2


def _solve(C: Tensor, k: Tensor, ridge: float) -> Tensor:
    d = len(k)
    if not C.trace() > 0:
        raise ValueError("expected a second moment of positive trace, got none; pass moments of some inputs")
    C = C + ridge * (C.trace() / d) * torch.eye(d, dtype=C.dtype)
    L, info = torch.linalg.cholesky_ex(C)
    pivots = L.diagonal().square()
    if int(info) != 0 or not bool(pivots.min() > d * torch.finfo(C.dtype).eps * pivots.max()):
        raise ValueError(
            f"expected a positive definite second moment, got a singular one (ridge {ridge:g}); pass ridge=1e-3 or "
            "moments of more inputs than they are long"
        )
    return torch.cholesky_solve(k.unsqueeze(-1), L).squeeze(-1)


def _spectrum(moments: StreamingMoments | Subspace | Tensor, d: int) -> tuple[Tensor, Tensor]:
    if isinstance(moments, Subspace):
        if moments.basis.shape != (d, d) or moments.eigenvalues is None:
            raise ValueError(
                f"expected all {d} directions of R^{d} with their eigenvalues, got {tuple(moments.basis.shape)}"
                f"{'' if moments.eigenvalues is not None else ' without'}; pass principal_subspace(moments)"
            )
        whole = moments
    else:
        whole = principal_subspace(_matrix(moments, d))
    assert whole.eigenvalues is not None
    return whole.eigenvalues.double().cpu(), whole.basis.double().cpu()
