"""Embeddings are compared in pieces, as they lie: no second one is made, whatever its layout and its scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tl_asymmetry.models.bridge import Scaled
from tl_asymmetry.models.checks import finite_check
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair import non_matrix_parameters as module
from tl_asymmetry.pair.non_matrix_parameters import other_changes
from tl_asymmetry.results.provenance import weights_hash


@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 3.0), (3.0, 1.0)])
def test_norms_are_the_naive_ones(layout: str, scales: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 40, 24, generator=generator)
    if layout != "rows":
        ours = ours.mT.contiguous().mT
    if layout == "columns":
        theirs = theirs.mT.contiguous().mT
    pieces = list(module._pieces(ours, theirs))
    assert len(pieces) > 10
    assert all(x.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr() for x, _ in pieces)
    _, _, *found = module._row("embed.W_E", (ours, scales[0]), (theirs, scales[1]))
    W, V = ours.double().numpy() * scales[0], theirs.double().numpy() * scales[1]
    norm, change = np.linalg.norm(W), np.linalg.norm(V - W)
    np.testing.assert_allclose(found, [norm, change, change / norm, (W * (V - W)).sum() / norm**2], rtol=1e-6)


def test_a_scaled_embedding_is_not_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = (ModelView(tiny.bridge("gemma2", delta=delta)) for delta in (0.0, 0.05))
    W, V = (view.headless()["embed.W_E"].double() for view in (base, aligned))
    monkeypatch.setattr(Scaled, "__call__", lambda _: pytest.fail("a scaled copy was made"))
    row = other_changes(base, aligned).set_index("parameter").loc["embed.W_E"]
    expected = [float(W.norm()), float((V - W).norm())]
    np.testing.assert_allclose(row[["base_norm", "delta_norm"]].astype(float), expected, rtol=1e-6)


def test_its_hash_is_that_of_the_scaled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    view = ModelView(tiny.bridge("gemma2"))
    whole = [(name, weight, 1.0) for name, weight in view.named_weights()]
    torch.testing.assert_close(dict(view.named_weights())["embed.W_E"], view.headless()["embed.W_E"], rtol=0, atol=0)
    with monkeypatch.context() as patched:
        patched.setattr(ModelView, "unscaled_weights", lambda _: iter(whole))
        expected = weights_hash(view)
    monkeypatch.setattr(Scaled, "__call__", lambda _: pytest.fail("a scaled copy was made"))
    assert weights_hash(view, each=finite_check(view)) == expected
