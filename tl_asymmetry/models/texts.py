"""From texts and tokens to sequences of token ids and batches, the same on both kinds of model.

The Hugging Face tokenizer is called directly: `to_tokens` prepends a begin-of-sequence token by rules that
differ between HookedTransformer and TransformerBridge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_asymmetry.models.calibration import calibration_texts
from tl_asymmetry.models.view import ModelView

LONGEST_WINDOW = 1024
"""Texts are cut into windows of at most this many tokens, however long the model's context."""

_LONG_RUN = 4
"""From so many equal tokens on at the ends of several rows they may be padding that no tokenizer told of."""

_CHARACTERS, _EDGE = 16, 64
"""Of a long text only so many characters for each token that is wanted are encoded; what so many tokens before a cut
are does not depend on it."""


def token_sequences(
    view: ModelView,
    texts: Any = None,
    tokens: Any = None,
    mask: Any = None,
    *,
    max_tokens: int | None = None,
    window: int | None = None,
    notes: Callable[[str], None],
) -> list[Int[Tensor, " _pos"]]:
    """The token ids that a model is to read, from texts or from tokens: one way for every function that runs one.

    The same content gives the same ids: a text as a string, as a chat and as a rendered chat, or the tokens that a
    tokenizer made of it, padded or not. A sequence begins with one begin-of-sequence token where the tokenizer has
    one; for an encoder a text stands between the tokenizer's [CLS] and [SEP]. A text longer than a window continues in
    the next one, which begins with the same token again.

    Args:
        view: the model whose tokenizer, context length and vocabulary count.
        texts: an iterable of strings or of chats (lists of messages {"role": ..., "content": ...}), read only as far
            as `max_tokens` asks; without texts and tokens the package's calibration texts.
        tokens: token ids instead: `[batch, pos]`, sequences of different lengths, or a mapping with `input_ids` and
            `attention_mask` as a tokenizer gives it. A run of the tokenizer's pad token at either end of a row is left
            out where no mask says what is real.
        mask: which tokens are real, of the shape of `tokens`: False at padding, at either end of a row.
        max_tokens: no more tokens than this.
        window: longest sequence of a text, begin-of-sequence token included; the context, but 1024 at most, by default.
        notes: told what was taken off, put in front or left out.

    Returns:
        One int64 tensor on CPU per window or row, in order.

    Raises:
        ValueError: both or unusable texts and tokens, saying at which index; no tokenizer; a mask that leaves out
            more than padding; token ids out of range; a sequence longer than the context.

    Example:
        >>> sequences = token_sequences(view, ["Mira was happy.", "<bos> Tom lost the cup."], notes=print)
        1 text began with the begin-of-sequence token already: it was not doubled
        >>> [len(sequence) for sequence in sequences]
        [5, 6]
    """
    if texts is not None and tokens is not None:
        raise ValueError("expected texts or tokens, got both; pass one of them")
    if mask is not None and tokens is None:
        raise ValueError("expected mask beside tokens, got it without; pass tokens= as well, or no mask")
    if max_tokens is not None and (isinstance(max_tokens, bool) or int(max_tokens) != max_tokens or max_tokens < 1):
        raise ValueError(f"expected max_tokens >= 1, got {max_tokens!r}; pass None to use every token")
    if tokens is not None:
        return _at_most(max_tokens, iter(_token_rows(view, tokens, mask, notes)), notes)
    if texts is None:
        texts = calibration_texts()
        notes(
            "activations come from the package's calibration texts; texts like those the model is used on "
            "(chat-templated for a chat model) are better: pass texts="
        )
    window = min(view.n_ctx, LONGEST_WINDOW) if window is None else window
    if not 2 <= window <= view.n_ctx:
        raise ValueError(
            f"expected a window from 2 to {view.n_ctx} tokens (the context), got {window}; pass such a window"
        )
    _require_texts(texts)
    reader = TextReader(view, instead="tokens=", most=max_tokens)
    windows = (part for index, text in enumerate(texts) for part in reader.windows(text, index, window))
    sequences = _at_most(max_tokens, windows, notes)
    if not sequences:
        raise ValueError("expected at least one text, got none; pass texts or tokens=")
    reader.report(notes)
    return sequences


def _at_most(limit: int | None, sequences: Iterator[Tensor], notes: Callable[[str], None]) -> list[Tensor]:
    """The first `limit` tokens; what follows is not even made."""
    if limit is None:
        return list(sequences)
    kept, room = [], limit
    for sequence in sequences:
        kept.append(sequence[:room])
        if len(sequence) > room or (len(sequence) == room and next(sequences, None) is not None):
            notes(f"only the first {limit} tokens were used (max_tokens)")
        room -= len(kept[-1])
        if room == 0:
            break
    return kept


# --- texts ----------------------------------------------------------------------------------------


class TextReader:
    """Encodes strings and chats with a model's tokenizer, and remembers what it had to take off or put in front.

    Args:
        view: the model.
        instead: what to pass where the model has no tokenizer.
        most: tokens wanted of one text; all by default.

    Raises:
        ValueError: no tokenizer.
    """

    def __init__(self, view: ModelView, *, instead: str, most: int | None = None) -> None:
        if view.tokenizer is None:
            raise ValueError(f"expected a model with a tokenizer to read texts, {view.name!r} has none; pass {instead}")
        self.tokenizer = view.tokenizer
        self._d_vocab, self._most = view.d_vocab, most
        first, last = ("cls_token_id", "sep_token_id") if view.encoder else ("bos_token_id", None)
        self._head: list[int] = self._special(first)
        self._tail: list[int] = [] if last is None else self._special(last)
        self._doubled: set[int] = set()
        self._unmarked: set[int] = set()

    def windows(self, text: Any, index: int, window: int) -> Iterator[Int[Tensor, " _pos"]]:
        """A text's token ids, cut into windows that each begin (and end) with the special tokens.

        Raises:
            ValueError: a text without a token, or what is no text, naming `index`.
        """
        head, body, tail = self.parts(text, index)
        if not body:
            raise ValueError(f"expected texts with a token or more, got an empty text at index {index}; leave it out")
        step = max(1, window - len(head) - len(tail))
        for start in range(0, len(body), step):
            yield torch.tensor(head + body[start : start + step] + tail, dtype=torch.int64)

    def parts(
        self, text: Any, index: int, *, generation_prompt: bool = False
    ) -> tuple[list[int], list[int], list[int]]:
        """What a sequence begins with, the text's own tokens, and what it ends with.

        Args:
            text: a string, or a list of chat messages, which the tokenizer's chat template renders.
            index: of the text, for messages.
            generation_prompt: end a chat where the assistant's answer would begin.
        """
        if isinstance(text, str):
            body, chat = self._encoded(text, index), False
        elif _is_chat(text):
            body, chat = self._rendered(text, index, generation_prompt), True
        else:
            raise ValueError(
                f"expected texts to be strings or lists of {{'role', 'content'}} messages, got {type(text).__name__} "
                f"at index {index}; pass strings"
            )
        if body and not 0 <= min(body) <= max(body) < self._d_vocab:
            wrong = next(i for i in body if not 0 <= i < self._d_vocab)
            raise ValueError(
                f"expected token ids from 0 to {self._d_vocab - 1}, got {wrong} from the tokenizer for the text at "
                f"index {index}; pass a model with a row of its embedding for every token"
            )
        marked = 0
        while self._head and body[marked : marked + 1] == self._head:
            marked += 1
        end = len(body)
        while self._tail and end > marked and body[end - 1 : end] == self._tail:
            end -= 1
        if marked > chat:
            self._doubled.add(index)
        if chat and self._head and body and not marked:
            self._unmarked.add(index)
        return self._head, body[marked:end], self._tail

    def report(self, notes: Callable[[str], None]) -> None:
        """Say what was taken off and what put in front."""
        if self._doubled:
            texts = "1 text" if len(self._doubled) == 1 else f"{len(self._doubled)} texts"
            notes(f"{texts} began with the begin-of-sequence token already: it was not doubled")
        if self._unmarked:
            notes(
                f"the chat template sets no begin-of-sequence token: it was put in front of {len(self._unmarked)} "
                f"{'chat' if len(self._unmarked) == 1 else 'chats'}, as of strings"
            )

    def _special(self, name: str) -> list[int]:
        token = getattr(self.tokenizer, name, None)
        return [] if token is None else [int(token)]

    def _encoded(self, text: str, index: int) -> list[int]:
        size = len(text) if self._most is None else _CHARACTERS * (self._most + _EDGE)
        while True:
            try:
                ids = list(self.tokenizer.encode(text[:size], add_special_tokens=False, verbose=False))
            except Exception as error:  # whatever a tokenizer raises
                raise ValueError(
                    f"expected texts that the model's tokenizer reads, got {type(error).__name__} ({error}) for the "
                    f"text at index {index}; leave it out, or pass tokens="
                ) from error
            if size >= len(text):
                return ids
            if self._most is not None and len(ids) > self._most + _EDGE:
                return ids[: len(ids) - _EDGE]
            size *= 4

    def _rendered(self, messages: Sequence[Any], index: int, generation_prompt: bool) -> list[int]:
        if not messages:
            return []
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"expected a tokenizer with a chat template for the messages at index {index}, got one without; "
                "pass strings, or set tokenizer.chat_template"
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template's own refusals, and what it stumbles over
            raise ValueError(
                f"expected messages that the tokenizer's chat template renders, got {type(error).__name__} ({error}) "
                f"for the messages at index {index}; pass them as the template wants them, or strings"
            ) from error
        return [int(i) for i in ids]


def _is_chat(text: Any) -> bool:
    return isinstance(text, Sequence) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in text)


def _require_texts(texts: Any) -> None:
    """Refuse what iterates over something else than its texts."""
    if isinstance(texts, (str, bytes)):
        raise ValueError("expected a list of texts, got a single string; pass texts=[text]")
    if isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise ValueError(
            f"expected a list of texts, got a {type(texts).__name__}, which holds columns; pass the column with the "
            'texts, such as texts=data["text"]'
        )
    if isinstance(texts, Tensor):
        raise ValueError("expected a list of texts, got a Tensor; pass tokens=")
    if isinstance(texts, Set) or not isinstance(texts, Iterable):
        raise ValueError(
            f"expected a list of texts, got a {type(texts).__name__}, which has no order; pass a list or a generator"
        )
    if isinstance(texts, Sequence) and texts and isinstance(texts[0], Mapping) and _is_chat(texts):
        raise ValueError("expected a list of texts, got the messages of a single chat; pass texts=[messages]")


# --- tokens ---------------------------------------------------------------------------------------


def check_tokens(view: ModelView, tokens: Any) -> None:
    """Refuse what is no batch of token ids of this model."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or not _is_integer(tokens):
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"expected tokens as an integer tensor [batch, pos], got {got}; pass a tensor of token ids")
    if tokens.numel() == 0:
        raise ValueError(f"expected at least one token, got a tensor {list(tokens.shape)}; pass tokens=[batch, pos]")
    if tokens.shape[1] > view.n_ctx:
        raise ValueError(
            f"expected sequences of at most {view.n_ctx} tokens (the model's context), got {tokens.shape[1]}; "
            "pass them cut into windows"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= view.d_vocab:
        raise ValueError(
            f"expected token ids from 0 to {view.d_vocab - 1}, got {low if low < 0 else high}; pass tokens made by "
            "this model's tokenizer"
        )


def _token_rows(view: ModelView, tokens: Any, mask: Any, notes: Callable[[str], None]) -> list[Tensor]:
    """Rows without their padding."""
    attention = None
    if isinstance(tokens, Mapping):
        if "input_ids" not in tokens:
            raise ValueError(
                f"expected tokens with input_ids, got a mapping with {', '.join(map(str, tokens)) or 'nothing'}; pass "
                "what the tokenizer returns, or a tensor [batch, pos]"
            )
        attention, tokens = tokens.get("attention_mask"), tokens["input_ids"]
    rows = _rows(tokens, "tokens")
    for row in rows:
        check_tokens(view, row.unsqueeze(0))
    rows = [row.to(torch.int64) for row in rows]
    kept = _unmasked(rows, mask, attention) if mask is not None or attention is not None else None
    if kept is None:
        kept = _unpadded(rows, view, notes)
        _note_runs(kept, view, notes)
    empty = [i for i, row in enumerate(kept) if len(row) == 0]
    if empty:
        raise ValueError(f"expected a token or more in every row, got padding alone in row {empty[0]}; leave it out")
    return kept if view.encoder else _with_one_begin(kept, view, notes)


def _rows(given: Any, what: str) -> list[Tensor]:
    """A tensor, array or list of sequences as tensors `[pos]` on CPU."""
    if isinstance(given, (str, bytes, Mapping)) or hasattr(given, "columns") or not isinstance(given, Iterable):
        raise ValueError(
            f"expected {what} as an integer tensor [batch, pos] or a list of sequences, got {type(given).__name__}; "
            "pass a tensor, or what the tokenizer returns"
        )
    if isinstance(given, Tensor) and given.ndim != 2:
        raise ValueError(
            f"expected {what} as an integer tensor [batch, pos], got {given.dtype} {list(given.shape)}; pass a tensor "
            "[batch, pos]"
        )
    rows = []
    for i, row in enumerate(given):
        try:
            rows.append(torch.as_tensor(row, device="cpu"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"expected sequences of numbers as {what}, got {type(row).__name__} as row {i}; pass token ids"
            ) from error
        if rows[-1].ndim != 1:
            got = f"{rows[-1].dtype} {list(rows[-1].shape)}"
            raise ValueError(f"expected {what} as sequences [pos], got {got} as row {i}; pass [batch, pos] or a list")
    if not rows:
        raise ValueError(f"expected at least one sequence of {what}, got none; pass texts or tokens=")
    return rows


def _unmasked(rows: Sequence[Tensor], mask: Any, attention: Any) -> list[Tensor]:
    """Rows without what a mask leaves out at their ends.

    A token left out in front is not read, so what follows is read without it: right for padding, wrong for a prompt.
    What the tokenizer's own `attention_mask` leaves out is padding; of any other mask it is believed where it is one
    token again and again, and not in front of every row.
    """
    masks = None if mask is None else _masks(rows, mask, "mask")
    real = masks if attention is None else _masks(rows, attention, "attention_mask")
    assert real is not None
    if masks is not None and attention is not None:
        real = [ours & theirs for ours, theirs in zip(masks, real, strict=True)]
    kept, before = [], []
    for i, (row, shown) in enumerate(zip(rows, real, strict=True)):
        places = shown.nonzero().flatten()
        first, end = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if end - first != len(places):
            raise ValueError(
                f"expected a mask that is False at padding alone, at the ends of rows, got False inside row {i}; pass "
                "tokens as sequences of different lengths"
            )
        kept.append(row[first:end])
        before.append(row[:first])
    if mask is not None and any(map(len, before)):
        left_out = torch.cat(before).unique()
        if len(left_out) > 1 or all(map(len, before)):
            raise ValueError(
                "expected a mask that is False at padding alone, got it False at other tokens in front of rows, which "
                "what follows is read after; pass a mapping with input_ids and attention_mask if they are padding"
            )
    return kept


def _masks(rows: Sequence[Tensor], given: Any, what: str) -> list[Tensor]:
    masks = _rows(given, what)
    if [len(m) for m in masks] != [len(row) for row in rows]:
        raise ValueError(f"expected {what} of the shape of tokens, got another; pass one entry per token")
    if any(m.dtype != torch.bool and not bool(((m == 0) | (m == 1)).all()) for m in masks):
        raise ValueError(f"expected a boolean {what}, got other numbers than 0 and 1; pass True at real tokens")
    return [m.bool() for m in masks]


def _unpadded(rows: Sequence[Tensor], view: ModelView, notes: Callable[[str], None]) -> list[Tensor]:
    """Rows without runs of the tokenizer's pad token at their ends.

    Where it also begins or ends texts, a single one in front is a text's own, and where every row begins (or ends) with
    it the innermost stays.
    """
    pad = getattr(view.tokenizer, "pad_token_id", None)
    if pad is None:
        return list(rows)
    front = [_run(row == pad) for row in rows]
    behind = [_run(row.flip(0) == pad) for row in rows]
    begins, ends = (getattr(view.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    if pad in (begins, ends) and max(front) < 2:
        front = [0] * len(rows)
    if pad == begins and all(front):
        front = [n - 1 for n in front]
    if pad == ends and all(behind):
        behind = [n - 1 for n in behind]
    kept = [row[a : max(a, len(row) - b)] for row, a, b in zip(rows, front, behind, strict=True)]
    trimmed = [len(row) - len(short) for row, short in zip(rows, kept, strict=True)]
    if any(trimmed):
        notes(
            f"padding at the ends of {sum(map(bool, trimmed))} of {len(rows)} rows of tokens was left out "
            f"({sum(trimmed)} tokens)"
        )
    return kept


def _note_runs(rows: Sequence[Tensor], view: ModelView, notes: Callable[[str], None]) -> None:
    """Say where rows end in one token again and again, which is read, since it is not what the tokenizer pads with."""
    runs: dict[int, list[int]] = {}
    for row in rows:
        for end in (row, row.flip(0)):
            if len(end) and (length := _run(end == end[0])) >= _LONG_RUN:
                runs.setdefault(int(end[0]), []).append(length)
    for token, lengths in runs.items():
        if len(lengths) > 1:
            word = "" if view.tokenizer is None else f" ({view.tokenizer.decode([token])!r})"
            notes(
                f"{len(lengths)} ends of rows of tokens are runs of token {token}{word}, {sum(lengths)} tokens in all, "
                "which are read as they are: where that is padding, pass mask="
            )


def _run(is_pad: Bool[Tensor, " pos"]) -> int:
    """How many pad tokens a row begins with."""
    real = (~is_pad).nonzero()
    return int(real[0]) if len(real) else len(is_pad)


def _with_one_begin(rows: Sequence[Tensor], view: ModelView, notes: Callable[[str], None]) -> list[Tensor]:
    """Rows with one begin-of-sequence token in front where there were more."""
    bos = getattr(view.tokenizer, "bos_token_id", None)
    if bos is None:
        return list(rows)
    runs = [max(_run(row == bos) - 1, 0) for row in rows]
    doubled = sum(map(bool, runs))
    if all(bool(row[0] != bos) for row in rows):
        notes(
            "no row of tokens begins with the tokenizer's begin-of-sequence token, with which texts begin: they are "
            "read as they are"
        )
    if doubled:
        notes(f"{doubled} of {len(rows)} rows of tokens began with the begin-of-sequence token twice: once is kept")
    return [row[n:] for row, n in zip(rows, runs, strict=True)]


def _is_integer(tokens: Tensor) -> bool:
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


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
