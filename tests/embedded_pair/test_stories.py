"""The story generator, the tokenizer and the scorer."""

import random
from itertools import islice

import pytest
import torch

from benchmarks.embedded_pair.encoding import encode_stories
from benchmarks.embedded_pair.preferences import ending_score
from benchmarks.embedded_pair.stories import stories
from tl_asymmetry.demo import demo_texts, demo_tokenizer
from tl_asymmetry.demo.tokenizer import SPECIALS

# The stories call many small functions; checking the types of each call takes ten times as long as the story.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def take(n, **options):
    return list(islice(stories(**options), n))


def test_equal_seeds_give_equal_stories_and_the_global_state_stays():
    before = random.getstate()
    first = take(50, seed=3, split="train")
    random.random()
    assert first == take(50, seed=3, split="train")
    assert first != take(50, seed=4, split="train")
    random.setstate(before)
    take(50, seed=3, split="held_out")
    assert random.getstate() == before


def test_no_opening_is_in_both_splits():
    train = {story.setup for story in take(3000, seed=0, split="train")}
    held_out = {story.setup for story in take(300, seed=0, split="held_out")}
    assert not train & held_out


def test_stories_vary():
    told = take(1000, seed=0, split="train")
    assert len({story.text for story in told}) > 990
    assert len({word for story in told for word in story.text.lower().split()}) > 400
    shares = {mood: sum(story.mood == mood for story in told) / len(told) for mood in ("happy", "neutral", "sad")}
    assert all(0.15 < share < 0.55 for share in shares.values())


def test_the_opening_tells_nothing_of_the_end_but_makes_it_likelier():
    told = [story for story in take(4000, seed=0, split="train") if "There was a contest" in story.setup]
    share = {}
    for diligent in (True, False):
        group = [s for s in told if ("practised every day" in s.setup or "worked hard" in s.setup) == diligent]
        share[diligent] = sum(story.mood == "happy" for story in group) / len(group)
    assert 0.1 < share[False] < share[True] - 0.1 < 0.8


def test_the_score_agrees_with_the_meaning():
    told = take(2000, seed=0, split="train")
    sign = {"happy": 1, "neutral": 0, "sad": -1}
    agree = [
        (ending_score(story.resolution) > 0) - (ending_score(story.resolution) < 0) == sign[story.mood]
        for story in told
    ]
    assert all(agree)


def test_a_bad_split_is_refused():
    with pytest.raises(ValueError, match="expected split 'train' or 'held_out', got 'test'; pass one of the two"):
        stories(seed=0, split="test")


def test_the_tokenizer_goes_there_and_back():
    tokenizer = demo_tokenizer()
    for text in demo_texts(200, seed=5):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.encode(tokenizer.decode(ids[1:])) == ids
    assert [tokenizer.convert_tokens_to_ids(special) for special in SPECIALS] == [0, 1, 2, 3]
    assert tokenizer.encode("Mira zzz")[1:] == [tokenizer.convert_tokens_to_ids("mira"), tokenizer.unk_token_id]


def test_every_story_fits_the_context():
    tokenizer = demo_tokenizer()
    texts = [story.text for split in ("train", "held_out") for story in take(5000, seed=9, split=split)]
    assert max(len(row) for row in tokenizer(texts)["input_ids"]) + 1 <= tokenizer.model_max_length - 8


def test_batches_mask_padding_and_prompts():
    tokenizer = demo_tokenizer()
    told = take(4, seed=0, split="held_out")
    whole = encode_stories(tokenizer, [story.text for story in told], length=112)
    part = encode_stories(tokenizer, [story.text for story in told], prompts=[story.setup for story in told])
    assert whole.tokens.shape == (4, 112)
    for i, story in enumerate(told):
        n = len(tokenizer.encode(story.text)) + 1
        start = len(tokenizer.encode(story.setup))
        assert whole.mask[i].nonzero().flatten().tolist() == list(range(1, n))
        assert part.mask[i].nonzero().flatten().tolist() == list(range(start, n))
        assert whole.tokens[i, n - 1] == tokenizer.eos_token_id
        assert bool((whole.tokens[i, n:] == tokenizer.pad_token_id).all())
        assert tokenizer.decode(part.tokens[i, part.mask[i]][:-1]) == tokenizer.decode(
            tokenizer.encode(story.resolution)[1:]
        )
    assert whole.mask.dtype == torch.bool
    with pytest.raises(ValueError, match=r"expected stories of at most 20 tokens, got one of \d+; pass shorter texts"):
        encode_stories(tokenizer, [told[0].text], length=20)
