"""Short training runs of a copy: the same optimiser for every objective, nothing random but the order of the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from tl_asymmetry.arguments import checked, listed, shown
from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.batches import Batch
from tl_asymmetry.training.objectives import Objective


@checked
@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up, constant after it.

    Raises:
        ValueError: for a learning rate that is not positive, or a negative setting.
    """

    lr: float = 3e-5
    """Learning rate after the warm-up."""
    warmup: int = 16
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    weight_decay: float = 0.0
    """Decoupled weight decay; it would shrink every grade's weights alike."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or self.warmup < 0 or not 0 <= self.weight_decay < math.inf or not self.clip > 0:
            raise ValueError(
                f"expected lr > 0, warmup >= 0, weight_decay >= 0 and clip > 0, got {self}; pass such settings"
            )
        check_betas(self.betas)


def check_betas(betas: Any) -> None:
    """Refuse what are no two decays of moments.

    Raises:
        ValueError: naming what to pass.
    """
    given = listed("betas", betas, float, instead="betas=(0.9, 0.95)")
    if len(given) != 2 or not all(0 <= beta < 1 for beta in given):
        raise ValueError(f"expected two betas from 0 to below 1, got {shown(betas)}; pass betas=(0.9, 0.95)")


@dataclass(frozen=True)
class Run:
    """What happened on the way."""

    losses: tuple[float, ...]
    """The objective before each step, in nats."""
    distances: tuple[float, ...]
    """√Σ‖ΔW‖² over the watched matrices of all layers, after each step."""


def trainable_copy(model: Any) -> Any:
    """A deep copy of a HookedTransformer or TransformerBridge whose parameters all require gradients.

    The model itself is left as it is.

    Raises:
        ValueError: weights in half precision, where a small step would be rounded away; a model that another thread is
            running.
    """
    view = ModelView(model)
    if view.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected float32 or float64 weights to train, got {view.dtype}: small steps would be rounded away; pass "
            "the model loaded with dtype=torch.float32"
        )
    modules: list[Any] = list(view.all_modules())
    # The Bridge's attention keeps its last pattern with its graph, which cannot be copied.
    kept = [(module, module._pattern) for module in modules if getattr(module, "_pattern", None) is not None]

    def forget() -> None:
        for module, _ in kept:
            module._pattern = None

    def remember() -> None:
        for module, pattern in kept:
            module._pattern = pattern

    try:
        with temporarily(forget, remember):
            other = copy.deepcopy(model)
    except RuntimeError as error:  # of a tensor with a graph, which a pass in another thread has just left
        raise ValueError(
            f"expected a model that can be copied, got {error}; pass one that no other thread is running"
        ) from error
    for parameter in other.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return other


def train(
    model: Any,
    start: Any,
    objective: Objective[Any],
    batches: Iterator[Batch],
    *,
    steps: int,
    optimizer: Optimizer,
    matrices: Sequence[str],
    until: float | None = None,
) -> Run:
    """Train `model` in place, without dropout.

    Args:
        model: what is trained, a copy of `start`.
        start: what distances are taken from.
        objective: the loss.
        batches: one for each step.
        steps: how many, at most.
        optimizer: its settings.
        matrices: whose change counts as distance.
        until: stop after the first step at which the distance is at least this.

    Raises:
        ValueError: a loss that is not finite, naming the step.
    """
    view, origin = ModelView(model), ModelView(start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(
        parameters, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
    )  # fmt: skip
    losses, distances = [], []
    with view.evaluating(), torch.enable_grad():
        for step, batch in enumerate(islice(batches, steps)):
            for group in adam.param_groups:
                group["lr"] = optimizer.lr * min(1.0, (step + 1) / max(optimizer.warmup, 1))
            loss = objective(view, batch.to(view.device))
            losses.append(float(loss.detach()))
            if not -torch.inf < losses[-1] < torch.inf:
                raise ValueError(
                    f"expected a finite loss, got {losses[-1]} at step {step}; pass a smaller lr or other data"
                )
            adam.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, optimizer.clip)
            adam.step()
            distances.append(distance(view, origin, matrices))
            if until is not None and distances[-1] >= until:
                break
    adam.zero_grad(set_to_none=True)
    return Run(tuple(losses), tuple(distances))


def distance(view: ModelView, origin: ModelView, matrices: Sequence[str]) -> float:
    """√Σ‖ΔW‖² over some matrices of all layers."""
    total = 0.0
    for layer in range(view.n_layers):
        for matrix in matrices:
            ΔW = view.weight(layer, matrix) - origin.weight(layer, matrix).to(view.device)
            total += ΔW.square().sum(dtype=torch.float64).item()
    return total**0.5
