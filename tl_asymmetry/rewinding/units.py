"""What is set back together: a head's matrices, a key-value head's, a layer's MLP; orders of them, and whole models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.edits import Rewind
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of


@dataclass(frozen=True)
class Unit:
    """Matrices that are set back together."""

    layer: int
    """Which block."""
    part: str
    """"head", "kv_head" (its keys and values, under grouped-query attention), or "mlp"."""
    head: int | None
    """Which head; None for an MLP."""
    matrices: tuple[str, ...]
    """Names of its matrices."""
    norm: float
    """‖ΔW‖ over all of them."""

    @property
    def name(self) -> str:
        """ "L7H3", "L7KV1" or "L7"."""
        letters = {"head": "H", "kv_head": "KV", "mlp": ""}[self.part]
        return f"L{self.layer}{letters}{'' if self.head is None else self.head}"

    def edits(self, base: ModelView, share: float = 1.0) -> tuple[Rewind, ...]:
        """Edits that take the aligned model's matrices `share` of the way to the base's."""
        return tuple(
            Rewind(self.layer, m, self.head, _of_head(base, self.layer, m, self.head), share) for m in self.matrices
        )


def units_of(base: ModelView, aligned: ModelView, matrices: Sequence[str]) -> list[Unit]:
    """All units of these matrices, layer by layer.

    W_O's heads are its input columns where it is stored as `nn.Linear` has it; here they are `[head, d_head, d_model]`
    on every kind of model.
    """
    grouped = base.n_kv_heads < base.n_heads
    kinds = {"head": [], "kv_head": [], "mlp": []}  # type: dict[str, list[str]]
    for matrix in matrices:
        heads = kind_of(matrix).heads
        kinds["mlp" if heads is None else "kv_head" if heads == "kv" and grouped else "head"].append(matrix)
    counts = {"head": range(base.n_heads), "kv_head": range(base.n_kv_heads), "mlp": [None]}
    units = []
    for layer in range(base.n_layers):
        for part, names in kinds.items():
            for head in counts[part] if names else ():
                norms = [
                    (_of_head(aligned, layer, m, head).double() - _of_head(base, layer, m, head).double()).norm()
                    for m in names
                ]
                units.append(Unit(layer, part, head, tuple(names), torch.stack(norms).norm().item()))
    return units


def _of_head(view: ModelView, layer: int, matrix: str, head: int | None) -> torch.Tensor:
    weight = view.weight(layer, matrix)
    return weight if head is None else weight[head]


def nearest_in_norm(unit: Unit, others: Sequence[Unit], count: int) -> list[Unit]:
    """The units of the same part that changed most nearly as much, nearest first; none that did not change."""
    changed = [other for other in others if other.part == unit.part and other is not unit and other.norm > 0]
    return sorted(changed, key=lambda other: abs(other.norm / unit.norm - 1) if unit.norm else 0.0)[:count]


def matched_order(order: Sequence[Unit]) -> list[Unit]:
    """For each unit of the first half of an order, the unused one of the second half nearest to it in ‖ΔW‖."""
    first, rest = list(order[: len(order) // 2]), list(order[len(order) // 2 :])
    matched = []
    for unit in first:
        near = nearest_in_norm(unit, rest, 1)
        if not near:
            break
        matched += near
        rest.remove(near[0])
    return matched


def same_parameters(base: ModelView, aligned: ModelView) -> bool:
    """Whether both models have parameters of the same names and shapes, so that one can be moved towards the other."""
    shapes = [{name: p.shape for name, p in view.model.named_parameters()} for view in (base, aligned)]
    return shapes[0] == shapes[1]


def moved(view: ModelView, towards: ModelView, share: float) -> AbstractContextManager[None]:
    """Every parameter of a model `share` of the way to another's for as long as a block lasts; 1 is the other exactly.

    A copy of the model's parameters is held meanwhile; on leaving, by an exception or Ctrl-C too, each is put back bit
    for bit.
    """
    targets = dict(towards.model.named_parameters())
    # All copies come first: a Bridge's queries, keys and values lie in the memory of the fused parameter beside them.
    saved = [(name, parameter, parameter.detach().clone()) for name, parameter in view.model.named_parameters()]

    @torch.no_grad()
    def put() -> None:
        for name, parameter, original in saved:
            target = targets[name].detach()
            if share == 1:
                parameter.copy_(target)
            elif share != 0:
                wide = original.to(torch.promote_types(original.dtype, torch.float32))
                parameter.copy_(wide.lerp(target.to(wide), share))

    @torch.no_grad()
    def take() -> None:
        for _, parameter, original in saved:
            parameter.copy_(original)

    return temporarily(put, take)
