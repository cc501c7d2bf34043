"""The stages after the base: instructions that ask for an ending, and how well they are followed.

An instruction is one sentence in the words of the stories, in front of an opening. The second stage (SFT) learns how
stories end that end as asked; the third (DPO) prefers, of two continuations sampled from the second, the one that ends
nearer to what was asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.embedded_pair.encoding import encode_stories
from benchmarks.embedded_pair.preferences import SENTENCES, attempts, ending_score
from benchmarks.embedded_pair.stories import Mood, stories
from tl_asymmetry.training.objectives import TokenBatch

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

INSTRUCTIONS: dict[Mood, str] = {
    "happy": "We want a happy end.",
    "neutral": "We want neither a happy nor a sad end.",
    "sad": "We want a sad end.",
}
_SIGN: dict[Mood, int] = {"happy": 1, "neutral": 0, "sad": -1}
_MODULES = {
    "attn.c_attn": ("W_Q", "W_K", "W_V"),
    "attn.c_proj": ("W_O",),
    "mlp.c_fc": ("W_in",),
    "mlp.c_proj": ("W_out",),
}


def asked_of(prompt: str) -> Mood:
    """The ending that a prompt asks for.

    Example:
        >>> asked_of("We want a sad end. One day")
        'sad'
    """
    (mood,) = (mood for mood, instruction in INSTRUCTIONS.items() if prompt.startswith(instruction))
    return mood


def nearness(prompt: str, text: str) -> int:
    """0 for a continuation that ends as asked, −1 for one off it, −2 for the opposite.

    Example:
        >>> nearness("We want a sad end. One day", "They came too late. She wept.")
        0
    """
    score = ending_score(text)
    return -abs((score > 0) - (score < 0) - _SIGN[asked_of(prompt)])


def instructed_batches(tokenizer: PreTrainedTokenizerFast, seed: str, rows: int) -> Iterator[TokenBatch]:
    """Training stories behind the instruction that asks for their end.

    The loss is on the sentences that `ending_score` reads: of a resolution's thirty tokens few are other words for
    another end, and over all of them a batch tells little of what was asked.
    """
    told = (f"{INSTRUCTIONS[story.mood]} {story.text}" for story in stories(seed=seed, split="train"))
    fitting = (text for text in told if len(tokenizer.encode(text)) < tokenizer.model_max_length)
    while True:
        texts = list(islice(fitting, rows))
        yield encode_stories(tokenizer, texts, prompts=[" ".join(_sentences(text)[:-SENTENCES]) for text in texts])


def _sentences(text: str) -> list[str]:
    return re.split(r'(?<=[."]) (?=["A-Z])', text)


@torch.no_grad()
def judge_following(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, *, seed: int, prompts: int
) -> dict[str, float]:
    """Share of continuations of held-out openings that end as asked, by what was asked, unfinished ones among all."""
    stream = attempts(
        model, tokenizer, seed=seed, split="held_out", per_prompt=1, prompts_per_batch=prompts,
        instructions=tuple(INSTRUCTIONS.values()),
    )  # fmt: skip
    tried = list(islice(stream, prompts))
    shares: dict[str, float] = {}
    for mood in INSTRUCTIONS:
        of_mood = [attempt for attempt in tried if asked_of(attempt.prompt) == mood]
        right = sum(nearness(attempt.prompt, text) == 0 for attempt in of_mood for text in attempt.continuations)
        shares[mood] = right / len(of_mood)
    return shares


class LowRank(nn.Module):
    """A LoRA as a parametrisation: the weight plus a product of two thin factors, of which the second begins at 0."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        d_in, d_out = weight.shape
        self.down = nn.Parameter(torch.randn(d_in, rank, generator=generator) / math.sqrt(d_in))
        self.up = nn.Parameter(torch.zeros(rank, d_out))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.down @ self.up


def add_factors(model: GPT2LMHeadModel, rank: int, generator: torch.Generator) -> None:
    """Freeze the model and put factors beside every matrix of its blocks, in place."""
    model.requires_grad_(False)
    for _, module in _matrices(model):
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, generator))


def factors_of(model: GPT2LMHeadModel, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors as `tl_asymmetry.demo` reads them: float16, `tensor.down @ tensor.up` in each tensor's own shape."""
    found: dict[str, Tensor] = {}
    for name, module in _matrices(model):
        low_rank = module.parametrizations.weight[0]
        down, up = low_rank.down.detach().half(), low_rank.up.detach().half()
        layer, kind = name
        for matrix, part in zip(_MODULES[kind], up.chunk(len(_MODULES[kind]), dim=1), strict=True):
            key = f"blocks.{layer}.{'mlp' if kind.startswith('mlp') else 'attn'}.{matrix}"
            left = down.unflatten(0, (config["n_heads"], -1)) if matrix == "W_O" else down
            right = part.unflatten(1, (config["n_heads"], -1)).transpose(0, 1) if kind == "attn.c_attn" else part
            found |= {f"{key}.down": left.clone(), f"{key}.up": right.contiguous()}
    return found


def _matrices(model: GPT2LMHeadModel) -> Iterator[tuple[tuple[int, str], Any]]:
    for layer, block in enumerate(model.transformer.h):
        for kind in _MODULES:
            yield (layer, kind), block.get_submodule(kind)
