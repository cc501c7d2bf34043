"""Gradients of live weights: Σ a δᵀ on every architecture, and nothing left behind."""

import pytest
import torch

from tests import tiny
from tests.tiny_encoder import ENCODER_KINDS, encoder, encoder_tokens
from tl_asymmetry import ModelView
from tl_asymmetry.models.weight_gradients import WeightGradients
from tl_asymmetry.names import kind_of

CASES = [(a, kind, False) for kind in tiny.KINDS for a in tiny.ARCHITECTURES]
CASES += [(a, kind, True) for kind in tiny.KINDS for a in ("gpt2", "llama")]  # a fused and a split projection
CASES += [("encoder", kind, frozen) for kind in ENCODER_KINDS for frozen in (False, True)]


def build(architecture, kind):
    return encoder(kind, torch.float64) if architecture == "encoder" else tiny.build(architecture, kind, torch.float64)


def loss_of(view, tokens):
    return view.run(tokens, logits=True).log_softmax(-1)[..., 7].sum()


@pytest.mark.parametrize(("architecture", "kind", "frozen"), CASES)
def test_gradient_is_the_sum_of_outer_products(architecture, kind, frozen):
    view = ModelView(build(architecture, kind))
    view.model.requires_grad_(not frozen)
    tokens = encoder_tokens(2, 9) if architecture == "encoder" else tiny.tokens(2, 9)
    everything = [(layer, matrix) for layer in range(view.n_layers) for matrix in view.matrices]
    projections = {site: view.projection(*site) for site in everything}
    sites = [site for site in everything if projections[site] is not None]
    # A mixture's router is no product that a module shows.
    assert {matrix for _, matrix in everything} - {matrix for _, matrix in sites} <= {"W_router"}
    inputs, outputs, handles = {}, {}, []
    parts = {}
    for site in sites:
        module, parts[site] = projections[site]

        def keep(_module, _args, output, site=site):
            outputs[site] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep))
    points = {(kind_of(matrix).point, layer) for layer, matrix in sites}
    gradients = WeightGradients(view, sites)
    readers = {point: (lambda x, point=point: inputs.__setitem__(point, x.detach())) for point in points}
    with gradients.tracked(), view.evaluating(), view.hooks(readers):
        loss = loss_of(view, tokens)
        found, upstream = gradients.of(loss, [outputs[site] for site in sites])
    for handle in handles:
        handle.remove()
    for (layer, matrix), upstream_whole in zip(sites, upstream, strict=True):
        δ = parts[layer, matrix](upstream_whole)
        a, W = inputs[kind_of(matrix).point, layer], view.weight(layer, matrix)
        if matrix in ("W_Q", "W_K", "W_V"):
            expected = torch.einsum("bpd,bphe->hde", a, δ.reshape(*δ.shape[:2], W.shape[0], W.shape[2]))
        elif matrix == "W_O":
            expected = torch.einsum("bphe,bpd->hed", a.reshape(*a.shape[:2], *W.shape[:2]), δ)
        else:
            expected = a.flatten(0, -2).T @ δ.flatten(0, -2)  # a router sees batch and positions in one
        assert torch.allclose(found[layer, matrix], expected, atol=1e-10 * expected.abs().max())
    assert all(p.requires_grad is not frozen and p.grad is None for p in view.model.parameters())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradient_is_a_difference_quotient(kind):
    view = ModelView(tiny.build("gpt2", kind, torch.float64))
    tokens, ε = tiny.tokens(2, 9), 1e-5
    gradients = WeightGradients(view, [(1, "W_K")])
    with gradients.tracked(), view.evaluating():
        found, _ = gradients.of(loss_of(view, tokens))
    W = view.weight(1, "W_K")
    direction = torch.randn(W.shape, generator=torch.Generator().manual_seed(0), dtype=W.dtype)
    with torch.no_grad(), view.evaluating():
        values = []
        for sign in (1, -1):
            W += sign * ε * direction
            values.append(loss_of(view, tokens).item())
            W -= sign * ε * direction
    quotient = (values[0] - values[1]) / (2 * ε)
    assert (found[1, "W_K"] * direction).sum().item() == pytest.approx(quotient, rel=1e-6)


def test_works_where_gradients_are_switched_off_and_leaves_them_so():
    view = ModelView(tiny.build("llama", tiny.KINDS[0]))
    before = {name: torch.ones_like(p) for name, p in view.model.named_parameters()}
    for name, p in view.model.named_parameters():
        p.grad = before[name]
    gradients = WeightGradients(view, [(0, "W_Q")])
    with torch.no_grad(), gradients.tracked():
        found, _ = gradients.of(loss_of(view, tiny.tokens(1, 5)))
    assert found[0, "W_Q"].abs().sum() > 0
    assert all(p.grad is before[name] and bool((p.grad == 1).all()) for name, p in view.model.named_parameters())


def test_flags_are_put_back_after_an_exception():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[-1]))
    view.model.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt), WeightGradients(view, [(0, "W_Q")]).tracked():
        raise KeyboardInterrupt
    assert not any(p.requires_grad for p in view.model.parameters())


def test_refuses_a_loss_that_knows_nothing_of_the_weight():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    gradients = WeightGradients(view, [(0, "W_Q")])
    with gradients.tracked(), pytest.raises(ValueError, match=r"expected a loss that depends on blocks\.0 W_Q"):
        gradients.of(view.model.embed(tiny.tokens(1, 4)).sum())
    with gradients.tracked():
        loss = loss_of(view, tiny.tokens(1, 5))
        with pytest.raises(ValueError, match="expected tensors the loss depends on"):
            gradients.of(loss, [torch.ones(3, requires_grad=True)])
