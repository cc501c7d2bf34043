"""The objectives against formulas written out in float64."""

import pytest
import torch
from torch import nn

from tl_asymmetry.training.objectives import (
    DPO,
    CrossEntropy,
    PreferenceBatch,
    TokenBatch,
    next_token_logits,
    sequence_log_probs,
)

VOCABULARY = 11


class Toy(nn.Module):
    """Logits from a table of the current token and its position; enough to have gradients everywhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64))
        self.place = nn.Parameter(torch.randn(9, VOCABULARY, generator=generator, dtype=torch.float64))

    def forward(self, tokens):
        return self.table[tokens] + self.place[: tokens.shape[1]]


def rows(seed: int, n: int = 5, length: int = 7) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (n, length), generator=generator)
    mask = torch.rand(n, length, generator=generator) < 0.6
    mask[:, 3] = True
    return TokenBatch(tokens, mask)


def naive_log_prob(model, tokens, mask, i) -> float:
    total = 0.0
    probabilities = model(tokens[i : i + 1])[0].detach().exp()
    for t in range(1, tokens.shape[1]):
        if mask[i, t]:
            total += float(torch.log(probabilities[t - 1, tokens[i, t]] / probabilities[t - 1].sum()))
    return total


def test_sequence_log_probs_add_up_the_counted_tokens():
    model, batch = Toy(0), rows(1)
    expected = [naive_log_prob(model, batch.tokens, batch.mask, i) for i in range(5)]
    torch.testing.assert_close(sequence_log_probs(model, batch).tolist(), expected, atol=1e-12, rtol=1e-12)


def test_dpo_against_the_formula():
    policy, reference, β = Toy(0), Toy(1), 0.3
    chosen, rejected = rows(2), rows(3, length=8)
    margins = []
    for i in range(5):
        ratio_c = naive_log_prob(policy, chosen.tokens, chosen.mask, i)
        ratio_c -= naive_log_prob(reference, chosen.tokens, chosen.mask, i)
        ratio_r = naive_log_prob(policy, rejected.tokens, rejected.mask, i)
        ratio_r -= naive_log_prob(reference, rejected.tokens, rejected.mask, i)
        margins.append(β * (ratio_c - ratio_r))
    expected = sum(-torch.log(1 / (1 + torch.exp(-torch.tensor(m, dtype=torch.float64)))) for m in margins) / 5
    objective, batch = DPO(reference, beta=β), PreferenceBatch(chosen, rejected)
    torch.testing.assert_close(objective.margins(policy, batch).tolist(), margins, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(objective(policy, batch), expected, atol=1e-12, rtol=1e-12)


def test_dpo_gradient_goes_into_the_policy_only():
    policy, reference = Toy(0), Toy(1)
    DPO(reference)(policy, PreferenceBatch(rows(2), rows(3))).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in policy.parameters())
    assert all(p.grad is None for p in reference.parameters())


def test_dpo_of_the_reference_itself_is_log_two_with_a_gradient():
    model = Toy(0)
    loss = DPO(model)(model, PreferenceBatch(rows(2), rows(3)))
    assert loss.item() == pytest.approx(0.6931471805599453)
    loss.backward()
    assert bool(model.table.grad.abs().sum() > 0)


def test_dpo_is_finite_for_huge_margins():
    class Scaled(Toy):
        def forward(self, tokens):
            return 1e4 * super().forward(tokens)

    loss = DPO(Toy(1), beta=10.0)(Scaled(0), PreferenceBatch(rows(2), rows(3)))
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.1), (0.7, 0.3)])
def test_cross_entropy_against_the_formula(temperature, smoothing):
    model, batch = Toy(0), rows(4)
    losses = []
    for i in range(5):
        log_p = torch.log_softmax(model(batch.tokens[i : i + 1])[0] / temperature, -1)
        for t in range(1, 7):
            if batch.mask[i, t]:
                hit = -log_p[t - 1, batch.tokens[i, t]]
                losses.append((1 - smoothing) * hit + smoothing * -log_p[t - 1].mean())
    loss = CrossEntropy(temperature, smoothing)(model, batch)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-12, rtol=1e-12)


def test_what_the_mask_leaves_out_changes_nothing():
    model, batch = Toy(0), rows(5)
    padded = TokenBatch(
        torch.cat([batch.tokens, torch.full((5, 2), 3)], 1),
        torch.cat([batch.mask, torch.zeros(5, 2, dtype=torch.bool)], 1),
    )
    torch.testing.assert_close(CrossEntropy()(model, padded), CrossEntropy()(model, batch))


def test_half_precision_logits_are_widened():
    model = Toy(0)
    batch = rows(6)
    half = lambda tokens: model(tokens).bfloat16()  # noqa: E731
    assert next_token_logits(half, batch.tokens).dtype == torch.float32
    assert CrossEntropy()(half, batch).dtype == torch.float32
    assert CrossEntropy()(model, batch).dtype == torch.float64


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input_is_refused_with_what_to_pass():
    tokens = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected tokens and mask of one shape .*pass one mask entry per token"):
        TokenBatch(tokens, mask[:, :3])
    with pytest.raises(ValueError, match="expected a boolean mask, got torch.float32; pass mask.bool()"):
        TokenBatch(tokens, mask.float())
    only_first = torch.tensor([[True, False, False, False]] * 2)
    with pytest.raises(ValueError, match=r"expected at least one target per row .*pass mask=True"):
        TokenBatch(tokens, only_first)
    with pytest.raises(ValueError, match=r"expected as many chosen rows as rejected, got 2 and 1; pass one"):
        PreferenceBatch(TokenBatch(tokens, mask), TokenBatch(tokens[:1], mask[:1]))
    with pytest.raises(ValueError, match=r"expected temperature > 0, got 0.0; pass 1.0"):
        CrossEntropy(temperature=0.0)
    with pytest.raises(ValueError, match=r"expected 0 <= label_smoothing < 1, got 1.0; pass 0.0"):
        CrossEntropy(label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"expected beta > 0, got -1.0; pass 0.1"):
        DPO(Toy(0), beta=-1.0)
    with pytest.raises(ValueError, match=r"expected logits \[batch, pos, vocab\] .*pass a model that maps"):
        next_token_logits(lambda tokens: tokens, tokens)
