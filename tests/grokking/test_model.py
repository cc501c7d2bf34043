"""One function in four forms: torch's own encoder, the plain module, HookedTransformer, Bridge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.oracles.reference_grokking import lens_weights, seeded
from tl_asymmetry import ModelView
from tl_asymmetry.grokking import GrokShape, GrokTransformer, ModularArithmetic, bridge_model, hooked_model
from tl_asymmetry.grokking.model import shape_of

PAIRS = torch.tensor([[3, 90], [0, 0], [96, 1], [5, 5]])
FORMS = [
    pytest.param(
        hooked_model, marks=pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="no HookedTransformer"), id="hooked"
    ),
    pytest.param(bridge_model, id="bridge"),
]


def scrambled(model, seed=0):
    """Random gains, biases and distinct layers, so that nothing agrees because it is zero, one or equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("seed", [42, 137])
def test_initial_weights_are_those_of_the_published_modules(seed):
    ours, theirs = GrokTransformer(seed=seed).state_dict(), lens_weights(seeded(seed))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert sum(w.numel() for w in ours.values()) == 290_401


def test_initial_weights_with_several_heads():
    theirs = lens_weights(seeded(7, p=11, d=16, d_mlp=24, outputs=3))
    shape = GrokShape(p=11, heads_out=3, d_model=16, d_mlp=24)
    for name, value in GrokTransformer(shape, seed=7).state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_theta_is_131072_numbers():
    weights = GrokTransformer().attention_parameters()
    assert list(weights)[:2] == ["blocks.0.attn.W_Q", "blocks.0.attn.W_K"]
    assert sum(w.numel() for w in weights.values()) == 131_072


def test_logits_and_gradients_equal_the_published_modules():
    theirs = seeded(3, p=97, outputs=2).double()
    scrambled(theirs)
    ours = GrokTransformer(GrokShape(heads_out=2)).double()
    ours.load_state_dict(lens_weights(theirs))
    targets = torch.tensor([[1, 2], [3, 4], [5, 6], [96, 0]])
    for model in (ours, theirs):
        logits = model(PAIRS)
        (F.cross_entropy(logits[:, 0], targets[:, 0]) + F.cross_entropy(logits[:, 1], targets[:, 1])).backward()
    torch.testing.assert_close(ours(PAIRS), theirs(PAIRS), rtol=1e-10, atol=1e-12)
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    gradients = lens_weights(theirs)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_equal_transformer_lens(form):
    ours = scrambled(GrokTransformer(GrokShape(heads_out=2), seed=1))
    theirs = form(ours).to(torch.float64)
    ours = ours.double()
    targets = torch.tensor([5, 100, 193, 7])
    logits = theirs(PAIRS)[:, 0]
    expected = ours(PAIRS).flatten(1)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    F.cross_entropy(logits, targets).backward()
    F.cross_entropy(expected, targets).backward()
    view = ModelView(theirs)
    assert not view.causal
    gradient = ours.blocks[1].attn.W_Q.grad
    if form is hooked_model:
        found = theirs.blocks[1].attn.W_Q.grad
    else:
        found = theirs.blocks[1].attn.q.weight.grad.view(4, 32, 128).mT
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    for matrix in ("W_Q", "W_K", "W_V", "W_O"):
        torch.testing.assert_close(view.weight(0, matrix), getattr(ours.blocks[0].attn, matrix).detach())
    assert view.self_check(PAIRS) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_position_0_sees_position_1(form):
    model = form(scrambled(GrokTransformer(seed=2)))
    first, second = model(torch.tensor([[4, 10], [4, 11]]))[:, 0]
    assert (first - second).abs().max() > 1e-2


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state()
    model = GrokTransformer(seed=5)
    bridge_model(model)
    if tiny.HOOKED_AVAILABLE:
        hooked_model(model)
    assert torch.equal(before, torch.get_rng_state())


def test_shape():
    task = ModularArithmetic(("add", "sub"), p=11)
    assert shape_of(task, {"d_model": 64}) == GrokShape(p=11, heads_out=2, d_model=64)
    with pytest.raises(ValueError, match="expected n_heads to divide d_model = 30, got 4"):
        GrokShape(d_model=30)
