"""Centroids against torch.func on the models' own forward."""

import pytest
import torch

from tests import tiny
from tests.oracles import reference_jacobians as reference
from tests.pair.test_pair_promises import state
from tl_asymmetry import ModelView, centroids
from tl_asymmetry.jacobians import local_centroids

T = 5
KIND = tiny.KINDS[0]
FAMILIES = [(a, k) for a in ("gpt2", "neox", "llama", "gemma2") for k in tiny.KINDS]


def logits_function(model, tokens, layer):
    """Logits `[pos, d_vocab]` by the stream entering a layer, by TransformerLens's own hooks; and that stream."""
    _, x = reference.part_function(model, tokens, layer, "block")

    def function(x):
        hooks = [(f"blocks.{layer}.hook_resid_pre", lambda value, hook: x.unsqueeze(0))]
        return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)[0]

    return function, x


def close(found, expected, tolerance=1e-9):
    return float((found - expected).abs().max() / expected.abs().max()) <= tolerance


@pytest.mark.parametrize(("architecture", "kind"), FAMILIES)
def test_model_and_parts(architecture, kind):
    model, tokens = tiny.build(architecture, kind, torch.float64), tiny.tokens(1, T)
    tolerance = 2e-6 if architecture in ("llama", "gemma2") and kind == "bridge" else 1e-9
    whole, x = logits_function(model, tokens, 0)
    gradient = torch.func.grad
    assert close(centroids(model, tokens=tokens)[0], gradient(lambda x: whole(x).sum())(x), tolerance)
    assert close(centroids(model, tokens=tokens, position=1)[0], gradient(lambda x: whole(x)[1].sum())(x), tolerance)
    first = int(whole(x)[-1].argmax())
    assert close(
        centroids(model, tokens=tokens, kind="logit")[0], gradient(lambda x: whole(x)[-1, first])(x), tolerance
    )
    y = torch.tensor([7])
    found = centroids(model, tokens=tokens, kind="logit", targets=y, position=0)[0]
    assert close(found, gradient(lambda x: whole(x)[0, 7])(x), tolerance)
    for part in ("block", "attn"):
        function, x1 = reference.part_function(model, tokens, 1, part)
        found = centroids(model, tokens=tokens, part=part, layer=1)[0]
        assert close(found, gradient(lambda x, f=function: f(x).sum())(x1), tolerance)
    later, x1 = logits_function(model, tokens, 1)
    found = centroids(model, tokens=tokens, part="block", layer=-1, kind="logit", targets=y)[0]
    assert close(found, gradient(lambda x: later(x)[-1, 7])(x1), tolerance)


@pytest.mark.parametrize("architecture", ["gpt2", "llama" if tiny.HOOKED_AVAILABLE else "neox"])
def test_mlp_is_the_jacobian_times_ones(architecture):
    from tl_asymmetry import layer_jacobians

    model, tokens = tiny.build(architecture, KIND, torch.float64), tiny.tokens(2, T)
    J = layer_jacobians(model, tokens=tokens, layers=[1], part="mlp", reduce=None, progress=False).per_token(1)
    torch.testing.assert_close(centroids(model, tokens=tokens, part="mlp", layer=1), J.sum(-2), rtol=1e-9, atol=1e-11)


def test_values_in_the_place_of_tokens():
    model, tokens = tiny.build("gpt2", KIND, torch.float64), tiny.tokens(2, T)
    for part, layer in (("model", None), ("block", 1)):
        x = torch.cat([reference.part_function(model, row[None], layer or 0, "block")[1][None] for row in tokens])
        by_values = centroids(model, values=x, part=part, layer=layer)
        torch.testing.assert_close(
            by_values, centroids(model, tokens=tokens, part=part, layer=layer), rtol=1e-9, atol=1e-11
        )


def test_local_centroid_is_a_seeded_mean():
    model, tokens = tiny.build("gpt2", KIND, torch.float64), tiny.tokens(2, T)
    function, _ = logits_function(model, tokens[:1], 0)
    one = centroids(model, tokens=tokens, noise=0.3, draws=3, seed=5)
    assert torch.equal(one, centroids(model, tokens=tokens, noise=0.3, draws=3, seed=5))
    assert not torch.equal(one, centroids(model, tokens=tokens, noise=0.3, draws=3, seed=6))
    generator = torch.Generator().manual_seed(5)
    x = torch.cat([reference.part_function(model, row[None], 0, "block")[1][None] for row in tokens])
    draws = [x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    expected = sum(torch.func.grad(lambda x: function(x).sum())(draw[0]) for draw in draws) / 3
    assert close(one[0], expected)
    assert torch.equal(centroids(model, tokens=tokens, noise=0.0, draws=1), centroids(model, tokens=tokens))


def test_of_any_function():
    A = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.func.jacrev(lambda x: torch.tanh(x @ A).sum(0))(x).sum(0)
    torch.testing.assert_close(local_centroids(lambda x: torch.tanh(x @ A), x), expected)
    first = local_centroids(lambda x: torch.tanh(x @ A), x, score=lambda out: out[:, 0].sum())
    torch.testing.assert_close(first, (1 - torch.tanh(x @ A)[:, :1].square()) * A[:, 0])
    assert not x.requires_grad


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_centroids_can_be_differentiated_by_the_weights(kind):
    """‖∂μ/∂θ · v‖ is what direction coupling needs: checked by a central difference of μ."""
    model, tokens = tiny.build("gpt2", kind, torch.float64), tiny.tokens(1, T)
    W = ModelView(model).weight(0, "W_out")
    name = next(
        n for n, p in model.named_parameters() if p.untyped_storage().data_ptr() == W.untyped_storage().data_ptr()
    )
    parameter = dict(model.named_parameters())[name]
    weights = torch.randn(1, T, tiny.D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = dict(kind="logit", targets=torch.tensor([4]), position=0)
    μ = centroids(model, tokens=tokens, create_graph=True, **options)
    (gradient,) = torch.autograd.grad((μ * weights).sum(), parameter)
    v = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * 1e-5 * v)
        values.append((centroids(model, tokens=tokens, **options) * weights).sum())
        with torch.no_grad():
            parameter.sub_(sign * 1e-5 * v)
    assert float((gradient * v).sum()) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-6)
    assert not centroids(model, tokens=tokens, **options).requires_grad


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_model_comes_back_as_it_was(kind):
    model, tokens = tiny.build("gpt2", kind), tiny.tokens(2, T)
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    ModelView(model).run(tokens)
    before = state(model)
    centroids(model, tokens=tokens, noise=0.1, draws=2)
    centroids(model, tokens=tokens, part="mlp", layer=0, create_graph=True)
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    interrupted = state(model)
    with pytest.raises(KeyboardInterrupt):
        centroids(model, tokens=tokens, kind="logit", noise=0.1)
    assert state(model) == interrupted
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "head"}, "expected a part among model, block, attn, mlp, got 'head'"),
        ({"part": "block"}, "expected a layer from 0 to 1, got None; pass layer= with part='block'"),
        ({"part": "mlp", "layer": 2}, "expected a layer from 0 to 1, got 2"),
        ({"layer": 0}, 'expected no layer with part "model", got 0; pass part="block" or leave it out'),
        ({"kind": "half"}, 'expected kind "full" or "logit", got \'half\'; pass kind="full"'),
        ({"position": T}, f"expected a position from 0 to {T - 1}, got {T}"),
        ({"targets": torch.tensor([1])}, "expected targets as 1 token ids with kind='logit', got .* with kind='full'"),
        ({"kind": "logit", "targets": torch.tensor([1, 2])}, "expected targets as 1 token ids with kind='logit'"),
        ({"kind": "logit", "targets": torch.tensor([96])}, "expected targets from 0 to 95, got 96 to 96"),
        ({"draws": 0}, "expected draws from 1 to 100,000, got 0; pass draws=1"),
        ({"noise": -1.0}, "expected noise >= 0, got -1.0; pass noise=0.0"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        centroids(tiny.build("gpt2", KIND), tokens=tiny.tokens(1, T), **options)


def test_what_is_no_score():
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match="expected a function whose output is a tensor, got a tuple of 2; pass score= as well"
    ):
        local_centroids(lambda x: (x, x), x)
    for wrong in (lambda out: out, lambda out: 3.0):
        with pytest.raises(ValueError, match="expected one number as the score, got .*; pass score= with a sum"):
            local_centroids(lambda x: x, x, score=wrong)


def test_bad_values():
    model = tiny.build("gpt2", KIND)
    with pytest.raises(ValueError, match=r"expected values .* got torch.float32 \[1, 3, 5\]"):
        centroids(model, values=torch.ones(1, 3, 5))
    with pytest.raises(ValueError, match="expected token ids from 0 to 95, got 96"):
        centroids(model, tokens=torch.full((1, 3), 96))
