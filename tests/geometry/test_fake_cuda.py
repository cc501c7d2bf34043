"""Device discipline without a GPU: kernels run on fake cuda tensors, and a mix of devices is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tl_asymmetry.geometry import moments as moments_module
from tl_asymmetry.geometry.fraction import energy_profile, gram_energy, subspace_fraction
from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nulls import isotropic_null, isotropic_variance
from tl_asymmetry.geometry.rounding import rounding_noise
from tl_asymmetry.geometry.spectrum import effective_rank, isoscore, participation_ratio, stable_rank
from tl_asymmetry.geometry.subspace import ordered_eigh
from tl_asymmetry.pair.circuits import product_change
from tl_asymmetry.pair.deltas import Delta, LiveDelta

D = 12


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """Fake tensors inside, and no cached index of either kind across the border."""
    caches = [f for f in vars(moments_module).values() if hasattr(f, "cache_clear")]
    assert caches
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode():
        yield
    for cache in caches:
        cache.cache_clear()


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def assert_on(device: str, *tensors: torch.Tensor) -> None:
    assert {t.device.type for t in tensors} == {device}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
def test_moments_stay_on_the_rows_device(dtype: torch.dtype, masked: bool, sequences: bool) -> None:
    mask = torch.ones(4, 5, dtype=torch.bool, device="cuda") if masked else None
    parts = [StreamingMoments(D, sequences=sequences) for _ in range(2)]
    for part in parts:
        part.update(cuda(4, 5, D, dtype=dtype), mask)
        part.update(cuda(4, 5, D, dtype=dtype), mask)
    total = parts[0].merge(parts[1])
    rest = total.without(parts[1])
    for each in (total, rest, total.pooled()):
        assert_on("cuda", each.mean, each.second_moment, each.covariance)
        assert each.second_moment.dtype == torch.float64
    if sequences:
        assert_on("cuda", total.within_covariance, rest.within_covariance)
    assert_on("cpu", total.cpu().second_moment, *total.state_dict().values())
    # What has left the device merges with what is still there, where the first of the two is.
    assert_on("cpu", total.cpu().merge(rest).covariance)


def test_rows_of_another_device_are_refused() -> None:
    moments = StreamingMoments(D)
    moments.update(cuda(5, D))
    with pytest.raises(RuntimeError, match="device"):
        moments.update(torch.randn(5, D))
    with pytest.raises(RuntimeError, match="device"):
        StreamingMoments(D).update(cuda(5, D), torch.ones(5, dtype=torch.bool))


def test_the_mode_refuses_a_mix() -> None:
    """If it did not, the other tests here would say nothing."""
    with pytest.raises(RuntimeError, match="device"):
        _ = cuda(3, 3) @ torch.randn(3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis_device", ["cpu", "cuda"])
def test_fractions_are_read_where_the_delta_is(dtype: torch.dtype, basis_device: str) -> None:
    basis = torch.randn(D, 4, device=basis_device, dtype=torch.float64)
    delta = cuda(3, D, 5, dtype=dtype)
    assert_on("cuda", energy_profile(delta, basis), subspace_fraction(delta.mT, basis, residual_axis=-1))
    assert_on("cuda", gram_energy(cuda(3, D, D), basis))
    mean, variance = isotropic_null(delta, 4)
    assert mean == 4 / D
    assert_on("cuda", variance, isotropic_variance(cuda(3), D, 4))


def test_spectra_and_intervals() -> None:
    λ = cuda(3, D)
    assert_on("cuda", effective_rank(λ), participation_ratio(λ), stable_rank(λ), isoscore(cuda(3, D, D)))
    interval = log_jackknife_interval(cuda(3), cuda(8, 3), corrected=True)
    assert_on("cuda", interval.low, interval.high, interval.biased)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigensolves_are_on_the_cpu(dtype: torch.dtype) -> None:
    λ, Q = ordered_eigh(cuda(3, D, D, dtype=dtype))
    assert_on("cpu", λ, Q)
    assert Q.dtype == dtype


@pytest.mark.parametrize("shape", [(2, D, 5), (2, 300, 300)])
def test_rounding_noise(shape: tuple[int, ...]) -> None:
    """Its draws come from a CPU generator; the second shape is sampled."""
    noise = rounding_noise(cuda(*shape), cuda(*shape), torch.bfloat16, seed=0)
    assert_on("cuda", noise.share, noise.rows)


def test_live_deltas_and_circuits_hand_out_cpu_numbers() -> None:
    basis = torch.randn(D, 4, dtype=torch.float64)
    none = torch.zeros(3, dtype=torch.float64)
    rows = torch.zeros(3, 1)
    numbers = Delta("W_Q", none, none, none, rows.double(), rows.unsqueeze(1), rows.unsqueeze(1), none, rows.double())
    for gram in (None, cuda(3, D, D)):
        assert_on("cpu", LiveDelta(numbers, cuda(3, D, 5), gram).energies(basis))
    change = product_change(cuda(4, D, 3), cuda(2, D, 3), cuda(4, D, 3), cuda(2, D, 3))
    assert_on("cuda", change.left, change.right)
    assert_on("cpu", change.energy, change.base_energy, change.energies(basis, "left"), change.energies(basis, "right"))
