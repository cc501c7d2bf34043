"""The published training loop, step by step, with a state on disk from which it goes on bit for bit."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.grokking.model import GrokTransformer, shape_of
from tl_asymmetry.grokking.modular import ModularArithmetic, legacy_stream
from tl_asymmetry.names import nearest
from tl_asymmetry.results.provenance import versions
from tl_asymmetry.store import PartStore
from tl_asymmetry.training.projection import GradientProjection
from tl_asymmetry.training.runs import check_betas

KIND, _STATE = "grokking run", "state"
_EVALUATED_AT_ONCE = 2048


@checked
@dataclass(frozen=True)
class Recipe:
    """Every number of the protocol of arXiv:2604.25143 (the author's `train_dense.py`).

    Raises:
        ValueError: a number that cannot be meant.
    """

    lr: float = 1e-3
    """Learning rate of AdamW, constant."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    weight_decay: float = 1.0
    """Decoupled, on every parameter."""
    batch_size: int = 512
    """Training pairs a step, drawn with replacement."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    steps: int = 8000
    """Steps at most."""
    every: int = 25
    """Steps between evaluations, each with a checkpoint."""
    stop_accuracy: float = 0.98
    """Test accuracy that counts, of every operation."""
    stop_count: int = 20
    """Evaluations that must count before training stops: in all, not in a row."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "every", "stop_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}; pass a positive number")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}; pass a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected weight_decay >= 0, got {self.weight_decay}; pass 1.0")
        check_betas(self.betas)
        if not 0 < self.stop_accuracy <= 1:
            raise ValueError(f"expected stop_accuracy in (0, 1], got {self.stop_accuracy}; pass 0.98")


@dataclass
class Progress:
    """What a run has produced so far."""

    step: int = 0
    """Steps taken."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One for each evaluation and operation: step, op, train_accuracy, test_accuracy, loss."""
    checkpoints: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Weights by step, on CPU."""
    counted: int = 0
    """Evaluations so far at which every operation reached the accuracy."""
    finished: bool = False
    """Whether enough evaluations counted, or the steps were used up."""


class GrokLoop:
    """A model, its optimiser and its batches; `run` goes on until the protocol stops it.

    Args:
        task: what to learn; its seed is that of the split.
        seed: of the initial weights and of the batches, drawn as the author's code draws them
            (`numpy.random.seed(seed)`, one `randint` a step).
        recipe: numbers of the protocol.
        projection: keywords of `GradientProjection` on the attention weights; None for plain AdamW.
        keep_checkpoints: keep the weights at every evaluation.
        store: folder in which checkpoints and the state are kept at every evaluation; a run that lies there, begun
            with the same settings, is continued. `close` lets others write to it.
        sizes: other sizes of the model, by their names in `GrokShape`.
        device: where to train.

    Raises:
        ValueError: a folder that holds a run of other settings, or something else.
        DamagedFile: a checkpoint or the state in it is not as it was written.
    """

    def __init__(
        self,
        task: ModularArithmetic,
        *,
        seed: int,
        recipe: Recipe = Recipe(),
        projection: Mapping[str, Any] | None = None,
        keep_checkpoints: bool = True,
        store: str | Path | None = None,
        sizes: Mapping[str, int] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.task, self.seed, self.recipe = task, seed, recipe
        self.keep_checkpoints = keep_checkpoints
        self.model = GrokTransformer(shape_of(task, {} if sizes is None else sizes), seed=seed).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
            fused=True,  # one pass over the parameters: a tenth off a step
        )
        attention = list(self.model.attention_parameters().values())
        known = set(inspect.signature(GradientProjection).parameters) - {"optimizer", "parameters"}
        if projection is not None and not isinstance(projection, Mapping):
            raise ValueError(f"expected projection as keywords, got {shown(projection)}; pass a dict, or leave it out")
        if unknown := sorted(set(projection or {}) - known):
            raise ValueError(
                f"expected projection with keywords among {', '.join(sorted(known))}, got {unknown[0]!r}; pass "
                f"{nearest(unknown[0], known)}"
            )
        arm: dict[str, Any] = {"arm": "none", "seed": seed + 1000, **(projection or {})}
        self.stepper = GradientProjection(self.optimizer, attention, **arm)
        self.batches = legacy_stream(seed)
        self.progress = Progress()
        self._train, self._test = task.train.to(device), task.test.to(device)
        self._train_targets, self._test_targets = task.targets(self._train), task.targets(self._test)
        self.settings = json.loads(
            json.dumps({"task": asdict(task), "seed": seed, "recipe": asdict(recipe), "projection": dict(arm),
                        "sizes": asdict(self.model.shape), "checkpoints": keep_checkpoints})
        )  # fmt: skip
        self.store = None if store is None else PartStore(store, KIND, self.settings, {"versions": versions()})
        if self.store is not None and _STATE in self.store:
            self._resume(self.store)

    def run(self, *, until: int | None = None, report: Callable[[Progress], None] | None = None) -> Progress:
        """Train until the protocol stops, or until a given step.

        Args:
            until: a step at which to pause; the state is on disk if it is a multiple of `recipe.every`.
            report: called after every evaluation.
        """
        progress, recipe = self.progress, self.recipe
        self.begin()
        last = recipe.steps if until is None else min(until, recipe.steps)
        while not progress.finished and progress.step < last:
            pairs, targets = self.draw()
            loss = summed_cross_entropy(self.model(pairs), targets)
            self.stepper.zero_grad()
            loss.backward()
            if self.advance(loss.item()) and report is not None:
                report(progress)
        return progress

    def close(self) -> None:
        """Let others write to the store."""
        if self.store is not None:
            self.store.close()

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self._train.device

    def begin(self) -> None:
        """Evaluate the initial weights, unless that is done."""
        if self.progress.step == 0 and not self.progress.rows:
            self._evaluate(float("nan"))

    def draw(self) -> tuple[Int[Tensor, "batch 2"], Int[Tensor, "batch ops"]]:
        """The next batch: training pairs and their results."""
        chosen = torch.from_numpy(self.batches.randint(0, len(self._train), size=self.recipe.batch_size))
        chosen = chosen.to(self.device)
        return self._train[chosen], self._train_targets[chosen]

    def advance(self, loss: float) -> bool:
        """One optimiser step on the gradients that lie on the parameters; whether it ended with an evaluation."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.stepper.step()
        self.progress.step += 1
        evaluated = self.progress.step % self.recipe.every == 0 or self.progress.step == self.recipe.steps
        if evaluated:
            self._evaluate(loss)
        return evaluated

    def _evaluate(self, loss: float) -> None:
        progress, recipe = self.progress, self.recipe
        test = accuracy(self.model, self._test, self._test_targets)
        train = accuracy(self.model, self._train, self._train_targets)
        if not all(0 <= a <= 1 for a in test) or (progress.step and not loss < float("inf")):
            raise RuntimeError(f"training diverged at step {progress.step}: loss {loss}")
        for op, train_accuracy, test_accuracy in zip(self.task.names, train, test, strict=True):
            progress.rows.append(
                {"step": progress.step, "op": op, "train_accuracy": train_accuracy, "test_accuracy": test_accuracy,
                 "loss": loss}
            )  # fmt: skip
        if progress.step:
            progress.counted += min(test) >= recipe.stop_accuracy
            progress.finished = progress.counted >= recipe.stop_count or progress.step >= recipe.steps
        if self.keep_checkpoints:
            weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            progress.checkpoints[progress.step] = weights
        if self.store is not None:
            self._save(self.store)

    # -- disk ----------------------------------------------------------------------------------------------------

    def _save(self, store: PartStore) -> None:
        """The checkpoint first, the state last: whatever interrupts, what the state names is whole."""
        progress = self.progress
        if self.keep_checkpoints:
            store.put(progress.step, progress.checkpoints[progress.step], {})
        record = {"step": progress.step, "rows": progress.rows, "counted": progress.counted,
                  "finished": progress.finished}  # fmt: skip
        store.put(_STATE, dict(self._state()), record)

    def _resume(self, store: PartStore) -> None:
        record = store.entry(_STATE)
        self._set_state(store.arrays(_STATE))
        checkpoints = {step: store.arrays(step) for step in store.steps if step <= record["step"]}
        self.progress = Progress(record["step"], record["rows"], checkpoints, record["counted"], record["finished"])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.model.state_dict().items():
            yield f"model.{name}", value
        for index, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                yield f"optimizer.{index}.{name}", value
        for name, value in self.stepper.projection_state().items():
            yield f"projection.{name}", value
        generator: Any = self.batches.get_state(legacy=True)
        _, keys, position, has_gauss, gauss = generator
        yield "batches.keys", torch.from_numpy(keys.astype("int64"))
        yield "batches.rest", torch.tensor([position, has_gauss, gauss], dtype=torch.float64)

    def _set_state(self, state: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, key = name.split(".")
            entries.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.stepper.load_projection_state(part("projection."))
        position, has_gauss, gauss = state["batches.rest"].tolist()
        keys = state["batches.keys"].numpy().astype("uint32")
        self.batches.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each head, the mean over the batch, summed over the heads; in nats."""
    heads = range(logits.shape[1])
    return torch.stack([F.cross_entropy(logits[:, i], targets[:, i]) for i in heads]).sum()


def accuracy(model: GrokTransformer, pairs: Tensor, targets: Tensor) -> list[float]:
    """Share of the pairs that each head gets right."""
    right = torch.zeros(targets.shape[1], dtype=torch.int64)
    with torch.no_grad():
        pieces = zip(pairs.split(_EVALUATED_AT_ONCE), targets.split(_EVALUATED_AT_ONCE), strict=True)
        for some, wanted in pieces:
            right += (model(some).argmax(-1) == wanted).sum(0).cpu()
    return (right.double() / len(pairs)).tolist()
