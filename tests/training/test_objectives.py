"""ORPO, InfoNCE and Mix against formulas written out, and what every objective says of itself."""

import math

import pytest
import torch

from tests import tiny
from tests.training.test_objective_formulas import Toy, naive_log_prob, rows
from tl_asymmetry import analyze_tangents, gradient_covariance
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.objectives import (
    DPO,
    ORPO,
    CrossEntropy,
    InfoNCE,
    Mix,
    Objective,
    PreferenceBatch,
    TokenBatch,
    objective_name,
)


def naive_orpo(model, batch, β, *, prompt):
    terms, nll, tokens = [], 0.0, 0
    for i in range(len(batch)):
        log_p = []
        for half in (batch.chosen, batch.rejected):
            count = sum(bool(half.mask[i, t]) for t in range(1, half.tokens.shape[1]))
            log_p.append(naive_log_prob(model, half.tokens, half.mask, i) / count)
        odds = [math.exp(x) / (1 - math.exp(x)) for x in log_p]
        terms.append(-math.log(1 / (1 + odds[1] / odds[0])))
        last = max(t for t in range(batch.chosen.tokens.shape[1]) if batch.chosen.mask[i, t])
        for t in range(1, last + 1):
            if prompt or batch.chosen.mask[i, t]:
                one = torch.zeros_like(batch.chosen.mask)
                one[i, t] = True
                nll -= naive_log_prob(model, batch.chosen.tokens, one, i)
                tokens += 1
    return nll / tokens + β * sum(terms) / len(terms)


@pytest.mark.parametrize("prompt", [True, False])
def test_orpo_against_the_formula(prompt):
    model, batch = Toy(0), PreferenceBatch(rows(2), rows(3, length=8))
    loss = ORPO(beta=0.4, prompt_loss=prompt)(model, batch)
    assert float(loss) == pytest.approx(naive_orpo(model, batch, 0.4, prompt=prompt), rel=1e-12)
    loss.backward()
    assert bool(model.table.grad.isfinite().all())


def test_orpo_stays_finite_near_certainty():
    class Certain(Toy):
        def forward(self, tokens):
            return 40 * torch.nn.functional.one_hot(tokens.roll(-1, 1), 11).double() * self.table.exp().mean()

    model, batch = Certain(0), PreferenceBatch(rows(2), rows(3))
    loss = ORPO()(model, batch)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(model.table.grad.isfinite().all())


def stream(model, tokens):
    """The residual stream after the last block, by TransformerLens's own cache."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return cache["blocks.1.hook_resid_post"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_info_nce_against_the_formula(kind):
    model = tiny.build("gpt2", kind, torch.float64)
    tokens = tiny.tokens(3, 11)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 8:] = False
    mask[1, :3] = False
    crops = []
    for i in range(3):
        counted = [t for t in range(1, 11) if mask[i, t]]
        middle, end = counted[len(counted) // 2], counted[-1] + 1
        first, second = tokens[i, :middle], torch.cat([tokens[i, :1], tokens[i, middle:end]])
        before = [t for t in counted if t < middle]
        pooled = [
            stream(model, first.unsqueeze(0))[0, before].mean(0),
            stream(model, second.unsqueeze(0))[0, 1:].mean(0),
        ]
        crops.append([h / h.norm() for h in pooled])
    expected = 0.0
    for i in range(3):
        scores = [math.exp(float(crops[i][0] @ crops[j][1]) / 0.2) for j in range(3)]
        expected -= math.log(scores[i] / sum(scores)) / 3
    loss = InfoNCE(temperature=0.2)(model, TokenBatch(tokens, mask))
    assert float(loss) == pytest.approx(expected, rel=1e-9)
    padded = TokenBatch(torch.nn.functional.pad(tokens, (0, 4), value=9), torch.nn.functional.pad(mask, (0, 4)))
    assert float(InfoNCE(temperature=0.2)(model, padded)) == pytest.approx(expected, rel=1e-9)
    lower = InfoNCE(temperature=0.2, layer=0)(ModelView(model), padded)
    assert abs(float(lower) - expected) > 1e-3


def test_mix_is_the_weighted_sum():
    model, batch = Toy(0), rows(4)
    mix = Mix([(0.25, CrossEntropy()), (0.5, CrossEntropy(temperature=3.0))])
    expected = 0.25 * CrossEntropy()(model, batch) + 0.5 * CrossEntropy(temperature=3.0)(model, batch)
    torch.testing.assert_close(mix(model, batch), expected)
    pairs = PreferenceBatch(rows(2), rows(3))
    assert Mix((0.25, CrossEntropy()), (0.5, CrossEntropy(temperature=3.0))) == mix
    assert Mix((1, CrossEntropy())) == Mix([(1, CrossEntropy())])
    both = Mix([(1, DPO(Toy(1))), (0.1, ORPO())])
    torch.testing.assert_close(both(model, pairs), DPO(Toy(1))(model, pairs) + 0.1 * ORPO()(model, pairs))
    assert both.passes == ("chosen", "rejected", "chosen", "rejected")
    assert (mix.additive, both.additive) == (True, False)
    assert (mix.count(batch), both.count(pairs)) == (CrossEntropy().count(batch), 5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(kind):
    model = tiny.build("gpt2", kind, torch.float64)
    tokens = tiny.tokens(3, 9)
    tokens[0, :2] = model.tokenizer.pad_token_id  # a real token here
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    expected = CrossEntropy()(model, batch)
    model.tokenizer.padding_side = "left"
    torch.testing.assert_close(CrossEntropy()(model, batch), expected)
    torch.testing.assert_close(CrossEntropy()(ModelView(model), batch), expected)
    margins = DPO(model).margins(ModelView(model), PreferenceBatch(batch, TokenBatch(tokens.flip(0), batch.mask)))
    assert bool((margins == 0).all())


# --- what they say of themselves ------------------------------------------------------------------------------------


def examples():
    return [CrossEntropy(), CrossEntropy(2.0, 0.1), DPO(Toy(1)), ORPO(), InfoNCE(), Mix([(1, CrossEntropy())])]


@pytest.mark.parametrize("objective", examples(), ids=objective_name)
def test_every_objective_keeps_the_protocol(objective):
    assert isinstance(objective, Objective)
    batch = rows(4) if objective.batch_type is TokenBatch else PreferenceBatch(rows(2), rows(3))
    weights = objective.token_weights(batch)
    assert len(weights) == len(objective.passes)
    assert objective.count(batch) >= 1


@pytest.mark.parametrize("objective", [CrossEntropy(), CrossEntropy(2.0, 0.1), DPO(Toy(1), 0.3)], ids=objective_name)
def test_loss_times_count_adds_up_over_batches(objective):
    assert objective.additive
    model = Toy(0)
    whole = rows(4, n=6) if objective.batch_type is TokenBatch else PreferenceBatch(rows(2, n=6), rows(3, n=6))
    parts = [whole.rows(slice(0, 2)), whole.rows(slice(2, 6))]
    total = sum(objective(model, part) * objective.count(part) for part in parts)
    torch.testing.assert_close(total, objective(model, whole) * objective.count(whole), rtol=1e-12, atol=1e-12)


def log_probs(model, batch):
    """Of every token given those before it, `[batch, pos]`; 0 at the first."""
    logits = model(batch.tokens).log_softmax(-1)
    later = logits[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(later, (1, 0))


def test_losses_are_functions_of_the_weighted_log_probabilities():
    model, reference = Toy(0), Toy(1)
    batch, pairs = rows(4), PreferenceBatch(rows(2), rows(3))
    (weights,) = CrossEntropy().token_weights(batch)
    torch.testing.assert_close((weights * log_probs(model, batch)).sum(), CrossEntropy()(model, batch))
    weights = DPO(reference, 0.3).token_weights(pairs)
    halves = (pairs.chosen, pairs.rejected)
    margins = sum(
        (w * (log_probs(model, half) - log_probs(reference, half))).sum(1)
        for w, half in zip(weights, halves, strict=True)
    )
    torch.testing.assert_close(margins, DPO(reference, 0.3).margins(model, pairs))
    for half, w in zip(halves, ORPO().token_weights(pairs), strict=True):
        assert w.sum(1).abs().tolist() == pytest.approx([1.0] * len(half))
    for w in InfoNCE().token_weights(batch):
        assert w.sum(1).tolist() == pytest.approx([1.0] * len(batch))


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    pairs, texts = PreferenceBatch(rows(2), rows(3)), rows(4)
    for objective, batch, message in (
        (CrossEntropy(), pairs, "expected a TokenBatch for CrossEntropy, got PreferenceBatch; pass texts"),
        (DPO(Toy(1)), texts, "expected a PreferenceBatch for DPO, got TokenBatch; pass prompts with a chosen"),
        (ORPO(), texts, "expected a PreferenceBatch for ORPO"),
        (InfoNCE(), texts.rows(slice(0, 1)), "expected two sequences or more for InfoNCE, got one"),
        (InfoNCE(), texts, "expected a HookedTransformer, a TransformerBridge or a model of transformers, got Toy;"),
        (Mix([(1, ORPO())]), texts, "expected a PreferenceBatch for this Mix"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(Toy(0), batch)
    single = torch.zeros(2, 4, dtype=torch.bool)
    single[:, 2] = True
    with pytest.raises(ValueError, match="expected two counted tokens or more in every row for InfoNCE"):
        InfoNCE()(tiny.toy(), TokenBatch(tiny.tokens(2, 4), single))
    for make, message in (
        (lambda: ORPO(beta=0), "expected beta > 0, got 0"),
        (lambda: InfoNCE(temperature=-1), "expected temperature > 0, got -1"),
        (lambda: Mix([]), "expected at least one part"),
        (lambda: Mix(), "expected at least one part"),
        (lambda: Mix([(0.0, CrossEntropy())]), r"expected weights > 0, got \[0.0\]"),
        (lambda: Mix([(1, CrossEntropy()), (1, ORPO())]), "expected parts that read one kind of batch"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("objective", [CrossEntropy(), Mix([(1.0, CrossEntropy())]), ORPO()])
def test_targets_that_the_model_cannot_predict_are_refused(objective):
    """A model that reads 16 tokens and predicts two."""

    def two_outputs(tokens):
        return torch.zeros(*tokens.shape, 2, dtype=torch.float64)

    half = TokenBatch(torch.tensor([[1, 0, 1], [1, 15, 0]]), torch.ones(2, 3, dtype=torch.bool))
    batch = PreferenceBatch(half, half) if objective.batch_type is PreferenceBatch else half
    with pytest.raises(
        ValueError, match="expected targets that the model can predict, tokens 0 to 1, got token 15; pass a"
    ):
        objective(two_outputs, batch)
    within = TokenBatch(half.tokens.clamp(max=1), half.mask)
    batch = PreferenceBatch(within, within) if objective.batch_type is PreferenceBatch else within
    assert bool(objective(two_outputs, batch).isfinite())


def test_gradients_and_tangents_refuse_them_in_the_same_words():
    if not tiny.HOOKED_AVAILABLE:
        pytest.skip("a Bridge's unembedding is as wide as its embedding")
    model = tiny.toy(d_vocab=16, d_vocab_out=2)
    tokens = tiny.tokens(16, 12) % 16
    message = "expected a model that predicts the tokens it reads, got 2 outputs for 16 tokens in 'custom'; pass a"
    with pytest.raises(ValueError, match=message):
        gradient_covariance(model, CrossEntropy(), [TokenBatch(tokens, torch.ones_like(tokens).bool())], progress=False)
    with pytest.raises(ValueError, match=message):
        analyze_tangents({0: model, 1: tiny.perturbed(model)}, tokens=tokens, rank=2, progress=False)
