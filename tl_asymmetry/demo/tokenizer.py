"""The word-level tokenizer of the demonstration pair, and batches of stories in its ids.

Words and punctuation marks are tokens, in lower case; anything the stories do not use is `<unk>`. `<bos>` is put
in front of every text, as the models were trained. It is an ordinary fast tokenizer of `transformers`, read from
one file, and works as `tokenizer=` of HookedTransformer and TransformerBridge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tl_asymmetry.training.objectives import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIALS = (PAD, BOS, EOS, UNK)
"""In order of their ids, 0 to 3."""


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


def read_tokenizer(path: Path, n_ctx: int) -> PreTrainedTokenizerFast:
    """The tokenizer in `path`, without network.

    Args:
        path: a file written by `write_tokenizer`.
        n_ctx: longest sequence of the model, in tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        add_bos_token=True,
        model_max_length=n_ctx,
        padding_side="right",
    )
    # TransformerLens reads both keys to see whether BOS is added already, and without them looks for the
    # tokenizer's folder on the Hub. transformers sets them only for tokenizers loaded from a folder.
    tokenizer.init_kwargs["add_bos_token"] = True
    tokenizer.init_kwargs.setdefault("name_or_path", "")
    return tokenizer


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
