"""Stories as token ids: the tokenizer's vocabulary, and batches of stories and preferences in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tl_asymmetry.demo import Preference
from tl_asymmetry.demo.tokenizer import BOS, EOS, SPECIALS, UNK
from tl_asymmetry.training.batches import PreferenceBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def write_tokenizer(path: Path, texts: Iterable[str]) -> int:
    """Write a tokenizer file that knows every word of `texts`; returns the number of tokens, specials included.

    The ids follow the alphabet, so they do not depend on the order of the texts.

    Args:
        path: where the JSON file goes.
        texts: stories, in any number.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    words = {
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    }
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *sorted(words)])}
    tokenizer.model = models.WordLevel(vocabulary, unk_token=UNK)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    # Word pieces are not used; their decoder is the one that closes the gap before "," and ".".
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.save(str(path))
    return len(vocabulary)


def encode_stories(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    prompts: Sequence[str] | None = None,
    length: int | None = None,
) -> TokenBatch:
    """Whole stories as a batch: `<bos>` text `<eos>`, padded on the right.

    Args:
        tokenizer: that of the pair.
        texts: one story per row.
        prompts: beginnings of the texts, one per row, left out of the mask; none: every word is a target.
        length: pad to so many tokens; default the longest row.

    Raises:
        ValueError: for a row longer than `length` or the model's context.

    Example:
        >>> from tl_asymmetry.demo import demo_texts, demo_tokenizer
        >>> batch = encode_stories(demo_tokenizer(), demo_texts(3, seed=0))
        >>> batch.tokens.shape == batch.mask.shape
        True
    """
    rows = tokenizer([text + EOS for text in texts])["input_ids"]
    starts = [1] * len(rows) if prompts is None else [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    longest = max(len(row) for row in rows)
    limit = tokenizer.model_max_length if length is None else length
    if longest > limit:
        raise ValueError(f"expected stories of at most {limit} tokens, got one of {longest}; pass shorter texts")
    width = longest if length is None else length
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, start : len(row)] = True
    return TokenBatch(tokens, mask)


def encode_preferences(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Preference], *, length: int | None = None
) -> PreferenceBatch:
    """Pairs as a batch for `DPO`: the masks cover the continuations, not the prompt.

    Args:
        tokenizer: that of the pair.
        pairs: at least one.
        length: pad both halves to so many tokens; default the longest row of each.
    """
    prompts = [pair.prompt for pair in pairs]
    chosen = [f"{pair.prompt} {pair.chosen}" for pair in pairs]
    rejected = [f"{pair.prompt} {pair.rejected}" for pair in pairs]
    return PreferenceBatch(
        chosen=encode_stories(tokenizer, chosen, prompts=prompts, length=length),
        rejected=encode_stories(tokenizer, rejected, prompts=prompts, length=length),
    )
