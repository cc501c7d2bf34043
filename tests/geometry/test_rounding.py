"""The share of a delta that its storage format explains."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import reference
from tl_asymmetry.geometry.rounding import coarser, rounding_noise, storage_dtype, without_rounding


def rounding_share(W: torch.Tensor, delta: torch.Tensor, stored: torch.dtype, *, seed: int) -> torch.Tensor:
    return rounding_noise(W, delta, stored, seed=seed).share


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    # Far from the seeds given to rounding_share: weights equal to its draws would be a strange accident.
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (30, 20), (2, 30, 20)])
def test_storage_dtype_sees_through_what_it_was_loaded_as(stored: torch.dtype, shape: tuple[int, ...]) -> None:
    x = gaussian(*shape).to(stored)
    assert storage_dtype(x) == stored
    assert storage_dtype(x.double()) == stored
    if stored != torch.float64:
        assert storage_dtype(x.float()) == stored


def test_storage_dtype_looks_at_every_entry() -> None:
    x = gaussian(5, 8).bfloat16().float()
    x[4, 7] = 1 + 2**-20
    assert storage_dtype(x) == torch.float32
    x[4, 7] = 1 + 2**-10
    assert storage_dtype(x) == torch.float16
    x[0, 0] = 1e30  # beyond float16
    assert storage_dtype(x) == torch.float32
    assert storage_dtype(torch.zeros(2, 2)) == torch.bfloat16


def test_coarser() -> None:
    order = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    for i, first in enumerate(order):
        for j, second in enumerate(order):
            assert coarser(first, second) == order[min(i, j)]


D, RANK = 1024, 4


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Stored bf16 weights and a unit delta of rank 4."""
    W = gaussian(D, 256).bfloat16().double()
    U = torch.linalg.qr(gaussian(D, RANK, seed=1)).Q
    delta = U @ gaussian(RANK, 256, seed=2)
    return W, delta / delta.norm()


@pytest.mark.parametrize(("size", "expected"), [(4e-4, 0.80), (1e-3, 0.56), (4e-3, 0.13)])
def test_trial_table(planted: tuple[torch.Tensor, torch.Tensor], size: float, expected: float) -> None:
    W, delta = planted
    measured = (W + size * W.norm() * delta).bfloat16().double() - W
    Q = torch.linalg.svd(delta, full_matrices=False).U[:, :RANK].numpy()
    fraction = reference.subspace_fraction(measured.numpy(), Q)
    # What lies along the intended delta is signal, the rest is noise.
    true = 1 - ((measured * delta).sum() ** 2 / measured.square().sum()).item()
    rounding = rounding_noise(W.float(), measured.float(), torch.bfloat16, seed=0)
    estimate, noise = rounding.share.item(), rounding.fraction(torch.tensor(Q))[-1].item()
    assert true == pytest.approx(expected, abs=0.04)
    assert estimate == pytest.approx(true, abs=0.05)
    assert noise == pytest.approx(RANK / D, rel=0.25)
    assert (fraction - estimate * noise) / (1 - estimate) == pytest.approx(1, abs=0.25)


def test_float32_pairs_carry_none_and_zero_deltas_are_undefined() -> None:
    W = gaussian(3, 20, 10)
    delta = 1e-4 * gaussian(3, 20, 10, seed=1)
    delta[1] = 0
    for stored in (torch.float32, torch.float64):
        share = rounding_share(W, delta, stored, seed=0)
        assert share.isnan().tolist() == [False, True, False]
        assert share[[0, 2]].tolist() == [0, 0]
    assert rounding_share(W, delta, torch.bfloat16, seed=0).isnan().tolist() == [False, True, False]


def test_share_falls_with_the_size_of_the_delta_and_the_length_of_the_mantissa() -> None:
    W, delta = gaussian(64, 64).bfloat16().double(), gaussian(64, 64, seed=1)
    shares = [rounding_share(W, size * delta, torch.bfloat16, seed=0).item() for size in (1e-5, 1e-3, 1e-2, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.95
    assert shares[-1] < 1e-4
    assert rounding_share(W, 1e-3 * delta, torch.float16, seed=0).item() < 0.2 * shares[1]


def test_a_pure_rounding_delta_is_all_rounding() -> None:
    W = gaussian(64, 64)
    delta = W.bfloat16().double() - W
    assert rounding_share(W, delta, torch.bfloat16, seed=0).item() > 0.95


def test_heads_together_are_heads_alone() -> None:
    W, delta = gaussian(2, 3, 40, 30).bfloat16().double(), 2e-3 * gaussian(2, 3, 40, 30, seed=1)
    W[1] *= 8
    together = rounding_share(W, delta, torch.bfloat16, seed=0)
    assert together.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = rounding_share(W[i, j], delta[i, j], torch.bfloat16, seed=0)
            assert alone.item() == pytest.approx(together[i, j].item(), abs=0.02)


def test_large_matrices_are_sampled_well_enough() -> None:
    W, delta = gaussian(1200, 100).bfloat16().double(), 3e-3 * gaussian(1200, 100, seed=1)
    whole = rounding_share(W, delta, torch.bfloat16, seed=0).item()
    parts = rounding_share(W.view(4, 300, 100), delta.view(4, 300, 100), torch.bfloat16, seed=0)
    assert whole == pytest.approx(parts.mean().item(), abs=0.01)


def test_seed_decides_and_global_state_is_left_alone() -> None:
    W, delta = gaussian(30, 30).bfloat16().double(), 2e-3 * gaussian(30, 30, seed=1)
    state = torch.get_rng_state()
    first, again, other = (rounding_share(W, delta, torch.bfloat16, seed=s).item() for s in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


LAWS = {
    "gaussian": lambda x: x,
    "signs": torch.sign,
    "heavy": lambda x: x**3,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [1e-5, 3e-5, 1e-4])
def test_the_deltas_own_entry_law_is_found_where_storage_is_finest(law: str, size: float) -> None:
    W = (0.02 * gaussian(512, 64)).bfloat16().double()
    intended = LAWS[law](gaussian(512, 64, seed=1))
    intended = size * intended / intended.square().mean().sqrt()
    measured = (W + intended).bfloat16().double() - W
    true = 1 - ((measured * intended).sum() ** 2 / measured.square().sum() / intended.square().sum()).item()
    assert rounding_share(W, measured, torch.bfloat16, seed=0).item() == pytest.approx(true, abs=0.05)


def test_the_noise_is_where_the_weights_are_large() -> None:
    """bf16 rounds a row of large weights more: the noise of such rows is not k/d."""
    scale = torch.ones(256, 1, dtype=torch.float64)
    scale[:16] = 8
    W = (scale * gaussian(256, 64)).bfloat16().double()
    intended = 0.05 * gaussian(256, 64, seed=1)
    measured = (W + intended).bfloat16().double() - W
    noise = measured - intended
    rounding = rounding_noise(W, measured, torch.bfloat16, seed=0)
    Q = torch.eye(256, dtype=torch.float64)[:, :16]
    true = (noise[:16].square().sum() / noise.square().sum()).item()
    assert rounding.fraction(Q)[-1].item() == pytest.approx(true, rel=0.1)
    assert true > 5 * 16 / 256
    corrected = without_rounding(measured[:16].square().sum() / measured.square().sum(), rounding.share,
                                 rounding.fraction(Q)[-1], most=0.9)  # fmt: skip
    assert corrected.item() == pytest.approx((intended[:16].square().sum() / intended.square().sum()).item(), abs=0.02)


def test_corrected_fractions_stay_possible() -> None:
    fraction, share, noise = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.8, 0.95], [0.1, 0.0, 0.1]], dtype=torch.float64)
    corrected = without_rounding(fraction, share, noise, most=0.9)
    assert corrected[:2].tolist() == [0, 1]
    assert corrected[2].isnan()
