"""Responses of centroids: exact against explicit Jacobians and finite differences, on every kind of model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.grokking.test_model import FORMS, scrambled
from tests.oracles.reference import float64
from tl_asymmetry.coupling import centroid_response
from tl_asymmetry.coupling.response import CentroidProblem, random_directions
from tl_asymmetry.grokking import GrokShape, GrokTransformer, bridge_model, hooked_model
from tl_asymmetry.models.parameters import ParameterVector, attention_weights

SHAPE = GrokShape(p=5, d_model=4, n_heads=2, d_mlp=6)
PAIRS = torch.tensor([[a, b] for a in range(5) for b in range(5)])
TARGETS = PAIRS.sum(1) % 5
SIZE = 2 * 4 * 16


def small(dtype=torch.float64):
    return scrambled(GrokTransformer(SHAPE, seed=0)).to(dtype)


def naive_jacobian(model, pair, target):
    """∂μ/∂θ by central differences of centroids in float64, one weight at a time."""
    columns = []
    for parameter in model.attention_parameters().values():
        for i in range(parameter.numel()):
            ends = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.view(-1)[i] += h
                x = model.embeddings(pair[None]).detach().requires_grad_()
                f = model.from_embeddings(x).flatten()[target] if target is not None else model.from_embeddings(x).sum()
                ends.append(float64(torch.autograd.grad(f, x)[0]).ravel())
                with torch.no_grad():
                    parameter.view(-1)[i] -= h
            columns.append((ends[0] - ends[1]) / 2e-5)
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module")
def dense():
    """M of three inputs, explicitly."""
    model = small()
    jacobians = [naive_jacobian(model, pair, target) for pair, target in zip(PAIRS[:3], TARGETS[:3], strict=True)]
    return sum(J.T @ J for J in jacobians) / 3


def test_exact_equals_the_explicit_jacobian(dense):
    V = random_directions(4, SIZE, seed=0).double() * torch.tensor([1, 1, 3, 0.5])[:, None].double()
    found = centroid_response(small(), PAIRS[:3], V, targets=TARGETS[:3])
    expected = [v @ dense @ v for v in float64(V)]
    np.testing.assert_allclose(float64(found), expected, rtol=1e-6)


def test_operator_equals_the_explicit_one(dense):
    problem = CentroidProblem(small(), PAIRS[:3], targets=TARGETS[:3])
    v = random_directions(1, SIZE, seed=1)[0].double()
    np.testing.assert_allclose(float64(problem.product(v)), dense @ float64(v), rtol=1e-5, atol=1e-8)
    value, residual = problem.largest(tolerance=1e-6, most=200)
    assert value == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-5)
    assert residual <= 1e-6


def test_trace_is_what_random_directions_have(dense):
    """Hutchinson on the sphere: the mean response of random unit directions is tr M / size."""
    A = centroid_response(small(), PAIRS[:3], random_directions(300, SIZE, seed=2).double(), targets=TARGETS[:3])
    error = A.std().item() / 300**0.5
    assert abs(A.mean().item() - np.trace(dense) / SIZE) < 4 * error


@pytest.mark.parametrize("centroid", ["logit", "sum"])
def test_finite_difference_goes_to_the_exact_one(centroid):
    V = random_directions(3, SIZE, seed=3).double()
    problem = CentroidProblem(small(), PAIRS, targets=TARGETS, centroid=centroid)
    exact = problem.exact(V)
    errors = [(problem.finite_difference(V, e) / exact - 1).abs().max().item() for e in (4e-2, 1e-2, 1e-3)]
    assert errors[2] < 1e-4
    assert errors[1] < 0.01  # the 1 % wanted, at twice the published step
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.3)  # second order in ε


def test_published_size_and_precision_agree_to_one_percent():
    model = GrokTransformer(seed=42)
    pairs = torch.randint(97, (64, 2), generator=torch.Generator().manual_seed(0))
    V = random_directions(3, 131_072, seed=0)
    exact = centroid_response(model, pairs, V, targets=pairs.sum(1) % 97)
    steps = centroid_response(model, pairs, V, targets=pairs.sum(1) % 97, method="finite_difference")
    torch.testing.assert_close(exact, steps, rtol=0.01, atol=0)


def test_response_is_quadratic_and_independent_of_the_batch():
    V = random_directions(2, SIZE, seed=4).double()
    one, two = centroid_response(small(), PAIRS, V, targets=TARGETS)
    scaled = centroid_response(small(), PAIRS, torch.cat([3 * V[:1], V[:1] + V[1:], V[:1] - V[1:]]), targets=TARGETS)
    assert scaled[0] == pytest.approx(9 * one.item())
    assert (scaled[1] + scaled[2]).item() == pytest.approx(2 * (one + two).item())  # parallelogram
    pieces = centroid_response(small(), PAIRS, V, targets=TARGETS, batch_size=7)
    torch.testing.assert_close(pieces, torch.stack([one, two]), rtol=1e-12, atol=0)
    steps = centroid_response(small(), PAIRS, 5 * V, targets=TARGETS, method="finite_difference", epsilon=1e-4)
    torch.testing.assert_close(steps, 25 * torch.stack([one, two]), rtol=1e-5, atol=0)


def test_heads_are_told_apart_by_the_target():
    shape = GrokShape(p=5, heads_out=2, d_model=4, n_heads=2, d_mlp=6)
    both = scrambled(GrokTransformer(shape, seed=0)).double()
    first = GrokTransformer(SHAPE).double()
    weights = both.state_dict()
    first.load_state_dict(weights | {f"unembed.{n}": weights[f"unembed.{n}"][..., 5:] for n in ("W_U", "b_U")})
    V = random_directions(2, SIZE, seed=5).double()
    torch.testing.assert_close(
        centroid_response(both, PAIRS, V, targets=TARGETS + 5), centroid_response(first, PAIRS, V, targets=TARGETS)
    )


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("form", FORMS)
def test_transformer_lens_gives_the_plain_module_s(form, method):
    plain = small(torch.float32)
    V = random_directions(3, SIZE, seed=6)
    expected = centroid_response(plain, PAIRS, V, targets=TARGETS)
    found = centroid_response(form(plain), PAIRS, V, targets=TARGETS, position=0, method=method)
    torch.testing.assert_close(found, expected, rtol=1e-4 if method == "exact" else 1e-2, atol=0)


ARCHITECTURES = ("gpt2", "neox", "llama", "qwen3", "gemma2")


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_blocks_of_language_models(architecture, kind):
    model = tiny.build(architecture, kind, torch.float64)
    tokens = tiny.tokens(3, 6)
    problem = CentroidProblem(model, tokens, centroid="attention", layer=1)
    V = random_directions(2, problem.θ.size, seed=7).double()
    exact = problem.exact(V)
    assert (exact > 0).all()
    # Norms of the Hugging Face models behind a Bridge compute in float32 whatever the weights are.
    torch.testing.assert_close(problem.finite_difference(V, 1e-3), exact, rtol=2e-3, atol=0)
    assert (problem.product(V[0]) @ V[0]).item() == pytest.approx(exact[0].item(), rel=1e-4)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="no HookedTransformer")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_kinds_give_one_answer(architecture):
    found = []
    for kind in ("hooked", "bridge"):
        model = tiny.build(architecture, kind, torch.float64)
        problem = CentroidProblem(model, tiny.tokens(2, 5), centroid="attention", layer=0)
        found.append((problem.exact(random_directions(2, problem.θ.size, seed=8).double()), problem.centroids()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_attention_centroid_is_the_gradient_of_what_the_block_writes():
    model = tiny.build("gpt2", "bridge", torch.float64)
    tokens = tiny.tokens(2, 5)
    problem = CentroidProblem(model, tokens, centroid="attention", layer=0, position=3)
    μ = problem.centroids()
    assert μ[:, 4].abs().max() == 0  # a later position cannot be seen
    block, h = model.blocks[0], 1e-6
    x = model.embed(tokens) + model.pos_embed.weight[:5]
    with torch.no_grad():
        for i, j in ((0, 3), (3, 17)):
            ends = []
            for sign in (1, -1):
                moved = x.clone()
                moved[:, i, j] += sign * h
                out = block.attn(block.ln1(moved))
                ends.append((out[0] if isinstance(out, tuple) else out)[:, 3].sum(-1))
            torch.testing.assert_close((ends[0] - ends[1]) / (2 * h), μ[:, i, j], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_centroids_are_those_of_the_package(architecture, kind):
    """The same centroids as `centroids` takes, which gets them another way."""
    from tl_asymmetry import centroids

    model, tokens = tiny.build(architecture, kind, torch.float64), tiny.tokens(2, 5)
    block = CentroidProblem(model, tokens, centroid="attention", layer=1, position=3).centroids()
    theirs = centroids(model, tokens=tokens, part="attn", layer=1, position=3)
    torch.testing.assert_close(block, theirs, rtol=1e-4, atol=1e-6)
    targets = torch.tensor([5, 7])
    logit = CentroidProblem(model, tokens, targets=targets).centroids()
    torch.testing.assert_close(
        logit, centroids(model, tokens=tokens, kind="logit", targets=targets), rtol=1e-4, atol=1e-6
    )


def models():
    forms = [small(torch.float32), bridge_model(small(torch.float32))]
    return [*forms, hooked_model(small(torch.float32))] if tiny.HOOKED_AVAILABLE else forms


def state(model):
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_comes_back_as_it_was(method, error, monkeypatch):
    for model in models():
        centroid_response(model, PAIRS, torch.ones(1, SIZE), targets=TARGETS, position=0)  # a Bridge's lazy hooks
        model.train()
        first, second = list(model.parameters())[:2]
        first.requires_grad_(False)
        second.grad = torch.ones_like(second)
        before, rng = state(model), torch.get_rng_state()
        problem = CentroidProblem(model, PAIRS, targets=TARGETS, position=0, batch_size=5)
        V = random_directions(2, SIZE, seed=9)
        if error is None:
            problem.exact(V) if method == "exact" else problem.finite_difference(V, 0.01)
        else:
            calls, forward = [], problem._forward

            def fails(*arguments, calls=calls, forward=forward):
                calls.append(1)
                if len(calls) == 4:
                    raise error
                return forward(*arguments)

            monkeypatch.setattr(problem, "_forward", fails)
            with pytest.raises(error):
                problem.exact(V) if method == "exact" else problem.finite_difference(V, 0.01)
        after = state(model)
        assert all(torch.equal(a, b) for a, b in zip(before.pop("weights"), after.pop("weights"), strict=True))
        assert all(a is b for a, b in zip(before.pop("gradients"), after.pop("gradients"), strict=True))
        assert before == after
        assert torch.equal(rng, torch.get_rng_state())
        assert torch.is_grad_enabled()


def test_inside_inference_mode():
    V = random_directions(2, SIZE, seed=12)
    model = small(torch.float32)
    expected = centroid_response(model, PAIRS, V, targets=TARGETS)
    with torch.inference_mode():
        found = centroid_response(model, PAIRS.clone(), V.clone(), targets=PAIRS.sum(1) % 5)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(found, expected)


def test_bfloat16_models_are_measured():
    plain = small(torch.float32)
    V = random_directions(2, SIZE, seed=10)
    rough = centroid_response(small(torch.bfloat16), PAIRS, V, targets=TARGETS)
    torch.testing.assert_close(rough, centroid_response(plain, PAIRS, V, targets=TARGETS), rtol=0.15, atol=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"centroid": "loss"}, "expected centroid to be one of logit, sum, attention, got 'loss'"),
        ({}, "expected a target for each of 25 inputs, got none; pass targets="),
        ({"targets": TARGETS[:3]}, "expected a target for each of 25 inputs, got 3"),
        ({"centroid": "attention"}, "expected a layer for the centroid 'attention'"),
        ({"targets": TARGETS, "layer": 0}, "expected a layer for the centroid 'attention' and none for others"),
        ({"centroid": "attention", "layer": 0}, "expected a HookedTransformer or TransformerBridge for the centroid"),
        ({"targets": TARGETS, "batch_size": 0}, "expected inputs and batch_size >= 1"),
        ({"targets": TARGETS.double()}, r"expected targets as whole numbers \[batch\], got float64 \[25\]"),
        ({"targets": [1, 2]}, r"expected targets as whole numbers \[batch\], got \[1, 2\]; pass a tensor of indexes"),
        ({"targets": TARGETS, "method": "guess"}, "expected method to be one of exact, finite_difference"),
        ({"targets": TARGETS, "method": "finite_difference", "epsilon": 0.0}, "expected epsilon > 0, got 0.0"),
    ],
)
def test_bad_input(unchecked_types, keywords, message):
    with pytest.raises(ValueError, match=message):
        centroid_response(small(), PAIRS, torch.ones(1, SIZE).double(), **keywords)


def test_what_are_no_inputs_or_directions(unchecked_types):
    for inputs in (3, [[1, 2]], PAIRS.double(), PAIRS[0]):
        with pytest.raises(ValueError, match=r"expected inputs as whole numbers \[batch, pos\], got"):
            centroid_response(small(), inputs, torch.ones(1, SIZE).double(), targets=TARGETS)
    with pytest.raises(ValueError, match=r"expected directions as rows \[n, parameters\], got float64"):
        centroid_response(small(), PAIRS, torch.ones(SIZE).double(), targets=TARGETS)


def test_a_direction_of_another_length():
    with pytest.raises(ValueError, match="expected a direction of 128 numbers, got 7"):
        centroid_response(small(), PAIRS, torch.ones(1, 7).double(), targets=TARGETS)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox"])
def test_a_vector_moves_the_weights_it_names(architecture, kind):
    model = tiny.build(architecture, kind)
    weights = attention_weights(model, [1])
    θ = ParameterVector(model, weights)
    before = [p.detach().clone() for p in model.parameters()]
    flat = torch.cat([w.reshape(-1) for w in weights.values()])
    assert torch.equal(θ.flat(), flat)
    v = torch.randn(θ.size, generator=torch.Generator().manual_seed(0))
    # One is the other's adjoint; where two parameters look at one memory (GPT-2's joint projection) both have a say.
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(θ.owners)]
    inner = sum((g * t).sum() for g, t in zip(gradients, θ.scatter(v), strict=True))
    torch.testing.assert_close(θ.gather(gradients) @ v, inner, rtol=1e-4, atol=1e-3)
    with θ.restored():
        θ.add_(v, 0.5)
        moved = torch.cat([w.reshape(-1) for w in attention_weights(model, [1]).values()])
        torch.testing.assert_close(moved, flat + 0.5 * v)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_copy_is_no_live_weight():
    model = tiny.build("gpt2", "bridge")
    with pytest.raises(ValueError, match="expected a live view of a parameter for W, got a copy"):
        ParameterVector(model, {"W": torch.zeros(3)})
    with pytest.raises(ValueError, match="expected at least one weight"):
        ParameterVector(model, {})
