"""References by optimiser: closed forms against simulated updates, cross-fitting against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import reference
from tl_asymmetry.geometry.references import (
    AdapterCovariance,
    CrossFit,
    correlation,
    expected_fraction,
    input_covariance,
    orthogonalized,
    sign_limit,
)

D = 24
double = {"dtype": torch.float64}


def inputs(tokens: int, seed: int = 0, d: int = D) -> torch.Tensor:
    """Rows with a steep spectrum and two massive coordinates."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(100)
    mix = torch.randn(d, d, generator=fixed, **double) * torch.arange(1, d + 1, **double) ** -0.5
    a = torch.randn(tokens, d, generator=generator, **double) @ mix.mT
    a[:, :2] *= 8
    return a


def leading(Σ: torch.Tensor, k: int) -> torch.Tensor:
    return torch.linalg.eigh(Σ)[1].flip(-1)[:, :k]


def relative_error(updates: list[torch.Tensor], Q: torch.Tensor, expected: float) -> float:
    fractions = [reference.subspace_fraction(u.numpy(), Q.numpy()) for u in updates]
    return float(np.mean(fractions)) / expected


def gradients(steps: int, columns: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for step in range(steps):
        a = inputs(400, seed=1000 * seed + step)
        made.append(a.mT @ torch.randn(400, columns, generator=generator, **double))
    return made


def test_sums_of_gradients_have_the_sgd_reference() -> None:
    Σ = inputs(40_000, seed=5).mT @ inputs(40_000, seed=5)
    Q = leading(Σ, 4)
    updates = [sum(gradients(20, 6, seed=s)) for s in range(12)]
    expected = expected_fraction(input_covariance(Σ, "sgd", columns=6), Q)[-1].item()
    assert relative_error(updates, Q, expected) == pytest.approx(1, abs=0.04)


def test_adams_updates_have_the_correlation_not_the_second_moment() -> None:
    Σ = inputs(40_000, seed=5).mT @ inputs(40_000, seed=5)
    Q = leading(Σ, 4)
    updates = []
    for s in range(6):
        m, v, W = torch.zeros(D, 6, **double), torch.zeros(D, 6, **double), torch.zeros(D, 6, **double)
        for t, g in enumerate(gradients(100, 6, seed=s), 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            W = W - (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        updates.append(W)
    adam = expected_fraction(input_covariance(Σ, "adam", columns=6), Q)[-1].item()
    sgd = expected_fraction(input_covariance(Σ, "sgd", columns=6), Q)[-1].item()
    assert relative_error(updates, Q, adam) == pytest.approx(1, abs=0.1)
    assert relative_error(updates, Q, sgd) < 0.8


def test_signs_of_gradients_have_the_arcsine_law() -> None:
    Σ = inputs(40_000, seed=5).mT @ inputs(40_000, seed=5)
    Q = leading(Σ, 4)
    updates = [torch.sign(g) for g in gradients(60, 6, seed=3)]
    expected = expected_fraction(sign_limit(Σ), Q)[-1].item()
    assert relative_error(updates, Q, expected) == pytest.approx(1, abs=0.05)
    assert sign_limit(Σ).diagonal().tolist() == pytest.approx([1.0] * D)


@pytest.mark.parametrize("columns", [2, 6, 12])
def test_orthogonalised_updates(columns: int) -> None:
    Σ = inputs(40_000, seed=5).mT @ inputs(40_000, seed=5)
    Q = leading(Σ, 4)
    updates = []
    for g in gradients(30, columns, seed=columns):
        U, _, V = torch.linalg.svd(g, full_matrices=False)
        updates.append(U @ V)
    C = orthogonalized(Σ, columns)
    assert C.trace().item() == pytest.approx(columns, rel=1e-6)
    # A deterministic equivalent: exact for many columns, 20 % off at a few.
    assert relative_error(updates, Q, expected_fraction(C, Q)[-1].item()) == pytest.approx(1, abs=0.25)
    assert torch.equal(orthogonalized(Σ, D), torch.eye(D, **double))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_adapters_updates(optimizer: str) -> None:
    r, columns = 4, 8
    A = torch.randn(D, r, generator=torch.Generator().manual_seed(9), **double)
    Σ = inputs(40_000, seed=5).mT @ inputs(40_000, seed=5) / 40_000
    Q = leading(Σ, 4)
    updates = []
    for s in range(8):
        m, v, B = (torch.zeros(r, columns, **double) for _ in range(3))
        for t, G in enumerate(gradients(60, columns, seed=50 + s), 1):
            g = A.mT @ G
            if optimizer == "sgd":
                B = B - g
                continue
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            B = B - (m / (1 - 0.9**t)) / (v / (1 - 0.999**t)).sqrt()
        updates.append(A @ B)
    own = AdapterCovariance.of(A, Σ, torch.zeros(D), optimizer)
    expected = expected_fraction(own.covariance, torch.eye(r, **double))
    assert expected[-1].item() == pytest.approx(1)
    inside = (own.frame.mT @ Q).mT @ own.covariance @ (own.frame.mT @ Q)
    assert relative_error(updates, Q, (inside.trace() / own.covariance.trace()).item()) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_cross_fitting_equals_loops(optimizer: str) -> None:
    rows = [inputs(n, seed=n, d=10) for n in (5, 9, 7, 4)]
    sums = [a.mT @ a for a in rows]
    bases = [leading(sum(sums) - S, 4) for S in sums]
    fit = CrossFit(sums)
    for g, Q in enumerate(bases):
        fit.add(g, Q)
    for k in (1, 3, 4):
        truth = reference.cross_fitted(
            [a.numpy() for a in rows], [Q.numpy() for Q in bases], k, adam=optimizer == "adam"
        )
        assert fit.expected(optimizer)[k - 1].item() == pytest.approx(truth, rel=1e-10)
    for g, Q in enumerate(bases):
        rest = input_covariance(sum(sums) - sums[g], optimizer, columns=1)
        torch.testing.assert_close(fit.replicates(optimizer)[g], expected_fraction(rest, Q), rtol=1e-10, atol=0)


@pytest.mark.slow
def test_few_tokens_need_cross_fitting() -> None:
    """30 tokens in R^64: in-sample, the leading directions hold far more than they hold of any update by chance."""
    d, k, columns = 64, 4, 16
    ratios = {"in-sample": [], "cross-fitted": []}
    for trial in range(40):
        a = inputs(30, seed=trial, d=d)
        groups = a.split(4)
        sums = [g.mT @ g for g in groups]
        Σ = sum(sums)
        Q = leading(Σ, k)
        fit = CrossFit(sums)
        for g, S in enumerate(sums):
            fit.add(g, leading(Σ - S, k))
        b = inputs(3000, seed=500 + trial, d=d)
        update = b.mT @ torch.randn(3000, columns, generator=torch.Generator().manual_seed(trial), **double)
        fraction = reference.subspace_fraction(update.numpy(), Q.numpy())
        ratios["in-sample"].append(fraction / expected_fraction(Σ, Q)[-1].item())
        ratios["cross-fitted"].append(fraction / fit.expected("sgd")[-1].item())
    assert np.median(ratios["cross-fitted"]) == pytest.approx(1, abs=0.06)
    assert np.median(ratios["in-sample"]) < 0.95


def test_dead_coordinates_and_dtypes() -> None:
    Σ = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    assert correlation(Σ).diagonal().tolist() == [1, 1, 0]
    assert expected_fraction(torch.zeros(3, 3), torch.eye(3)).isnan().all()
    single = expected_fraction(correlation(Σ.float()), torch.eye(3))
    assert single.dtype == torch.float64
    assert single.tolist() == [0.5, 1, 1]


def test_messages() -> None:
    with pytest.raises(ValueError, match="expected an optimizer of sgd, adam, muon, got 'lion'; pass one of them"):
        input_covariance(torch.eye(3), "lion", columns=3)  # type: ignore[arg-type]


def test_the_sign_limit_of_an_adapter() -> None:
    """A (2/π) arcsin(corr(AᵀΣA)) Aᵀ, in coordinates of what A reads."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 9, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 10).double())
    A = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    Σ, mean = a.T @ a / 200, a.mean(0)
    found = AdapterCovariance.of(A, Σ, mean, "sign")
    inner = A.T @ Σ @ A
    size = inner.diagonal().sqrt()
    limit = A @ torch.arcsin((inner / size / size.unsqueeze(-1)).clamp(-1, 1)) @ A.T * 2 / torch.pi
    torch.testing.assert_close(found.frame @ found.covariance @ found.frame.T, limit)
    torch.testing.assert_close(found.mean, AdapterCovariance.of(A, Σ, mean, "adam").mean)
