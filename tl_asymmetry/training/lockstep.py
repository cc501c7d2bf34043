"""Several grokking runs at once: one batched forward and backward pass a step for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from tl_asymmetry.training.grok_loop import GrokLoop, summed_cross_entropy


def run_together(loops: Sequence[GrokLoop], *, report: Callable[[GrokLoop], None] | None = None) -> None:
    """Train every loop until its protocol stops it, the gradients of all made in one batched pass.

    Each loop keeps its own batches, clipping, projection, optimiser, evaluations and folder; one that has stopped
    leaves the others. Batched products round otherwise than single ones, so weights agree with those of `GrokLoop.run`
    to rounding, which training amplifies: a run is repeated bit for bit only in the same company.

    Meant for a GPU, where a small model's launches cost more than its arithmetic (not measured yet); on a CPU it saves
    nothing. `benchmarks/lockstep.py` measures both.

    Args:
        loops: of one shape, batch size and device; at any step, finished ones are passed over.
        report: called with a loop after each of its evaluations.

    Raises:
        ValueError: no loop, or loops of several shapes, batch sizes or devices.
    """
    _check(loops)
    for loop in loops:
        loop.begin()
    while active := [loop for loop in loops if not loop.progress.finished]:
        with _shared(active) as stacked:
            while not any(loop.progress.finished for loop in active):
                batches = [loop.draw() for loop in active]
                pairs, targets = (torch.stack(parts) for parts in zip(*batches, strict=True))
                gradients, losses = _gradients(active[0], stacked, pairs, targets)
                for i, (loop, loss) in enumerate(zip(active, losses.tolist(), strict=True)):
                    for name, parameter in loop.model.named_parameters():
                        # Laid out as the parameter: the fused optimiser walks both by one stride, and asks nothing.
                        parameter.grad = gradients[name][i].contiguous()
                    if loop.advance(loss) and report is not None:
                        report(loop)


def _gradients(
    loop: GrokLoop,
    stacked: dict[str, Tensor],
    pairs: Int[Tensor, "runs batch 2"],
    targets: Int[Tensor, "runs batch ops"],
) -> tuple[dict[str, Tensor], Float[Tensor, " runs"]]:
    """Gradients by parameter, the runs side by side, and the losses."""

    def loss(weights: dict[str, Tensor], some: Tensor, wanted: Tensor) -> Tensor:
        return summed_cross_entropy(functional_call(loop.model, weights, (some,)), wanted)

    return vmap(grad_and_value(loss))(stacked, pairs, targets)


@contextmanager
def _shared(loops: Sequence[GrokLoop]) -> Iterator[dict[str, Tensor]]:
    """Parameters of all loops as slices of one tensor each: optimisers write into what the batched pass reads."""
    parameters = [dict(loop.model.named_parameters()) for loop in loops]
    stacked = {name: torch.stack([own[name].detach() for own in parameters]) for name in parameters[0]}
    try:
        for i, own in enumerate(parameters):
            for name, parameter in own.items():
                parameter.data = stacked[name][i]
        yield stacked
    finally:
        for own in parameters:
            for parameter in own.values():
                parameter.data = parameter.data.clone()
                parameter.grad = None


def _check(loops: Sequence[GrokLoop]) -> None:
    kinds = {(loop.model.shape, loop.recipe.batch_size, loop.device) for loop in loops}
    if len(kinds) != 1:
        raise ValueError(
            f"expected runs of one shape, batch size and device, got {len(kinds)} kinds; pass loops that differ in "
            "seed, operation or projection alone"
        )
