"""Does the claim of arXiv 2604.08764 replicate? A decoder and an encoder of several seeds, trained and analyzed.

    python -m benchmarks.embedded_pair.tangents --out DIR    # prints the tables; writes them, results and reports

Everything follows from the seed: initial weights, stories, masks. Both architectures read windows of one length cut
from a stream of whole stories, so nothing is padded. Five seeds of both take 8 minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.embedded_pair.model import initial_tensors, model_config, tensors_from_gpt2
from benchmarks.embedded_pair.replication import (
    replication_claims,
    replication_frequency,
    replication_strata,
    replication_table,
)
from benchmarks.embedded_pair.stories import Split, stories
from tl_asymmetry.demo import demo_tokenizer
from tl_asymmetry.demo.models import gpt2_model, lens_model
from tl_asymmetry.demo.tokenizer import EOS
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.models.loading import bridge_around
from tl_asymmetry.tangents.analysis import analyze_tangents
from tl_asymmetry.tangents.result import TangentAnalysis
from tl_asymmetry.training.masking import mask_tokens

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

ARCHITECTURES: tuple[str, ...] = ("decoder", "encoder")
"""A GPT-2 with next-token loss, and a BERT with masked-language-model loss, of one size."""


@dataclass(frozen=True)
class TangentRecipe:
    """Every number of the two trainings and of their analysis."""

    n_layers: int = 3
    """Blocks of both models; the width is that of the demonstration pair."""
    window: int = 64
    """Tokens of a training and of an analyzed sequence."""
    batch: int = 24
    """Windows per step."""
    steps: int = 240
    """Optimiser steps."""
    kept: tuple[int, ...] = (0, 12, 36, 72, 120, 180, 240)
    """Steps whose models are analyzed; the first four lie in the first 30 %."""
    lr: float = 2e-3
    """Highest learning rate of AdamW, after a linear warm-up; constant from there."""
    warmup: int = 24
    """Steps of the warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    gradient_clip: float = 1.0
    """Largest norm of a step's gradient."""
    analyzed: int = 64
    """Held-out windows the analysis reads."""
    rank: int = 16
    """Of the bases."""
    starts: int = 2
    """Of semi-NMF."""
    sample_rows: int = 2048
    """Rows semi-NMF is fitted on."""
    mask_share: float = 0.3
    """Share of tokens an encoder has to guess in training; in the analysis it is 0.15."""
    initial_std: float = 0.05
    """Standard deviation of an encoder's initial weights."""


RECIPES = {
    "decoder": TangentRecipe(),
    # An encoder first learns how frequent words are and stays there long; fewer steps would show nothing else.
    "encoder": TangentRecipe(steps=1600, kept=(0, 80, 240, 480, 800, 1200, 1600)),
}
"""What each architecture is trained by; the steps kept are at the same shares of the training."""


def tangent_checkpoints(
    architecture: str, seed: int, recipe: TangentRecipe | None = None, *, progress: bool = False
) -> dict[int, Callable[[], Any]]:
    """Train one model and return its checkpoints: step → function that makes the TransformerLens model.

    Args:
        architecture: "decoder" or "encoder".
        seed: of initial weights, stories and masks.
        recipe: sizes and rates; None: that of `RECIPES`.
        progress: show a progress bar.

    Raises:
        ValueError: for another architecture.

    Example:
        >>> run = tangent_checkpoints("encoder", 0, TangentRecipe(n_layers=1, steps=2, kept=(0, 2)))
        >>> sorted(run), type(run[2]()).__name__
        ([0, 2], 'TransformerBridge')
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"expected architecture 'decoder' or 'encoder', got {architecture!r}; pass one of the two")
    recipe = RECIPES[architecture] if recipe is None else recipe
    trainer = (_Decoder if architecture == "decoder" else _Encoder)(seed, recipe)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    kept: dict[int, Callable[[], Any]] = {}
    batches = _windows(f"tangents:{seed}", "train", recipe)
    for step in tqdm(range(recipe.steps + 1), desc=f"{architecture} {seed}", unit="step", disable=not progress):
        if step in recipe.kept:
            kept[step] = trainer.snapshot(step)
        if step == recipe.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / recipe.warmup)
        loss = trainer.loss(torch.stack(list(islice(batches, recipe.batch))), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), recipe.gradient_clip)
        optimizer.step()
    return kept


def tangent_windows(recipe: TangentRecipe = TangentRecipe()) -> Int[Tensor, "batch pos"]:
    """The held-out windows that all models are analyzed on.

    Example:
        >>> tuple(tangent_windows(TangentRecipe(analyzed=3)).shape)
        (3, 64)
    """
    return torch.stack(list(islice(_windows("tangents", "held_out", recipe), recipe.analyzed)))


def tangent_study(
    seeds: int = 5,
    recipe: TangentRecipe | None = None,
    *,
    folder: Path,
    workers: int = 2,
    progress: bool = True,
) -> dict[tuple[str, int], TangentAnalysis]:
    """Train and analyze a decoder and an encoder for each seed, with PCA and semi-NMF bases.

    Args:
        seeds: how many trainings of each.
        recipe: sizes and rates; None: those of `RECIPES`.
        folder: where each analysis is saved, as `decoder-0` and so on.
        workers: processes side by side, one thread each; 1 stays in this one.
        progress: show a progress bar.

    Returns:
        The analyses by architecture and seed.

    Raises:
        ValueError: seeds or workers below 1.
    """
    if seeds < 1 or workers < 1:
        raise ValueError(f"expected seeds >= 1 and workers >= 1, got {seeds} and {workers}; pass seeds=5, workers=2")
    folder.mkdir(parents=True, exist_ok=True)
    # the longer trainings first, so that none is left over at the end
    jobs = [(a, seed, recipe or RECIPES[a], folder) for a in ("encoder", "decoder") for seed in range(seeds)]
    bar = tqdm(total=len(jobs), desc="training and analyzing", unit="model", disable=not progress)
    with bar:
        if workers == 1:
            for job in jobs:
                _train_and_analyze(job)
                bar.update()
        else:
            # spawned, not forked: a forked torch may hang on the parent's threads
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for _ in pool.map(_train_and_analyze, jobs):
                    bar.update()
    return {(a, seed): TangentAnalysis.load(folder / f"{a}-{seed}") for a, seed, *_ in jobs}


def _train_and_analyze(job: tuple[str, int, TangentRecipe, Path]) -> None:
    architecture, seed, recipe, folder = job
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = analyze_tangents(
            tangent_checkpoints(architecture, seed, recipe), tokens=tangent_windows(recipe),
            rank=recipe.rank, method=("pca", "semi_nmf"), starts=recipe.starts, sample_rows=recipe.sample_rows,
            mask_token=_mask_token() if architecture == "encoder" else None, batch_size=32, seed=seed, progress=False,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    result.save(folder / f"{architecture}-{seed}")
    result.to_html(folder / f"{architecture}-{seed}" / "report.html")


class _Decoder:
    """A GPT-2 as the demonstration pair's, with fewer blocks."""

    def __init__(self, seed: int, recipe: TangentRecipe) -> None:
        self.config = model_config(len(demo_tokenizer())) | {
            "n_layers": recipe.n_layers, "n_ctx": recipe.window, "model_name": f"demo-decoder-{seed}",
        }  # fmt: skip
        self.model = gpt2_model(self.config, initial_tensors(self.config, seeded("tangents", seed)))
        self.model.config.use_cache = False

    def loss(self, tokens: Tensor, step: int) -> Tensor:
        logits = self.model(tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def snapshot(self, step: int) -> Callable[[], Any]:
        tensors = tensors_from_gpt2(self.config, self.model)
        return lambda: lens_model(self.config, tensors, demo_tokenizer())


class _Encoder:
    """A BERT of the same width, heads and blocks, without dropout; its mask token follows the vocabulary."""

    def __init__(self, seed: int, recipe: TangentRecipe) -> None:
        self.seed, self.recipe = seed, recipe
        self.model = self._fresh(seed)

    def _fresh(self, seed: int) -> BertForMaskedLM:
        from transformers import BertConfig, BertForMaskedLM

        shape = model_config(len(demo_tokenizer()) + 1)
        settings: dict[str, Any] = dict(
            vocab_size=shape["d_vocab"], hidden_size=shape["d_model"], num_hidden_layers=self.recipe.n_layers,
            num_attention_heads=shape["n_heads"], intermediate_size=shape["d_mlp"],
            max_position_embeddings=self.recipe.window, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=self.recipe.initial_std, attn_implementation="eager",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BertForMaskedLM(BertConfig(**settings))

    def loss(self, tokens: Tensor, step: int) -> Tensor:
        drawn = [
            mask_tokens(
                row,
                mask_token=_mask_token(),
                d_vocab=_mask_token(),
                share=self.recipe.mask_share,
                seed=self.seed * 1_000_003 + step,
            )
            for row in tokens
        ]
        inputs, targets = torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn])
        return F.cross_entropy(self.model(inputs).logits[targets], tokens[targets])

    def snapshot(self, step: int) -> Callable[[], Any]:
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

        def make() -> Any:
            hf_model = self._fresh(0)
            hf_model.load_state_dict(state)
            return bridge_around(hf_model.eval(), f"demo-encoder-{self.seed}", tokenizer=demo_tokenizer())

        return make


def _windows(seed: str, split: Split, recipe: TangentRecipe) -> Iterator[Tensor]:
    """Windows of one length, one after the other from a stream of whole stories."""
    tokenizer, buffer = demo_tokenizer(), []
    for story in stories(seed=seed, split=split):
        buffer += tokenizer(story.text + EOS)["input_ids"]
        while len(buffer) >= recipe.window:
            yield torch.tensor(buffer[: recipe.window])
            buffer = buffer[recipe.window :]


def _mask_token() -> int:
    return len(demo_tokenizer())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_pair.tangents", description="see above")
    parser.add_argument("--out", type=Path, default=Path("tangents"), help="folder for tables, results and reports")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each architecture")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    options = parser.parse_args(arguments)
    runs = tangent_study(options.seeds, folder=options.out, workers=options.workers)
    tables = (
        (f"Energy and anisotropy, means over {options.seeds} seeds", replication_table(runs), "table.csv"),
        ("Late checkpoints by token frequency (1 = rarest fifth)", replication_strata(runs), "strata.csv"),
        ("Log-frequency and distance to the centroid, last step", replication_frequency(runs), "frequency.csv"),
    )
    for title, table, name in tables:
        table.to_csv(options.out / name, index=False)
        sys.stdout.write(f"{title}\n{table.to_string(index=False, float_format='{:.3g}'.format)}\n\n")
    sys.stdout.write("\n".join(replication_claims(runs)) + "\n")


if __name__ == "__main__":
    main()
