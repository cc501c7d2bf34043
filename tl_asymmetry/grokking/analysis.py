"""Grokking on modular arithmetic, after arXiv:2604.25143: the task, the model, the training run, the interventions.

>>> run = train("add", p=7, seed=1, recipe=Recipe(steps=40, every=20), sizes={"d_model": 16, "d_mlp": 32})
>>> run.table["step"].tolist(), run.steps
([0, 20, 40], [0, 20, 40])
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked, listed, shown
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.grokking.loop import GrokLoop, Progress, Recipe
from tl_asymmetry.grokking.model import GrokShape, GrokTransformer
from tl_asymmetry.grokking.modular import ModularArithmetic
from tl_asymmetry.results.provenance import versions
from tl_asymmetry.results.report import FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


@checked
@with_fresh_settings
def train(
    task: str | tuple[str, ...] | ModularArithmetic = "add",
    *,
    p: int = 97,
    seed: int = 42,
    recipe: Recipe | None = None,
    projection: Mapping[str, Any] | None = None,
    keep_checkpoints: bool = True,
    store: str | Path | None = None,
    sizes: Mapping[str, int] | None = None,
    device: str | torch.device = "cpu",
    recorder: Callable[[int, GrokTransformer], object] | None = None,
    progress: bool = False,
) -> GrokRun:
    """Train the published model on modular arithmetic by the published protocol.

    Split, initial weights and batches are those the author's code draws for the same seed. Everything is on disk at
    every evaluation if a store is given, and a run found there is continued to bit-identical weights (on one device,
    with the same versions and number of threads).

    Args:
        task: an operation, several (one encoder, a head each, cross-entropies summed, one batch of pairs for all: our
            choice, the paper's multitask recipe is not public), or a `ModularArithmetic` of your own.
        p: the modulus, unless `task` is one.
        seed: of split, weights and batches.
        recipe: numbers of the protocol; default the published ones.
        projection: an arm of intervention on the attention weights: keywords of `GradientProjection`, e.g.
            `{"arm": "keep", "space": "random"}`.
        keep_checkpoints: keep the weights at every evaluation (1.2 MB each).
        store: folder in which the run is kept.
        sizes: other sizes by their names in `GrokShape`.
        device: where to train.
        recorder: called with the step and the live model after every evaluation, e.g. to feed `RollingSVDs`.
        progress: show a progress bar.

    Raises:
        ValueError: see `ModularArithmetic`, `GradientProjection`, `Recipe`; a store with a run of other settings.

    Example:
        >>> run = train("sub", p=7, seed=0, recipe=Recipe(steps=30, every=10), sizes={"d_model": 16, "d_mlp": 32})
        >>> run.weights(step=10)["blocks.0.attn.W_Q"].shape
        torch.Size([4, 16, 4])
    """
    loop = _loop(
        task, p=p, seed=seed, recipe=recipe, projection=projection, keep_checkpoints=keep_checkpoints, store=store,
        sizes=sizes, device=device,
    )  # fmt: skip
    start, first = time.perf_counter(), loop.progress.step
    with tqdm(total=loop.recipe.steps, initial=first, desc="training", unit="step", disable=not progress) as bar:

        def show(state: Progress) -> None:
            bar.update(state.step - bar.n)
            if recorder is not None:
                recorder(state.step, loop.model)
            bar.set_postfix({row["op"]: f"{row['test_accuracy']:.2f}" for row in state.rows[-len(loop.task.names) :]})

        try:
            loop.run(report=show)
        finally:
            loop.close()
    return run_of(loop, seconds=time.perf_counter() - start, first=first)


def _loop(
    task: str | tuple[str, ...] | ModularArithmetic,
    *,
    seed: int,
    recipe: Recipe | None,
    p: int = 97,
    **keywords: Any,
) -> GrokLoop:
    arithmetic = task if isinstance(task, ModularArithmetic) else ModularArithmetic(task, p=p, seed=seed)
    return GrokLoop(arithmetic, seed=seed, recipe=recipe or Recipe(), **keywords)


@checked
def run_of(loop: GrokLoop, *, seconds: float = float("nan"), first: int = 0) -> GrokRun:
    """The result of a loop as far as it has gone; `seconds` were spent since step `first`."""
    state = loop.progress
    notes = []
    if state.counted < loop.recipe.stop_count:
        notes.append(
            f"only {state.counted} of {loop.recipe.stop_count} evaluations reached {loop.recipe.stop_accuracy:g} on "
            f"held-out pairs within {state.step} steps"
        )
    if first:
        notes.append(f"continued from step {first} of an earlier process")
    steps = sorted(state.checkpoints)
    arrays = {"steps": torch.tensor(steps, dtype=torch.int64)}
    if steps:
        names = state.checkpoints[steps[0]]
        arrays |= {f"weights/{n}": torch.stack([state.checkpoints[step][n] for step in steps]) for n in names}
    config = {
        "settings": loop.settings, "finished": state.finished, "counted": state.counted, "step": state.step,
        "device": str(next(loop.model.parameters()).device), "threads": torch.get_num_threads(),
        "seconds": seconds, "versions": versions(),
    }  # fmt: skip
    return GrokRun(table=pd.DataFrame(state.rows), config=config, notes=tuple(notes), arrays=arrays)


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class GrokRun(Result):
    """A training run: accuracies at every evaluation, weights at every checkpoint. Made by `train`."""

    # `table`: step, op, train_accuracy, test_accuracy, loss (of the last batch, all heads summed, nats)
    LISTED = ("test_accuracy", "train_accuracy", "loss")

    def _listed(self) -> pd.DataFrame:
        """Operations at the last evaluation."""
        return self.table[self.table["step"] == self.table["step"].max()]

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints."""
        return self.arrays["steps"].tolist()

    @property
    def task(self) -> ModularArithmetic:
        """What was learned."""
        settings = dict(self.config["settings"]["task"])
        ops = settings.pop("ops")
        return ModularArithmetic(tuple(ops) if isinstance(ops, list) else ops, **settings)

    @property
    def shape(self) -> GrokShape:
        """Sizes of the model."""
        return GrokShape(**self.config["settings"]["sizes"])

    def weights(self, *, step: int) -> dict[str, torch.Tensor]:
        """Weights of one checkpoint, by HookedTransformer's names.

        Raises:
            ValueError: no checkpoint at that step.
        """
        if step not in self.steps:
            raise ValueError(
                f"expected a step with a checkpoint, got {step}; pass one of "
                f"{', '.join(map(str, self.steps[:6])) or 'none (train with keep_checkpoints=True)'} …"
            )
        at = self.steps.index(step)
        return {name.removeprefix("weights/"): w[at] for name, w in self.arrays.items() if name.startswith("weights/")}

    def model(self, *, step: int) -> GrokTransformer:
        """A fresh model with the weights of one checkpoint; see also `hooked_model` and `bridge_model`.

        Raises:
            ValueError: no checkpoint at that step.
        """
        model = GrokTransformer(self.shape)
        model.load_state_dict(self.weights(step=step))
        return model

    def grok_step(self, *, accuracy: float = 0.98, count: int = 20) -> int | None:
        """Step of the `count`-th evaluation at which every operation has that test accuracy; None if there is none.

        `count=1` is the first such evaluation; the published "grok step" is the 20th, counted in all, not in a row.

        Raises:
            ValueError: a count below 1, an accuracy outside 0 to 1.
        """
        if not 0 <= accuracy <= 1:
            raise ValueError(f"expected an accuracy from 0 to 1, got {accuracy}; pass accuracy=0.98")
        if count < 1:
            raise ValueError(f"expected count >= 1, got {count}; pass count=1 for the first")
        lowest = self.table[self.table["step"] > 0].groupby("step")["test_accuracy"].min()
        reached = lowest.index[lowest >= accuracy]
        return int(reached[count - 1]) if len(reached) >= count else None

    def plot_accuracy(
        self,
        *,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Train and held-out accuracy over steps, one colour for each operation.

        Args:
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.
        """
        from tl_asymmetry.plots import accuracy_figure

        return accuracy_figure(self.table, title=title, template=template, width=width, height=height)

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        settings = self.config["settings"]
        arm = settings["projection"]["arm"]
        return f"{' + '.join(self.task.names)} modulo {self.task.p}, seed {settings['seed']}, arm {arm}"

    def _facts(self) -> str:
        return f"{self.config['step']} steps, {len(self.steps)} checkpoints, {self.config['seconds']:.0f} s"

    def _summary_table(self) -> pd.DataFrame:
        last = self.table[self.table["step"] == self.table["step"].max()]
        return last.assign(first_98=self.grok_step(count=1), twentieth_98=self.grok_step())

    def _headline(self) -> list[str]:
        first, twentieth = self.grok_step(count=1), self.grok_step()
        if first is None:
            return [f"No evaluation reached 0.98 on the held-out pairs in {self.config['step']} steps."]
        ending = f", the 20th at {twentieth}" if twentieth else ""
        return [f"The first evaluation of at least 0.98 on the held-out pairs was at step {first}{ending}."]

    def _report(self) -> Report:
        return self._page(
            figures=[FigureSection("Accuracy", self.plot_accuracy())],
            tables=[TableSection("Evaluations", self.table, "One row per evaluation and operation.", "evaluations")],
        )


@checked
def arms(
    task: str | tuple[str, ...] = "add",
    *,
    seeds: Sequence[int] = (42, 137, 2024),
    which: Mapping[str, Mapping[str, Any] | None] | None = None,
    store: str | Path | None = None,
    recipe: Recipe | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    **keywords: Any,
) -> pd.DataFrame:
    """Train every arm with every seed and lay the evaluations under one another, for `plots.arms_figure`.

    Args:
        task, recipe, device, progress: as in `train`; further keywords (`p`, `sizes`) go there too.
        seeds: one run each.
        which: arms by name, keywords of `GradientProjection` or None for plain training; default `PUBLISHED_ARMS`.
        store: each run is kept in its subfolder `{task}-{seed}-{arm}` and is continued there.

    Returns:
        `train`'s table of every run, with columns `arm` and `seed` in front.

    Example:
        >>> short = Recipe(steps=20, every=10, batch_size=16)
        >>> table = arms("add", p=7, seeds=(1,), recipe=short, sizes={"d_model": 16, "d_mlp": 32})
        >>> table.groupby("arm", sort=False)["step"].max().to_dict()["frozen"]
        20
    """
    chosen = PUBLISHED_ARMS if which is None else which
    if not isinstance(chosen, Mapping) or not chosen:
        raise ValueError(f"expected which as arms by name, got {shown(which)}; pass a dict, or leave it out")
    if not isinstance(task, ModularArithmetic):
        ModularArithmetic(task)  # which refuses what is no operation
    seeds = listed("seeds", seeds, int, instead="seeds=(42,)")
    if not seeds:
        raise ValueError("expected seeds with a number or more, got none; pass seeds=(42,)")
    for arm, keywords_of in chosen.items():
        if keywords_of is not None and not isinstance(keywords_of, Mapping):
            raise ValueError(
                f"expected which with keywords of GradientProjection or None for each arm, got "
                f"{type(keywords_of).__name__} for {arm!r}; pass a dict"
            )
    names = [(arm, seed) for seed in seeds for arm in chosen]
    word = task if isinstance(task, str) else "+".join(task)

    def loop(arm: str, seed: int) -> GrokLoop:
        return _loop(
            task, seed=seed, recipe=recipe, projection=chosen[arm], keep_checkpoints=False, device=device,
            store=None if store is None else Path(store).expanduser() / f"{word}-{seed}-{arm}", **keywords,
        )  # fmt: skip

    loops = [loop(*name) for name in names]
    most = sum(each.recipe.steps for each in loops)
    with tqdm(total=most, desc="training", unit="step", disable=not progress) as bar:
        for each in loops:
            try:
                each.run(report=lambda _: bar.update(loops[0].recipe.every))
            finally:
                each.close()
    tables = [
        pd.DataFrame(each.progress.rows).assign(arm=arm, seed=seed)
        for each, (arm, seed) in zip(loops, names, strict=True)
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["arm", "seed", *(c for c in table.columns if c not in ("arm", "seed"))]]


PUBLISHED_ARMS: dict[str, Mapping[str, Any] | None] = {
    "control": None,
    "remove-rolling": {"arm": "remove", "space": "rolling"},
    "keep-rolling": {"arm": "keep", "space": "rolling"},
    "remove-random": {"arm": "remove", "space": "random"},
    "keep-random": {"arm": "keep", "space": "random"},
    "zeroed": {"arm": "zero"},
    "frozen": {"arm": "freeze"},
}
"""Interventions A to E of arXiv:2604.25143, in its order, and the two controls it lacks."""
