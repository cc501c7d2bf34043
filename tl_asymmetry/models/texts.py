"""From texts to token ids and batches, the same on both kinds of model.

The Hugging Face tokenizer is called directly: `to_tokens` prepends a begin-of-sequence token by rules that
differ between HookedTransformer and TransformerBridge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.models.view import ModelView


def tokenize(view: ModelView, texts: Sequence[Any], window: int | None = None) -> list[Int[Tensor, " _pos"]]:
    """Token ids of texts, cut into windows, nothing dropped.

    A string is encoded without special tokens and preceded by the begin-of-sequence token where the tokenizer
    has one; for an encoder it stands between the tokenizer's [CLS] and [SEP]. A list of chat messages is rendered by
    the tokenizer's chat template, which sets its own special tokens. What is longer than a window continues in the
    next one, which begins with the same token again.

    Args:
        view: the model whose tokenizer and context length count.
        texts: strings, or lists of chat messages {"role": ..., "content": ...}.
        window: longest sequence in tokens, begin-of-sequence token included; the model's context length
            by default.

    Returns:
        One int64 tensor on CPU per window, in the order of the texts.

    Raises:
        ValueError: no tokenizer, no texts, an empty text, messages without a chat template, a window that
            does not fit.

    Example:
        >>> [len(tokens) for tokens in tokenize(view, ["Mira was happy.", "Tom lost the cup."])]
        [5, 6]
    """
    window = view.n_ctx if window is None else window
    if not 2 <= window <= view.n_ctx:
        raise ValueError(
            f"expected a window from 2 to {view.n_ctx} tokens (the context), got {window}; pass such a window"
        )
    if isinstance(texts, (str, bytes)):
        raise ValueError("expected a list of texts, got a single string; pass texts=[text]")
    texts = list(texts)
    if not texts:
        raise ValueError("expected at least one text, got none; pass texts or tokens=")
    tokenizer = view.tokenizer
    if tokenizer is None:
        raise ValueError(f"expected a model with a tokenizer to read texts, {view.name!r} has none; pass tokens=")
    sequences: list[Tensor] = []
    for index, text in enumerate(texts):
        head, body, tail = _encode(tokenizer, text, index, view.encoder)
        if not body:
            raise ValueError(f"expected texts with a token or more, got an empty text at index {index}; leave it out")
        step = max(1, window - len(head) - len(tail))
        for start in range(0, len(body), step):
            sequences.append(torch.tensor(head + body[start : start + step] + tail, dtype=torch.int64))
    return sequences


def _encode(tokenizer: Any, text: Any, index: int, encoder: bool) -> tuple[list[int], list[int], list[int]]:
    """What every window of a text begins with, the text's own tokens, and what every window ends with."""
    bos = tokenizer.bos_token_id
    if isinstance(text, str):
        body = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        if encoder:
            marks = tokenizer.cls_token_id, tokenizer.sep_token_id
            return [i for i in marks[:1] if i is not None], body, [i for i in marks[1:] if i is not None]
        return ([] if bos is None else [bos]), body, []
    if isinstance(text, Sequence) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in text):
        if not text:
            return [], [], []
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"expected a tokenizer with a chat template for the messages at index {index}, got one without; "
                "pass strings, or set tokenizer.chat_template"
            )
        body = list(tokenizer.apply_chat_template(list(text), tokenize=True, return_dict=False))
        if bos is not None and body[:1] == [bos]:
            return [bos], body[1:], []
        return [], body, []
    raise ValueError(
        f"expected texts to be strings or lists of {{'role', 'content'}} messages, got {type(text).__name__} at index "
        f"{index}; pass strings"
    )


def batches(sequences: Sequence[Tensor], batch_size: int, *, causal: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive sequences as right-padded batches with their masks.

    In a causal model padding on the right leaves every real position as it is, so no attention mask is
    needed; the mask only says which positions count. The padding is token 0. Where every position sees every
    other, sequences of one length share a batch, shorter ones first, and there is no padding.

    Args:
        sequences: token ids `[pos]`, of any lengths.
        batch_size: sequences per batch.
        causal: whether the model that reads them is.

    Yields:
        `(tokens, mask)`, both `[batch, pos]`, the mask True at real tokens.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}; pass batch_size=8")
    for group in _batched(sequences, batch_size) if causal else _batched_by_length(sequences, batch_size):
        lengths = torch.tensor([len(s) for s in group])
        tokens = torch.nn.utils.rnn.pad_sequence(list(group), batch_first=True, padding_value=0)
        yield tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _batched(sequences: Sequence[Tensor], batch_size: int) -> Iterator[Sequence[Tensor]]:
    return (sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size))


def _batched_by_length(sequences: Sequence[Tensor], batch_size: int) -> Iterator[Sequence[Tensor]]:
    for _, group in groupby(sorted(sequences, key=len), key=len):
        yield from _batched(list(group), batch_size)


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary as pairs of id and token: equal for equal vocabularies, whatever the
    tokenizer's class."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
