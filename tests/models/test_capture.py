"""Groups to leave out: whole sequences in order, copies together."""

import pytest
import torch

from tests import tiny
from tl_asymmetry import analyze_pair, analyze_tangents, gradient_covariance
from tl_asymmetry.models.capture import balanced_groups, copies, copies_noted, group_numbers
from tl_asymmetry.objectives import CrossEntropy, TokenBatch


def sequences(*rows: str) -> list[torch.Tensor]:
    return [torch.tensor([0, *map(ord, row)]) for row in rows]


def test_what_is_a_copy():
    assert copies(sequences("abcd", "efgh", "abcd", "xbcd")) == [0, 1, 0, 2]
    assert copies(sequences("abcdef", "abcdxy", "abxxyz", "abcd")) == [0, 0, 1, 0]  # more than half from the beginning
    assert copies(sequences("a", "b", "a")) == [0, 1, 0]  # the begin token alone is no prompt
    assert copies_noted(sequences("abc", "def")) is None
    assert copies_noted(sequences("abc", "def", "abc", "abc")).startswith("2 of 4 sequences are copies of others")


def test_copies_stay_in_one_group_wherever_they_stand():
    rows = sequences("aaaa", "bbbb", "aaaa", "cccc", "dddd", "aaaa")
    numbers = group_numbers(rows, 3)
    assert numbers[0] == numbers[2] == numbers[5] == 0
    assert set(numbers) == {0, 1, 2}
    assert sorted(map(len, balanced_groups(rows, 3))) == [1, 2, 3]
    assert group_numbers(sequences(*"abcdef"), 3) == [0, 0, 1, 1, 2, 2]
    assert group_numbers(sequences("ab", "ab", "ab"), 8) == [0, 0, 0]


def test_copies_of_one_text_give_no_interval():
    base, aligned = tiny.toy("plain", "bridge"), tiny.toy("plain", "bridge", seed=1)
    one = tiny.tokens(1, 12).repeat(8, 1)
    with pytest.warns(UserWarning, match="7 of 8 sequences are copies of others"):
        result = analyze_pair(base, aligned, tokens=one, ranks=[4], progress=False)
    assert result.table["ci_low"].isna().all()
    batch = TokenBatch(torch.cat([one, tiny.tokens(6, 12, seed=1)]), torch.ones(14, 12, dtype=torch.bool))
    parts = [batch.rows(slice(0, 9)), batch.rows(slice(9, 14))]
    with pytest.warns(UserWarning, match="7 of 14 sequences are copies of others"):
        found = gradient_covariance(base, CrossEntropy(), parts, progress=False)
    plain = gradient_covariance(base, CrossEntropy(), [batch], groups=1, progress=False)
    torch.testing.assert_close(found.gradient_moment(0, "W_O"), plain.gradient_moment(0, "W_O"), rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="an unembedding of another size is HookedTransformer's")
def test_a_model_whose_outputs_are_not_its_inputs_is_refused():
    model = tiny.toy("plain", "hooked", d_vocab_out=2)
    text = "expected a model that predicts the tokens it reads, got 2 outputs for 96 tokens"
    with pytest.raises(ValueError, match=text):
        gradient_covariance(model, CrossEntropy(), [tiny.tokens(2, 6)], progress=False)
    with pytest.raises(ValueError, match=text):
        analyze_tangents(model, tokens=tiny.tokens(4, 12), rank=2, strata=0, progress=False)
