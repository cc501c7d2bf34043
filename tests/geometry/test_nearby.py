"""Replicates without eigensolves: right on spectra as residual streams have them, refused where that is not certain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tl_asymmetry.geometry import nearby
from tl_asymmetry.geometry.nearby import nearby_directions, rounded_directions, worth_iterating
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace, random_subspace

D, GROUPS, RANKS = 288, 4, [1, 4, 16, 40]


def scatters(exponent: float = 1.0) -> list[torch.Tensor]:
    """Second moments of groups of texts, of which each has its own mean and variances along the directions; the first
    direction holds 0.95 of the energy and the others fall as a power."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, D + 1, dtype=torch.float64) ** -exponent
    spectrum[0] = 30 * spectrum[1:].sum()
    frame = random_subspace(D, D, seed=0).basis
    groups = []
    for _ in range(GROUPS):
        rows = torch.zeros(0, D, dtype=torch.float64)
        for _ in range(6):
            own = 0.5 * torch.randn(2, D, dtype=torch.float64, generator=generator)
            own[:, 0] = 0
            text = torch.randn(64, D, dtype=torch.float64, generator=generator) + own[0]
            rows = torch.cat([rows, text * own[1].exp() * spectrum.sqrt() @ frame.mT])
        groups.append(rows.mT @ rows)
    return groups


def log_energies(change: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    inside = (Q.mT @ change).square().sum(1).cumsum(0)
    return inside[[k - 1 for k in [*RANKS, 72] if k <= Q.shape[1]]].log()


def errors(k: int, quickly: Callable[[torch.Tensor, Subspace], torch.Tensor | None]) -> tuple[float, float]:
    """Of the interval's half-width and of the replicates, as shares of the half-width; the largest of all."""
    groups = scatters()
    whole = principal_subspace(torch.stack(groups).sum(0))
    assert whole.eigenvalues is not None
    assert 0.9 < float(whole.eigenvalues[0] / whole.eigenvalues.sum()) < 0.97
    # Isotropic, and drawn to the leading directions.
    other = torch.randn(D, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = whole.basis @ (whole.eigenvalues.pow(0.25).unsqueeze(-1) * other)
    ends: dict[str, list[torch.Tensor]] = {"quick": [], "full": []}
    for group in groups:
        rest = torch.stack(groups).sum(0) - group
        quick = quickly(rest, whole)
        assert quick is not None
        quick = quick.double()
        full = torch.linalg.eigh(rest)[1].flip(-1)[:, :k]
        torch.testing.assert_close(quick.mT @ quick, torch.eye(k, dtype=torch.float64), atol=5e-6, rtol=0)
        for name, Q in (("quick", quick), ("full", full)):
            ends[name].append(torch.stack([log_energies(change, Q) for change in (other, drawn)]))
    half = {name: torch.stack(parts).std(0) * (GROUPS - 1) / GROUPS**0.5 * 3.182 for name, parts in ends.items()}
    of_replicates = (torch.stack(ends["quick"]) - torch.stack(ends["full"])).abs() / half["full"]
    return float(((half["quick"] - half["full"]).abs() / half["full"]).max()), float(of_replicates.max())


def test_intervals_are_those_of_full_solves() -> None:
    assert max(errors(max(RANKS), lambda rest, whole: nearby_directions(rest, whole, RANKS))) < 1e-2


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 at this small width."""
    monkeypatch.setattr(nearby, "FLOAT32_WIDTH", D)


@pytest.mark.usefixtures("narrow")
def test_float32_keeps_its_digits_once_the_largest_directions_are_out() -> None:
    assert max(errors(72, lambda rest, whole: rounded_directions(rest, whole, 72))) < 1e-3
    groups = scatters()
    whole = principal_subspace(torch.stack(groups).sum(0))
    found = rounded_directions(torch.stack(groups[1:]).sum(0), whole, 72)
    assert found is not None
    assert found.dtype == torch.float64  # what was taken out has its digits
    exact = torch.linalg.eigh(torch.stack(groups[1:]).sum(0))[1][:, -1]
    assert 1 - float(found[:, 0] @ exact) ** 2 < 1e-12


@pytest.mark.usefixtures("narrow")
def test_float32_is_refused_where_it_has_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = scatters()
    whole, rest = principal_subspace(torch.stack(groups).sum(0)), torch.stack(groups[1:]).sum(0)
    assert rounded_directions(rest, random_subspace(D, D, seed=0), 72) is None  # nothing is known of its spectrum
    with monkeypatch.context() as patched:
        patched.setattr(nearby, "_LEFT", 0.0)  # never converged
        assert rounded_directions(rest, whole, 72) is None
    with monkeypatch.context() as patched:
        patched.setattr(nearby, "_LARGE_SHARE", 0.0)  # too many
        assert rounded_directions(rest, whole, 72) is None
    monkeypatch.setattr(nearby, "FLOAT32_WIDTH", D + 1)  # no time is won
    assert rounded_directions(rest, whole, 72) is None


def test_what_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = scatters()
    whole, rest = principal_subspace(torch.stack(groups).sum(0)), torch.stack(groups[1:]).sum(0)
    assert nearby_directions(rest, whole, RANKS) is not None
    monkeypatch.setattr(nearby, "_ROUNDS", (0,))
    assert nearby_directions(rest, whole, RANKS) is None
    assert nearby_directions(rest, whole, [1]) is None


def test_another_round_where_the_first_two_do_not_reach() -> None:
    groups = scatters()
    whole, rest = principal_subspace(torch.stack(groups).mean(0)), torch.stack(groups[1:]).mean(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nearby, "CERTIFIED", 1e-4)
        patched.setattr(nearby, "_ROUNDS", (1,))
        assert nearby_directions(rest, whole, RANKS) is None
        patched.setattr(nearby, "_ROUNDS", (1, 2))
        found = nearby_directions(rest, whole, RANKS)
    assert found is not None
    exact = torch.linalg.eigh(rest)[1].flip(-1)[:, : max(RANKS)]
    assert (found.mT @ exact).square().sum() > max(RANKS) - 1e-4


def test_a_flat_spectrum_is_refused() -> None:
    """No direction is far from those beyond the block, so the residuals bound nothing."""
    groups = scatters(exponent=0.1)
    whole = principal_subspace(torch.stack(groups).sum(0))
    assert nearby_directions(torch.stack(groups[1:]).sum(0), whole, RANKS) is None


def test_a_direction_that_the_neighbour_has_not_is_found_and_refused() -> None:
    """The block never leaves the span it begins in: only the products with a random vector see what lies beyond."""
    spectrum = 2.0 ** -torch.arange(D, dtype=torch.float64).div(8)
    known = Subspace(torch.eye(D, dtype=torch.float64), spectrum)
    turned = torch.diag(spectrum)
    turned[0, 1] = turned[1, 0] = turned[15, 16] = turned[16, 15] = 1e-3
    assert nearby_directions(turned, known, [1, 16]) is not None
    turned[-1, -1] = 2.0
    assert nearby_directions(turned, known, [1, 16]) is None


def test_too_few_directions_or_no_order() -> None:
    few = torch.zeros(D, dtype=torch.float64)
    few[:20] = 1 / torch.arange(1, 21)
    matrix = torch.diag(few)
    assert nearby_directions(matrix, principal_subspace(matrix), [16]) is None
    assert nearby_directions(matrix, random_subspace(D, D, seed=0), [16]) is None


def test_where_it_pays() -> None:
    assert worth_iterating(640, 80)
    assert not worth_iterating(640, 160)
    assert not worth_iterating(64, 1)
