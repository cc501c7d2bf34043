"""Named subspaces: each is what its definition says, and analyze_pair knows those that weights alone give."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests import tiny
from tl_asymmetry import ModelView, analyze_pair
from tl_asymmetry.geometry import (
    difference_of_means,
    embedding_subspace,
    massive_coordinates,
    prediction_subspace,
    suppressed_subspace,
    weak_readout_subspace,
    written_not_read_subspaces,
)
from tl_asymmetry.models.named_subspaces import READY

KIND = tiny.KINDS[-1]


@functools.cache
def view(architecture: str = "gpt2") -> ModelView:
    return ModelView(tiny.build(architecture, KIND))


def same_span(found: torch.Tensor, expected: torch.Tensor) -> bool:
    k = found.shape[1]
    return (found.T @ torch.linalg.qr(expected).Q).square().sum().item() == pytest.approx(k, abs=1e-6)


def test_embedding_is_the_principal_directions_of_the_tokens():
    W = view().embedding().double()
    centred = W - W.mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    found = embedding_subspace(view())
    assert same_span(found.basis[:, :5], Vh[:5].T)
    torch.testing.assert_close(found.eigenvalues, (S.square() / len(W)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_weak_readout_is_the_far_end_of_the_prediction_subspace(architecture):
    weak, whole = weak_readout_subspace(view(architecture)), prediction_subspace(view(architecture))
    assert same_span(weak.basis[:, :6], whole.basis[:, -6:])
    assert (weak.eigenvalues.diff() <= 0).all()
    ones = torch.ones(tiny.D_MODEL, dtype=torch.float64) / tiny.D_MODEL**0.5
    is_mean = (ones @ weak.basis[:, 0]).abs() > 1 - 1e-6
    assert bool(is_mean) == (architecture == "gpt2")  # LayerNorm takes it out, RMSNorm does not


def test_suppressed_is_read_by_the_plain_unembedding_and_not_by_the_logits():
    W_U, gain, _ = view().unembedding()
    W_U, γ = W_U.double(), gain.double()
    folded = γ[:, None] * (W_U - W_U.mean(1, keepdim=True))
    folded = folded - folded.mean(0)
    plain, through = (x @ x.T / x.square().sum() for x in (W_U, folded))
    found = suppressed_subspace(view())
    λ = torch.linalg.eigvalsh(plain - through).flip(0)
    torch.testing.assert_close(found.eigenvalues, λ.clamp(min=0), rtol=1e-6, atol=1e-9)
    v = found.basis[:, 0]
    assert (v @ plain @ v - v @ through @ v).item() == pytest.approx(λ[0].item(), rel=1e-6)
    assert found.existing == int((λ > 1e-6 * λ[0]).sum()) < tiny.D_MODEL


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_written_not_read_against_sums_written_out(architecture):
    here = view(architecture)
    found = written_not_read_subspaces(here)
    parameters = here.headless()
    d = here.d_model
    for layer in range(here.n_layers):
        written, read = torch.zeros(d, d).double(), prediction_gram(here)
        for block in range(here.n_layers):
            for matrix in here.matrices:
                W = here.weight(block, matrix).detach().double()
                W = W[None] if W.ndim == 2 else W
                if matrix in ("W_O", "W_out"):
                    written += sum(w.T @ w for w in W) if block <= layer else 0
                elif block > layer:
                    norm = "ln1" if matrix in ("W_Q", "W_K", "W_V") else "ln2"
                    γ = parameters[f"blocks.{block}.{norm}.w"].double()
                    read += sum((γ[:, None] * w) @ (γ[:, None] * w).T for w in W)
        λ = torch.linalg.eigvalsh(written / written.trace() - read / read.trace()).flip(0)
        torch.testing.assert_close(found[layer].eigenvalues, λ.clamp(min=0), rtol=1e-6, atol=1e-9)


def prediction_gram(here: ModelView) -> torch.Tensor:
    subspace = prediction_subspace(here)
    return (subspace.basis * subspace.eigenvalues) @ subspace.basis.T


def test_massive_coordinates_are_ordered_by_their_mean_square():
    tokens = tiny.tokens(3, 8)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), view().hooks({("resid_post", 1): lambda x: seen.append(x.double())}):
        view()(tokens)
    squares = seen[0].square().mean((0, 1))
    found = massive_coordinates(tiny.build("gpt2", KIND), tokens=tokens, progress=False)[1]
    torch.testing.assert_close(found.eigenvalues, squares.sort(descending=True).values, rtol=1e-5, atol=1e-9)
    assert found.basis[:, 0].argmax() == squares.argmax()


@pytest.mark.parametrize("position", ["last", "all"])
def test_difference_of_means_against_the_activations(position):
    harmful, harmless = tiny.tokens(3, 8), [row[:5] for row in tiny.tokens(2, 8)]
    means = []
    for sequences in (harmful, harmless):
        rows = []
        for sequence in sequences:
            seen: list[torch.Tensor] = []
            with torch.no_grad(), view().hooks({("resid_pre", 1): lambda x, seen=seen: seen.append(x[0].double())}):
                view()(sequence[None])
            rows.append(seen[0][-1:] if position == "last" else seen[0][1:])
        means.append(torch.cat(rows).mean(0))
    expected = means[0] - means[1]
    found = difference_of_means(
        view(), harmful, harmless, point="resid_pre", position=position, name="refusal", batch_size=2
    )
    torch.testing.assert_close(found[1].basis[:, 0], expected / expected.norm(), rtol=1e-4, atol=1e-6)
    assert (found[1].name, found[1].rank, len(found)) == ("refusal", 1, 2)


def test_the_pair_takes_them_by_name():
    base, aligned = (tiny.build("gpt2", KIND, delta=delta) for delta in (0.0, 0.05))
    options: dict[str, Any] = {
        "tokens": tiny.tokens(4, 10), "matrices": ["W_O"], "ranks": [2], "groups": 1, "progress": False
    }  # fmt: skip
    by_name = analyze_pair(base, aligned, subspaces=list(READY), **options).table
    assert set(by_name["subspace"]) == {"embedding", "weak_readout", "suppressed", "written_not_read"}
    W = [ModelView(model).weight(1, "W_O")[0].detach().double() for model in (base, aligned)]
    Q = written_not_read_subspaces(base)[1].basis[:, :2]
    Δ = W[1] - W[0]
    row = by_name[(by_name["subspace"] == "written_not_read") & (by_name["layer"] == 1) & (by_name["head"] == 0)]
    assert row["fraction"].item() == pytest.approx(((Δ @ Q).square().sum() / Δ.square().sum()).item(), rel=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="expected position 'last' or 'all', got 'first'"):
        difference_of_means(view(), tiny.tokens(1, 4), tiny.tokens(1, 4), position="first")
    with pytest.raises(ValueError, match="expected texts that differ at resid_post, got equal means in layer 0"):
        difference_of_means(view(), tiny.tokens(1, 4), tiny.tokens(1, 4))
    base = tiny.build("gpt2", KIND)
    with pytest.raises(ValueError, match="got 'embedding', which is the name of a built-in one"):
        analyze_pair(base, base, tokens=tiny.tokens(), subspaces={"embedding": torch.ones(tiny.D_MODEL)})
