"""The two sides of a weight gradient are what autograd multiplies, on every architecture, and leave no trace."""

import pytest
import torch

from tests import tiny
from tl_asymmetry.models.backward import outer_products
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.objectives import DPO, CrossEntropy, PreferenceBatch, TokenBatch

MODELS = [(name, kind) for kind in tiny.KINDS for name in tiny.ARCHITECTURES]
FORMULA = {"W_Q": "bpd,bphe->hde", "W_K": "bpd,bphe->hde", "W_V": "bpd,bphe->hde", "W_O": "bphe,bpd->hed"}


def batch(rows=3, length=11, seed=0):
    tokens = tiny.tokens(rows, length, seed)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 7:] = False
    mask[2, :4] = False
    return TokenBatch(tokens, mask)


def parameters(view):
    return list({id(p): p for module in view.all_modules() for p in module.parameters(recurse=False)}.values())


def autograd_gradient(view, layer, matrix):
    """`.grad` of whatever parameters lie in the matrix's storage, read the way the matrix is read."""
    W = view.weight(layer, matrix)
    whole = torch.zeros(W.untyped_storage().nbytes() // W.element_size(), dtype=W.dtype)
    found = False
    for p in parameters(view):
        if p.grad is not None and p.untyped_storage().data_ptr() == W.untyped_storage().data_ptr():
            whole.as_strided(p.shape, p.stride(), p.storage_offset()).add_(p.grad)
            found = True
    assert found
    return whole.as_strided(W.shape, W.stride(), W.storage_offset())


def sites(view):
    everything = ((layer, matrix) for layer in range(view.n_layers) for matrix in view.matrices)
    # The router of a mixture gives more than its product.
    return [site for site in everything if view.projection(*site) is not None]


def summed(view, loss_of):
    """Σ a δᵀ of every matrix, and every δ, from one backward pass."""
    gradients, deltas = {}, {}

    def read(index, site, a, δ):
        formula = FORMULA.get(site[1], "bpi,bpo->io")
        gradients[site] = gradients.get(site, 0) + torch.einsum(formula, a, δ)
        deltas[index, site] = δ.clone()

    with view.evaluating(), outer_products(view, sites(view), read) as backward:
        backward.run(loss_of())
    return gradients, deltas


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_sum_of_outer_products_is_autograds_gradient(name, kind):
    view = ModelView(tiny.build(name, kind, torch.float64))
    objective, data = CrossEntropy(), batch()
    gradients, _ = summed(view, lambda: objective(view, data))
    assert set(gradients) == set(sites(view))
    with view.evaluating():
        objective(view, data).backward()
    for site in sites(view):
        expected = autograd_gradient(view, *site)
        assert expected.norm() > 0
        error = (gradients[site] - expected).norm() / expected.norm()
        assert error < 1e-10, (site, error)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_preference_losses_make_two_passes_that_add_up(kind):
    view = ModelView(tiny.build("llama", kind, torch.float64))
    reference = ModelView(tiny.build("llama", kind, torch.float64, seed=5))
    pairs = PreferenceBatch(batch(seed=1), batch(length=9, seed=2))
    objective = DPO(reference, beta=0.3)
    gradients, deltas = summed(view, lambda: objective(view, pairs))
    assert {index for index, _ in deltas} == {0, 1}
    with view.evaluating():
        objective(view, pairs).backward()
    for site in sites(view):
        torch.testing.assert_close(gradients[site], autograd_gradient(view, *site), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_model_itself_as_reference_is_not_recorded(kind):
    view = ModelView(tiny.build("gpt2", kind, torch.float64))
    pairs = PreferenceBatch(batch(seed=1), batch(length=9, seed=2))
    own, _ = summed(view, lambda: DPO(view)(view, pairs))
    other, _ = summed(view, lambda: DPO(ModelView(tiny.build("gpt2", kind, torch.float64)))(view, pairs))
    for site in own:
        torch.testing.assert_close(own[site], other[site], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_softmax_makes_key_gradients_cancel_without_rotary_positions(kind):
    plain = ModelView(tiny.build("gpt2", kind, torch.float64))
    _, deltas = summed(plain, lambda: CrossEntropy()(plain, batch()))
    rotary = ModelView(tiny.build("neox", kind, torch.float64))
    _, rotated = summed(rotary, lambda: CrossEntropy()(rotary, batch()))
    for layer in range(plain.n_layers):
        δ = deltas[0, (layer, "W_K")]
        assert δ.sum(1).abs().max() < 1e-12 * δ.abs().sum(1).max()
        other = rotated[0, (layer, "W_K")]
        assert other.sum(1).abs().max() > 1e-3 * other.abs().sum(1).max()
        assert deltas[0, (layer, "W_V")].sum(1).abs().max() > 1e-3 * deltas[0, (layer, "W_V")].abs().sum(1).max()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tokens_that_nothing_depends_on_have_exactly_no_gradient(kind):
    view = ModelView(tiny.build("llama", kind))
    _, deltas = summed(view, lambda: CrossEntropy()(view, batch()))
    for (_, site), δ in deltas.items():
        assert not δ[1, 6:].any(), site  # row 1 counts tokens up to 6: its last source is token 5
        assert δ[0, 0].any() or site[1] == "W_Q"  # attention to one key alone does not depend on its query
        assert not δ[0, -1].any()


def test_heads_repeated_before_the_hook_are_added_up_again():
    if not tiny.HOOKED_AVAILABLE:
        pytest.skip("HookedTransformer only")
    model = tiny.build("llama", "hooked", torch.float64)
    view = ModelView(model)
    expected, _ = summed(view, lambda: CrossEntropy()(view, batch()))
    model.set_ungroup_grouped_query_attention(True)
    repeated, deltas = summed(view, lambda: CrossEntropy()(view, batch()))
    assert deltas[0, (0, "W_K")].shape[2] == view.n_kv_heads
    for site in expected:
        torch.testing.assert_close(repeated[site], expected[site], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_everything_is_as_it_was_even_after_an_exception(kind):
    view = ModelView(tiny.build("gpt2", kind))
    with torch.no_grad():
        view.run(tiny.tokens())  # Hugging Face installs hooks of its own on a model's first run
    some = parameters(view)
    for i, p in enumerate(some):
        p.requires_grad_(i % 3 > 0)
        if i % 3 == 2:
            p.grad = torch.full_like(p, 0.5)
    before = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in some]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in view.all_modules()]
    state = torch.random.get_rng_state()

    def check():
        assert [p.requires_grad for p in some] == [required for required, _ in before]
        for p, (_, grad) in zip(some, before, strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad)
        assert hooks == [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in view.all_modules()
        ]
        assert torch.equal(state, torch.random.get_rng_state())

    with torch.no_grad():  # the caller's mode does not matter
        summed(view, lambda: CrossEntropy()(view, batch()))
    check()
    for problem in (RuntimeError("in a reader"), KeyboardInterrupt()):

        def read(*_, problem=problem):
            raise problem

        with (
            pytest.raises(type(problem)),
            view.evaluating(),
            outer_products(view, sites(view), read) as backward,
        ):
            backward.run(CrossEntropy()(view, batch()))
        check()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_get_no_gradient_and_the_graph_starts_at_the_stream(kind):
    view = ModelView(tiny.build("gpt2", kind))
    with view.evaluating(), outer_products(view, [(0, "W_Q")], lambda *_: None) as backward:
        assert not any(p.requires_grad for p in parameters(view))
        loss = CrossEntropy()(view, batch())
        assert [tuple(start.shape) for start in backward.starts] == [(3, 11, tiny.D_MODEL)]
        assert backward.starts[0].is_leaf
        leaves, nodes = set(), [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            nodes.extend(n for n, _ in node.next_functions if n is not None)
        assert leaves == {id(backward.starts[0])}


@pytest.mark.usefixtures("unchecked_types")
def test_refusals_say_what_to_do():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"got a call inside torch.inference_mode\(\); leave that context"),
        outer_products(view, [(0, "W_Q")], lambda *_: None),
    ):
        pass
    with pytest.raises(ValueError, match=r"depends on the model, got one without a gradient; pass an objective"), \
            outer_products(view, [(0, "W_Q")], lambda *_: None) as backward:  # fmt: skip
        backward.run(torch.zeros(()))
    with torch.inference_mode():
        made = tiny.toy("plain")
    with pytest.raises(ValueError, match=r"got inference tensors \(.*\); load the model outside"), \
            outer_products(ModelView(made), [(0, "W_Q")], lambda *_: None):  # fmt: skip
        pass
