"""Preference pairs for happy endings, both halves sampled from one model.

Chosen and rejected continue the same opening and come from the same distribution, so nothing but the preference
tells them apart: no difference of style, length or source that a model could learn instead.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from benchmarks.embedded_pair.sampling import sample_continuations
from benchmarks.embedded_pair.stories import Split, stories
from tl_asymmetry.demo import Preference
from tl_asymmetry.demo.tokenizer import EOS, SPECIALS
from tl_asymmetry.geometry.seeds import seeded

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

HAPPY_WORDS = frozenset(
    ("happy", "laughed", "smiled", "thanked", "danced", "sang", "hugged", "glad", "proud", "feast", "cheered")
)
SAD_WORDS = frozenset(("cried", "wept", "sad", "tears", "alone", "sighed", "lonely", "silent", "broken", "dead"))
SENTENCES = 2
"""The score looks at so many sentences, counted from the end."""


def ending_score(text: str) -> int:
    """How happy a story ends: happy words less sad words in its last two sentences.

    Example:
        >>> ending_score("the cup was gone. tom was sad. they found it. tom laughed.")
        1
        >>> ending_score("they came too late. she wept.")
        -1
    """
    sentences = [part for part in text.lower().split(".") if part.strip(' "')]
    words = re.findall(r"\w+", " ".join(sentences[-SENTENCES:]))
    return sum((word in HAPPY_WORDS) - (word in SAD_WORDS) for word in words)


@dataclass(frozen=True)
class Attempt:
    """The finished continuations sampled for one opening."""

    prompt: str
    """The opening."""
    continuations: tuple[str, ...]
    """Those that ended within the context; may be fewer than asked for."""
    unfinished: int
    """How many did not end."""


def attempts(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    split: Split,
    per_prompt: int,
    prompts_per_batch: int = 256,
    instructions: Sequence[str] = (),
    advance: Callable[[int], object] | None = None,
) -> Iterator[Attempt]:
    """Endless stream of openings with continuations sampled from `model` at temperature 1.

    Args:
        model: the model to sample from.
        tokenizer: that of the pair.
        seed: equal seeds give the same openings and the same random numbers, whatever the model and batch size.
        split: which openings.
        per_prompt: continuations for each.
        prompts_per_batch: how many openings are sampled at once; changes the speed only.
        instructions: sentences to put in front of the openings, one after the other and from the first again.
        advance: called with the number of continuations sampled after each batch.
    """
    openings = (story.setup for story in stories(seed=f"prompts:{seed}", split=split))
    if instructions:
        openings = (f"{said} {opening}" for said, opening in zip(cycle(instructions), openings, strict=False))
    forbidden = [i for i, special in enumerate(SPECIALS) if special != EOS]
    index = 0
    while True:
        batch = list(islice(openings, prompts_per_batch))
        ids = tokenizer(batch)["input_ids"]
        sampled = sample_continuations(
            model,
            [row for row in ids for _ in range(per_prompt)],
            [seeded("sample", seed, index + i, j) for i in range(len(batch)) for j in range(per_prompt)],
            end=tokenizer.eos_token_id,
            forbidden=forbidden,
            advance=advance,
        )
        for i, prompt in enumerate(batch):
            rows = sampled[i * per_prompt : (i + 1) * per_prompt]
            finished = tuple(str(tokenizer.decode(row[:-1])) for row in rows if row is not None)
            yield Attempt(prompt, finished, unfinished=rows.count(None))
        index += len(batch)


def sample_preferences(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    n: int,
    seed: int,
    split: Split,
    per_prompt: int = 4,
    prompts_per_batch: int = 256,
    instructions: Sequence[str] = (),
    score: Callable[[str, str], int] = lambda prompt, text: ending_score(text),
    advance: Callable[[int], object] | None = None,
) -> list[Preference]:
    """Pairs of continuations that differ in their score, one pair for each opening that has any.

    The pair is drawn evenly from those of the opening that differ, so near ties (happy against neutral) occur as
    well as opposites. The first pairs of a longer list are those of a shorter one.

    Args:
        model: the model both continuations are sampled from.
        tokenizer: that of the pair.
        n: number of pairs.
        seed: see `attempts`.
        split: which openings.
        per_prompt: continuations sampled for each opening.
        prompts_per_batch: openings sampled at once; changes the speed only.
        instructions: as in `attempts`.
        score: of a prompt and its continuation; the higher one is chosen. How happy it ends unless given.
        advance: called with 1 for each pair found.
    """
    rng = random.Random(f"pairs:{seed}")
    pairs: list[Preference] = []
    stream = attempts(
        model, tokenizer, seed=seed, split=split, per_prompt=per_prompt, prompts_per_batch=prompts_per_batch,
        instructions=instructions,
    )  # fmt: skip
    for attempt in stream:
        scored = [(score(attempt.prompt, text), text) for text in attempt.continuations]
        unequal = [(a[1], b[1]) for a in scored for b in scored if a[0] > b[0]]
        if not unequal:
            continue
        chosen, rejected = unequal[rng.randrange(len(unequal))]
        pairs.append(Preference(attempt.prompt, chosen, rejected))
        if advance is not None:
            advance(1)
        if len(pairs) == n:
            break
    return pairs
