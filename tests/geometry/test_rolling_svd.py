"""The rolling decomposition is that of the window, always, whatever came before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.reference import float64
from tl_asymmetry.geometry import RollingSVD, RollingSVDs
from tl_asymmetry.geometry.sketch import RowSketch


def rows(count, size, seed=0, scale=None):
    """A drifting stream: each row keeps most of the last one, so that the window is strongly graded."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, size, generator=generator, dtype=torch.float64)
    out = [noise[0]]
    for row in noise[1:]:
        out.append(0.95 * out[-1] + 0.1 * row)
    stream = torch.stack(out)
    return stream if scale is None else stream * scale


@pytest.mark.slow
def test_equals_the_full_svd_over_a_thousand_steps():
    stream = rows(1000, 257).float()
    svd = RollingSVD(window=12, rank=5)
    for i, row in enumerate(stream):
        svd.update(row)
        window = float64(stream[max(0, i - 11) : i + 1])
        U, σ, Vt = np.linalg.svd(window, full_matrices=False)
        k = min(5, len(window))
        assert np.abs(float64(svd.singular_values) - σ[:k]).max() <= 1e-6 * σ[0]
        if i % 37 == 0 or i > 990:
            V = float64(svd.right_singular_vectors)
            # Vectors up to sign: what the window loses when projected is the same.
            mine, full = window - (window @ V.T) @ V, window - (window @ Vt[:k].T) @ Vt[:k]
            assert abs(np.linalg.norm(mine) - np.linalg.norm(full)) <= 1e-6 * σ[0]
            signs = np.sign((V * Vt[:k]).sum(1))
            separated = np.abs(np.diff(σ[: k + 1], append=0))[:k] > 0.02 * σ[0]
            separated[1:] &= separated[:-1]
            assert np.abs(V * signs[:, None] - Vt[:k])[separated[:k]].max(initial=0) <= 1e-5
            left = float64(svd.left_vectors)
            assert np.abs(np.abs(left.T @ U[:, :k]).diagonal() - 1)[separated[:k]].max(initial=0) <= 1e-6


def test_gram_is_that_of_the_rows_held_oldest_first():
    stream = rows(9, 20_000)  # longer than one piece of the products
    svd = RollingSVD(window=4, rank=2, dtype=torch.float64)
    for row in stream:
        svd.update(row)
    held = float64(stream[-4:])
    np.testing.assert_allclose(float64(svd.gram), held @ held.T, rtol=1e-12)


def test_small_singular_values_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(400, 6, generator=generator, dtype=torch.float64)).Q.T
    U = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    σ = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], dtype=torch.float64)
    svd = RollingSVD(window=6, rank=6, dtype=torch.float64)
    for row in U @ (σ[:, None] * Q):
        svd.update(row)
    torch.testing.assert_close(svd.singular_values, σ, rtol=1e-5, atol=0)
    V = svd.right_singular_vectors
    torch.testing.assert_close(V @ V.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_ring_of_half_the_bits_is_off_by_its_rounding_only():
    stream = rows(30, 3000).float()
    exact, rounded = RollingSVD(8, 3), RollingSVD(8, 3, dtype=torch.bfloat16)
    for row in stream:
        exact.update(row)
        rounded.update(row)
    norms = exact.gram.diagonal().sqrt()
    off = (rounded.gram - exact.gram).abs() / (norms[:, None] * norms)
    assert off.max() <= torch.finfo(torch.bfloat16).eps
    assert off.diagonal().max() == 0  # a row's own product is taken before it is rounded
    V = rounded.right_singular_vectors
    torch.testing.assert_close(V @ V.T, torch.eye(len(V)), rtol=0, atol=1e-5)


def test_fewer_directions_where_the_rows_have_fewer():
    svd = RollingSVD(window=5, rank=3)
    row = torch.arange(50.0)
    for factor in (1.0, -2.0, 3.0):
        svd.update(factor * row)
    assert svd.right_singular_vectors.shape == (1, 50)
    torch.testing.assert_close(svd.right_singular_vectors[0].abs(), row / row.norm())
    svd.update(torch.ones(50))
    assert len(svd.singular_values) == 2
    assert RollingSVD(3, 2).singular_values.tolist() == []
    assert not svd.full
    assert svd.rows_held == 4


def test_zero_rows_have_no_direction():
    svd = RollingSVD(2, 1)
    svd.update(torch.zeros(8))
    assert svd.singular_values.tolist() == []
    assert svd.right_singular_vectors.shape == (0, 8)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.floats(1e-3, 1e3))
def test_scales_with_the_rows_and_forgets_the_past(window, extra, scale):
    stream = rows(window + extra, 40, seed=extra) * scale
    whole, late = RollingSVD(window, 1, dtype=torch.float64), RollingSVD(window, 1, dtype=torch.float64)
    for row in stream:
        whole.update(row)
    for row in stream[-window:] / scale:
        late.update(row)
    torch.testing.assert_close(whole.singular_values, late.singular_values * scale, rtol=1e-9, atol=0)


def test_state_goes_on_bit_for_bit():
    stream = rows(14, 33).float()
    through, first = RollingSVD(5, 2), RollingSVD(5, 2)
    for row in stream[:7]:
        through.update(row)
        first.update(row)
    second = RollingSVD(5, 2)
    second.load_state_dict(first.state_dict())
    for row in stream[7:]:
        through.update(row)
        second.update(row)
    assert torch.equal(through.right_singular_vectors, second.right_singular_vectors)
    assert torch.equal(through.gram, second.gram)
    with pytest.raises(ValueError, match="expected the state of a window of 4, got 5; pass the same window"):
        RollingSVD(4, 2).load_state_dict(first.state_dict())


def test_blocks_add_up_to_whole_rows():
    stream = rows(11, 60)
    streams, whole = RollingSVDs(4, 3, dtype=torch.float64), RollingSVD(4, 3, dtype=torch.float64)
    for row in stream:
        streams.update("gradient", {"a": row[:24].view(4, 6), "b": row[24:]})
        streams.update("update", {"a": row[24:48]})
        whole.update(row)
    torch.testing.assert_close(streams.joint_singular_values("gradient"), whole.singular_values)
    np.testing.assert_allclose(
        float64(streams["gradient", "b"].singular_values),
        np.linalg.svd(float64(stream[-4:, 24:]), compute_uv=False)[:3],
    )
    with pytest.raises(ValueError, match="pass one of gradient/a, gradient/b, update/a"):
        streams["loss", "a"]


@pytest.mark.slow
def test_sketch_keeps_inner_products():
    a, b = rows(2, 1000, seed=1).float()
    errors = []
    for seed in range(200):
        sketch = RowSketch(64, seed=seed)
        errors.append(((sketch(a) @ sketch(b)) - a.double() @ b.double()).item() / (a.norm() * b.norm()).item())
    standard = (2 / 64) ** 0.5
    assert abs(np.mean(errors)) < 4 * standard / 200**0.5  # unbiased
    assert 0.3 * standard < np.std(errors) < 1.2 * standard


def test_sketch_is_a_linear_map_that_loses_no_energy_of_single_entries():
    sketch = RowSketch(8, seed=3)
    identity = torch.eye(30)
    images = torch.stack([sketch(e) for e in identity])
    assert ((images != 0).sum(1) == 1).all()
    assert (images.abs().sum(1) == 1).all()
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sketch(x), images.T @ x.double())


def test_sketched_singular_values_are_near_and_vectors_refused():
    stream = rows(10, 20_000).float()
    exact, sketched = RollingSVD(6, 2), RollingSVD(6, 2, sketch=4096)
    for row in stream:
        exact.update(row)
        sketched.update(row)
    ratio = sketched.singular_values / exact.singular_values
    assert (ratio - 1).abs().max() < 5 * (2 / 4096) ** 0.5
    with pytest.raises(ValueError, match="expected a ring of rows for right vectors, got sketches"):
        _ = sketched.right_singular_vectors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RollingSVD(2, 3), "expected window >= rank = 3, got 2; pass a longer window or a smaller rank"),
        (lambda: RollingSVD(2, 0), "expected rank >= 1, got 0"),
        (lambda: RollingSVD(2, 1, dtype=torch.int32), "expected a floating-point dtype"),
        (lambda: RollingSVDs(1, 2), "expected window >= rank"),
        (lambda: RowSketch(1), "expected a sketch of at least 2"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_rows():
    svd = RollingSVD(3, 1)
    svd.update(torch.ones(4))
    with pytest.raises(ValueError, match="expected a row of 4 numbers, got 5; pass rows of one stream"):
        svd.update(torch.ones(5))
    with pytest.raises(ValueError, match="expected finite rows, got NaN or infinity"):
        svd.update(torch.tensor([1.0, 2.0, float("nan"), 0.0]))
    assert svd.rows_seen == 1  # what was refused has left no trace
    assert svd.singular_values.tolist() == [2.0]


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    stream = rows(20, 5000).float()
    here, there = RollingSVD(8, 3), RollingSVD(8, 3)
    for row in stream:
        here.update(row)
        there.update(row.cuda())
    torch.testing.assert_close(there.singular_values, here.singular_values, rtol=1e-9, atol=0)
    assert there.right_singular_vectors.is_cuda
