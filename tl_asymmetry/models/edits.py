"""Rank-1 edits of live weights: put in on the model's own device, taken out again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.models.interrupts import critical, held, hold_interrupts, interrupt, release_interrupts
from tl_asymmetry.models.view import ModelView, Slot
from tl_asymmetry.names import MATRICES, kind_of

_EMBEDDINGS = ("W_E", "W_U", "W_pos")


@dataclass(frozen=True, eq=False)
class RankOneEdit:
    """Adds `scale · residual otherᵀ` to one head's matrix, `residual` on its d_model axis, whichever side that is.

    With y = x W: a read matrix (W_Q, W_K, W_V, W_in, W_gate) then adds `scale · (x · residual)` times `other` to its
    output, a write matrix (W_O, W_out) `scale · (x · other)` times `residual`. Half-precision vectors are widened to
    float32; the edit holds copies of its own.

    Raises:
        ValueError: an unknown matrix, a head where there is none or none where there is one, vectors that are not
            one-dimensional, not finite, or a `residual` of zero length. (An `other` of zeros is an edit that changes
            nothing, as the removal of a direction the delta does not use.)

    Example:
        >>> edit = RankOneEdit(0, "W_Q", 1, torch.ones(64), torch.ones(16), scale=0.5)
        >>> edit.norm
        16.0
        >>> with apply_edits(model, [edit]):
        ...     changed = model.blocks[0].attn.W_Q[1].detach().clone()
        >>> bool((changed - model.blocks[0].attn.W_Q[1] - 0.5).abs().max() < 1e-6)
        True
    """

    layer: int
    """Which block."""
    matrix: str
    """Which matrix, by its TransformerLens name, W_Q … W_out."""
    head: int | None
    """Which head: the key-value head for W_K and W_V, None for a matrix of the MLP."""
    residual: Float[Tensor, " d_model"]
    """The vector on the d_model axis."""
    other: Float[Tensor, " other"]
    """The vector on the other axis, d_head or d_mlp long."""
    scale: float | int = 1.0
    """What the outer product is multiplied by; −1 takes out, 0.5 is half a dose."""

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES:
            why = "; embeddings are not edited (where W_U is tied to W_E, an edit of one would be an edit of both)"
            raise ValueError(
                f"expected a matrix among {', '.join(MATRICES)}, got {self.matrix!r}"
                f"{why if self.matrix in _EMBEDDINGS else ''}; pass one of these"
            )
        headed = kind_of(self.matrix).heads is not None
        if headed != (self.head is not None):
            wanted = "the index of a head" if headed else "head=None (a matrix of the MLP)"
            raise ValueError(f"expected {wanted} for {self.matrix}, got {self.head}; pass that")
        for name in ("residual", "other"):
            vector = getattr(self, name)
            if not isinstance(vector, Tensor) or vector.ndim != 1 or vector.numel() == 0:
                got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
                raise ValueError(f"expected {name} as a vector, got {got}; pass a one-dimensional tensor")
            vector = vector.detach().to(torch.float64 if vector.dtype == torch.float64 else torch.float32, copy=True)
            if not bool(vector.isfinite().all()):
                raise ValueError(f"expected a finite {name}, got NaN or infinite entries; pass a finite vector")
            object.__setattr__(self, name, vector)
        object.__setattr__(self, "scale", float(self.scale))
        if not math.isfinite(self.scale):
            raise ValueError(f"expected a finite scale, got {self.scale}; pass a number")
        if not bool(self.residual.any()):
            raise ValueError("expected a residual direction, got a vector of zeros; pass a direction of some length")

    @property
    def pathway(self) -> str:
        """ "read" or "write": whether d_model is the matrix's input or its output axis."""
        return kind_of(self.matrix).side

    @property
    def norm(self) -> float:
        """Frobenius norm of what is added."""
        return abs(self.scale) * (self.residual.double().norm() * self.other.double().norm()).item()

    def change(self) -> Float[Tensor, "rows columns"]:
        """What is added, as a matrix in TransformerLens orientation, float64."""
        first, second = self._axes(torch.float64, self.residual.device)
        return self.scale * torch.outer(first, second)

    def with_residual(self, residual: Float[Tensor, " d_model"]) -> RankOneEdit:
        """The same edit along another direction of the residual stream."""
        return replace(self, residual=residual)

    def scaled(self, factor: float | int) -> RankOneEdit:
        """The same edit, `factor` times as strong."""
        return replace(self, scale=self.scale * factor)

    def to(self, device: torch.device | str) -> RankOneEdit:
        """The same edit with its vectors on another device."""
        return replace(self, residual=self.residual.to(device), other=self.other.to(device))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; `from_dict` gives back the same numbers, bit for bit."""
        vectors = {
            name: {"dtype": str(v.dtype).removeprefix("torch."), "values": v.tolist()}
            for name, v in (("residual", self.residual), ("other", self.other))
        }
        return {"layer": self.layer, "matrix": self.matrix, "head": self.head, "scale": self.scale, **vectors}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RankOneEdit:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an entry is missing, or what the edit itself refuses.
        """
        missing = {"layer", "matrix", "head", "scale", "residual", "other"} - set(document)
        if missing:
            raise ValueError(f"expected an edit written by to_dict, got one without {', '.join(sorted(missing))}; "
                             "pass all its entries")  # fmt: skip
        residual, other = (
            torch.tensor(document[name]["values"], dtype=getattr(torch, document[name]["dtype"]))
            for name in ("residual", "other")
        )
        return cls(document["layer"], document["matrix"], document["head"], residual, other, document["scale"])

    def __eq__(self, theirs: object) -> bool:
        if not isinstance(theirs, RankOneEdit):
            return NotImplemented
        return (
            (self.layer, self.matrix, self.head, self.scale) == (theirs.layer, theirs.matrix, theirs.head, theirs.scale)
            and torch.equal(self.residual.cpu(), theirs.residual.cpu())
            and torch.equal(self.other.cpu(), theirs.other.cpu())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"RankOneEdit(layer {self.layer} {self.matrix}{head}, norm {self.norm:.4g}, scale {self.scale:g})"

    def _axes(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two vectors in the order of the matrix's axes."""
        residual, other = self.residual.to(device, dtype), self.other.to(device, dtype)
        return (other, residual) if kind_of(self.matrix).writes else (residual, other)


def apply_edits(model: Any, edits: RankOneEdit | Sequence[RankOneEdit], *, commit: bool = False) -> AppliedEdits:
    """Edit a model's own weights for as long as a `with` block lasts.

    In place and on the model's device: only the heads that are touched are copied, once each. On leaving, by an
    exception or Ctrl-C as well, they are copied back: floating-point addition cannot be undone by subtraction. Both
    copying steps hold Ctrl-C back until they are done (in the main thread, where Python's own handler is in place).

    Weights of 16 bits are added to in float32 and rounded once; what an edit smaller than their spacing then changes
    is less than it says. Blocks may be nested and may touch the same head; left in another order than that of entering
    (by hand or from threads), each takes out its own edits and no others. What the block itself does to a touched head,
    such as an optimiser step, is lost. The version counters of edited parameters go up, so a graph recorded before the
    block cannot be run backward after it.

    Args:
        model: a HookedTransformer or TransformerBridge, or a `ModelView` of one: making the view takes longer than an
            edit, so keep one for many edits.
        edits: applied in order; several may touch one head.
        commit: edit at once and for good; the returned record can still `undo()`.

    Returns:
        A context manager; it may be entered again after it was left.

    Raises:
        ValueError: before anything is changed: no such layer, matrix or head, vectors of another length, weights that
            are copies (nothing would happen), quantised, or made under `torch.inference_mode`.

    Example:
        >>> edit = RankOneEdit(1, "W_O", 0, torch.randn(64), torch.randn(16))
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with apply_edits(model, [edit]):
        ...     during = model(tokens)
        >>> torch.equal(model(tokens), before), torch.equal(during, before)
        (True, False)
    """
    listed = [edits] if isinstance(edits, RankOneEdit) else list(edits)
    for edit in listed:
        if not isinstance(edit, RankOneEdit):
            raise ValueError(f"expected edits of type RankOneEdit, got {type(edit).__name__}; pass RankOneEdit(...)")
    view = model if isinstance(model, ModelView) else ModelView(model)
    applied = AppliedEdits(view, tuple(listed))
    if commit:
        applied._commit()
    return applied


_OPEN: list[AppliedEdits] = []
"""Edits in force, in the order in which they were put in; those that were committed have left it."""


class AppliedEdits:
    """Edits of one model's weights, and what they displaced. Made by `apply_edits`."""

    edits: tuple[RankOneEdit, ...]
    """In the order in which they are added."""

    def __init__(self, view: ModelView, edits: tuple[RankOneEdit, ...]) -> None:
        self.view = view
        self.edits = edits
        self._places = [_place(view, edit) for edit in edits]
        self._saved: list[tuple[_Place, Tensor]] = []
        self._held = False
        self._committed = False

    @critical
    def __enter__(self) -> AppliedEdits:
        if self._committed or self in _OPEN:
            raise ValueError("expected edits that are not in force, got some that are; call apply_edits for others")
        self._held = hold_interrupts()
        try:
            self._put_in()
            _OPEN.append(self)
            if held.waits:
                raise interrupt()
        except BaseException:
            self._put_back()
            if self in _OPEN:
                _OPEN.remove(self)
            release_interrupts(self._held)
            if held.waits:
                raise interrupt() from None
            raise
        return self

    @critical
    def __exit__(self, *_: object) -> None:
        if self not in _OPEN:
            raise ValueError("expected edits that are in force, got some that are not; enter them first")
        later = self._stacked_on_this()
        try:
            for edits in reversed(later):
                edits._put_back()
            self._put_back()
            _OPEN.remove(self)
            for edits in later:
                edits._put_in()
        finally:
            release_interrupts(self._held)
            if held.waits:
                raise interrupt()

    @critical
    def _commit(self) -> None:
        if any(self._addresses() & edits._addresses() for edits in _OPEN):
            raise ValueError(
                "expected no open edits of the same head, got commit=True inside a `with apply_edits(...)` that would "
                "undo it; commit outside that block"
            )
        was_held = hold_interrupts()
        try:
            self._put_in()
            self._committed = True
        except BaseException:
            self._put_back()
            raise
        finally:
            release_interrupts(was_held)
            if held.waits:
                raise interrupt()

    @critical
    def undo(self) -> None:
        """Take committed edits out again, bit for bit.

        Raises:
            ValueError: nothing was committed, or the weights are no longer as the edits left them.
        """
        if not self._committed:
            raise ValueError("expected committed edits, got none; pass commit=True to apply_edits")
        if not self._are_as_left():
            raise ValueError(
                "expected the weights as these edits left them, got others; undo first what was done to them since"
            )
        was_held = hold_interrupts()
        try:
            self._put_back()
            self._committed = False
        finally:
            release_interrupts(was_held)
            if held.waits:
                raise interrupt()

    def _put_in(self) -> None:
        self._places = [place if place.is_live() else _place(self.view, place.edit) for place in self._places]
        for place in self._places:
            if all(place.address != before.address for before, _ in self._saved):
                self._saved.append((place, place.weights.clone(memory_format=torch.contiguous_format)))
            _add(place.weights, place.edit)

    def _put_back(self) -> None:
        while self._saved:
            place, original = self._saved[-1]
            # A model that was moved or converted meanwhile has its weights elsewhere: there they are put back.
            here = place if place.is_live() else _place(self.view, place.edit)
            here.weights.copy_(original)
            self._saved.pop()

    def _are_as_left(self) -> bool:
        for saved, original in self._saved:
            expected = original.clone()
            for place in self._places:
                if place.address == saved.address:
                    _add(expected, place.edit)
            if not saved.is_live() or not torch.equal(expected, saved.weights):
                return False
        return True

    def _addresses(self) -> set[int]:
        return {place.address for place in self._places}

    def _stacked_on_this(self) -> list[AppliedEdits]:
        """Edits put in later that lie on top of these, directly or by way of others."""
        addresses, later = self._addresses(), []
        for edits in _OPEN[_OPEN.index(self) + 1 :]:
            if addresses & edits._addresses():
                later.append(edits)
                addresses |= edits._addresses()
        return later

    def __repr__(self) -> str:
        state = "committed" if self._committed else "in force" if self in _OPEN else "not in force"
        return f"AppliedEdits({len(self.edits)} edits of {self.view.name!r}, {state})"


@dataclass(frozen=True, eq=False)
class _Place:
    """The weights that one edit touches: a head, or the whole matrix of an MLP."""

    edit: RankOneEdit
    weights: Tensor
    """A live view, outside autograd."""
    slot: Slot
    """Where the model keeps the parameter it is a view of."""
    address: int
    """Where the view begins: two places are either the same or apart."""

    def is_live(self) -> bool:
        """Whether these are still weights of the model."""
        return self.slot.shares(self.weights)


def _place(view: ModelView, edit: RankOneEdit) -> _Place:
    weight, slot = view.weight_and_slot(edit.layer, edit.matrix)
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"expected weights that can be edited, got inference tensors in blocks.{edit.layer} {edit.matrix}; pass a "
            "model that was loaded outside torch.inference_mode"
        )
    if edit.head is not None:
        heads = weight.shape[0]
        if not 0 <= edit.head < heads:
            kind = "key-value heads under grouped-query attention" if heads < view.n_heads else "heads"
            raise ValueError(
                f"expected a head from 0 to {heads - 1} of {edit.matrix} ({heads} {kind}), got {edit.head}; pass one "
                "of these"
            )
        weight = weight[edit.head]
    residual, other = weight.shape if kind_of(edit.matrix).reads else weight.shape[::-1]
    given = edit.residual.numel(), edit.other.numel()
    if given != (residual, other):
        raise ValueError(
            f"expected residual and other of {residual} and {other} entries for {edit.matrix}, got {given[0]} and "
            f"{given[1]}; pass vectors of these lengths"
        )
    return _Place(edit, weight, slot, weight.data_ptr())


def _add(live: Tensor, edit: RankOneEdit) -> None:
    if live.dtype in (torch.float32, torch.float64):
        live.addr_(*edit._axes(live.dtype, live.device), alpha=edit.scale)
        return
    wide = live.float().addr_(*edit._axes(torch.float32, live.device), alpha=edit.scale)
    if live.dtype == torch.float16 and not bool((wide.abs() <= torch.finfo(torch.float16).max).all()):
        raise ValueError(f"expected an edit that float16 weights can hold, got an overflow by {edit}; pass a smaller "
                         "scale or a model in another type")  # fmt: skip
    live.copy_(wide)
