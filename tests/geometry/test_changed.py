"""Entries that moved in storage: a dense change has what is expected, a sparse one less."""

import pytest
import torch

from tl_asymmetry.geometry.changed import changed_expected, changed_share


def stored(size, *, keep=1.0, seed=0, law="normal", dtype=torch.bfloat16):
    """A weight and its change once both are stored; `keep` of the entries move at all."""
    generator = torch.Generator().manual_seed(seed)
    W = (0.02 * torch.randn(1, 120, 100, generator=generator)).to(dtype).float()
    noise = torch.randn(1, 120, 100, generator=generator)
    noise = noise.sign() if law == "sign" else noise
    moves = torch.rand(1, 120, 100, generator=generator) < keep
    return W, (W + size * noise * moves).to(dtype).float() - W


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("law", ["normal", "sign"])
def test_a_dense_change_moves_as_many_as_expected(size, law):
    W, ΔW = stored(size, law=law)
    share = changed_share(ΔW).item()
    assert 0 < share < 1
    assert changed_expected(W, ΔW, torch.bfloat16, seed=0).item() == pytest.approx(share, rel=0.1, abs=0.01)


def test_a_sparse_change_moves_fewer():
    W, ΔW = stored(1e-3, keep=0.05)
    assert changed_share(ΔW).item() == pytest.approx(0.05, abs=0.01)
    assert changed_expected(W, ΔW, torch.bfloat16, seed=0).item() > 0.5


def test_no_change_expects_nothing():
    W, ΔW = stored(0.0)
    assert changed_share(ΔW).item() == 0
    assert changed_expected(W, ΔW, torch.bfloat16, seed=0).isnan().all()
