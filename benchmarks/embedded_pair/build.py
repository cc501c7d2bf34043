"""Train the demonstration models, write them and their texts: `python -m benchmarks.embedded_pair.build [--out DIR]`.

One seed gives every file, bit for bit on one machine with the same versions. The base learns the stories by
next-token cross-entropy. The aligned model starts from the base and is trained by DPO to prefer happy endings, on
pairs sampled from the base. The control starts from the base too and gets as many steps of the same shape and
learning rate, but plain cross-entropy on fresh stories: what any further training does. A second chain goes from the
base to SFT on instructions and from there to DPO, both kept as low-rank factors; `--stages` trains it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import lzma
import math
import platform
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from benchmarks.embedded_pair.encoding import encode_preferences, encode_stories, write_tokenizer
from benchmarks.embedded_pair.instructions import (
    INSTRUCTIONS,
    add_factors,
    factors_of,
    instructed_batches,
    judge_following,
    nearness,
)
from benchmarks.embedded_pair.model import initial_tensors, model_config, tensors_from_gpt2
from benchmarks.embedded_pair.preferences import attempts, ending_score, sample_preferences
from benchmarks.embedded_pair.stories import held_out_texts, stories
from tl_asymmetry import demo
from tl_asymmetry.demo import Preference
from tl_asymmetry.demo.models import Tensors, gpt2_model, read_config, read_tensors, with_factors
from tl_asymmetry.demo.tokenizer import read_tokenizer
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.training.objectives import DPO, CrossEntropy, Objective, TokenBatch, sequence_log_probs

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Every number that goes into the build."""

    seed: int = 0
    """Source of all randomness: weights, stories, samples, order."""
    threads: int = 1
    """CPU threads; another number adds up in another order and gives other last bits. One is not much slower than
    two for matrices this small, and does not stall on a machine that is busy otherwise."""
    vocabulary_stories: int = 20_000
    """Training stories read to collect the words."""
    base_steps: int = 1000
    """Optimiser steps of the base."""
    base_batch: int = 32
    """Stories per step."""
    base_lr: float = 2e-3
    """Highest learning rate of AdamW."""
    base_warmup: int = 50
    """Steps of linear warm-up; a cosine to a tenth follows."""
    base_weight_decay: float = 0.01
    """Decoupled weight decay of the base; DPO and the control have none, as it would shrink both alike."""
    checkpoints: tuple[int, ...] = (0, 50, 150, 400)
    """Steps kept besides the last one."""
    tune_steps: int = 128
    """Steps of DPO, and of the control."""
    tune_pairs: int = 32
    """Pairs per DPO step; the control reads twice as many stories."""
    tune_lr: float = 3e-5
    """Learning rate of DPO and of the control, constant after the warm-up."""
    tune_warmup: int = 16
    """Steps of linear warm-up of both."""
    beta: float = 0.3
    """Of DPO. With 0.1 the model drifts further from the base's language for the same ranking of the pairs."""
    pairs: int = 2048
    """Training pairs; gone through as often as the steps need."""
    held_out_stories: int = 512
    """Stories the held-out losses are taken over."""
    held_out_pairs: int = 512
    """Pairs the preference accuracies are taken over."""
    judged_prompts: int = 256
    """Held-out openings continued by each model to count its happy endings."""
    judged_per_prompt: int = 4
    """Continuations of each of them."""
    gradient_clip: float = 1.0
    """Largest norm of a step's gradient, in all trainings."""
    factor_rank: int = 4
    """Rank of the LoRA factors in which the two further stages are trained and kept."""
    sft_steps: int = 400
    """Steps of the second stage, SFT on instructions."""
    sft_batch: int = 32
    """Stories per step of it."""
    sft_lr: float = 1e-2
    """Its highest learning rate; over the last quarter it falls in a line to 0."""
    asked_pairs: int = 256
    """Pairs of the third stage, DPO on what was asked; gone through as often as the steps need."""
    asked_steps: int = 48
    """Its steps, of `asked_batch` pairs each."""
    asked_batch: int = 16
    """Pairs per step of it."""
    asked_lr: float = 1e-3
    """Its highest learning rate, which falls likewise."""
    judged_openings: int = 768
    """Held-out openings behind instructions, continued once by each stage."""
    kept_stories: int = 512
    """Held-out stories of each of `SEEDS` seeds that `demo_texts` gives out."""
    kept_pairs: int = 128
    """Held-out pairs of each of them that `demo_preferences` gives out."""


def build(out: Path, recipe: Recipe = Recipe(), *, progress: bool = True) -> dict[str, Any]:
    """Train all demonstration models and write checkpoints, tokenizer, `config.json` and `log.json`.

    Args:
        out: folder for the files, made if missing; files of the same names are replaced.
        recipe: sizes, rates and the seed.
        progress: show progress bars.

    Returns:
        What `log.json` holds.

    Example:
        >>> from pathlib import Path
        >>> log = build(Path("models"), Recipe(base_steps=10))  # doctest: +SKIP
        >>> sorted(log["models"])  # doctest: +SKIP
        ['base', 'control', 'dpo', 'step0', 'step50', ...]
    """
    out.mkdir(parents=True, exist_ok=True)
    with _reproducible(recipe.threads):
        return _Build(out, recipe, progress).run()


def build_stages(out: Path, recipe: Recipe = Recipe(), *, progress: bool = True) -> dict[str, Any]:
    """Train the two stages behind the base of an earlier build, and write them and the log with them.

    Args:
        out, recipe, progress: as in `build`; the folder is one that it has filled.

    Returns:
        What `log.json` holds now.
    """
    with _reproducible(recipe.threads):
        return _Build(out, recipe, progress).add_stages()


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """Deterministic kernels and a fixed number of threads inside, the caller's settings again after."""
    before = torch.get_num_threads()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(before)


class _Build:
    def __init__(self, out: Path, recipe: Recipe, progress: bool) -> None:
        self.out, self.recipe, self.progress = out, recipe, progress
        self.config: dict[str, Any] = {}
        self.tokenizer: PreTrainedTokenizerFast
        self.models: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        r = self.recipe
        self._prepare()
        base, base_curve = self._train_base()
        pairs = self._pairs(base, n=r.pairs, seed=r.seed, split="train")
        dpo, dpo_curve = self._train_dpo(base, pairs)
        control, control_curve = self._train_control(base)
        stages = self.train_stages(base)
        self.write_texts(base)
        log = {
            "recipe": asdict(r),
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
            | {"python": platform.python_version()},
            "data": self._describe_data(),
            "models": self.models,
            "preference": self._judge_pairs(base, dpo, control),
            "endings": {
                name: self._judge_endings(model) for name, model in (("base", base), ("dpo", dpo), ("control", control))
            },
            "change": {name: self._relative_change(name) for name in ("dpo", "control")},
            "following": stages["following"],
            "curves": _short({"base": base_curve, "dpo": dpo_curve, "control": control_curve}) | stages["curves"],
            "sha256": self._hashes(),
        }
        _write_json(self.out / "log.json", log)
        return log

    def add_stages(self) -> dict[str, Any]:
        """The two further stages behind a base that is there, and the log with them."""
        log: dict[str, Any] = json.loads((self.out / "log.json").read_text(encoding="utf-8"))
        self.config = read_config(self.out)
        self._read_texts()
        self.models = {name: about for name, about in log["models"].items() if "after" not in about}
        stages = self.train_stages(self._trainable(read_tensors(self.out / "base.safetensors")))
        log |= {"recipe": asdict(self.recipe), "models": self.models, "following": stages["following"]}
        log["curves"] |= stages["curves"]
        log["sha256"] = self._hashes()
        _write_json(self.out / "log.json", log)
        return log

    def _hashes(self) -> dict[str, str]:
        return {path.name: _sha256(path) for path in sorted(self.out.iterdir()) if path.name != "log.json"}

    # ------------------------------------------------------------------------------------------ training

    def _prepare(self) -> None:
        r, path = self.recipe, self.out / "tokenizer.json"
        texts = (story.text for story in islice(stories(seed=f"base:{r.seed}", split="train"), r.vocabulary_stories))
        self.config = model_config(write_tokenizer(path, texts))
        _write_json(self.out / "config.json", self.config)
        self._read_texts()

    def _read_texts(self) -> None:
        r = self.recipe
        self.tokenizer = read_tokenizer(self.out / "tokenizer.json", self.config["n_ctx"])
        self.held_out = encode_stories(self.tokenizer, held_out_texts(r.held_out_stories, seed=r.seed))

    def _train_base(self) -> tuple[GPT2LMHeadModel, list[float]]:
        r = self.recipe
        model = self._trainable(initial_tensors(self.config, seeded("init", r.seed)))

        def keep(step: int) -> None:
            if step in r.checkpoints:
                self._keep(f"step{step}", model, step=step)

        def cosine(step: int) -> float:
            t = (step - r.base_warmup) / max(1, r.base_steps - r.base_warmup)
            return 0.1 + 0.45 * (1 + math.cos(math.pi * t))

        curve = self._train(
            model,
            CrossEntropy(),
            self._story_batches(f"base:{r.seed}", r.base_batch),
            steps=r.base_steps,
            lr=lambda step: (
                r.base_lr * (min(1.0, (step + 1) / r.base_warmup) if step < r.base_warmup else cosine(step))
            ),
            weight_decay=r.base_weight_decay,
            name="base",
            before_step=keep,
        )
        self._keep("base", model, step=r.base_steps, curve=curve)
        return model, curve

    def _train_dpo(self, base: GPT2LMHeadModel, pairs: Sequence[Preference]) -> tuple[GPT2LMHeadModel, list[float]]:
        r = self.recipe
        model = self._trainable(tensors_from_gpt2(self.config, base))
        base.requires_grad_(False)
        batches = self._pair_batches(pairs, r.tune_pairs)
        curve = self._tune(model, DPO(reference=base, beta=r.beta), batches, name="dpo")
        self._keep("dpo", model, step=r.tune_steps, curve=curve)
        return model, curve

    def _train_control(self, base: GPT2LMHeadModel) -> tuple[GPT2LMHeadModel, list[float]]:
        r = self.recipe
        model = self._trainable(tensors_from_gpt2(self.config, base))
        batches = self._story_batches(f"control:{r.seed}", 2 * r.tune_pairs, length=self.config["n_ctx"])
        curve = self._tune(model, CrossEntropy(), batches, name="control")
        self._keep("control", model, step=r.tune_steps, curve=curve)
        return model, curve

    def train_stages(self, base: GPT2LMHeadModel) -> dict[str, Any]:
        """SFT on instructions from the base, then DPO from what came of it; both as factors, and judged as stored."""
        r = self.recipe
        batches = instructed_batches(self.tokenizer, f"sft:{r.seed}", r.sft_batch)
        sft, sft_curve = self._train_factors(
            "sft", "base", base, CrossEntropy(), batches, steps=r.sft_steps, lr=r.sft_lr
        )
        sft.requires_grad_(False)
        pairs = self._pairs(
            sft, n=r.asked_pairs, seed=r.seed + 3, split="train", score=nearness,
            instructions=tuple(INSTRUCTIONS.values()),
        )  # fmt: skip
        last, last_curve = self._train_factors(
            "sft_dpo", "sft", sft, DPO(reference=sft, beta=r.beta), self._pair_batches(pairs, r.asked_batch),
            steps=r.asked_steps, lr=r.asked_lr,
        )  # fmt: skip
        following = {name: self._judge_following(m) for name, m in (("base", base), ("sft", sft), ("sft_dpo", last))}
        logger.info("following: %s", following)
        return {"following": following, "curves": _short({"sft": sft_curve, "sft_dpo": last_curve})}

    def _train_factors(
        self,
        name: str,
        after: str,
        start: GPT2LMHeadModel,
        objective: Objective[Any],
        batches: Iterator[Any],
        *,
        steps: int,
        lr: float,
    ) -> tuple[GPT2LMHeadModel, list[float]]:
        """One stage in factors; the model that is given back is the one that the file gives."""
        r = self.recipe
        tensors = tensors_from_gpt2(self.config, start)
        model = self._trainable(tensors)
        model.set_attn_implementation("sdpa")  # the same function, a quarter faster
        add_factors(model, r.factor_rank, seeded("factors", name, r.seed))
        curve = self._train(
            model, objective, batches, steps=steps, weight_decay=0.0, name=name,
            lr=lambda step: lr * min(1.0, (step + 1) / r.tune_warmup, 4 * (1 - step / steps)),
        )  # fmt: skip
        path = self.out / f"{name}.safetensors"
        path.write_bytes(save(factors_of(model, self.config), metadata={"format": "pt"}))
        kept = self._trainable(with_factors(tensors, path))
        self.models[name] = {
            "file": path.name, "after": after, "step": steps, "held_out_loss": self._held_out_loss(kept),
            "train_loss_last_tenth": _last_tenth(curve),
        }  # fmt: skip
        logger.info("%s: held-out loss %.4f nats per token", name, self.models[name]["held_out_loss"])
        return kept, curve

    def _pair_batches(self, pairs: Sequence[Preference], rows: int) -> Iterator[Any]:
        """Shuffled batches of pairs, without end."""
        rng = random.Random(f"order:{self.recipe.seed}")
        while True:
            order = list(pairs)
            rng.shuffle(order)
            for first in range(0, len(order) - rows + 1, rows):
                batch = order[first : first + rows]
                yield encode_preferences(self.tokenizer, batch, length=self.config["n_ctx"])

    def _tune(
        self, model: GPT2LMHeadModel, objective: Objective[Any], batches: Iterator[Any], *, name: str
    ) -> list[float]:
        """The optimiser that DPO and its control share."""
        r = self.recipe
        return self._train(
            model,
            objective,
            batches,
            steps=r.tune_steps,
            lr=lambda step: r.tune_lr * min(1.0, (step + 1) / r.tune_warmup),
            weight_decay=0.0,
            name=name,
        )

    def _train(
        self,
        model: GPT2LMHeadModel,
        objective: Objective[Any],
        batches: Iterator[Any],
        *,
        steps: int,
        lr: Callable[[int], float],
        weight_decay: float,
        name: str,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> list[float]:
        """AdamW; returns the loss of every step, in nats."""
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)
        losses: list[float] = []
        bar = tqdm(range(steps), desc=name, unit="step", disable=not self.progress)
        for step in bar:
            before_step(step)
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
            loss = objective(model, next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.recipe.gradient_clip)
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        return [round(value, 5) for value in losses]

    def _trainable(self, tensors: Tensors) -> GPT2LMHeadModel:
        model = gpt2_model(self.config, tensors)
        model.config.use_cache = False
        return model

    def _story_batches(self, seed: str, rows: int, length: int | None = None) -> Iterator[TokenBatch]:
        stream = stories(seed=seed, split="train")
        while True:
            yield encode_stories(self.tokenizer, [story.text for story in islice(stream, rows)], length=length)

    def _pairs(self, model: GPT2LMHeadModel, *, n: int, seed: int, split: Any, **options: Any) -> list[Preference]:
        with tqdm(total=n, desc=f"{split} pairs", unit="pair", disable=not self.progress) as bar:
            return sample_preferences(
                model, self.tokenizer, n=n, seed=seed, split=split, advance=bar.update, **options
            )  # fmt: skip

    def write_texts(self, base: GPT2LMHeadModel) -> None:
        """The stories and pairs of the held-out split that the package carries, one a line, seed after seed."""
        r = self.recipe
        told = [text for seed in range(demo.SEEDS) for text in held_out_texts(r.kept_stories, seed=seed)]
        self._write_lines("stories.txt", told)
        pairs = [
            json.dumps(asdict(pair))
            for seed in range(demo.SEEDS)
            for pair in self._pairs(base, n=r.kept_pairs, seed=seed, split="held_out")
        ]
        self._write_lines("preferences.jsonl", pairs)

    def _write_lines(self, name: str, lines: Sequence[str]) -> None:
        (self.out / f"{name}.xz").write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9))

    # ------------------------------------------------------------------------------------- what came of it

    def _keep(self, name: str, model: GPT2LMHeadModel, *, step: int, curve: Sequence[float] = ()) -> None:
        path = self.out / f"{name}.safetensors"
        tensors = tensors_from_gpt2(self.config, model)
        if name.startswith("step"):  # half the size, as checkpoints of a training are often published
            tensors = {key: tensor.half() for key, tensor in tensors.items()}
        # One metadata key only: safetensors writes several in no fixed order.
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
        self.models[name] = {"file": path.name, "step": step, "held_out_loss": self._held_out_loss(model)}
        if curve:
            # Of its own objective, so for DPO not comparable with the other two.
            self.models[name]["train_loss_last_tenth"] = _last_tenth(curve)
        logger.info("%s: held-out loss %.4f nats per token", name, self.models[name]["held_out_loss"])

    @torch.no_grad()
    def _held_out_loss(self, model: GPT2LMHeadModel) -> float:
        return CrossEntropy()(model, self.held_out).item()

    def _describe_data(self) -> dict[str, Any]:
        r = self.recipe
        told = list(islice(stories(seed=f"texts:{r.seed}", split="held_out"), r.held_out_stories))
        tokens = int(self.held_out.mask.sum())
        return {
            "held_out": {"stories": len(told), "seed": r.seed, "tokens": tokens},
            "moods": {
                mood: sum(story.mood == mood for story in told) / len(told) for mood in ("happy", "neutral", "sad")
            },
        }

    @torch.no_grad()
    def _judge_pairs(self, base: Any, dpo: Any, control: Any) -> dict[str, Any]:
        """How often the held-out pairs, sampled from the base, are ranked as preferred."""
        r = self.recipe
        pairs = self._pairs(base, n=r.held_out_pairs, seed=r.seed + 1, split="held_out")
        batch = encode_preferences(self.tokenizer, pairs, length=self.config["n_ctx"])
        result: dict[str, Any] = {"pairs": len(pairs)}
        for name, model in (("base", base), ("dpo", dpo), ("control", control)):
            margins = DPO(reference=base, beta=r.beta).margins(model, batch)
            likelier = sequence_log_probs(model, batch.chosen) > sequence_log_probs(model, batch.rejected)
            result[name] = {
                # The base against itself has margins of exactly zero; its likelihood ranking is the "before".
                "margin_accuracy": (margins > 0).double().mean().item(),
                "mean_margin": margins.double().mean().item(),
                "likelihood_accuracy": likelier.double().mean().item(),
            }
            logger.info("%s: %s", name, result[name])
        return result

    def _judge_endings(self, model: GPT2LMHeadModel) -> dict[str, float]:
        """Shares among continuations of the same held-out openings, drawn with the same random numbers."""
        r = self.recipe
        stream = attempts(model, self.tokenizer, seed=r.seed + 2, split="held_out", per_prompt=r.judged_per_prompt)
        tried = list(islice(stream, r.judged_prompts))
        scores = [ending_score(text) for attempt in tried for text in attempt.continuations]
        unfinished = sum(attempt.unfinished for attempt in tried)
        total = len(scores) + unfinished
        shares = {
            "happy": sum(score > 0 for score in scores) / total,
            "neutral": sum(score == 0 for score in scores) / total,
            "sad": sum(score < 0 for score in scores) / total,
            "unfinished": unfinished / total,
        }
        logger.info("endings: %s", shares)
        return shares

    def _judge_following(self, model: GPT2LMHeadModel) -> dict[str, float]:
        """How often each kind of ending that is asked for comes, among continuations of the same held-out openings."""
        r = self.recipe
        return judge_following(model, self.tokenizer, seed=r.seed + 4, prompts=r.judged_openings)

    def _relative_change(self, name: str) -> float:
        """||ΔW|| / ||W|| against the base, over all parameters."""
        base, tuned = (read_tensors(self.out / f"{which}.safetensors") for which in ("base", name))
        changed = sum((tuned[key] - W).double().square().sum().item() for key, W in base.items())
        relative = math.sqrt(changed / sum(W.double().square().sum().item() for W in base.values()))
        logger.info("%s: relative change %.5f", name, relative)
        return relative


def _last_tenth(curve: Sequence[float]) -> float:
    last = curve[-max(1, len(curve) // 10) :]
    return sum(last) / len(last)


def _short(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """Means of eight steps' losses, to a thousandth of a nat: the log is in the wheel."""
    return {
        name: [round(fmean(curve[first : first + 8]), 3) for first in range(0, len(curve), 8)]
        for name, curve in curves.items()
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    # A list of numbers on one line: a curve of a thousand losses is one thing to a reader.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_pair.build", description="train the demonstration models"
    )
    parser.add_argument("--out", type=Path, default=Path(demo.__file__).parent / "data", help="folder for the files")
    parser.add_argument(
        "--stages", action="store_true", help="only the two stages behind the base that lies in the folder"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with logging_redirect_tqdm():
        (build_stages if options.stages else build)(options.out)


if __name__ == "__main__":
    main()
