"""Changes of W_Q W_Kᵀ and W_V W_O against explicit d × d arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import reference
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.circuits import CIRCUIT_COLUMNS, ProductChange, layer_circuits, product_change
from tl_asymmetry.pair.deltas import measure_delta, residual_first

D, R = 20, 4


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(d: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, k, seed=50)).Q


def pair(heads: tuple[int, int], size: float) -> list[torch.Tensor]:
    """X, Y and their changes, each change of that relative size."""
    X, Y = (gaussian(n, D, R, seed=i) for i, n in enumerate(heads))
    return [X, Y, size * gaussian(heads[0], D, R, seed=2), size * gaussian(heads[1], D, R, seed=3)]


def truth(X: torch.Tensor, Y: torch.Tensor, ΔX: torch.Tensor, ΔY: torch.Tensor) -> list[np.ndarray]:
    """Explicit products, query head by query head."""
    heads = max(len(X), len(Y))
    products = []
    for h in range(heads):
        i, j = h * len(X) // heads, h * len(Y) // heads
        new = (X[i] + ΔX[i]).numpy(), (Y[j] + ΔY[j]).numpy()
        products.append(reference.product_change(X[i].numpy(), Y[j].numpy(), *new))
    return products


def compare(change: ProductChange, products: list[np.ndarray], tolerance: float) -> None:
    Q = orthonormal(D, D)
    energy = [(p**2).sum() for p in products]
    np.testing.assert_allclose(change.energy, energy, rtol=tolerance)
    for side, turned in (("left", products), ("right", [p.T for p in products])):
        profile = change.energies(Q, side) / change.energy.unsqueeze(-1)
        np.testing.assert_allclose(
            profile, [reference.energy_profile(p, Q.numpy()) for p in turned], rtol=tolerance, atol=0.1 * tolerance
        )
        np.testing.assert_allclose(profile.sum(-1), 1, rtol=tolerance)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    [(torch.float64, 1.0, 1e-10), (torch.float32, 1.0, 1e-5), (torch.float32, 1e-2, 1e-5), (torch.float32, 1e-5, 1e-3)],
)
def test_equals_explicit_products(heads: tuple[int, int], dtype: torch.dtype, size: float, tolerance: float) -> None:
    rounded = [t.to(dtype) for t in pair(heads, size)]
    change = product_change(*rounded)
    assert change.left.shape == (max(heads), D, 2 * R)
    exact = [t.double() for t in rounded]
    compare(change, truth(*exact), tolerance)
    base = [(p**2).sum() for p in truth(*exact[:2], -exact[0], 0 * exact[1])]
    np.testing.assert_allclose(change.base_energy, base, rtol=max(tolerance / 10, 1e-10))


def test_gauge_does_not_matter() -> None:
    X, Y, ΔX, ΔY = pair((3, 3), 0.1)
    G = gaussian(3, R, R, seed=9)
    H = torch.linalg.inv(G).mT
    plain, turned = product_change(X, Y, ΔX, ΔY), product_change(X @ G, Y @ H, ΔX @ G, ΔY @ H)
    torch.testing.assert_close(turned.energy, plain.energy, rtol=1e-9, atol=0)
    for side in ("left", "right"):
        Q = orthonormal(D, 5)
        torch.testing.assert_close(turned.energies(Q, side), plain.energies(Q, side), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_a_change_of_gauge_alone_is_no_change(size: float) -> None:
    X, Y = gaussian(6, D, R, seed=0), gaussian(6, D, R, seed=1)
    G = torch.eye(R) + size * gaussian(6, R, R, seed=2)
    ΔX, ΔY = X @ G - X, Y @ torch.linalg.inv(G).mT - Y
    assert product_change(*(t.float() for t in (X, Y, ΔX, ΔY))).energy.tolist() == [0] * 6


def test_table_in_transformer_lens_orientation() -> None:
    shapes = {"W_Q": (4, D, R), "W_K": (2, D, R), "W_V": (2, D, R), "W_O": (4, R, D)}
    base = {name: gaussian(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    changed = {name: W + 0.1 * gaussian(*W.shape, seed=20 + i) for i, (name, W) in enumerate(base.items())}
    deltas = {name: measure_delta(name, base[name], changed[name], seed=0) for name in base}
    given = {name: [Subspace(orthonormal(D, 6))] * 4 for name in ("attn_in", "prediction")}
    bases = LayerBases(3, [], given, centered=False, exact=True, softmax_centres_keys=False, optimizer="adam")
    table = layer_circuits(3, base, deltas, bases, [1, 4, 7])
    assert list(table.columns) == list(CIRCUIT_COLUMNS)
    assert sorted(table["rank"].unique()) == [1, 4]  # no basis of rank 7
    assert len(table) == 4 * 4 * 2
    Q = orthonormal(D, 6)[:, :4].numpy()
    for head in range(4):
        products = {}
        for circuit, (left, right) in {"QK": ("W_Q", "W_K"), "OV": ("W_V", "W_O")}.items():
            i, j = (h * shapes[m][0] // 4 for h, m in ((head, left), (head, right)))

            old, new = ((W[left][i] @ residual_first(right, W[right])[j].mT).numpy() for W in (base, changed))
            products[circuit] = new - old
        for side, matrix in {
            ("QK", "query"): products["QK"],
            ("QK", "key"): products["QK"].T,
            ("OV", "value"): products["OV"],
            ("OV", "output"): products["OV"].T,
        }.items():
            at = (table[["circuit", "side", "head", "rank"]] == [*side, head, 4]).all(axis=1)
            (row,) = table[at].to_dict("records")
            assert row["fraction"] == pytest.approx(reference.subspace_fraction(matrix, Q), rel=1e-10)
            assert row["relative"] == pytest.approx(row["fraction"] * D / 4)
            assert row["delta_norm"] == pytest.approx(np.linalg.norm(matrix), rel=1e-10)
            assert row["pathway"] == ("write" if side[1] == "output" else "read")
            assert row["subspace"] == ("prediction" if side[1] == "output" else "attn_in")
    only = layer_circuits(3, base, {"W_Q": deltas["W_Q"]}, bases, [1])
    assert (len(only), list(only.columns)) == (0, list(CIRCUIT_COLUMNS))
