"""Leading eigenvectors from a tridiagonal form: against eigensolves in float64, refused where they are not certain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_asymmetry.geometry import subspace
from tl_asymmetry.geometry.subspace import leading_directions, random_subspace
from tl_asymmetry.geometry.tridiagonal import leading_eigenvectors

double = {"dtype": torch.float64}


def matrix(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Float64, its eigenvectors those of `random_subspace`."""
    frame = random_subspace(len(spectrum), len(spectrum), seed).basis
    symmetric = (frame * spectrum.double()) @ frame.mT
    return (symmetric + symmetric.mT) / 2


def turn(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖(I − QQᵀ) U‖_F."""
    Q = found.double()
    return float((exact - Q @ (Q.mT @ exact)).norm())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.floats(0.3, 2.0), st.integers(0, 1000))
def test_spans_are_those_of_a_float64_solve(d: int, exponent: float, seed: int) -> None:
    k = max(1, d // 4)
    symmetric = matrix(torch.arange(1, d + 1, **double) ** -exponent, seed)
    rounded = symmetric.float()
    found = leading_eigenvectors(rounded, k)
    assert found is not None
    assert found.dtype == torch.float32
    λ, U = (part.flip(-1) for part in torch.linalg.eigh(rounded.double()))
    torch.testing.assert_close(found.mT @ found, torch.eye(k), atol=2e-6, rtol=0)
    for rank in range(1, k + 1):
        gap = float(λ[rank - 1] - λ[rank]) if rank < d else 1.0
        assert turn(found[:, :rank], U[:, :rank]) < 2e-6 * d**0.5 * float(λ[0]) / gap
    # In order, each by itself.
    image = rounded.double() @ found.double()
    torch.testing.assert_close((found.double() * image).sum(0), λ[:k], atol=1e-5 * float(λ[0]), rtol=0)


def test_errors_are_no_larger_than_those_of_a_float32_solve() -> None:
    d, k = 512, 128
    rounded = matrix(1 / torch.arange(1, d + 1, **double)).float()
    found = leading_eigenvectors(rounded, k)
    assert found is not None
    exact = torch.linalg.eigh(rounded.double())[1].flip(-1)[:, :k]
    full = torch.linalg.eigh(rounded)[1].flip(-1)[:, :k]
    for rank in (1, 16, k):
        assert turn(found[:, :rank], exact[:, :rank]) < 1.5 * turn(full[:, :rank], exact[:, :rank])


def test_both_ends_of_a_spectrum_of_any_sign() -> None:
    spectrum = torch.linspace(1, -3, 41, **double)
    found = leading_eigenvectors(matrix(spectrum).float(), 5)
    assert found is not None
    assert turn(found, random_subspace(41, 41, 0).basis[:, :5]) < 1e-5


@pytest.mark.parametrize(
    "spectrum", [torch.ones(30), torch.tensor([2.0, 2.0] + [1.0] * 28), torch.zeros(30), torch.arange(30.0).flip(0)]
)
def test_clusters_are_refused_or_right(spectrum: torch.Tensor) -> None:
    """A multiple eigenvalue, or a matrix that is diagonal already, where pivots are zero."""
    for symmetric in (matrix(spectrum).float(), torch.diag(spectrum)):
        found = leading_eigenvectors(symmetric, 2)
        if found is not None:
            torch.testing.assert_close(found.mT @ found, torch.eye(2), atol=2e-6, rtol=0)
            inside = found.mT @ symmetric @ found
            torch.testing.assert_close(inside, torch.diag(spectrum[:2]), atol=1e-5, rtol=1e-5)


def test_what_is_refused_is_solved_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_SMALLEST_REDUCED", 30)
    flat = torch.ones(30)
    flat[0] = 2
    found = leading_directions(torch.diag(flat), 3)
    torch.testing.assert_close(found.mT @ found, torch.eye(3), atol=2e-6, rtol=0)
    assert abs(float(found[0, 0])) == pytest.approx(1)
    nothing = torch.full((30, 30), torch.nan)
    assert leading_eigenvectors(nothing, 3) is None


def test_a_turn_of_the_matrix_turns_its_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """`leading_directions` takes this way in float32 alone, for half the directions at most."""
    monkeypatch.setattr(subspace, "_SMALLEST_REDUCED", 30)
    asked: list[int] = []

    def counted(symmetric: torch.Tensor, k: int) -> torch.Tensor | None:
        asked.append(k)
        return leading_eigenvectors(symmetric, k)

    monkeypatch.setattr(subspace, "leading_eigenvectors", counted)
    spectrum = 1 / torch.arange(1, 31, **double)
    exact = random_subspace(30, 30, 4).basis
    for dtype, k in ((torch.float32, 15), (torch.float32, 16), (torch.float64, 4)):
        assert turn(leading_directions(matrix(spectrum, 4).to(dtype), k), exact[:, :k]) < 1e-4
    assert asked == [15]
