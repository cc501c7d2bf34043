"""What is measured of a delta, against an explicit SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import reference
from tl_asymmetry.geometry.rounding import rounding_noise
from tl_asymmetry.pair.deltas import DIRECTIONS, LiveDelta, measure_delta, residual_first

SHAPES = {"W_Q": (3, 12, 7), "W_O": (3, 7, 12), "W_in": (12, 40), "W_out": (40, 12), "W_K": (2, 9, 9)}
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)


def measured(matrix: str, dtype: torch.dtype = torch.float64) -> tuple[LiveDelta, np.ndarray, np.ndarray]:
    """Ours, and the base and the delta as [head, d_model, other] in numpy."""
    base = gaussian(*SHAPES[matrix]).to(dtype)
    aligned = (base.double() + 0.1 * gaussian(*SHAPES[matrix], seed=1)).to(dtype)
    W, new = reference.float64(base), reference.float64(aligned)
    W, new = (t if t.ndim == 3 else t[None] for t in (W, new))
    W, new = (t.transpose(0, 2, 1) if matrix in ("W_O", "W_out") else t for t in (W, new))
    return measure_delta(matrix, base, aligned, seed=0), W, new - W


@pytest.mark.parametrize(("dtype", "tolerance"), [*PRECISIONS, (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("matrix", SHAPES)
def test_numbers_equal_an_explicit_svd(matrix: str, dtype: torch.dtype, tolerance: float) -> None:
    live, W, ΔW = measured(matrix, dtype)
    numbers = live.numbers
    assert (live.matrix, numbers.matrix) == (matrix, matrix)
    if live.change is not None:
        # Float32 subtracts what it holds exactly to within half a unit of the result.
        np.testing.assert_allclose(live.change, ΔW, atol=1e-7)
    else:
        np.testing.assert_allclose(live.gram, ΔW @ ΔW.transpose(0, 2, 1), rtol=tolerance, atol=tolerance)
    U, σ, Vt = np.linalg.svd(ΔW, full_matrices=False)
    np.testing.assert_allclose(numbers.spectrum, σ**2, rtol=tolerance, atol=tolerance * (σ**2).max())
    np.testing.assert_allclose(numbers.energy, (ΔW**2).sum((1, 2)), rtol=tolerance)
    np.testing.assert_allclose(numbers.base_energy, (W**2).sum((1, 2)), rtol=tolerance)
    shrink = (ΔW * W).sum((1, 2)) / (W**2).sum((1, 2))
    np.testing.assert_allclose(numbers.shrink, shrink, rtol=tolerance, atol=tolerance)
    for ours, theirs in ((numbers.directions, U.transpose(0, 2, 1)), (numbers.partners, Vt)):
        assert ours.shape == (len(W), DIRECTIONS, theirs.shape[-1])
        assert ours.dtype == torch.float32
        cosines = (ours.double().numpy() * theirs[:, :DIRECTIONS]).sum(-1)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    # A direction and its partner belong together, sign and all: uᵀ ΔW v = σ.
    stretch = np.einsum("hnd,hdo,hno->hn", numbers.directions.double(), ΔW, numbers.partners.double())
    np.testing.assert_allclose(stretch, σ[:, :DIRECTIONS], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("matrix", SHAPES)
def test_numbers_hold_no_more_than_themselves(matrix: str, dtype: torch.dtype) -> None:
    """They outlive the layer: five directions that were a view of all eigenvectors kept d² entries a matrix."""
    for name, numbers in vars(measured(matrix, dtype)[0].numbers).items():
        if isinstance(numbers, torch.Tensor):
            assert numbers.untyped_storage().nbytes() == numbers.numel() * numbers.itemsize, name


@pytest.mark.parametrize("matrix", SHAPES)
def test_rounding_is_that_of_the_storage_format(matrix: str) -> None:
    base = gaussian(*SHAPES[matrix]).bfloat16()
    aligned = (base.double() + 5e-3 * gaussian(*SHAPES[matrix], seed=1)).bfloat16()
    W = residual_first(matrix, base).double()
    truth = rounding_noise(W, residual_first(matrix, aligned).double() - W, torch.bfloat16, seed=4).share
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        ours = measure_delta(matrix, base.to(dtype), aligned.to(dtype), seed=4).numbers.rounding
        assert ours.tolist() == pytest.approx(truth.tolist(), abs=1e-6)
    # One side in bf16 is enough to round the difference.
    mixed = measure_delta(matrix, base.double(), aligned.double() + 1e-9, seed=4)
    assert bool((mixed.numbers.rounding > 0).all())
    fine = measure_delta(matrix, gaussian(*SHAPES[matrix]), gaussian(*SHAPES[matrix], seed=1), seed=4)
    assert fine.numbers.rounding.max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("matrix", ["W_in", "W_out", "W_Q", "W_O"])
def test_the_gram_of_a_wide_delta_stands_in_for_it(matrix: str, dtype: torch.dtype, tolerance: float) -> None:
    live, _, ΔW = measured(matrix, dtype)
    assert (live.gram is not None) == (live.change is None) == (matrix in ("W_in", "W_out"))
    Q = torch.linalg.qr(gaussian(12, 12, seed=7)).Q
    truth = np.stack([reference.energy_profile(head, Q.numpy()) * (head**2).sum() for head in ΔW])
    direct = LiveDelta(live.numbers, torch.from_numpy(ΔW).to(dtype), None)
    for ours in (live.energies(Q), direct.energies(Q)):
        np.testing.assert_allclose(ours, truth, rtol=tolerance, atol=tolerance * truth.max())


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (20, 20)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_directions_beyond_the_rank_stay_orthonormal(shape: tuple[int, int], rank: int) -> None:
    """Rounding must not pass for a second copy of the first direction."""
    base = gaussian(*shape).float()
    factors = gaussian(shape[0], rank, seed=1), gaussian(rank, shape[1], seed=2)
    numbers = measure_delta("W_in", base, base + (0.1 * factors[0] @ factors[1]).float(), seed=0).numbers
    for vectors in (numbers.directions[0], numbers.partners[0]):
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(DIRECTIONS), atol=1e-5, rtol=0)
    inside = torch.linalg.qr(factors[0]).Q.float()
    lengths = (numbers.directions[0, :rank] @ inside).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(rank), atol=1e-4, rtol=0)


def test_shrink_finds_weight_decay() -> None:
    base = gaussian(2, 6, 4)
    numbers = measure_delta("W_Q", base, 0.9 * base, seed=0).numbers
    assert numbers.shrink.tolist() == pytest.approx([-0.1, -0.1])


def test_precision_is_the_finer_of_the_two() -> None:
    base = gaussian(2, 6, 4)
    for first, second, expected in [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ]:
        live = measure_delta("W_Q", base.to(first), base.to(second), seed=0)
        assert live.change.dtype == expected
        np.testing.assert_allclose(live.change, base.to(second).double() - base.to(first).double(), atol=1e-7)


def test_residual_first_is_a_view() -> None:
    W_O, W_out, W_in = gaussian(2, 4, 6), gaussian(8, 6), gaussian(6, 8).requires_grad_()
    assert residual_first("W_O", W_O).shape == (2, 6, 4)
    assert residual_first("W_out", W_out).shape == (1, 6, 8)
    assert residual_first("W_in", W_in).shape == (1, 6, 8)
    for matrix, W in (("W_O", W_O), ("W_out", W_out), ("W_in", W_in)):
        assert residual_first(matrix, W).data_ptr() == W.data_ptr()
    assert not residual_first("W_in", W_in).requires_grad
