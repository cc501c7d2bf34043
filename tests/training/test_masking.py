"""Masked-language-model targets: shares, and what they depend on."""

import pytest
import torch

from tl_asymmetry.training.masking import mask_tokens

SPECIAL = (0, 1)


def sequence(length=4000, seed=0):
    tokens = torch.randint(10, 90, (length,), generator=torch.Generator().manual_seed(seed))
    tokens[0], tokens[-1] = SPECIAL
    return tokens


def test_shares_of_bert():
    tokens = sequence(40_000)
    inputs, targets = mask_tokens(tokens, mask_token=2, d_vocab=100, special=SPECIAL)
    assert int(targets.sum()) == round(0.15 * 39_998)
    assert not targets[0]
    assert not targets[-1]
    assert torch.equal(inputs[~targets], tokens[~targets])
    masked = (inputs[targets] == 2).float().mean()
    kept = (inputs[targets] == tokens[targets]).float().mean()
    assert masked.item() == pytest.approx(0.8 + 0.1 / 100, abs=0.02)
    assert kept.item() == pytest.approx(0.1 + 0.1 / 100, abs=0.02)


def test_depends_on_sequence_and_seed_alone(unchecked_types):
    state = torch.random.get_rng_state()
    a, b = (mask_tokens(sequence(), mask_token=2, d_vocab=100, special=SPECIAL) for _ in range(2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    other_seed = mask_tokens(sequence(), mask_token=2, d_vocab=100, special=SPECIAL, seed=1)
    other_tokens = mask_tokens(sequence(seed=1), mask_token=2, d_vocab=100, special=SPECIAL)
    assert not torch.equal(a[1], other_seed[1])
    assert not torch.equal(a[1], other_tokens[1])
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_short_sequence_has_one_target():
    _, targets = mask_tokens(torch.tensor([0, 50, 1]), mask_token=2, d_vocab=100, special=SPECIAL)
    assert targets.tolist() == [False, True, False]


@pytest.mark.parametrize("share", [0.0, 1.5, -0.1])
def test_refuses_shares(share):
    with pytest.raises(ValueError, match="expected a share above 0 and at most 1"):
        mask_tokens(sequence(), mask_token=2, d_vocab=100, share=share)


def test_refuses_nothing_to_guess():
    with pytest.raises(ValueError, match="expected a sequence with a token that is not special"):
        mask_tokens(torch.tensor([0, 1]), mask_token=2, d_vocab=100, special=SPECIAL)
