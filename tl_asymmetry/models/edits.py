"""Edits of live weights: put in on the model's own device, taken out again bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.view import ModelView, Slot
from tl_asymmetry.names import MATRICES, Place, kind_of, side_by_name

_EMBEDDINGS = ("W_E", "W_U", "W_pos")
EditT = TypeVar("EditT", bound="HeadEdit")

_WIDE = (torch.float32, torch.float64)
"""Types of weights that are changed where they lie; narrower ones are widened and rounded once."""


@dataclass(frozen=True, eq=False)
class HeadEdit:
    """A change of one head's or expert's matrix, or of a matrix without such parts; its subclasses say which change.

    Raises:
        ValueError: an unknown matrix, a head where there is none or none where there is one.
    """

    layer: int
    """Which block."""
    matrix: str
    """Which matrix: W_Q … W_out, or the path of a further linear map's module inside the block."""
    head: int | None
    """Which head: the key-value head for W_K and W_V, None for a matrix of the MLP."""
    expert: int | None = field(default=None, kw_only=True)
    """Which expert of a mixture; None elsewhere."""

    def __post_init__(self) -> None:
        if self.matrix not in MATRICES and side_by_name(self.matrix) is None:
            why = "; embeddings are not edited (where W_U is tied to W_E, an edit of one would be an edit of both)"
            raise ValueError(
                f"expected a matrix among {', '.join(MATRICES)}, got {self.matrix!r}"
                f"{why if self.matrix in _EMBEDDINGS else ''}; pass one of these"
            )
        headed = kind_of(self.matrix).heads is not None
        if headed != (self.head is not None):
            wanted = "the index of a head" if headed else "head=None (a matrix without heads)"
            raise ValueError(f"expected {wanted} for {self.matrix}, got {self.head}; pass that")
        if headed and self.expert is not None:
            raise ValueError(
                f"expected expert=None for {self.matrix}, which has heads, got {self.expert}; leave it out"
            )

    @property
    def place(self) -> Place:
        """Layer, matrix, head and expert."""
        return Place(self.layer, self.matrix, self.head, self.expert)

    @property
    def pathway(self) -> str:
        """ "read" or "write": whether d_model is the matrix's input or its output axis."""
        return kind_of(self.matrix).side

    def check_fits(self, weights: Tensor) -> None:
        """Refuse weights of another shape than the edit's."""
        raise NotImplementedError

    def to(self: EditT, device: torch.device | str) -> EditT:
        """The same edit with its tensors on another device."""
        raise NotImplementedError

    def put_into(self, weights: Tensor) -> None:
        """Change weights `[rows, columns]` in TransformerLens orientation, in place; 16 bits are rounded once."""
        raise NotImplementedError


@checked
@dataclass(frozen=True, eq=False)
class RankOneEdit(HeadEdit):
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

    residual: Float[Tensor, " d_model"]
    """The vector on the d_model axis."""
    other: Float[Tensor, " other"]
    """The vector on the other axis, d_head or d_mlp long."""
    scale: float | int = 1.0
    """What the outer product is multiplied by; −1 takes out, 0.5 is half a dose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("residual", "other"):
            vector = getattr(self, name)
            if vector.ndim != 1 or vector.numel() == 0:
                raise ValueError(
                    f"expected {name} as a vector, got shape {tuple(vector.shape)}; pass a one-dimensional tensor"
                )
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
    def norm(self) -> float:
        """Frobenius norm of what is added."""
        return abs(self.scale) * (self.residual.double().norm() * self.other.double().norm()).item()

    def change(self) -> Float[Tensor, "rows columns"]:
        """What is added, as a matrix in TransformerLens orientation, float64."""
        first, second = self._in_order(torch.float64, self.residual.device)
        return self.scale * torch.outer(first, second)

    def scaled(self, factor: float | int) -> RankOneEdit:
        """The same edit, `factor` times as strong."""
        return replace(self, scale=self.scale * factor)

    def to(self, device: torch.device | str) -> RankOneEdit:
        """The same edit with its vectors on another device."""
        return replace(self, residual=self.residual.to(device), other=self.other.to(device))

    def check_fits(self, weights: Tensor) -> None:
        """As `HeadEdit.check_fits`."""
        residual, other = weights.shape if kind_of(self.matrix).reads else weights.shape[::-1]
        given = self.residual.numel(), self.other.numel()
        if given != (residual, other):
            raise ValueError(
                f"expected residual and other of {residual} and {other} entries for {self.matrix}, got {given[0]} and "
                f"{given[1]}; pass vectors of these lengths"
            )

    def put_into(self, weights: Tensor) -> None:
        """As `HeadEdit.put_into`."""
        wide = weights if weights.dtype in _WIDE else weights.float()
        wide.addr_(*self._in_order(wide.dtype, wide.device), alpha=self.scale)
        _narrow_into(weights, wide, self)

    def with_residual(self, residual: Float[Tensor, " d_model"]) -> RankOneEdit:
        """The same edit along another direction of the residual stream."""
        return replace(self, residual=residual)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; `from_dict` gives back the same numbers, bit for bit."""
        vectors = {
            name: {"dtype": str(v.dtype).removeprefix("torch."), "values": v.tolist()}
            for name, v in (("residual", self.residual), ("other", self.other))
        }
        return {**self.place._asdict(), "scale": self.scale, **vectors}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RankOneEdit:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an entry is missing, or what the edit itself refuses.
        """
        missing = {*Place._fields, "scale", "residual", "other"} - set(document)
        if missing:
            raise ValueError(f"expected an edit written by to_dict, got one without {', '.join(sorted(missing))}; "
                             "pass all its entries")  # fmt: skip
        residual, other = (
            torch.tensor(document[name]["values"], dtype=getattr(torch, document[name]["dtype"]))
            for name in ("residual", "other")
        )
        layer, matrix, head, expert = (document[name] for name in Place._fields)
        return cls(layer, matrix, head, residual, other, document["scale"], expert=expert)

    def __eq__(self, theirs: object) -> bool:
        if not isinstance(theirs, RankOneEdit):
            return NotImplemented
        return (
            (self.place, self.scale) == (theirs.place, theirs.scale)
            and torch.equal(self.residual.cpu(), theirs.residual.cpu())
            and torch.equal(self.other.cpu(), theirs.other.cpu())
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = "".join(f" {name} {i}" for name, i in (("head", self.head), ("expert", self.expert)) if i is not None)
        return f"RankOneEdit(layer {self.layer} {self.matrix}{parts}, norm {self.norm:.4g}, scale {self.scale:g})"

    def _in_order(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two vectors in the order of the matrix's axes."""
        residual, other = self.residual.to(device, dtype), self.other.to(device, dtype)
        return (other, residual) if kind_of(self.matrix).writes else (residual, other)


@checked
@dataclass(frozen=True, eq=False)
class MatrixEdit(HeadEdit):
    """Adds a given matrix to one head's, whatever its rank.

    Example:
        >>> edit = MatrixEdit(0, "W_Q", 1, torch.eye(64)[:, :16])
        >>> edit.norm
        4.0
        >>> with apply_edits(model, edit):
        ...     trace = model.blocks[0].attn.W_Q[1].diagonal().sum().item()
        >>> round(trace - model.blocks[0].attn.W_Q[1].diagonal().sum().item(), 4)
        16.0
    """

    added: Float[Tensor, "rows columns"]
    """What is added, in TransformerLens orientation."""

    @property
    def norm(self) -> float:
        """Frobenius norm of what is added."""
        return self.added.double().norm().item()

    def change(self) -> Float[Tensor, "rows columns"]:
        """What is added, float64."""
        return self.added.double()

    def to(self, device: torch.device | str) -> MatrixEdit:
        """The same edit with its matrix on another device."""
        return replace(self, added=self.added.to(device))

    def check_fits(self, weights: Tensor) -> None:
        """As `HeadEdit.check_fits`."""
        _check_shape(self.added, weights, self.matrix)

    def put_into(self, weights: Tensor) -> None:
        """As `HeadEdit.put_into`."""
        wide = weights if weights.dtype in _WIDE else weights.float()
        wide.add_(self.added.to(wide))
        _narrow_into(weights, wide, self)


@checked
@dataclass(frozen=True, eq=False)
class Rewind(HeadEdit):
    """Moves one head's matrix `share` of the way to given weights: W + share · (target − W); 1 sets it to them exactly.

    Example:
        >>> target = base.blocks[0].attn.W_Q[1].detach()
        >>> with apply_edits(aligned, Rewind(0, "W_Q", 1, target)):
        ...     torch.equal(aligned.blocks[0].attn.W_Q[1], target)
        True
    """

    target: Float[Tensor, "rows columns"]
    """Where to, in TransformerLens orientation; a view of another model's live weights will do."""
    share: float | int = 1.0
    """How far: 0 changes nothing, 1 replaces the weights."""

    def to(self, device: torch.device | str) -> Rewind:
        """The same edit with its target on another device."""
        return replace(self, target=self.target.to(device))

    def check_fits(self, weights: Tensor) -> None:
        """As `HeadEdit.check_fits`."""
        _check_shape(self.target, weights, self.matrix)

    def put_into(self, weights: Tensor) -> None:
        """As `HeadEdit.put_into`."""
        if self.share == 1:
            weights.copy_(self.target)
        elif self.share != 0:
            wide = weights if weights.dtype in _WIDE else weights.float()
            wide.lerp_(self.target.to(wide), float(self.share))
            _narrow_into(weights, wide, self)


def apply_edits(model: Any, edits: HeadEdit | Sequence[HeadEdit]) -> AbstractContextManager[None]:
    """Edit a model's own weights for as long as a `with` block lasts.

    In place and on the model's device: only the heads that are touched are copied, once each, and on leaving the block,
    by an exception or Ctrl-C as well, copied back bit for bit: floating-point addition cannot be undone by subtraction.

    Weights of 16 bits are added to in float32 and rounded once; what an edit smaller than their spacing then changes
    is less than it says. Blocks may be nested and may touch the same head. What the block itself does to a touched
    head, such as an optimiser step, is lost; a model that it moves or converts is restored where it then lies. The
    version counters of edited parameters go up, so a graph recorded before the block cannot be run backward after it.

    Args:
        model: a HookedTransformer or TransformerBridge, or a `ModelView` of one: making the view takes longer than an
            edit, so keep one for many edits.
        edits: applied in order; several may touch one head.

    Returns:
        A context manager, to be entered once.

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
    view = model if isinstance(model, ModelView) else ModelView(model)
    places = [_place(view, edit) for edit in _listed(edits)]

    saved: dict[int, tuple[_Place, Tensor]] = {}

    def put() -> None:
        for place in (place.as_it_lies(view) for place in places):
            if place.address not in saved:
                saved[place.address] = place, place.weights.clone(memory_format=torch.contiguous_format)
            place.edit.put_into(place.weights)

    def take() -> None:
        for address, (place, original) in list(saved.items()):
            place.as_it_lies(view).weights.copy_(original)
            del saved[address]

    return temporarily(put, take)


def commit_edits(model: Any, edits: HeadEdit | Sequence[HeadEdit]) -> None:
    """Edit a model's own weights for good.

    Args:
        model, edits: as in `apply_edits`.

    Raises:
        ValueError: as `apply_edits`, before anything is changed; an edit that 16-bit weights cannot hold leaves none.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> planted = demo_model("base")
        >>> commit_edits(planted, RankOneEdit(1, "W_O", 0, torch.ones(64), torch.ones(16)))
        >>> bool((planted.blocks[1].attn.W_O[0] - model.blocks[1].attn.W_O[0] - 1).abs().max() < 1e-6)
        True
    """
    view = model if isinstance(model, ModelView) else ModelView(model)
    places = [_place(view, edit) for edit in _listed(edits)]
    with apply_edits(view, edits):
        edited = [place.weights.clone() for place in places]
    for place, weights in zip(places, edited, strict=True):
        place.weights.copy_(weights)


def _listed(edits: HeadEdit | Sequence[HeadEdit]) -> list[HeadEdit]:
    if not isinstance(edits, HeadEdit | Iterable):
        raise ValueError(f"expected edits, one or several, got {type(edits).__name__}; pass RankOneEdit(...) or a list")
    listed = [edits] if isinstance(edits, HeadEdit) else list(edits)
    for edit in listed:
        if not isinstance(edit, HeadEdit):
            raise ValueError(f"expected edits of type RankOneEdit, got {type(edit).__name__}; pass RankOneEdit(...)")
    return listed


@dataclass(frozen=True, eq=False)
class _Place:
    """The weights that one edit touches: a head's, an expert's, or the whole matrix."""

    edit: HeadEdit
    weights: Tensor
    """A live view, outside autograd."""
    slot: Slot
    """Where the model keeps the parameter it is a view of."""
    address: int
    """Where the view begins: two places are either the same or apart."""

    def as_it_lies(self, view: ModelView) -> _Place:
        """The same place now: a model that was moved, converted or loaded meanwhile has its weights elsewhere."""
        return self if self.slot.shares(self.weights) else _place(view, self.edit)


def _place(view: ModelView, edit: HeadEdit) -> _Place:
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
    elif view.unit(edit.layer, edit.matrix) == "expert":
        if edit.expert is None or not 0 <= edit.expert < len(weight):
            raise ValueError(
                f"expected an expert from 0 to {len(weight) - 1} of {edit.matrix} in layer {edit.layer}, got "
                f"{edit.expert}; pass expert="
            )
        weight = weight[edit.expert]
    elif edit.expert is not None:
        raise ValueError(
            f"expected expert=None for {edit.matrix} of layer {edit.layer}, which has no experts, got {edit.expert}; "
            "leave it out"
        )
    edit.check_fits(weight)
    return _Place(edit, weight, slot, weight.data_ptr())


def _check_shape(given: Tensor, weights: Tensor, matrix: str) -> None:
    if given.shape != weights.shape:
        raise ValueError(
            f"expected a matrix of shape {tuple(weights.shape)} for {matrix}, got {tuple(given.shape)}; pass one in "
            "TransformerLens orientation, of one head where there are heads"
        )


def _narrow_into(weights: Tensor, wide: Tensor, edit: HeadEdit) -> None:
    """Round what was computed beside 16-bit weights into them."""
    if wide is weights:
        return
    if weights.dtype == torch.float16 and not bool((wide.abs() <= torch.finfo(torch.float16).max).all()):
        raise ValueError(f"expected an edit that float16 weights can hold, got an overflow by {edit}; pass a smaller "
                         "scale or a model in another type")  # fmt: skip
    weights.copy_(wide)
