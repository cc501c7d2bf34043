"""Streaming moments against explicit sums, however the rows arrive."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference
from tl_asymmetry.geometry import moments as moments_module
from tl_asymmetry.geometry.moments import StreamingMoments

READINGS = ("second_moment", "covariance")
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def rows(
    shape: tuple[int, ...], *, seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Gaussian rows about one mean, the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    d = shape[-1]
    scale = torch.linspace(0.5, 2, d, dtype=torch.float64)
    offset = mean * torch.linspace(1, -0.5, d, dtype=torch.float64)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)


def streamed(*batches: torch.Tensor, sequences: bool = False) -> StreamingMoments:
    moments = StreamingMoments(batches[0].shape[-1], sequences=sequences)
    for batch in batches:
        moments.update(batch)
    return moments


def error(ours: torch.Tensor, truth: np.ndarray) -> float:
    """Largest deviation, relative to the largest entry."""
    return float(np.abs(ours.numpy() - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("d", [12, 257])  # from 256 on the product is made in blocks
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [*PRECISIONS, (torch.bfloat16, 1e-5)])
def test_equals_explicit_sums(reading: str, mean: float, dtype: torch.dtype, tolerance: float, d: int) -> None:
    x = rows((6, 50, d), mean=mean, dtype=dtype)
    moments = streamed(*x.split(2))
    truth = getattr(reference, reading)(reference.float64(x).reshape(-1, d))
    assert getattr(moments, reading).dtype == torch.float64
    assert error(getattr(moments, reading), truth) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-7)])
def test_mean_and_count(dtype: torch.dtype, tolerance: float) -> None:
    x = rows((40, 5), mean=1e3, dtype=dtype)
    moments = streamed(x[:7], x[7:])
    assert moments.count == 40
    assert error(moments.mean, reference.float64(x).mean(axis=0)) < tolerance


def test_float32_rows_after_float64_rows_lose_nothing() -> None:
    x = rows((60, 6), mean=1e3)
    moments = streamed(x[:30], x[30:].float())
    truth = np.concatenate([reference.float64(x[:30]), reference.float64(x[30:].float())])
    assert error(moments.covariance, reference.covariance(truth)) < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_split_order_and_mask_give_the_same(data: st.DataObject) -> None:
    n, length, d = data.draw(st.integers(1, 7), label="n"), data.draw(st.integers(1, 6), label="length"), 3
    x = rows((n, length, d), seed=data.draw(st.integers(0, 9)), mean=data.draw(st.sampled_from([0.0, 1e3])))
    bits = data.draw(st.lists(st.booleans(), min_size=n * length, max_size=n * length), label="mask")
    mask = torch.tensor(bits).view(n, length)
    mask[-1, -1] = True
    poisoned = torch.where(mask.unsqueeze(-1), x, torch.nan)
    cuts = sorted(data.draw(st.sets(st.integers(1, n), max_size=3), label="cuts") | {n})
    parts, start = [], 0
    for stop in cuts:
        part = StreamingMoments(d, sequences=True)
        part.update(poisoned[start:stop], mask[start:stop])
        parts.append(part)
        start = stop
    merged = StreamingMoments(d, sequences=True)
    for part in data.draw(st.permutations(parts), label="order"):
        assert merged.merge(part) is merged
    truth = reference.float64(x[mask])
    scale = 1 + np.abs(truth).max() ** 2
    assert merged.count == int(mask.sum())
    np.testing.assert_allclose(merged.second_moment, reference.second_moment(truth), atol=1e-13 * scale)
    np.testing.assert_allclose(merged.covariance, reference.covariance(truth), atol=1e-13 * scale)
    within = reference.within_covariance([reference.float64(s[m]) for s, m in zip(x, mask, strict=True)])
    np.testing.assert_allclose(merged.within_covariance, within, atol=1e-13 * scale)


@pytest.mark.parametrize("masked_value", [0.0, float("nan"), float("inf"), 1e30])
def test_a_first_batch_without_rows_costs_no_digits(masked_value: float) -> None:
    x = rows((4, 30, 6), mean=1e3, dtype=torch.float32)
    moments = StreamingMoments(6)
    moments.update(torch.full_like(x, masked_value), torch.zeros(4, 30, dtype=torch.bool))
    assert moments.count == 0
    moments.update(x)
    assert error(moments.covariance, reference.covariance(reference.float64(x).reshape(-1, 6))) < 1e-5


@pytest.mark.parametrize("masked_value", [float("nan"), float("inf"), 1e30])
def test_masked_rows_leave_no_trace_in_float32(masked_value: float) -> None:
    x = rows((4, 30, 6), mean=1e3, dtype=torch.float32)
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[:, 20:] = False
    moments = StreamingMoments(6, sequences=True)
    moments.update(torch.where(mask.unsqueeze(-1), x, masked_value), mask)
    kept = reference.float64(x[:, :20])
    assert error(moments.covariance, reference.covariance(kept.reshape(-1, 6))) < 1e-5
    assert error(moments.within_covariance, reference.within_covariance(list(kept))) < 1e-5


def test_an_unmasked_nan_is_not_hidden() -> None:
    x = rows((5, 2))
    x[3, 1] = torch.nan
    assert streamed(x).second_moment.isnan().any()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_within_covariance_centres_each_sequence(dtype: torch.dtype, tolerance: float) -> None:
    x = rows((5, 9, 4), mean=1e3, dtype=dtype) + 3 * rows((5, 1, 4), seed=1, dtype=dtype)
    lengths = [9, 1, 4, 0, 7]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(-1)
    moments = StreamingMoments(4, sequences=True)
    moments.update(x[:2], mask[:2])
    moments.update(x[2:], mask[2:])
    sequences = [reference.float64(s[:n]) for s, n in zip(x, lengths, strict=True)]
    truth = reference.within_covariance(sequences)
    assert error(moments.within_covariance, truth) < tolerance
    assert error(moments.covariance, truth) > 0.5  # the means differ as much as the rows about them


def test_a_sequence_cut_over_two_updates_counts_as_two() -> None:
    x = rows((1, 8, 3))
    halves = [reference.float64(x[0, :4]), reference.float64(x[0, 4:])]
    moments = streamed(x[:, :4], x[:, 4:], sequences=True)
    assert error(moments.within_covariance, reference.within_covariance(halves)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("left_out", [0, 1, 3])
def test_without_is_the_sum_of_the_others(left_out: int, dtype: torch.dtype, tolerance: float) -> None:
    groups = [rows((3, 10, 5), seed=i, mean=1e3, dtype=dtype) for i in range(4)]
    parts = [streamed(g, sequences=True) for g in groups]
    total = StreamingMoments(5, sequences=True)
    for part in parts:
        total.merge(part)
    rest = total.without(parts[left_out])
    sequences = [reference.float64(s) for i, g in enumerate(groups) if i != left_out for s in g]
    flat = np.concatenate(sequences)
    assert (rest.count, total.count) == (90, 120)
    assert error(rest.second_moment, reference.second_moment(flat)) < tolerance
    assert error(rest.covariance, reference.covariance(flat)) < tolerance
    assert error(rest.within_covariance, reference.within_covariance(sequences)) < tolerance


def test_without_and_merge_of_nothing() -> None:
    moments, empty = streamed(rows((5, 2))), StreamingMoments(2)
    assert torch.equal(moments.without(empty).second_moment, moments.second_moment)
    assert StreamingMoments(2).merge(moments).count == moments.merge(empty).count == 5


def test_merge_pooled_and_state_are_independent_copies() -> None:
    source = streamed(rows((2, 4, 3)), sequences=True)
    before = source.second_moment.clone()
    copies = [StreamingMoments(3, sequences=True).merge(source), StreamingMoments.from_state(source.state_dict())]
    state, pooled = source.state_dict(), source.pooled()
    source.update(rows((2, 4, 3), seed=5))
    for copy in [*copies, StreamingMoments.from_state(state), pooled]:
        assert copy.count == 8
        assert torch.equal(copy.second_moment, before)
        copy.update(rows((2, 4, 3), seed=6))
    assert source.count == 16


@pytest.mark.parametrize("sequences", [False, True])
def test_state_round_trip_is_exact(sequences: bool) -> None:
    moments = streamed(rows((3, 4, 5), mean=1e3, dtype=torch.float32), sequences=sequences)
    again = StreamingMoments.from_state(moments.state_dict())
    assert repr(again) == repr(moments) == f"StreamingMoments(d=5, sequences={sequences})"
    assert again.count == moments.count
    for reading in (*READINGS, "mean", *(["within_covariance"] if sequences else [])):
        assert torch.equal(getattr(again, reading), getattr(moments, reading))
    assert {v.dtype for v in moments.state_dict().values()} == {torch.float64}


def test_pooled_and_cpu_hold_the_same_numbers() -> None:
    moments = streamed(rows((3, 4, 5)), sequences=True)
    assert torch.equal(moments.pooled().covariance, moments.covariance)
    assert not moments.pooled().sequences
    assert torch.equal(moments.cpu().within_covariance, moments.within_covariance)
    assert StreamingMoments(5).cpu().count == StreamingMoments(5).pooled().count == 0


def test_gradients_are_not_recorded() -> None:
    assert not streamed(rows((4, 2)).requires_grad_()).second_moment.requires_grad


def test_memory_is_one_triangle() -> None:
    sizes = {name: value.numel() for name, value in streamed(rows((2, 30, 8)), sequences=True).state_dict().items()}
    assert sizes == {"shift": 8, "gram": 36, "total": 8, "count": 1, "between": 36}


@pytest.fixture(params=["medium", "mkldnn", "all", "autocast"])
def shortened_products(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a caller may have switched on; each makes his own float32 products inexact where the CPU can."""
    if request.param == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    if request.param != "medium" and not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"):
        pytest.skip("fp32_precision is of torch 2.9")
    if request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    else:
        backend = torch.backends.mkldnn.matmul if request.param == "mkldnn" else torch.backends
        backend.fp32_precision = "bf16" if request.param == "mkldnn" else "tf32"
    yield
    if request.param != "medium":
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


def precision_settings() -> list[object]:
    found: list[object] = [torch.is_autocast_enabled("cpu")]
    try:
        found.append(torch.get_float32_matmul_precision())
    except RuntimeError:
        found.append("mixed")
    for backend in (torch.backends, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):
        found.append(getattr(backend, "fp32_precision", None))
    return found


@pytest.mark.usefixtures("shortened_products")
def test_the_callers_precision_is_neither_used_nor_changed() -> None:
    x = rows((3, 100, 64), dtype=torch.float32)
    before = precision_settings()
    moments = streamed(x, sequences=True)
    assert precision_settings() == before
    assert error(moments.second_moment, reference.second_moment(reference.float64(x).reshape(-1, 64))) < 1e-6


def test_the_callers_precision_is_put_back_after_an_error() -> None:
    moments = streamed(rows((4, 3)))
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError):
            moments._sums.add(torch.ones(2, 5), None)  # type: ignore[union-attr]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("d", [5, 300])  # in one block of rows, and in four
def test_groups_about_one_point_are_added_up_as_they_are(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows((3, 40, d)) + 10.0
    groups = [StreamingMoments(d)]
    groups[0].update(x[0, :20])
    groups += [groups[0].beside(), groups[0].beside().beside()]
    groups[0].update(x[0, 20:])  # after they were made
    for moments, of_group in zip(groups[1:], x[1:], strict=True):
        assert moments.count == 0
        for part in of_group.split(15):
            moments.update(part)
            assert moments.count > 0  # read between two batches
    total = StreamingMoments(d)
    with monkeypatch.context() as patched:
        patched.setattr(moments_module._Sums, "moved", lambda *_: pytest.fail("moved"))
        for moments in groups:
            total.merge(moments)
    everything = reference.float64(x).reshape(-1, d)
    assert error(total.second_moment, reference.second_moment(everything)) < 1e-12
    assert error(total.covariance, reference.covariance(everything)) < 1e-12
    left = total.without(groups[1])
    assert error(left.covariance, reference.covariance(reference.float64(x[[0, 2]]).reshape(-1, d))) < 1e-12


def test_messages() -> None:
    x = rows((2, 4, 3))
    with pytest.raises(ValueError, match="expected a positive row length d, got 0; pass the width of the activations"):
        StreamingMoments(0)
    with pytest.raises(ValueError, match=r"expected rows of length 5, got \(2, 4, 3\); pass \[\.\.\., 5\]"):
        StreamingMoments(5).update(x)
    with pytest.raises(ValueError, match=r"expected \[batch, pos, 3\] for per-sequence moments, got \(3,\)"):
        StreamingMoments(3, sequences=True).update(x[0, 0])
    with pytest.raises(ValueError, match="expected moments of at least one row, got none; call update first"):
        _ = StreamingMoments(3).covariance
    with pytest.raises(ValueError, match="pass sequences=True to StreamingMoments"):
        _ = streamed(x).within_covariance
    for other in (StreamingMoments(4), StreamingMoments(3, sequences=True)):
        with pytest.raises(ValueError, match="pass moments of the same kind"):
            StreamingMoments(3).merge(other)
