"""Whatever holds the data becomes the same batches."""

import pytest
import torch

from benchmarks.embedded_pair.encoding import encode_preferences
from tests import tiny
from tl_asymmetry import ModelView
from tl_asymmetry.demo import demo_model, demo_preferences, demo_tokenizer
from tl_asymmetry.objectives import PreferenceBatch, TokenBatch
from tl_asymmetry.training.data import as_batches, rebatched, shuffled

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def view(**options):
    model = tiny.toy("plain", tiny.KINDS[0])
    words = (*tiny.WORDS[:-2], "user", "assistant")
    model.tokenizer = tiny.tokenizer(words, **options)
    return ModelView(model)


def words(n, start=0):
    return " ".join(f"w{i}" for i in range(start, start + n))


def read(data, kind=PreferenceBatch, of=None, **options):
    return as_batches(of or view(), data, kind, **{"note": pytest.fail, "warn": pytest.fail, **options})


def spoken(batch, tokenizer):
    return [
        tokenizer.decode(row[mask]).strip()
        for row, mask in zip(batch.tokens, batch.mask, strict=True)
    ]  # fmt: skip


def test_the_embedded_preferences_are_read_as_the_build_reads_them():
    pairs = demo_preferences(6)
    expected = encode_preferences(demo_tokenizer(), pairs)
    (batch,) = read(pairs, of=ModelView(demo_model("base")))
    for ours, theirs in ((batch.chosen, expected.chosen), (batch.rejected, expected.rejected)):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.mask, theirs.mask)


@pytest.mark.parametrize("form", ["mappings", "dataset", "implicit"])
def test_preference_columns(form):
    rows = [
        {"prompt": words(3), "chosen": f" {words(2, 10)}", "rejected": f" {words(3, 20)}"},
        {"prompt": words(2), "chosen": f" {words(4, 30)}", "rejected": f" {words(1, 40)}"},
    ]
    data = rows
    if form == "dataset":
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
    if form == "implicit":
        data = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in rows]
    of = view()
    (batch,) = read(data, of=of)
    assert spoken(batch.chosen, of.tokenizer) == ["w10 w11 </s>", "w30 w31 w32 w33 </s>"]
    assert spoken(batch.rejected, of.tokenizer) == ["w20 w21 w22 </s>", "w40 </s>"]
    assert batch.chosen.tokens[0, :4].tolist() == of.tokenizer.convert_tokens_to_ids(["<s>", "w0", "w1", "w2"])
    texts = read(data, TokenBatch, of=of)
    assert torch.equal(texts[0].tokens, batch.chosen.tokens)
    assert torch.equal(texts[0].mask, batch.chosen.mask)


@pytest.mark.parametrize("form", ["explicit", "implicit"])
def test_conversations(form):
    of = view(chat_template=CHAT, name="data_chat")
    question = [{"role": "user", "content": words(2)}]
    answers = [[{"role": "assistant", "content": words(2, s)}] for s in (10, 20)]
    row = {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
    if form == "implicit":
        row = {"chosen": question + answers[0], "rejected": question + answers[1]}
    notes = []
    (batch,) = read([row], of=of, note=notes.append)
    assert spoken(batch.chosen, of.tokenizer) == ["w10 w11 </s>"]
    assert spoken(batch.rejected, of.tokenizer) == ["w20 w21 </s>"]
    (texts,) = read([{"messages": question + answers[0]}], TokenBatch, of=of, note=notes.append)
    assert {int(batch.chosen.tokens[0, 0]), int(texts.tokens[0, 0])} == {of.tokenizer.bos_token_id}
    assert len(notes) == 2
    assert all("the chat template sets no begin-of-sequence token" in note for note in notes)
    assert texts.tokens.shape == batch.chosen.tokens.shape


def test_texts_and_completions():
    of = view()
    (batch,) = read([words(3), words(5)], TokenBatch, of=of)
    assert batch.mask.sum(1).tolist() == [3, 5]
    assert not batch.mask[:, 0].any()
    (columns,) = read([{"text": words(3)}, {"text": words(5)}], TokenBatch, of=of)
    assert torch.equal(columns.tokens, batch.tokens)
    (completed,) = read([{"prompt": words(2), "completion": f" {words(2, 8)}"}], TokenBatch, of=of)
    assert spoken(completed, of.tokenizer) == ["w8 w9 </s>"]
    assert [len(b) for b in read([words(3)] * 5, TokenBatch, of=of, batch_size=2)] == [2, 2, 1]


def test_what_is_too_long_is_cut_or_left_out_and_said():
    notes = []
    rows = [
        {"prompt": words(3), "chosen": f" {words(9, 10)}", "rejected": f" {words(2, 20)}"},
        {"prompt": words(20), "chosen": f" {words(2, 30)}", "rejected": f" {words(2, 40)}"},
    ]
    of = view()
    (batch,) = as_batches(of, rows, PreferenceBatch, max_length=8, note=pytest.fail, warn=notes.append)
    assert len(batch) == 1
    assert spoken(batch.chosen, of.tokenizer) == ["w10 w11 w12 w13"]
    assert any("were cut at 8 tokens" in note for note in notes)
    assert "1 of 2 rows were left out: the prompt leaves no room for a token to predict" in notes


def test_ready_batches_pass_through():
    tokens = tiny.tokens(3, 6)
    batch = TokenBatch(tokens, tokens > 0)
    pair = PreferenceBatch(batch, batch)
    assert read([batch], TokenBatch) == [batch]
    assert read(pair) == [pair]
    assert read([pair], TokenBatch)[0] is batch


def test_token_ids_are_batches():
    tokens, of = tiny.tokens(3, 6), view()
    tokens[:, 0] = of.tokenizer.bos_token_id
    (batch,) = read(tokens, TokenBatch, of=of)
    assert torch.equal(batch.tokens, tokens)
    assert batch.mask.sum() == 15
    encoded = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
    encoded["attention_mask"][0, :2] = 0  # padding on the left
    encoded["labels"][:, :4] = -100  # completions alone
    (batch,) = read([encoded], TokenBatch, of=of)
    assert batch.tokens[0, :4].tolist() == tokens[0, 2:].tolist()
    assert batch.mask.tolist() == [[False] * 2 + [True] * 2 + [False] * 2] + [[False] * 4 + [True] * 2] * 2
    with pytest.raises(
        ValueError, match="expected labels of the shape of input_ids, .* in batch 0; pass one entry per"
    ):
        read([{"input_ids": tokens, "labels": tokens[:1]}], TokenBatch, of=of)


def test_labels_of_good_and_bad_answers_are_not_ignored():
    rows = [{"prompt": words(2), "completion": f" {words(2, 8)}", "label": False}]
    with pytest.raises(
        ValueError, match="got a column label in row 0, as KTO has for good and bad answers; pass the rows"
    ):
        read(rows, TokenBatch)


def test_rebatched_keeps_rows_and_their_order():
    short, long = tiny.tokens(3, 5, seed=1), tiny.tokens(4, 9, seed=2)
    batches = [TokenBatch(short, short > 0), TokenBatch(long, long > 0)]
    again = rebatched(batches, 2)
    assert [len(b) for b in again] == [2, 2, 2, 1]
    rows = [row[mask] for b in again for row, mask in zip(b.tokens, b.mask, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(rows, [*short, *long], strict=True))
    pairs = rebatched([PreferenceBatch(batches[0], batches[0])], 2)
    assert [len(p) for p in pairs] == [2, 1]


def test_shuffled_passes_hold_every_row_once_in_an_order_of_the_seed():
    tokens = torch.arange(3, 3 + 14).view(7, 2)
    batch = TokenBatch(tokens, torch.tensor([[False, True]] * 7))
    stream = shuffled([batch], 3, seed=0)
    epochs = [[tuple(row.tolist()) for _ in range(2) for row in next(stream).tokens] for _ in range(3)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = shuffled([batch.rows(slice(0, 4)), batch.rows(slice(4, 7))], 3, seed=0)
    assert [tuple(row.tolist()) for _ in range(2) for row in next(again).tokens] == epochs[0]
    other = shuffled([batch], 3, seed=1)
    assert [tuple(row.tolist()) for _ in range(2) for row in next(other).tokens] != epochs[0]
    pairs = next(shuffled([PreferenceBatch(batch, batch)], 3, seed=0))
    assert [tuple(row.tolist()) for row in pairs.chosen.tokens] == epochs[0][:3]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (words(3), TokenBatch, r"expected batches, texts or rows of a dataset, got str; pass a list"),
        ({"train": []}, TokenBatch, r"got dict; pass a list of them \(one split of a DatasetDict\)"),
        ([], TokenBatch, "expected at least one batch, text or row, got none"),
        ([words(3)], PreferenceBatch, "expected columns prompt, chosen and rejected, got a text in row 0"),
        ([{"text": words(3)}], PreferenceBatch, "expected columns prompt, chosen and rejected, got text in row 0"),
        ([{"story": words(3)}], TokenBatch, "expected a column text, messages, completion or chosen, got story in"),
        ([3], TokenBatch, "expected rows with columns such as prompt, chosen, rejected, got int as row 0"),
        ([{"prompt": "w1", "chosen": [{"role": "user", "content": "w2"}], "rejected": "w3"}], PreferenceBatch,
         "expected prompt and continuation of one form|expected a tokenizer with a chat template"),
        ([{"messages": [{"role": "user", "content": "w2"}]}], TokenBatch, "expected a tokenizer with a chat template"),
    ],
)  # fmt: skip
def test_refusals(data, kind, message):
    with pytest.raises(ValueError, match=message):
        read(data, kind)


@pytest.mark.usefixtures("unchecked_types")
def test_sizes_out_of_range():
    with pytest.raises(ValueError, match="expected a batch_size of at least 1, got 0"):
        read([words(3)], TokenBatch, batch_size=0)
    with pytest.raises(ValueError, match="expected max_length from 2 to 64"):
        read([words(3)], TokenBatch, max_length=100)
    tokens = tiny.tokens(2, 5)
    with pytest.raises(ValueError, match=r"expected a batch_size from 1 to the number of rows \(2\), got 3"):
        next(shuffled([TokenBatch(tokens, tokens > 0)], 3, seed=0))
    model = tiny.toy("plain")
    with pytest.raises(ValueError, match="expected a model with a tokenizer to read texts"):
        read([words(3)], TokenBatch, of=ModelView(model))
