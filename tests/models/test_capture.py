"""Groups to leave out: whole sequences in order, copies together."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tl_asymmetry import analyze_pair, analyze_tangents, gradient_covariance
from tl_asymmetry.models import capture as capture_module
from tl_asymmetry.models.capture import balanced_groups, capture, copies, copies_noted, group_numbers
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.objectives import CrossEntropy, TokenBatch


def sequences(*rows: str) -> list[torch.Tensor]:
    return [torch.tensor([0, *map(ord, row)]) for row in rows]


def test_what_is_a_copy():
    assert copies(sequences("abcd", "efgh", "abcd", "xbcd")) == [0, 1, 0, 2]
    assert copies(sequences("abcdef", "abcdxy", "abxxyz", "abcd")) == [0, 0, 1, 0]  # more than half from the beginning
    assert copies(sequences("abcdef", "abcxyz")) == [0, 1]  # half is not more than half
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
    exact = base.double()
    with pytest.warns(UserWarning, match="7 of 14 sequences are copies of others"):
        found = gradient_covariance(exact, CrossEntropy(), parts, progress=False)
    plain = gradient_covariance(exact, CrossEntropy(), [batch], groups=1, progress=False)
    torch.testing.assert_close(found.gradient_moment(0, "W_O"), plain.gradient_moment(0, "W_O"), rtol=1e-9, atol=1e-15)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="an unembedding of another size is HookedTransformer's")
def test_a_model_whose_outputs_are_not_its_inputs_is_refused():
    model = tiny.toy("plain", "hooked", d_vocab_out=2)
    text = "expected a model that predicts the tokens it reads, got 2 outputs for 96 tokens"
    with pytest.raises(ValueError, match=text):
        gradient_covariance(model, CrossEntropy(), [tiny.tokens(2, 6)], progress=False)
    with pytest.raises(ValueError, match=text):
        analyze_tangents(model, tokens=tiny.tokens(4, 12), rank=2, strata=0, progress=False)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers and shapes read off a tensor's entries."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.is_nonzero,
        )
        return func(*args, **(kwargs or {}))


def test_the_capture_makes_the_host_wait_no_more_than_a_bare_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked of a group's finished moments, which have left the device.
    monkeypatch.setattr(capture_module, "_check_size", lambda *_: None)
    view = ModelView(tiny.bridge("gpt2"))
    points = [(point, layer) for layer in range(view.n_layers) for point in ("attn_in", "resid_mid", "z")]
    with torch.no_grad(), Waits() as bare:
        for tokens in tiny.tokens(4).split(2):
            view.run(tokens, layers=view.n_layers)
    with Waits() as captured:
        capture(view, [list(tiny.tokens(4))], points, exclude_first=True, first_positions=True, batch_size=2,
                progress=False)  # fmt: skip
    assert captured.count <= bare.count
    with Waits() as seen:
        bool(torch.ones(2).sum() > 1)
    assert seen.count == 1
