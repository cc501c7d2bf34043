"""One content, one sequence of ids, whatever it comes as; and what is refused as a text or a token."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry.models.texts import batches, check_tokens, token_sequences, vocabulary_fingerprint
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.batches import PreferenceBatch, TokenBatch
from tl_asymmetry.training.data import as_batches

pytestmark = pytest.mark.usefixtures("unchecked_types")
MARKED = "<s> {% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
UNMARKED = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
CHAT = [{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w2"}]
CHAT_IDS = [0, 94, 3, 4, 1, 95, 5, 1]
CHAT_WORDS = (*tiny.WORDS[:-2], "user", "assistant")


def with_tokenizer(tokenizer: Any, d_vocab: int = tiny.D_VOCAB) -> ModelView:
    model = tiny.toy("plain", "bridge", d_vocab=d_vocab)
    model._tokenizer = tokenizer
    return ModelView(model)


def chatting(template: str = MARKED) -> ModelView:
    return with_tokenizer(tiny.tokenizer(CHAT_WORDS, chat_template=template, name=f"chat{len(template)}"))


def padded_by(pad: str) -> ModelView:
    """A model whose tokenizer pads with that word."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = pad
    return with_tokenizer(tokenizer)


def read(view: ModelView, texts: Any = None, **options: Any) -> list[list[int]]:
    """Ids; a note is a failure unless notes are asked for."""
    return [s.tolist() for s in token_sequences(view, texts, **{"notes": pytest.fail, **options})]


# --- one content, one sequence of ids ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_the_same_content_is_the_same_ids(template: str) -> None:
    view, notes = chatting(template), []
    rendered = view.tokenizer.apply_chat_template(CHAT, tokenize=False)
    encoded = view.tokenizer([rendered], add_special_tokens=False, return_tensors="pt")
    ways = {
        "chat": {"texts": [CHAT]},
        "rendered chat": {"texts": [rendered]},
        "with its mark": {"texts": ["<s> user w0 w1 </s> assistant w2 </s>"]},
        "marked twice": {"texts": ["<s> <s> user w0 w1 </s> assistant w2 </s>"]},
        "without": {"texts": ["user w0 w1 </s> assistant w2 </s>"]},
        "tokens": {"tokens": torch.tensor([CHAT_IDS])},
        "doubled tokens": {"tokens": torch.tensor([[0, *CHAT_IDS]])},
    } | ({"encoded": {"tokens": encoded}} if template == MARKED else {})
    for way, data in ways.items():
        assert read(view, **data, notes=notes.append) == [CHAT_IDS], way
    rows = [
        {"prompt": start + "user w0 w1 </s>", "chosen": " assistant w2", "rejected": " w3"} for start in ("", "<s> ")
    ]
    rows.append({"prompt": rendered[: rendered.index(" assistant")], "chosen": " assistant w2", "rejected": " w3"})
    (batch,) = as_batches(view, rows, PreferenceBatch, note=notes.append, warn=pytest.fail)
    assert batch.chosen.tokens.tolist() == [CHAT_IDS] * 3
    (batch,) = as_batches(view, [CHAT, rendered], TokenBatch, note=notes.append, warn=pytest.fail)
    assert batch.tokens.tolist() == [CHAT_IDS] * 2


def test_what_was_taken_off_or_put_in_front_is_said() -> None:
    notes: list[str] = []
    view = chatting(MARKED)
    read(view, ["<s> w0", "w1", "<s> w2"], notes=notes.append)
    read(view, ["<s> w0"], notes=notes.append)
    read(view, tokens=[[0, 0, 3], [0, 4]], notes=notes.append)
    read(chatting(UNMARKED), [CHAT], notes=notes.append)
    assert notes == [
        "2 texts began with the begin-of-sequence token already: it was not doubled",
        "1 text began with the begin-of-sequence token already: it was not doubled",
        "1 of 2 rows of tokens began with the begin-of-sequence token twice: once is kept",
        "the chat template sets no begin-of-sequence token: it was put in front of 1 chat, as of strings",
    ]
    assert read(view, [CHAT, "w3"]) == [CHAT_IDS, [0, 6]]  # what is as it should be needs no words


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "int32", "numpy", "lists", "sequences", "generator"])
def test_tokens_in_every_form(form: str) -> None:
    rows = [[0, 5, 6, 7], [0, 8, 9, 4]]
    tokens = {
        "tensor": torch.tensor(rows),
        "int32": torch.tensor(rows, dtype=torch.int32),
        "numpy": np.array(rows),
        "lists": rows,
        "sequences": [torch.tensor(row) for row in rows],
        "generator": (row for row in rows),
    }[form]
    sequences = token_sequences(with_tokenizer(tiny.tokenizer()), tokens=tokens, notes=pytest.fail)
    assert [s.tolist() for s in sequences] == rows
    assert all(s.dtype == torch.int64 for s in sequences)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", ["w9", "</s>", "<s>"])
def test_runs_of_pads_at_row_ends_do_not_count(side: str, pad: str) -> None:
    """What a tokenizer pads, and no more: a pad that also begins texts stays once where every row begins with it."""
    view, rows, notes = padded_by(pad), [[0, 3, 4, 5, 6, 7], [0, 3, 4], [0, 5]], []
    view.tokenizer.padding_side = side
    encoded = view.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert read(view, tokens=encoded["input_ids"], notes=notes.append) == rows
    assert notes == ["padding at the ends of 2 of 3 rows of tokens was left out (7 tokens)"]
    # with the tokenizer's own mask there is nothing to guess, and nothing to say
    assert read(view, tokens=encoded) == rows
    assert read(view, tokens=dict(encoded)) == rows
    assert read(view, tokens={"input_ids": rows}) == rows
    if side == "right":
        assert read(view, tokens=encoded["input_ids"], mask=encoded["attention_mask"].bool()) == rows
        assert read(view, tokens=encoded["input_ids"], mask=encoded["attention_mask"].tolist()) == rows


def test_what_may_be_the_texts_own_is_no_padding() -> None:
    view = padded_by("</s>")
    assert read(view, tokens=[[0, 3, 1], [0, 4, 1]]) == [[0, 3, 1], [0, 4, 1]]  # every row ends its text
    assert read(view, tokens=[[0, 3, 1, 1, 4], [1, 5, 6, 7, 8]]) == [[0, 3, 1, 1, 4], [1, 5, 6, 7, 8]]  # packed texts
    notes: list[str] = []
    assert read(view, tokens=[[0, 3, 1, 1], [0, 4, 5, 1]], notes=notes.append) == [[0, 3, 1], [0, 4, 5, 1]]
    without = with_tokenizer(None)
    assert read(without, tokens=[[1, 1, 3], [4, 5, 6]]) == [[1, 1, 3], [4, 5, 6]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_runs_of_another_token_at_row_ends_are_said(side: str) -> None:
    """Padding by hand, with a token that the tokenizer does not pad with, is read: not without a word."""
    rows = [[0, 3, 1, 1, 1, 1], [0, 3, 4, 5, 6, 7], [0, 1, 1, 1, 1, 1]]
    given = rows if side == "right" else [row[::-1] for row in rows]
    notes: list[str] = []
    assert read(padded_by("w9"), tokens=torch.tensor(given), notes=notes.append) == given
    said = "2 ends of rows of tokens are runs of token 1 ('</s>'), 9 tokens in all, which are read as they are: where"
    assert sum(note.startswith(said) for note in notes) == 1
    read(padded_by("w9"), tokens=torch.tensor(given)[:2], notes=notes.append)  # one row may end as it likes
    assert sum(note.startswith(said) for note in notes) == 1


def test_a_mask_may_leave_out_padding_alone() -> None:
    view = with_tokenizer(tiny.tokenizer())
    tokens, mask = torch.tensor([[0, 3, 4, 5], [2, 2, 0, 6]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    assert read(view, tokens=tokens, mask=mask) == [[0, 3, 4, 5], [0, 6]]
    for wrong, text in (
        (
            [[1, 0, 1, 1], [1, 1, 1, 1]],
            "expected a mask that is False at padding alone, .* got False inside row 0; pass",
        ),
        (
            [[0, 1, 1, 1], [0, 1, 1, 1]],
            "False at other tokens in front of rows, which .*; pass a mapping with input_ids",
        ),
        ([[0, 0, 1, 1], [1, 1, 1, 1]], "False at other tokens in front of rows"),
        (
            [[1, 1, 1, 1], [0, 0, 0, 0]],
            "expected a token or more in every row, got padding alone in row 1; leave it out",
        ),
        ([[1, 1, 1], [1, 1, 1]], "expected mask of the shape of tokens, got another; pass one entry per token"),
        ([[1, 1, 1, 2], [1, 1, 1, 1]], "expected a boolean mask, got other numbers than 0 and 1"),
        (True, "expected mask as an integer tensor .* or a list of sequences, got bool"),
    ):
        with pytest.raises(ValueError, match=text):
            read(view, tokens=tokens, mask=wrong)
    with pytest.raises(ValueError, match="expected mask beside tokens, got it without; pass tokens= as well"):
        read(view, ["w1"], mask=mask)


def test_tokens_out_of_range_and_of_wrong_form_are_refused() -> None:
    view = with_tokenizer(None)
    check_tokens(view, tiny.tokens())
    for tokens, text in (
        (torch.tensor([[3, 96]]), "expected token ids from 0 to 95, got 96; pass tokens made by this model"),
        (torch.tensor([[3, -1]]), "expected token ids from 0 to 95, got -1; pass"),
        (torch.zeros(1, 65, dtype=torch.long), "expected sequences of at most 64 tokens .*, got 65; pass them cut"),
        (torch.zeros(0, 5, dtype=torch.long), r"expected at least one (token|sequence)"),
        (torch.zeros(2, 5), r"expected tokens as an integer tensor \[batch, pos\], got torch.float32 \[.*5\]; pass"),
        (torch.zeros(5, dtype=torch.long), r"expected tokens .*, got torch.int64 \[5\]; pass"),
        (torch.ones(2, 2, dtype=torch.bool), "expected tokens .*, got torch.bool"),
        (torch.ones(2, 2, dtype=torch.complex64), "expected tokens .*, got torch.complex64"),
    ):
        with pytest.raises(ValueError, match=text):
            check_tokens(view, tokens)
        with pytest.raises(ValueError, match=text):
            read(view, tokens=tokens)
    with pytest.raises(
        ValueError, match=r"expected tokens as an integer tensor \[batch, pos\], got list; pass a tensor"
    ):
        check_tokens(view, [[1, 2]])
    for tokens, text in (
        ([], "expected at least one sequence of tokens, got none; pass texts or tokens="),
        ([1, 2], r"expected tokens as sequences \[pos\], got torch.int64 \[\] as row 0; pass \[batch, pos\] or a list"),
        (["w1"], "expected sequences of numbers as tokens, got str as row 0; pass token ids"),
        ("w1", "got str; pass a tensor, or what the tokenizer returns"),
        (3, "got int; pass a tensor"),
        (pd.DataFrame({"tokens": [1, 2]}), "got DataFrame; pass a tensor"),
        ({"ids": [[1]]}, "expected tokens with input_ids, got a mapping with ids; pass what the tokenizer returns"),
    ):
        with pytest.raises(ValueError, match=text):
            read(view, tokens=tokens)


# --- texts ---------------------------------------------------------------------------------------------------------


def test_texts_are_the_same_tokens_on_both_kinds() -> None:
    for kind in tiny.KINDS:
        view = ModelView(tiny.build("llama", kind))
        assert read(view, ["w0 w1 w2", "w5"]) == [[0, 3, 4, 5], [0, 8]]
        assert all(s.dtype == torch.int64 for s in token_sequences(view, ["w1"], notes=pytest.fail))


def test_long_texts_continue_in_the_next_window() -> None:
    view, text = with_tokenizer(tiny.tokenizer()), " ".join(f"w{i}" for i in range(10))
    assert read(view, [text], window=5) == [[0, 3, 4, 5, 6], [0, 7, 8, 9, 10], [0, 11, 12]]
    assert max(map(len, read(view, [" ".join(["w1"] * 200)]))) == view.n_ctx
    without = with_tokenizer(tiny.tokenizer(bos=False))
    assert read(without, [text], window=5) == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]
    # a chat's begin token stands again at the head of the next window
    assert read(chatting(), [CHAT], window=5) == [[0, 94, 3, 4, 1], [0, 95, 5, 1]]


def test_texts_are_read_only_as_far_as_they_are_used() -> None:
    view, notes = with_tokenizer(tiny.tokenizer()), []
    endless = (f"w{i % 90} w1" for i in itertools.count())
    assert read(view, endless, max_tokens=7, notes=notes.append) == [[0, 3, 4], [0, 4, 4], [0]]
    assert next(endless) == "w3 w1"  # the third text was begun, none after it
    assert notes == ["only the first 7 tokens were used (max_tokens)"]
    assert read(view, ["w0 w1", "w2"], max_tokens=5) == [[0, 3, 4], [0, 5]]  # all of them: nothing to say
    assert read(view, tokens=[[0, 3, 4], [0, 5]], max_tokens=4, notes=notes.append) == [[0, 3, 4], [0]]

    text, encoded = " ".join(f"w{i % 90}" for i in range(200_000)), []
    encode = type(view.tokenizer).encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(view.tokenizer), "encode", lambda self, part, **o: encoded.append(part) or encode(self, part, **o)
        )
        few = read(view, [text], max_tokens=200, notes=notes.append)
        assert sum(map(len, encoded)) < 20_000
    assert few == read(view, tokens=read(view, [text[:2000]]), max_tokens=200, notes=notes.append)


@pytest.mark.parametrize("text", ["one two, three. " * 400, "naïve 東京 🙂 " * 300, "x" * 5000])
def test_the_beginning_of_a_long_text_is_encoded_as_in_the_whole(text: str) -> None:
    """With a byte-pair encoding, whose tokens are no words: as many tokens as are wanted do not depend on the cut."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator(["one two three naïve 東京 🙂 xxxxxxxx"] * 5, vocab_size=400, show_progress=False)
    view = with_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner), d_vocab=400)
    whole = list(itertools.chain(*read(view, [text])))
    few = list(itertools.chain(*read(view, [text], max_tokens=50, notes=lambda line: None)))
    assert few == whole[:50]


def test_unusable_texts_are_refused() -> None:
    view = with_tokenizer(tiny.tokenizer())
    frame = pd.DataFrame({"text": ["w1"]})
    for texts, text in (
        ([], "expected at least one text, got none; pass texts or tokens="),
        (["w1", ""], "expected texts with a token or more, got an empty text at index 1; leave it out"),
        (["   "], "got an empty text at index 0"),
        (["<s>"], "got an empty text at index 0"),
        ([[]], "got an empty text at index 0"),
        ("w1 w2", r"expected a list of texts, got a single string; pass texts=\[text\]"),
        ([3], "expected texts to be strings or lists of .* messages, got int at index 0; pass strings"),
        ([[{"text": "w1"}]], "expected texts to be strings or lists of .* messages, got list at index 0"),
        ([{"text": "w1"}], "expected texts to be strings or lists of .* messages, got dict at index 0"),
        (frame, "expected a list of texts, got a DataFrame, which holds columns; pass the column with the texts, such"),
        ({"text": ["w1"]}, "expected a list of texts, got a dict, which holds columns; pass the column"),
        (torch.ones(2, 2), "expected a list of texts, got a Tensor; pass tokens="),
        ({"w1", "w2"}, "expected a list of texts, got a set, which has no order; pass a list or a generator"),
        (7, "expected a list of texts, got a int, .*; pass a list or a generator"),
        (CHAT, r"expected a list of texts, got the messages of a single chat; pass texts=\[messages\]"),
        (["w1", "w2 \ud800"], "expected texts that the model's tokenizer reads, got .* for the text at index 1; leave"),
        (["w1", CHAT], "expected a tokenizer with a chat template .* index 1, got one without; pass strings"),
    ):
        with pytest.raises(ValueError, match=text):
            read(view, texts)
    assert read(view, frame["text"]) == [[0, 4]]
    with pytest.raises(ValueError, match="expected a model with a tokenizer to read texts, .* has none; pass tokens="):
        read(with_tokenizer(None), ["w1"])
    with pytest.raises(ValueError, match="expected texts or tokens, got both; pass one of them"):
        read(view, ["w1"], tokens=tiny.tokens())
    for window in (1, 65):
        with pytest.raises(
            ValueError, match=rf"expected a window from 2 to 64 tokens \(the context\), got {window}; p"
        ):
            read(view, ["w1"], window=window)
    for most in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"expected max_tokens >= 1, got {most}; pass None to use every token"):
            read(view, ["w1"], max_tokens=most)


def test_a_chat_that_the_template_refuses_is_named() -> None:
    view = chatting("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match=r"got TemplateError \(roles must alternate\) for the messages at index 1; pass"
    ):
        read(view, ["w1", CHAT])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    view = with_tokenizer(tiny.tokenizer(), d_vocab=90)
    assert read(view, ["w86"]) == [[0, 89]]
    with pytest.raises(
        ValueError, match="expected token ids from 0 to 89, got 90 from the tokenizer for the text at i"
    ):
        read(view, ["w1", "w87"])


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_pad_on_the_right_and_lose_nothing() -> None:
    sequences = [torch.arange(1, n + 1) for n in (3, 5, 2, 4, 1)]
    got = list(batches(sequences, 2))
    assert [tuple(t.shape) for t, _ in got] == [(2, 5), (2, 4), (1, 1)]
    assert got[0][0].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert got[0][1].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    found = [t[i][m[i]] for t, m in got for i in range(len(t))]
    assert all(torch.equal(a, b) for a, b in zip(found, sequences, strict=True))
    with pytest.raises(ValueError, match="expected a batch_size of at least 1, got 0; pass batch_size=8"):
        next(batches(sequences, 0))


def test_fingerprint_depends_on_the_vocabulary_alone() -> None:
    assert vocabulary_fingerprint(tiny.tokenizer()) == vocabulary_fingerprint(tiny.tokenizer(bos=False))
    other = tiny.tokenizer((*tiny.WORDS[:-1], "other"), name="other")
    assert vocabulary_fingerprint(tiny.tokenizer()) != vocabulary_fingerprint(other)
