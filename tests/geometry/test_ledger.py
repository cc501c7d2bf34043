"""The ledger of a chain of steps against its definition written out, and chance against sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_asymmetry.geometry.ledger import cosine_spread, leading_overlap, ledger, step_gram, storage_product

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_ledger_is_its_definition(stages, seed):
    steps = normal(stages, 3, 6, 4, seed=seed)
    found = ledger(step_gram(steps))
    for head in range(3):
        Δ = steps[:, head]
        for i in range(stages):
            size = (Δ[i] ** 2).sum()
            later = Δ[i + 1 :].sum(0)
            kept = 1 + sum((Δ[i] * Δ[j]).sum() for j in range(stages) if j != i) / size
            along = (Δ[i] * later).sum()
            beside = later - along / size * Δ[i]
            assert found.kept[head, i].item() == pytest.approx(kept.item(), rel=1e-10, abs=1e-12)
            assert found.undone[head, i].item() == pytest.approx(max(0.0, -along.item()) / size.item(), abs=1e-12)
            assert found.turned[head, i].item() == pytest.approx((beside.norm() / size.sqrt()).item(), abs=1e-7)
        energy = (Δ**2).sum((-2, -1))
        assert (found.kept[head] * energy).sum().item() == pytest.approx((Δ.sum(0) ** 2).sum().item(), rel=1e-9)


def test_a_way_that_returns_keeps_nothing_and_has_undone_all():
    Δ = normal(2, 5, 3)
    found = ledger(step_gram(torch.stack([Δ, -Δ])))
    torch.testing.assert_close(found.kept, torch.zeros(2, 2, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.undone, torch.tensor([[1.0, 0.0]] * 2, dtype=F64))
    torch.testing.assert_close(found.turned, torch.zeros(2, 2, dtype=F64), atol=1e-7, rtol=0)


def test_a_step_of_no_length_has_no_shares():
    found = ledger(step_gram(torch.stack([torch.zeros(5, 3, dtype=F64), normal(5, 3)])))
    assert found.kept[0].isnan()
    assert found.kept[1] == 1


def test_float32_steps_are_summed_in_float64():
    steps = normal(2, 300, 200).float()
    torch.testing.assert_close(step_gram(steps), step_gram(steps.double()), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(24, 8), (8, 24)])
def test_the_spread_of_cosines_is_that_of_deltas_that_share_covariances(rows, columns):
    """Two deltas A G B with fresh G each: the measured spread against the formula, and against white entries."""
    A = torch.diag(torch.arange(1, rows + 1, dtype=F64) ** -1.0)
    B = torch.diag(torch.arange(1, columns + 1, dtype=F64) ** -0.5)
    first, second = (A @ normal(4000, rows, columns, seed=s) @ B for s in (1, 2))
    cosines = (first * second).sum((-2, -1)) / first.norm(dim=(-2, -1)) / second.norm(dim=(-2, -1))
    predicted = cosine_spread(first, second)
    assert predicted.median().item() == pytest.approx(cosines.std().item(), rel=0.12)
    assert cosines.std() > 2 / math.sqrt(rows * columns)


def test_overlap_by_chance_is_k_over_rows():
    first, second = normal(500, 20, 6, seed=1), normal(500, 20, 6, seed=2)
    assert leading_overlap(first, second, 3).mean().item() == pytest.approx(3 / 20, rel=0.05)
    wide = normal(20, 60)
    assert leading_overlap(wide, wide @ normal(60, 60, seed=3).fill_diagonal_(9) / 9, 20).item() == pytest.approx(1)
    assert leading_overlap(first[0], 3 * first[0], 3).item() == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-4, 2e-4, 4e-4, 1e-3])
def test_storage_explains_the_cosine_of_independent_bf16_steps(size):
    """Paths in float64, their checkpoints stored in bf16: what is simulated from the stored ones alone is what came."""
    W = normal(40, 64, 16) * 0.1
    path = [W, W + size * normal(40, 64, 16, seed=1)]
    path.append(path[1] + size * normal(40, 64, 16, seed=2))
    stored = [x.to(torch.bfloat16).double() for x in path]
    gram = step_gram(torch.stack([stored[1] - stored[0], stored[2] - stored[1]]))
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    product = storage_product(stored[1], norms[:, 0], norms[:, 1], torch.bfloat16, seed=0)
    cosine, floor = (x / norms[:, 0] / norms[:, 1] for x in (gram[:, 0, 1], product))
    assert floor.mean() < -0.01
    error = (cosine - floor).std().item() / 40**0.5
    assert abs((cosine - floor).mean().item()) < 4 * error
    assert (cosine.mean() < -0.2) == (size < 3e-4)
    assert storage_product(stored[1], norms[:, 0], norms[:, 1], torch.float32, seed=0).eq(0).all()


def test_storage_of_large_matrices_is_sampled():
    W = (normal(1, 600, 400) * 0.1).to(torch.bfloat16)
    size = torch.tensor([2e-4 * 240_000**0.5], dtype=F64)
    part = (size / 8**0.5).expand(8)
    sampled = storage_product(W, size, size, torch.bfloat16, seed=0)
    parts = storage_product(W.reshape(8, 75, 400), part, part, torch.bfloat16, seed=1).sum()
    assert sampled.item() == pytest.approx(parts.item(), rel=0.15)
