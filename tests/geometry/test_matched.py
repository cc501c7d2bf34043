"""The test of excess: its law against rotations, its whitening against plain algebra, its size on simulated updates."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.oracles import reference
from tl_asymmetry.geometry import matched as matched_module
from tl_asymmetry.geometry.matched import MatchedCovariance, laws_at, matched_tails
from tl_asymmetry.geometry.references import correlation
from tl_asymmetry.geometry.saddlepoint import rotation_tails

D, R = 32, 6
double = {"dtype": torch.float64}


def covariance(name: str, d: int = D) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    U = torch.linalg.qr(torch.randn(d, d, generator=generator, **double)).Q
    rotated = (U * torch.arange(1, d + 1, **double) ** -1) @ U.T
    if name == "massive":  # three coordinates far larger than the others, as attention sinks make them
        scale = torch.ones(d, **double)
        scale[:3] = torch.tensor([30.0, 20, 10], **double)
        rotated = scale.unsqueeze(-1) * (d * rotated + 0.05 * torch.eye(d, **double)) * scale
    return correlation(rotated) if name == "correlation" else rotated


def basis(C: torch.Tensor, which: str) -> torch.Tensor:
    if which == "own":
        return torch.linalg.eigh(C)[1].flip(-1)[:, :8]
    return torch.tensor(reference.haar_basis(len(C), 8, np.random.default_rng(0)))


SCALES = np.arange(1, R + 1) ** -0.5


@functools.cache
def updates(name: str) -> list[np.ndarray]:
    """What a covariance leaves of random directions: looked at by every basis and rank."""
    return reference.rotated_updates(covariance(name).numpy(), SCALES, 1000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "other"])
@pytest.mark.parametrize("name", ["rotated", "massive", "correlation"])
def test_law_agrees_with_rotations(name: str, which: str) -> None:
    C = covariance(name)
    Q = basis(C, which)
    (law,) = MatchedCovariance.of(C).laws(Q)
    spectrum = torch.tensor(SCALES**2).unsqueeze(0)
    for k in (1, 4, 8):
        drawn = np.array([reference.subspace_fraction(W, Q[:, :k].numpy()) for W in updates(name)])
        for p in (0.5, 0.1, 0.02):
            x = torch.tensor([np.quantile(drawn, 1 - p)])
            found = law.tails(spectrum, k, x)[0].item()
            # Conservative where one direction holds nearly everything.
            noise = 0.15 + 3 / np.sqrt(p * len(drawn))
            assert 1 - noise < found / p < 1.2 + noise
            assert law.tails(spectrum, k, x)[1].item() == pytest.approx(1 - p, abs=0.06)


@pytest.mark.parametrize("name", ["rotated", "massive", "correlation"])
def test_the_spectrum_of_h_stands_for_all_of_it(name: str) -> None:
    """p from the reduced spectrum and from every eigenvalue of H, far out too."""
    d = 96
    C = covariance(name, d)
    spectrum = torch.rand(1, 20, generator=torch.Generator().manual_seed(1), **double)
    mean = torch.randn(d, generator=torch.Generator().manual_seed(2), **double)
    matched = MatchedCovariance.of(C, mean)
    for which in ("own", "other"):
        Q = basis(C, which)
        for without, law in zip((False, True), matched.laws(Q), strict=True):
            μ = mean / mean.norm()
            P = torch.eye(d, **double) - (torch.outer(μ, μ) if without else 0)
            λ, V = torch.linalg.eigh(P @ matched.matrix @ P)
            root = (V * λ.clamp(min=0).sqrt()) @ V.T
            for k in (1, 8):
                expected = law.products[0, law.leading : law.leading + k, law.leading : law.leading + k].trace()
                for times in (1.3, 2.0):
                    f = (times * expected / law.traces[0]).clamp(max=0.97)
                    H = root @ (Q[:, :k] @ Q[:, :k].T - f * torch.eye(d, **double)) @ root
                    h = torch.linalg.eigvalsh(H)
                    if without:  # the removed direction is no dimension any more
                        h = torch.cat([h[: int(h.abs().argmin())], h[int(h.abs().argmin()) + 1 :]])
                    whole = rotation_tails(h.unsqueeze(0), torch.ones(1, len(h)), spectrum, len(h))[0].item()
                    assert law.tails(spectrum, k, f.reshape(1))[0].item() == pytest.approx(whole, rel=0.15)


@pytest.mark.parametrize("one_reduction", [2, D + 1])
def test_whitening_equals_plain_algebra(one_reduction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one tridiagonal form for both spectra, as at large widths, and by two solves."""
    monkeypatch.setattr(matched_module, "_ONE_REDUCTION", one_reduction)
    C = covariance("rotated")
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(D, generator=generator, **double)
    change = torch.randn(3, D, R, generator=generator, **double)
    matched = MatchedCovariance.of(C, mean)
    μ = mean / mean.norm()
    P = torch.eye(D, **double) - torch.outer(μ, μ)
    for i, inverse in enumerate((torch.linalg.inv(matched.matrix), torch.linalg.pinv(P @ matched.matrix @ P))):
        truth = torch.linalg.eigvalsh(change.mT @ P.matrix_power(i) @ inverse @ P.matrix_power(i) @ change).flip(-1)
        torch.testing.assert_close(matched.whitened_spectra(change)[i], truth, rtol=1e-9, atol=0)
        grams = matched.whitened_gram_spectra(change @ change.mT)[i]
        torch.testing.assert_close(grams[..., :R], truth, rtol=1e-8, atol=0)
        wide = torch.cat([change, torch.zeros(3, D, D, **double)], -1)  # more columns than rows
        torch.testing.assert_close(matched.whitened_spectra(wide)[i][..., :R], truth, rtol=1e-8, atol=0)


def test_no_direction_is_nothing_to_leave_out() -> None:
    gram = torch.diag(torch.tensor([3.0, 2.0, 1.0], **double))
    for v in (torch.zeros(3, **double), torch.tensor([0.0, 0.0, -1.0], **double)):
        whole, rest = matched_module._of_one_reduction(gram.numpy(), v.numpy(), inside=False)
        np.testing.assert_allclose(whole, [3, 2, 1], rtol=1e-15)
        np.testing.assert_allclose(rest, [3, 2, 1 - float(v.square().sum())], atol=1e-15)


def test_spectra_of_some_items_are_those_of_all() -> None:
    generator = torch.Generator().manual_seed(1)
    matched = MatchedCovariance.of(covariance("rotated"), torch.randn(D, generator=generator, **double))
    change = torch.randn(3, D, R, generator=generator, **double)
    for whitened, given in (
        (matched.whitened_spectra, change), (matched.whitened_gram_spectra, change @ change.mT)
    ):  # fmt: skip
        every = whitened(given, pooled=True)
        for only in ([True, False, True, False], [False, False, False, True], [False, True, False, True]):
            some = whitened(given, pooled=True, only=torch.tensor(only))
            for one, all_of_them in zip(some, every, strict=True):
                expected = all_of_them[torch.tensor(only)][:, : one.shape[1]]
                torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_a_flat_covariance_leaves_the_isotropic_law() -> None:
    """As Muon's of a wide matrix: beside the solved directions one value is left, and rounding makes no second one."""
    d, k, n = 64, 4, 200
    generator = torch.Generator().manual_seed(5)
    matched = MatchedCovariance.of(torch.eye(d, **double), torch.randn(d, generator=generator, **double))
    Q = torch.linalg.qr(torch.randn(d, k, generator=generator, **double)).Q
    spectra = torch.rand(n, 16, generator=generator, **double).square()
    f = k / d * (0.5 + 2 * torch.rand(n, generator=generator, **double))
    (law, without) = laws_at(matched, Q, [k])
    found, freed = matched_tails([(law[k], spectra, f), (without[k], spectra, f)])
    copies = torch.tensor([[k, d - k]], **double).expand(n, -1)
    torch.testing.assert_close(
        found, rotation_tails(torch.stack([1 - f, -f], -1), copies, spectra, d), rtol=1e-7, atol=0
    )
    # One dimension less, of which Q holds nearly all that it did.
    assert ((freed - found).abs() < 0.05).all()
    # All that it did, where the mean lies at right angles to it.
    across = torch.randn(d, generator=generator, **double)
    across = across - Q @ (Q.mT @ across)
    (_, without) = laws_at(MatchedCovariance.of(torch.eye(d, **double), across), Q, [k])
    (freed,) = matched_tails([(without[k], spectra, f)])
    copies = torch.tensor([[k, d - 1 - k]], **double).expand(n, -1)
    torch.testing.assert_close(
        freed, rotation_tails(torch.stack([1 - f, -f], -1), copies, spectra, d - 1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("numbers", [1, 150, 1 << 22])
def test_many_tests_at_once_are_those_made_alone(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws with and without the mean, of several ranks, heads and their pool: each as if it were the only one."""
    C = covariance("massive")
    generator = torch.Generator().manual_seed(3)
    matched = MatchedCovariance.of(C, torch.randn(D, generator=generator, **double))
    change = torch.randn(3, D, R, generator=generator, **double)
    spectra = matched.whitened_spectra(change, pooled=True)
    heads, (together, _) = matched.whitened_spectra(change), matched.whitened_spectra(change.mT.flatten(0, 1).T[None])
    assert torch.equal(spectra[0][:3, :R], heads[0])
    torch.testing.assert_close(spectra[0][3:], together, rtol=1e-9, atol=1e-9)
    asked = [
        (law, spectrum, f * law.expected * torch.ones(4, **double))
        for laws, spectrum in zip(laws_at(matched, basis(C, "own"), [1, 8]), spectra, strict=True)
        for law in laws.values()
        for f in (0.5, 1.0, 1.6)
    ]
    monkeypatch.setattr(matched_module, "_NUMBERS", numbers)
    for one, found in zip(asked, matched_tails(asked), strict=True):
        torch.testing.assert_close(found, matched_tails([one])[0], rtol=1e-9, atol=0)


def test_float32_inputs_give_the_same_p() -> None:
    C = covariance("rotated")
    Q = basis(C, "own")
    spectrum = torch.rand(1, R, generator=torch.Generator().manual_seed(0), **double)
    f = torch.tensor([0.5], **double)
    (exact,), (single,) = (MatchedCovariance.of(C.to(t)).laws(Q.to(t)) for t in (torch.float64, torch.float32))
    assert single.tails(spectrum, 4, f)[0].item() == pytest.approx(exact.tails(spectrum, 4, f)[0].item(), rel=1e-3)


def test_nothing_to_vary_and_nothing_there() -> None:
    (law,) = MatchedCovariance.of(torch.eye(1, **double)).laws(torch.ones(1, 1, **double))
    assert law.tails(torch.ones(1, 1), 1, torch.ones(1)).isnan().all()
    C = covariance("rotated")
    (law,) = MatchedCovariance.of(C).laws(basis(C, "own"))
    assert law.tails(torch.ones(1, R), 4, torch.tensor([torch.nan])).isnan().all()
    assert len(MatchedCovariance.of(C, torch.zeros(D)).laws(basis(C, "own"))) == 1


@pytest.mark.slow
def test_size_on_updates_that_read_their_inputs_by_chance() -> None:
    """Sums of a δᵀ, δ independent of a: the larger of the two p keeps its size even where δ has a mean."""
    generator = torch.Generator().manual_seed(7)
    C = covariance("rotated")
    root = torch.linalg.cholesky(C)
    offset = 0.5 * torch.linalg.eigh(C)[1][:, -1]
    asked = []
    for _ in range(150):
        a = torch.randn(2000, D, generator=generator, **double) @ root.mT + offset
        δ = torch.randn(2000, R, generator=generator, **double)
        Σ = a.mT @ a / len(a)
        Q = torch.linalg.eigh(Σ)[1].flip(-1)[:, :4]
        matched = MatchedCovariance.of(Σ, a.mean(0))
        μ, laws = matched.mean, matched.laws(Q)
        assert μ is not None
        for mean in (0.0, 0.3):
            change = (a.mT @ (δ + mean)).unsqueeze(0)
            freed = change - μ.unsqueeze(-1) * (μ @ change).unsqueeze(-2)
            asked += [
                (law.at(4), s, (Q.mT @ X).square().sum((-2, -1)) / X.square().sum((-2, -1)))
                for law, s, X in zip(laws, matched.whitened_spectra(change), (change, freed), strict=True)
            ]
    larger = torch.stack(matched_tails(asked))[:, 0].reshape(150, 2, 2).amax(-1)  # of both laws: [update, mean]
    for p in larger.mT:
        assert (p < 0.05).double().mean() <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / len(p))
