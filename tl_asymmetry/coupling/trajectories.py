"""Checkpoints of one training run as a study of couplings needs them: weights, gradients, centroids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.coupling.response import CENTROIDS, CentroidProblem
from tl_asymmetry.grokking import GrokRun
from tl_asymmetry.grokking.model import GrokTransformer
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.parameters import ParameterVector
from tl_asymmetry.results.provenance import model_record, shape_record, weights_hash
from tl_asymmetry.training.objectives import CrossEntropy, TokenBatch


@runtime_checkable
class Trajectory(Protocol):
    """Checkpoints in the order of training."""

    steps: list[int]
    """Their steps, ascending."""
    objectives: tuple[str, ...]
    """Names of the losses whose gradients are looked at; each has its own centroids."""
    accuracy: pd.DataFrame
    """step, op, train_accuracy, test_accuracy; empty where there is none."""

    def parameters(self, index: int) -> Float[Tensor, " parameters"]:
        """θ of a checkpoint."""
        ...

    def gradient(self, index: int, objective: str) -> Float[Tensor, " parameters"]:
        """∂loss/∂θ on a fixed batch."""
        ...

    def problem(self, index: int, objective: str) -> CentroidProblem:
        """Centroids of fixed probes, with the checkpoint's weights in place until another index is asked for."""
        ...

    def record(self) -> dict[str, Any]:
        """What a result must say of it; JSON-ready."""
        ...


@checked
class GrokTrajectory:
    """A `GrokRun`: gradients of each operation's cross-entropy on pairs drawn from the whole table, as published.

    Args:
        run: with checkpoints.
        probes: pairs whose centroids are followed.
        probe_seed: of their draw (the author's code: 100 for gradients, 0 for updates; one set serves both here).
        gradient_batch: pairs the gradient is taken on.
        gradient_seed: of their draw.
        centroid: "logit" (published) or "sum", over the outputs of all heads.

    Raises:
        ValueError: a run without at least two checkpoints.
    """

    def __init__(
        self,
        run: GrokRun,
        *,
        probes: int = 1024,
        probe_seed: int = 100,
        gradient_batch: int = 512,
        gradient_seed: int = 0,
        centroid: str = "logit",
    ) -> None:
        if len(run.steps) < 2:
            raise ValueError(
                f"expected a run with two checkpoints or more, got {len(run.steps)}; train with keep_checkpoints=True"
            )
        if centroid not in CENTROIDS:
            raise ValueError(f"expected centroid among {', '.join(CENTROIDS)}, got {centroid!r}; pass one of these")
        task = run.task
        self._run, self._task, self._centroid = run, task, centroid
        self.steps, self.objectives = run.steps, task.names
        self.accuracy = run.table[["step", "op", "train_accuracy", "test_accuracy"]]
        self._probes = task.sample(probes, seed=probe_seed)
        self._batch = task.sample(gradient_batch, seed=gradient_seed)
        self._draws = {"probes": probes, "probe_seed": probe_seed, "gradient_batch": gradient_batch,
                       "gradient_seed": gradient_seed, "centroid": centroid}  # fmt: skip
        self._model = GrokTransformer(run.shape)
        self._at: int | None = None

    def parameters(self, index: int) -> Float[Tensor, " parameters"]:
        self._load(index)
        return self._vector().flat()

    def gradient(self, index: int, objective: str) -> Float[Tensor, " parameters"]:
        self._load(index)
        head = self.objectives.index(objective)
        logits = self._model(self._batch)[:, head]
        loss = F.cross_entropy(logits, self._task.targets(self._batch)[:, head])
        vector = self._vector()
        return vector.gather(torch.autograd.grad(loss, vector.owners))

    def problem(self, index: int, objective: str) -> CentroidProblem:
        self._load(index)
        head = self.objectives.index(objective)
        targets = self._task.targets(self._probes)[:, head] + head * self._task.p
        return CentroidProblem(self._model, self._probes, targets=targets, centroid=self._centroid)

    def record(self) -> dict[str, Any]:
        return {"run": self._run.config["settings"], **self._draws}

    def _vector(self) -> ParameterVector:
        return ParameterVector(self._model, self._model.attention_parameters())

    def _load(self, index: int) -> None:
        if self._at != index:
            self._model.load_state_dict(self._run.weights(step=self.steps[index]))
            self._at = index


@checked
class BlockTrajectory:
    """Checkpoints of a language model and one attention block of it, with block-level centroids.

    θ is W_Q, W_K, W_V, W_O of `layer`; the centroid of a text is J_f(x)ᵀ 1 of that attention block, f what it writes at
    the last position, x the stream that enters the block at all positions. The gradient is that of the next-token
    cross-entropy on `tokens`.

    Args:
        checkpoints: by step, models of one architecture (HookedTransformer or TransformerBridge) or folders to open
            them from, one at a time.
        tokens: `[batch, pos]` token ids, without padding: probes and gradient batch alike.
        layer: the block.
        position: where the block's output is read.

    Raises:
        ValueError: fewer than two checkpoints.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> checkpoints = {step: demo_model(f"step{step}") for step in (0, 50, 150)}
        >>> trajectory = BlockTrajectory(checkpoints, torch.arange(24).view(2, 12), layer=1)
        >>> trajectory.steps[:2], trajectory.objectives
        ([0, 50], ('next token',))
    """

    def __init__(
        self, checkpoints: Mapping[int, Any], tokens: Int[Tensor, "batch pos"], *, layer: int, position: int = -1
    ) -> None:
        if not isinstance(checkpoints, Mapping):
            raise ValueError(f"expected checkpoints as models by step, got {shown(checkpoints)}; pass {{0: model, …}}")
        if not isinstance(tokens, Tensor):
            raise ValueError(f"expected tokens as a tensor [batch, pos], got {shown(tokens)}; pass token ids")
        if len(checkpoints) < 2:
            raise ValueError(f"expected two checkpoints or more, got {len(checkpoints)}; pass models by step")
        self.steps = sorted(checkpoints)
        self.objectives: tuple[str, ...] = ("next token",)
        self.accuracy = pd.DataFrame(columns=["step", "op", "train_accuracy", "test_accuracy"])
        self._checkpoints = [checkpoints[step] for step in self.steps]
        self._opened: tuple[int, Any] = (-1, None)
        self._tokens, self._layer, self._position = tokens, layer, position
        self._batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def parameters(self, index: int) -> Float[Tensor, " parameters"]:
        return self._problem(index).θ.flat().cpu()

    def gradient(self, index: int, objective: str) -> Float[Tensor, " parameters"]:
        problem = self._problem(index)
        with problem.differentiable():
            device = problem.θ.device
            batch = TokenBatch(self._batch.tokens.to(device), self._batch.mask.to(device))
            loss = CrossEntropy()(problem.model, batch)
            return problem.θ.gather(torch.autograd.grad(loss, problem.θ.owners, allow_unused=True)).cpu()

    def problem(self, index: int, objective: str) -> CentroidProblem:
        return self._problem(index)

    def record(self) -> dict[str, Any]:
        first = self._problem(0).view
        if first is None:
            return {}
        return {
            "model": model_record(first, weights_hash(first)), "shape": shape_record(first), "layer": self._layer,
            "position": self._position, "sequences": len(self._tokens), "tokens": self._tokens.numel(),
            "centroid": "attention",
        }  # fmt: skip

    def _problem(self, index: int) -> CentroidProblem:
        return CentroidProblem(
            self._model(index), self._tokens, centroid="attention", layer=self._layer, position=self._position,
            batch_size=8,
        )  # fmt: skip

    def _model(self, index: int) -> Any:
        given = self._checkpoints[index]
        if not isinstance(given, str | Path):
            return given
        if self._opened[0] != index:
            self._opened = (-1, None)  # the last one goes before the next one comes
            self._opened = (index, open_model(str(given)))
        return self._opened[1]


def as_trajectory(source: Any) -> Trajectory:
    """A `GrokRun` with the published probes, or a trajectory as it is.

    Raises:
        ValueError: anything else.
    """
    if isinstance(source, GrokRun):
        return GrokTrajectory(source)
    if isinstance(source, Trajectory):
        return source
    got: Sequence[str] = [type(source).__name__]
    raise ValueError(
        f"expected a GrokRun or a trajectory, got {got[0]}; pass grokking.train(…) or BlockTrajectory(checkpoints, "
        "tokens, layer=…)"
    )
