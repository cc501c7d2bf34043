"""The test below what training gives: neither few steps of Adam nor 16-bit storage make a change by chance less."""

import numpy as np
import torch

from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.models.readers.base import Factors
from tl_asymmetry.pair import reference_tests
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.deltas import AnyDelta, measure_delta, measure_factors
from tl_asymmetry.pair.projections import project
from tl_asymmetry.trajectory.held_bases import HeldBases

D, HEADS, COLUMNS, K, TOKENS = 32, 24, 24, 3, 640


def inputs(generator: torch.Generator) -> torch.Tensor:
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    scale = torch.arange(1, D + 1) ** -0.5
    mean = 0.3 * torch.randn(D, generator=generator)
    return torch.randn(TOKENS, D, generator=generator) @ (rotation * scale).T + mean


def by_chance(a: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Σ a δᵀ of every head, δ knowing nothing of a."""
    δ = torch.randn(TOKENS, HEADS * COLUMNS, generator=generator)
    return (a.T @ δ).unflatten(1, (HEADS, COLUMNS)).transpose(0, 1)


def bases(a: torch.Tensor, optimizer: str) -> LayerBases:
    moments = StreamingMoments(D)
    moments.update(a)
    return LayerBases(
        0, [{("attn_in", 0): moments}], {}, centered=False, exact=False, softmax_centres_keys=False, optimizer=optimizer
    )


def tails(held: LayerBases, delta: AnyDelta) -> np.ndarray:
    """P(fraction ≥) and P(fraction ≤) of every head."""
    (found,) = project([delta], {delta.matrix: ["attn_in"]}, held, [K], intervals=False, gradient=None)
    return found.tails[:, :HEADS, 0].numpy()


def test_one_step_of_adam_is_not_less_than_trained(monkeypatch):
    """One step is sign(Σ a δᵀ): 0.7 of Adam's reference, and what its sign limit gives."""
    generator = torch.Generator().manual_seed(0)
    a = inputs(generator)
    W = torch.randn(HEADS, D, COLUMNS, generator=generator)
    signs = by_chance(a, generator).sign()
    _, below = tails(bases(a, "adam"), measure_delta("W_Q", W, W + 1e-2 * signs, seed=0))
    assert np.mean(below <= 0.05) <= 0.05
    # against the reference of many steps alone most of them would be less
    monkeypatch.setattr(reference_tests, "_some_below", lambda tails: False)
    _, alone = tails(bases(a, "adam"), measure_delta("W_Q", W, W + 1e-2 * signs, seed=0))
    assert np.mean(alone <= 0.05) > 0.3
    assert (below >= alone).all()


def test_an_adapter_has_a_sign_limit_too(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    a = inputs(generator)
    A = torch.randn(D, 12, generator=generator) / D**0.5
    δ = torch.randn(TOKENS, HEADS * COLUMNS, generator=generator)
    B = ((a @ A).T @ δ).sign().unflatten(1, (HEADS, COLUMNS)).permute(1, 2, 0)
    adapter = measure_factors("W_Q", torch.ones(HEADS, D, COLUMNS), Factors(A, B))
    found = {}
    for asked in (True, False):
        monkeypatch.setattr(reference_tests, "_some_below", lambda tails, asked=asked: asked)
        found[asked] = tails(bases(a, "adam"), adapter)
    (above, below), (above_alone, below_alone) = found[True], found[False]
    np.testing.assert_array_equal(above, above_alone)
    assert (below >= below_alone).all()
    assert (below > 1.05 * below_alone).any()


def test_storage_does_not_make_a_change_less_than_trained():
    """At a rounding share of 0.6 a change by chance has half of its reference in the leading directions."""
    generator = torch.Generator().manual_seed(2)
    a = inputs(generator)
    W = torch.randn(HEADS, D, COLUMNS, generator=generator).bfloat16().float()
    change = by_chance(a, generator)
    change *= 1e-3 * W.norm() / change.norm()
    stored = measure_delta("W_Q", W, (W + change).bfloat16().float(), seed=0)
    assert (stored.numbers.rounding > 0.4).all()
    above, below = tails(bases(a, "sgd"), stored)
    assert np.mean(below <= 0.05) <= 0.1
    assert np.mean(above <= 0.05) <= 0.05
    exact = measure_delta("W_Q", W.double(), W.double() + change.double(), seed=0)
    assert np.mean(tails(bases(a, "sgd"), exact)[1] <= 0.05) <= 0.1
    # what is far below is still found: everything in the trailing half
    Q = bases(a, "sgd").subspace("attn_in").basis[:, D // 2 :].float()
    trailing = Q @ torch.randn(HEADS, D // 2, COLUMNS, generator=generator)
    trailing *= 1e-2 * W.norm() / trailing.norm()
    _, below = tails(bases(a, "sgd"), measure_delta("W_Q", W, (W + trailing).bfloat16().float(), seed=0))
    assert (below <= 0.05).all()


def test_held_bases_know_whose_reference_is_tested():
    generator = torch.Generator().manual_seed(0)
    a = inputs(generator)
    whole = bases(a, "adam")
    C, mean = whole.covariance("W_Q", columns=HEADS * COLUMNS)
    subspace = whole.subspace("attn_in")
    references = whole.references("W_Q", "attn_in", K, columns=HEADS * COLUMNS)
    held = HeldBases(
        0,
        {
            "attn_in/basis": subspace.basis,
            "attn_in/eigenvalues": subspace.eigenvalues,
            "attn_in/references/W_Q": torch.stack([references.chosen, *references.expected.values()]),
            "covariance/W_Q": C,
            "mean/W_Q": mean,
        },
        optimizer="adam",
    )
    W = torch.randn(HEADS, D, COLUMNS, generator=generator)
    delta = measure_delta("W_Q", W, W + 1e-2 * by_chance(a, generator).sign(), seed=0)
    np.testing.assert_allclose(tails(held, delta), tails(whole, delta), rtol=1e-6)
