"""Each expert of a mixture against its own inputs: the tokens that were routed to it, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.names import EXPERT_INPUT, kind_of
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.deltas import AnyDelta, of_unit
from tl_asymmetry.pair.projections import Projection, project
from tl_asymmetry.settings import GradientMoments

_INPUT = kind_of("W_in").point


def project_experts(
    deltas: Sequence[AnyDelta],
    bases: LayerBases,
    ranks: Sequence[int],
    *,
    intervals: bool,
    gradient: GradientMoments | None,
) -> list[Projection]:
    """Hold the experts' matrices of one layer against the inputs of each expert, references included.

    What an expert was given too few tokens for is NaN: directions beyond those that they span, and all of an expert
    without tokens. Intervals need as many tokens as ranks whichever group of texts is left out.

    Args:
        deltas: of this layer's experts, all experts together.
        bases: of this layer, with the moments of the experts' inputs.
        ranks, intervals, gradient: as in `project`; gradients weigh no inputs here, since they are known of all of a
            layer's experts together only.
    """
    experts = len(deltas[0].numbers.energy)
    found: list[dict[str, Projection] | None] = []
    for expert in range(experts):
        own = bases.of_expert(expert, _INPUT)
        if own is None:
            found.append(None)
            continue
        there = [k for k in ranks if k <= own.subspace(_INPUT).existing]
        projections = project(
            [of_unit(delta, expert) for delta in deltas],
            {delta.matrix: (_INPUT,) for delta in deltas},
            own,
            ranks,
            intervals=intervals and bool(there) and own.left_without_any_group(_INPUT) >= max(there),
            gradient=gradient,
        )
        found.append({projection.matrix: projection for projection in projections})
    if not any(found):
        return []
    return [_together([None if one is None else one[delta.matrix] for one in found]) for delta in deltas]


def _together(experts: Sequence[Projection | None]) -> Projection:
    """One projection of all experts, each of whose numbers has an axis of experts."""
    there = [one for one in experts if one is not None]
    first = there[0]
    twin = None
    if any(one.unshrunk is not None for one in there):
        twin = _together([None if one is None else replace(one.unshrunk or one, unshrunk=None) for one in experts])

    def of_heads(name: str, axis: int) -> Any:
        """What has an axis of heads, of length 1 with each expert; None where no expert has it."""
        found = of_layers(name, axis)
        return None if found is None else found.squeeze(axis + 1)

    def of_layers(name: str, axis: int) -> Any:
        """What has none."""
        parts = [None if one is None else getattr(one, name) for one in experts]
        return None if all(part is None for part in parts) else _beside(parts, axis)

    existing = torch.tensor([0 if one is None else int(one.existing) for one in experts])
    energies = of_heads("energies", 0)
    beyond = torch.arange(energies.shape[-1]) >= existing.unsqueeze(-1)
    tails = of_heads("tails", 1)
    if tails is not None and len(experts) > 1:  # no one subspace of which the pooled change could be asked
        tails = torch.cat([tails, torch.full_like(tails[:, :1], torch.nan)], 1)
    references: Mapping[str, Tensor] = {
        null: _beside([None if one is None else one.references[null] for one in experts], 0)
        for null in first.references
    }
    return replace(
        first,
        subspace=EXPERT_INPUT,
        energies=energies.masked_fill(beyond, torch.nan),
        eigenvalues=of_layers("eigenvalues", 0),
        existing=existing,
        noise=of_heads("noise", 0),
        activation_reference=of_layers("activation_reference", 0),
        gradient_reference=of_heads("gradient_reference", 0),
        replicates=of_heads("replicates", 1),
        reference_replicates=of_layers("reference_replicates", 1),
        references=references,
        tails=tails,
        unshrunk=twin,
    )


def _beside(parts: Sequence[Tensor | None], axis: int) -> Tensor:
    """Of several experts beside one another along a new axis; NaN where one has nothing."""
    return padded_stack(parts).movedim(0, axis)
