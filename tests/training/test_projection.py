"""What each arm gives the optimiser, against explicit projectors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.oracles.reference import float64
from tl_asymmetry.grokking import GradientProjection

SHAPES = ((4, 6), (30,), (2, 3, 5))
SIZE = 24 + 30 + 30


def setup(optimizer="sgd", **keywords):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    other = torch.nn.Parameter(torch.ones(3))
    if optimizer == "sgd":
        inner = torch.optim.SGD([*weights, other], lr=0.1)
    else:
        inner = torch.optim.AdamW([*weights, other], lr=0.01, betas=(0.9, 0.98), weight_decay=1.0)
    return GradientProjection(inner, weights, **keywords), weights, other


def gradients(step, weights, other):
    """A drifting gradient, new at every step; returned flat."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, weight in enumerate(weights):
        base = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        weight.grad = base * (1 + 0.1 * step) + 0.5 * torch.randn(weight.shape, generator=generator)
    other.grad = torch.ones(3)
    return flat(weights)


def flat(weights):
    return float64(torch.cat([w.grad.flatten() for w in weights]))


def theta(weights):
    return float64(torch.cat([w.detach().flatten() for w in weights]))


@pytest.mark.parametrize("buffer", ["projected", "raw"])
@pytest.mark.parametrize("arm", ["keep", "remove"])
def test_rolling_arms_are_explicit_projections(arm, buffer):
    projection, weights, other = setup(arm=arm, rank=3, window=5, buffer=buffer)
    held: list = []
    for step in range(17):
        g = gradients(step, weights, other)
        expected = g
        if len(held) >= 5:
            V = np.linalg.svd(np.stack(held[-5:]), full_matrices=False)[2][:3]
            P = V.T @ V
            expected = P @ g if arm == "keep" else g - P @ g
        projection.step()
        given = flat(weights)
        assert np.abs(given - expected).max() <= 1e-5 * np.linalg.norm(g)
        if arm == "keep" and len(held) >= 5:
            assert np.linalg.norm(given - P @ given) < 1e-5 * np.linalg.norm(given)
        held.append(given if buffer == "projected" else g)
    assert other.grad.tolist() == [1, 1, 1]


def test_projected_buffer_never_leaves_the_warm_up():
    """What the published buffer implies, and what the raw one does not."""
    spans = {}
    for buffer in ("projected", "raw"):
        projection, weights, other = setup(arm="keep", rank=2, window=4, buffer=buffer)
        first, given = [], None
        for step in range(30):
            g = gradients(step, weights, other)
            if step < 4:
                first.append(g)
            projection.step()
            given = flat(weights)
        Q = np.linalg.qr(np.stack(first).T)[0]
        spans[buffer] = np.linalg.norm(given - Q @ (Q.T @ given)) / np.linalg.norm(given)
    assert spans["projected"] < 1e-5
    assert spans["raw"] > 0.1


@pytest.mark.parametrize("arm", ["keep", "remove"])
def test_random_space_is_fresh_isotropic_and_of_the_rank(arm):
    projection, weights, other = setup(arm=arm, space="random", rank=3, window=3, seed=5)
    kept = []
    for step in range(400):
        g = gradients(step, weights, other)
        projection.step()
        if step >= 3:
            given = flat(weights)
            part = given if arm == "keep" else g - given
            assert abs(part @ (g - part)) < 1e-5 * (g @ g)  # an orthogonal projection
            kept.append((part @ part) / (g @ g))
    # E‖Pg‖²/‖g‖² = k/n with the variance of a Beta(k/2, (n − k)/2)
    mean, n = 3 / SIZE, len(kept)
    deviation = (2 * 3 * (SIZE - 3) / (SIZE**2 * (SIZE + 2)) / n) ** 0.5
    assert abs(np.mean(kept) - mean) < 4 * deviation
    V = projection.basis()
    torch.testing.assert_close(V @ V.T, torch.eye(3), rtol=0, atol=1e-5)


def test_noise_has_the_norm_of_what_keep_would_leave():
    kept, noisy = setup(arm="keep", window=4), setup(arm="noise", window=4, buffer="raw")
    for step in range(5):  # the fifth step is the first that is projected, from equal windows
        for projection, weights, other in (kept, noisy):
            gradients(step, weights, other)
            projection.step()
    a, b = flat(kept[1]), flat(noisy[1])
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-5)
    assert abs(a @ b) < 0.5 * (a @ a)


def test_zero_leaves_decay_and_fading_moments():
    projection, weights, other = setup("adamw", arm="zero", warmup=3)
    for step in range(60):
        gradients(step, weights, other)
        before = theta(weights)
        projection.step()
        if step >= 3:
            assert not flat(weights).any()
    # 0.9^57 of the moments is gone: what is left is decay, θ ← θ (1 − lr · wd)
    np.testing.assert_allclose(theta(weights), before * (1 - 0.01), rtol=0, atol=2e-4)


def test_freeze_changes_nothing_and_keeps_the_gradient_to_look_at():
    projection, weights, other = setup("adamw", arm="freeze")
    before = [w.detach().clone() for w in weights]
    for step in range(4):
        g = gradients(step, weights, other)
        projection.step()
        np.testing.assert_array_equal(flat(weights), g)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert (other < 1).all()


def test_none_is_the_optimiser_alone():
    projection, weights, other = setup("adamw", arm="none")
    plain, theirs, rest = setup("adamw", arm="none")
    for step in range(5):
        gradients(step, weights, other)
        gradients(step, theirs, rest)
        projection.step()
        plain.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_moments_of_adamw_are_sums_of_what_it_got():
    """As documented: exp_avg stays in the spans of the projected gradients, the step does not."""
    projection, weights, other = setup("adamw", arm="keep", rank=2, window=3)
    expected, given = np.zeros(SIZE), []
    for step in range(12):
        gradients(step, weights, other)
        before = theta(weights)
        projection.step()
        given.append(flat(weights))
        expected = 0.9 * expected + 0.1 * given[-1]
    state = projection.optimizer.state
    moment = float64(torch.cat([state[w]["exp_avg"].flatten() for w in weights]))
    np.testing.assert_allclose(moment, expected, atol=1e-5)
    Q = np.linalg.qr(np.stack(given).T)[0]
    assert np.linalg.norm(moment - Q @ (Q.T @ moment)) < 1e-4 * np.linalg.norm(moment)
    update = theta(weights) - 0.99 * before  # decay taken out
    assert np.linalg.norm(update - Q @ (Q.T @ update)) > 0.1 * np.linalg.norm(update)


@pytest.mark.parametrize("arm", ["keep", "remove", "zero"])
def test_projected_updates(arm):
    projection, weights, other = setup("adamw", arm=arm, target="update", rank=2, window=4)
    free, theirs, rest = setup("adamw", arm="none")
    held: list = []
    for step in range(9):
        for w, t in zip(weights, theirs, strict=True):
            t.data.copy_(w.data)  # the same step from the same place, with the same full-gradient moments
        gradients(step, weights, other)
        g = gradients(step, theirs, rest)
        before = theta(weights)
        projection.step()
        free.step()
        np.testing.assert_array_equal(flat(weights), g)  # the gradient is as it came
        u, expected = theta(theirs) - before, None
        expected = u
        if step >= 4:
            V = np.linalg.svd(np.stack(held[-4:]), full_matrices=False)[2][:2]
            P = V.T @ V
            expected = {"keep": P @ u, "remove": u - P @ u, "zero": 0 * u}[arm]
        np.testing.assert_allclose(theta(weights) - before, expected, atol=2e-6)
        held.append(theta(weights) - before)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"arm": "hold"}, "expected arm to be one of none, keep, remove, noise, zero, freeze, got 'hold'"),
        ({"space": "fixed"}, "expected space to be one of rolling, random"),
        ({"buffer": "both"}, "expected buffer to be one of projected, raw"),
        ({"target": "loss"}, "expected target to be one of gradient, update"),
        ({"window": 2, "rank": 3}, "expected window >= rank = 3, got 2"),
        ({"rank": 85, "window": 100}, "expected rank <= 84, the number of parameters, got 85"),
        ({"warmup": 4, "window": 5}, "expected a warm-up of at least the window of 5, got 4; pass warmup=5"),
    ],
)
def test_bad_arguments(keywords, message):
    with pytest.raises(ValueError, match=message):
        setup(**keywords)


def test_parameters_must_be_the_optimisers_own():
    ours, stranger = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    sgd = torch.optim.SGD([ours], lr=1.0)
    with pytest.raises(ValueError, match="expected parameters that the optimiser owns, got 1 of 2 that it does not"):
        GradientProjection(sgd, [ours, stranger], rank=1, window=2)
    with pytest.raises(ValueError, match="expected parameters that the optimiser owns"):
        GradientProjection(sgd, [], rank=1, window=2)


def test_a_missing_gradient_is_named():
    projection, weights, other = setup()
    gradients(0, weights, other)
    weights[1].grad = None
    with pytest.raises(ValueError, match="expected a gradient on every parameter, got 1 without"):
        projection.step()


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state()
    projection, weights, other = setup(arm="noise", space="random", window=3)
    for step in range(6):
        gradients(step, weights, other)
        projection.step()
    assert torch.equal(before, torch.get_rng_state())


def test_it_passes_for_an_optimiser():
    """Schedulers and scalers write to the very groups of the optimiser it steps, before and after loading a state."""

    def made():
        weight = torch.nn.Parameter(torch.ones(6))
        adam = torch.optim.AdamW([weight], lr=1.0)
        return weight, adam, GradientProjection(adam, [weight], arm="keep", space="random", rank=2, warmup=0, seed=3)

    def steps(weight, projection, scheduler, count):
        for _ in range(count):
            projection.zero_grad()
            loss = projection.step(lambda: weight.square().sum().backward() or weight.square().sum())
            scheduler.step()
        return loss

    weight, adam, projection = made()
    assert isinstance(projection, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(projection, 1, 0.5)
    assert float(steps(weight, projection, scheduler, 2)) > 0
    assert adam.param_groups[0]["lr"] == 0.25
    state, before = copy.deepcopy(projection.state_dict()), weight.detach().clone()
    steps(weight, projection, scheduler, 2)

    other, its_adam, again = made()
    with torch.no_grad():
        other.copy_(before)
    again.load_state_dict(state)
    assert again.param_groups is its_adam.param_groups
    follow = torch.optim.lr_scheduler.StepLR(again, 1, 0.5, last_epoch=2)
    its_adam.param_groups[0]["lr"] = 0.25
    steps(other, again, follow, 2)
    assert torch.equal(other, weight)

    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.square().sum()).backward()
    scaler.step(projection)
    scaler.update()
