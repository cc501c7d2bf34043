"""From what researchers have (texts, chats, datasets, preference columns) to the batches objectives read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.models.texts import TextReader, token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.batches import Batch, PreferenceBatch, TokenBatch

_SHOWN = 3


def as_batches(
    view: ModelView,
    data: Any,
    batch_type: type[Any],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    note: Callable[[str], None],
    warn: Callable[[str], None],
) -> list[Batch]:
    """Batches of the kind an objective reads, from whatever holds the data.

    Args:
        view: the model whose tokenizer and context length count.
        data: batches (as they are; the chosen half of a `PreferenceBatch` where texts are wanted; token ids `[batch,
            pos]`; mappings with `input_ids`, `attention_mask`, `labels` as a collator makes them); or texts (strings,
            or lists of chat messages); or rows: a Hugging Face dataset, a list of mappings or of objects, with columns
            `prompt, chosen, rejected`, or `chosen, rejected` whose common beginning is the prompt (trl's formats), for
            texts also `text`, `messages`, or `prompt, completion`. Values are strings or lists of
            `{"role": ..., "content": ...}`.
        batch_type: `TokenBatch` or `PreferenceBatch`.
        batch_size: rows of a batch that is made here; ready batches stay as they are.
        max_length: longest row in tokens; by default the model's context. A longer continuation is cut there, and a
            prompt that leaves it no room is left out: both with a warning.
        note: told how texts were read, such as a begin-of-sequence token that was not doubled.
        warn: told what degrades the data.

    Returns:
        Batches on CPU, in the order of the data.

    Raises:
        ValueError: no data, columns that do not fit, no tokenizer, chats without a chat template.

    Example:
        >>> rows = [{"prompt": "Mira lost", "chosen": " the cup.", "rejected": " a song."}]
        >>> batch, = as_batches(view, rows, PreferenceBatch, note=print, warn=print)
        >>> view.tokenizer.decode(batch.chosen.tokens[0][batch.chosen.mask[0]])
        'the cup. <eos>'
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}; pass batch_size=8")
    if isinstance(data, TokenBatch | PreferenceBatch) or _is_token_ids(data):
        data = [data]
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"expected batches, texts or rows of a dataset, got {type(data).__name__}; pass a list of them (one "
            "split of a DatasetDict)"
        )
    rows = list(data)
    if not rows:
        raise ValueError("expected at least one batch, text or row, got none; pass data")
    rows = [_token_batch(view, row, i, note) if _is_token_ids(row) else row for i, row in enumerate(rows)]
    if isinstance(rows[0], TokenBatch | PreferenceBatch):
        return [_ready(batch, batch_type, i) for i, batch in enumerate(rows)]
    length = view.n_ctx if max_length is None else max_length
    if not 2 <= length <= view.n_ctx:
        raise ValueError(
            f"expected max_length from 2 to {view.n_ctx} tokens (the context), got {length}; pass such a length"
        )
    encode = _Encoder(view, length)
    if batch_type is PreferenceBatch:
        pairs = [p for i, row in enumerate(rows) if (p := encode.pair(row, i)) is not None]
        encode.report(len(rows), note, warn)
        return [
            PreferenceBatch(_padded([c for c, _ in part]), _padded([r for _, r in part]))
            for part in _chunks(_some(pairs), batch_size)
        ]
    encoded = [row for i, row in enumerate(rows) for row in encode.text(row, i)]
    encode.report(len(rows), note, warn)
    return [_padded(part) for part in _chunks(_some(encoded), batch_size)]


def rebatched(batches: Sequence[Batch], batch_size: int) -> list[Batch]:
    """The same rows in the same order, `batch_size` of them to a batch (the last may be smaller)."""
    rows = [(batch, i) for batch in batches for i in range(len(batch))]
    return [_stacked(part) for part in _chunks(rows, batch_size)]


Row = tuple[list[int], int]
"""Token ids, and where the tokens that count begin."""


class _Encoder:
    """Reads rows with the model's tokenizer, and remembers what had to be cut or left out."""

    def __init__(self, view: ModelView, length: int) -> None:
        self.reader = TextReader(view, instead="TokenBatch or PreferenceBatch objects")
        self.tokenizer, self.length = view.tokenizer, length
        self.cut, self.left_out = 0, 0

    def pair(self, row: Any, index: int) -> tuple[Row, Row] | None:
        columns = _columns(row, index)
        if columns.get("chosen") is None or columns.get("rejected") is None:
            raise ValueError(
                f"expected columns prompt, chosen and rejected, got {', '.join(columns) or 'a text'} in row {index}; "
                "pass preference data for a preference objective"
            )
        prompt, chosen, rejected = _explicit_prompt(columns.get("prompt"), columns["chosen"], columns["rejected"])
        halves = [self._continuation(prompt, answer, index) for answer in (chosen, rejected)]
        if any(half is None for half in halves):
            self.left_out += 1
            return None
        return halves[0], halves[1]  # type: ignore[return-value]

    def text(self, row: Any, index: int) -> list[Row]:
        """A row as texts: windows of a plain one, or the (chosen) answer to a prompt."""
        columns = {"text": row} if isinstance(row, str | list | tuple) else _columns(row, index)
        if columns.get("label") is not None:
            raise ValueError(
                f"expected rows whose every text is one to learn, got a column label in row {index}, as KTO has for "
                "good and bad answers; pass the rows with label=True without that column"
            )
        if columns.get("chosen") is not None and columns.get("rejected") is not None:
            prompt, answer, _ = _explicit_prompt(columns.get("prompt"), columns["chosen"], columns["rejected"])
        elif columns.get("completion") is not None and columns.get("prompt") is not None:
            prompt, answer = columns["prompt"], columns["completion"]
        else:
            content = next((columns[name] for name in ("text", "messages") if columns.get(name) is not None), None)
            if content is None:
                raise ValueError(
                    f"expected a column text, messages, completion or chosen, got {', '.join(columns)} in row {index}; "
                    "rename the column that holds the text"
                )
            windows = list(self.reader.windows(content, index, self.length))
            bos = self.tokenizer.bos_token_id
            starts = [1 if bos is not None and int(w[0]) == bos else 0 for w in windows]
            # a window of one token, without one before it, has nothing to predict
            return [(w.tolist(), s) for w, s in zip(windows, starts, strict=True) if len(w) > 1]
        row = self._continuation(prompt, answer, index)
        self.left_out += row is None
        return [] if row is None else [row]

    def _continuation(self, prompt: Any, answer: Any, index: int) -> Row | None:
        """Prompt and answer as one row; the prompt is what the two encodings have in common, as trl has it."""
        if isinstance(answer, str) and isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            ended = answer if eos is None or answer.endswith(eos) else answer + eos
            whole, head = self._ids(prompt + ended, index), self._ids(prompt, index)
        elif not isinstance(answer, str) and not isinstance(prompt, str):
            whole = self._ids([*prompt, *answer], index)
            head = self._ids(list(prompt), index, generation_prompt=True) if prompt else []
        else:
            raise ValueError(
                f"expected prompt and continuation of one form, got {type(prompt).__name__} and "
                f"{type(answer).__name__} in row {index}; pass strings, or lists of messages, for both"
            )
        start = max(_common(head, whole), 1)  # nothing comes before the first token to predict it from
        self.cut += len(whole) > self.length
        whole = whole[: self.length]
        return (whole, start) if len(whole) > start else None

    def _ids(self, text: Any, index: int, *, generation_prompt: bool = False) -> list[int]:
        head, body, tail = self.reader.parts(text, index, generation_prompt=generation_prompt)
        return head + body + tail

    def report(self, rows: int, note: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self.reader.report(note)
        if self.cut:
            warn(f"{self.cut} continuations were cut at {self.length} tokens (of {rows} rows)")
        if self.left_out:
            warn(f"{self.left_out} of {rows} rows were left out: the prompt leaves no room for a token to predict")


def _is_token_ids(data: Any) -> bool:
    """A batch as a tensor, or as a tokenizer or collator makes it."""
    if isinstance(data, Mapping):
        return getattr(data.get("input_ids"), "ndim", 0) == 2
    return isinstance(data, Tensor) and data.ndim == 2


def _token_batch(view: ModelView, data: Any, index: int, note: Callable[[str], None]) -> TokenBatch:
    """Token ids as a batch; targets are all of them, or those that `labels` (not −100) or `completion_mask` name."""
    tokens = torch.as_tensor(data["input_ids"] if isinstance(data, Mapping) else data)
    asked = torch.ones_like(tokens, dtype=torch.bool)
    for name, left_out in (("labels", -100), ("completion_mask", 0)):
        if isinstance(data, Mapping) and name in data:
            given = torch.as_tensor(data[name])
            if given.shape != tokens.shape:
                raise ValueError(
                    f"expected {name} of the shape of input_ids, {list(tokens.shape)}, got {list(given.shape)} in "
                    f"batch {index}; pass one entry per token"
                )
            asked &= given != left_out
    real = token_sequences(view, tokens=data, notes=note)
    if bool(asked.all()):
        return _padded([(row.tolist(), 1) for row in real])
    shown = torch.as_tensor(data.get("attention_mask", torch.ones_like(tokens))).bool()
    width = int(shown.sum(1).max())
    ids, mask = torch.zeros(len(tokens), width, dtype=torch.int64), torch.zeros(len(tokens), width, dtype=torch.bool)
    for i, row in enumerate(shown):  # padding, wherever it stands, goes to the right
        count = int(row.sum())
        ids[i, :count], mask[i, :count] = tokens[i][row], asked[i][row]
    return TokenBatch(ids, mask)


def _ready(batch: Any, batch_type: type[Any], index: int) -> Batch:
    if batch_type is TokenBatch and isinstance(batch, PreferenceBatch):
        return batch.chosen
    if not isinstance(batch, batch_type):
        raise ValueError(
            f"expected a {batch_type.__name__} for this objective, got {type(batch).__name__} as batch {index}; pass "
            "prompts with a chosen and a rejected continuation each"
        )
    return batch


def _columns(row: Any, index: int) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    known = ("prompt", "chosen", "rejected", "completion", "text", "messages", "label")
    columns = {name: getattr(row, name) for name in known if hasattr(row, name)}
    if not columns and not isinstance(row, str | list | tuple):
        raise ValueError(
            f"expected rows with columns such as prompt, chosen, rejected, got {type(row).__name__} as row {index}; "
            "pass mappings"
        )
    return columns


def _explicit_prompt(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and continuations; without a prompt, or with a plain one beside chats, what both chats begin with."""
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return prompt, chosen, rejected
    common = _common(chosen, rejected)
    if isinstance(chosen, str) and 0 < common < len(chosen) and chosen[common - 1] == " ":
        common -= 1  # a word begins with its space
    return chosen[:common], chosen[common:], rejected[common:]


def _common(a: Any, b: Any) -> int:
    """How many elements two sequences have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _some(rows: list[Any]) -> list[Any]:
    if not rows:
        raise ValueError("expected at least one row with a token to predict, got none; pass longer texts")
    return rows


def _chunks(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _padded(rows: Sequence[Row]) -> TokenBatch:
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, start) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        mask[i, start : len(ids)] = True
    return TokenBatch(tokens, mask)


def _stacked(rows: Sequence[tuple[Any, int]]) -> Batch:
    """Rows of several batches as one."""
    single = [batch.rows(slice(i, i + 1)) for batch, i in rows]
    if isinstance(single[0], PreferenceBatch):
        return PreferenceBatch(_joined([b.chosen for b in single]), _joined([b.rejected for b in single]))
    return _joined(single)


def _joined(batches: Sequence[Any]) -> TokenBatch:
    width = max(int(batch.lengths.max()) for batch in batches)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x[:, :width], (0, max(width - x.shape[1], 0)))

    return TokenBatch(torch.cat([pad(b.tokens) for b in batches]), torch.cat([pad(b.mask) for b in batches]))


def shuffled(batches: Sequence[Batch], batch_size: int, *, seed: int) -> Iterator[Batch]:
    """Endless batches of `batch_size` rows: all rows in an order drawn anew for each pass over the data.

    A pass ends where no full batch is left, so that no batch holds a row twice. The order depends on the seed and the
    number of rows alone: objectives that read the same rows get them in the same order.

    Raises:
        ValueError: fewer rows than a batch takes.
    """
    rows = [(batch, i) for batch in batches for i in range(len(batch))]
    if not 1 <= batch_size <= len(rows):
        raise ValueError(
            f"expected a batch_size from 1 to the number of rows ({len(rows)}), got {batch_size}; pass a smaller one "
            "or more data"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(rows) - batch_size + 1, batch_size):
            yield _stacked([rows[i] for i in order[first : first + batch_size]])
