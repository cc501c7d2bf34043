"""The pulled-back prediction subspace against jacrev of the whole model, and against TransformerLens's JacobianLens."""

import warnings

import numpy as np
import pytest
import torch

import tl_asymmetry.jacobians.pullback as pullback
from tests import tiny
from tests.listing import check_listed
from tests.oracles import reference_jacobians as reference
from tl_asymmetry import ModelView, PredictionPullback, Subspace, analyze_pair, prediction_pullback
from tl_asymmetry.demo import demo_model
from tl_asymmetry.geometry import prediction_subspace
from tl_asymmetry.results.result import load

T = 5
KIND = tiny.KINDS[0]
FAMILIES = [(a, k) for a in ("gpt2", "neox", "llama", "gemma2", "mixtral") for k in tiny.KINDS]


def pulled(model, tokens, layers=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return prediction_pullback(model, tokens=tokens, layers=layers, **{"progress": False, **options})


def close(found, expected, tolerance):
    return float((found - expected).abs().max() / expected.abs().max()) <= tolerance


def prediction_map(model):
    """C diag(γ) W_U less its mean over the vocabulary, written out."""
    W_U, gain, center = ModelView(model).unembedding()
    P = W_U.double() - W_U.double().mean(1, keepdim=True)
    P = P if gain is None else gain.double()[:, None] * P
    return P - P.mean(0, keepdim=True) if center else P


@pytest.mark.parametrize(("architecture", "kind"), FAMILIES)
def test_equals_jacrev_and_an_svd(architecture, kind):
    model, tokens = tiny.build(architecture, kind, torch.float64), tiny.tokens(1, T)
    # from behind block 0 is from before block 1
    full = reference.jacobian(*reference.part_function(model, tokens, 1, "block")).detach()
    means = {
        "same": reference.same_position(full).mean(0), "sum": reference.summed_sources(full).mean(0),
    }  # fmt: skip
    tolerance = 1e-9 if architecture in ("gpt2", "neox") else 2e-6
    P = prediction_map(model)
    for sources, J in means.items():
        found = pulled(model, tokens, sources=sources)
        assert found.config["method"] == {"same": "einsum", "sum": "autograd"}[sources]
        assert close(found.mean(0), J, tolerance)
        U, σ, _ = torch.linalg.svd(J.mT @ P, full_matrices=False)
        np.testing.assert_allclose(found[0].eigenvalues, σ.square(), rtol=0, atol=10 * tolerance * float(σ[0]) ** 2)
        gap = 6 if σ[5] > 1.01 * σ[6] else 7
        assert found[0].truncate(gap).overlap(Subspace(U[:, :gap])) == pytest.approx(1, abs=1e-6)
        # in the last layer it is the prediction subspace itself
        assert torch.equal(found.mean(1), torch.eye(tiny.D_MODEL, dtype=torch.float64))
        assert found[1].truncate(4).overlap(prediction_subspace(model).truncate(4)) == pytest.approx(1, abs=1e-9)
    plain = pulled(model, tokens, method="autograd")
    assert plain.config["method"] == "autograd"
    assert close(plain.mean(0), means["same"], tolerance)


@pytest.mark.parametrize(("options", "steps"), [
    ({}, -(-tiny.D_MODEL // 5)),  # chunks, of which each goes through the one block above
    ({"method": "autograd"}, 2 * T * -(-tiny.D_MODEL // 5)),
    ({"sources": "sum"}, 2 * -(-tiny.D_MODEL // 5)),
])  # fmt: skip
def test_the_bar_moves_with_every_chunk(options, steps, monkeypatch):
    totals, moved = [], []

    class Bar(pullback.tqdm):
        def __init__(self, *args, **kwargs):
            totals.append(kwargs["total"])
            super().__init__(*args, **kwargs)

        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(pullback, "tqdm", Bar)
    tokens = tiny.tokens(1 if not options else 2, T)
    pulled(tiny.build("gpt2", KIND), tokens, chunk=5, **options)
    assert (totals, sum(moved), len(moved)) == ([steps], steps, steps)


def test_positions_sequences_and_chunks():
    model, tokens = tiny.build("neox", KIND, torch.float64), tiny.tokens(2, 6)
    for sources in ("same", "sum"):
        parts = [
            pulled(model, row[None], sources=sources, positions=[-1, 2], chunk=c)
            for row, c in zip(tokens, (1, 7), strict=True)
        ]
        whole = pulled(model, tokens, sources=sources, positions=[5, 2])
        torch.testing.assert_close(
            whole.arrays["mean"], sum(p.arrays["mean"] for p in parts) / 2, rtol=1e-9, atol=1e-11
        )
        assert whole.config["tokens"] == 4
        assert parts[1].config["memory"]["chunk"] == 7


def test_leading_directions_only():
    """With rank r what is pulled back is W_U cut to rank r, exactly."""
    model, tokens = tiny.build("gpt2", KIND, torch.float64), tiny.tokens(2, 6)
    whole = pulled(model, tokens)
    few = pulled(model, tokens, [0], rank=5)
    assert (len(few), few[0].rank, few.layers) == (1, 5, (0,))
    U, σ, _ = torch.linalg.svd(prediction_map(model), full_matrices=False)
    Q, s, _ = torch.linalg.svd(whole.mean(0).mT @ (U[:, :5] * σ[:5]), full_matrices=False)
    assert few[0].overlap(Subspace(Q)) == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(few[0].eigenvalues, s.square(), rtol=1e-9)
    with pytest.raises(ValueError, match="expected whole mean Jacobians, got leading directions only; pass rank=None"):
        few.mean(0)


def test_given_jacobians():
    model, tokens = tiny.build("gpt2", KIND, torch.float64), tiny.tokens(1, T)
    whole = pulled(model, tokens)

    class Lens:
        jacobians = {0: whole.mean(0)}

    for given in (Lens(), {0: whole.mean(0)}):
        found = pulled(model, None, jacobians=given)
        torch.testing.assert_close(found.arrays["eigenvalues"], whole.arrays["eigenvalues"])
        assert found[0].truncate(5).overlap(whole[0].truncate(5)) == pytest.approx(1, abs=1e-9)
        assert found.config["method"] == "given"
    with pytest.raises(ValueError, match="expected Jacobians of layers 0, 1, got none of layer 0; pass layers=\\[1\\]"):
        pulled(model, None, jacobians={1: whole.mean(1)})
    with pytest.raises(ValueError, match=r"expected Jacobians \[48, 48\], got \[3, 3\] in layer 0"):
        pulled(model, None, jacobians={0: torch.eye(3)})
    with pytest.raises(ValueError, match="expected a JacobianLens or a mapping from layers to matrices, got int"):
        pulled(model, None, jacobians=3)


def test_summed_over_sources_is_transformerlens_jacobian_lens():
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    model = demo_model("base", kind="bridge")
    text = "Mira was happy. Tom lost the cup."
    model.eval()
    lens = analysis.JacobianLens.fit(model, [text], corpus="x", skip_first_positions=0, show_progress=False)
    tokens = model.to_tokens(text)
    # the lens leaves the last position out, as source and as target; a causal model's earlier targets do not see it
    found = pulled(model, tokens, sources="sum", positions=range(tokens.shape[1] - 1))
    for layer in lens.source_layers:
        assert close(found.mean(layer), lens.jacobians[layer], 2e-6)
    taken = pulled(model, None, jacobians=lens)
    for mine, theirs in zip(found, taken, strict=True):
        assert mine.truncate(4).overlap(theirs.truncate(4)) == pytest.approx(1, abs=1e-4)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="a HookedTransformer's option")
def test_attention_both_ways_takes_autograd():
    model = tiny.toy("plain", "hooked", torch.float64, attention_dir="bidirectional", n_layers=3)
    tokens = tiny.tokens(1, T)
    with pytest.warns(
        UserWarning, match="since attention looks both ways, so that paths through other positions count"
    ):
        found = prediction_pullback(model, tokens=tokens, progress=False)
    full = reference.jacobian(*reference.part_function(model, tokens, 1, "block", until=2))
    assert close(found.mean(0), reference.same_position(full).mean(0).detach(), 1e-9)
    with pytest.raises(ValueError, match="expected a product of blocks in closed form, but attention looks both ways"):
        prediction_pullback(model, tokens=tokens, method="einsum", progress=False)


def test_into_a_pair_analysis():
    base, aligned = tiny.build("gpt2", KIND), tiny.build("gpt2", KIND, delta=0.05)
    tokens = tiny.tokens(4, 12)
    found = pulled(base, tokens)
    options = dict(tokens=tokens, ranks=[4], groups=1, progress=False)
    for given in (found, found.subspaces):
        result = analyze_pair(base, aligned, subspaces=[{"pullback": given}], **options)
        assert result.table["subspace"].unique().tolist() == ["pullback"]
        assert result.table["fraction"].between(0, 1).all()
    last = analyze_pair(base, aligned, subspaces=["prediction"], **options)
    one, other = (r.table.query("layer == 1 and matrix == 'W_out'")["fraction"].item() for r in (result, last))
    assert one == pytest.approx(other)


def test_sequence_table_words_and_disk(tmp_path):
    model, tokens = tiny.build("gpt2", KIND, torch.float64), tiny.tokens(1, T)
    found = pulled(model, tokens)
    assert len(found) == 2
    assert [space.name for space in found] == ["pullback L0", "pullback L1"]
    assert found.subspace(1).name == found[-1].name == found[0:2][1].name
    with pytest.raises(IndexError):
        found[2]
    with pytest.raises(ValueError, match="expected a layer among 0, 1, got 7; pass one of these"):
        found.subspace(7)
    row = found.table.query("layer == 0 and rank == 4").iloc[0]
    prediction = prediction_subspace(model)
    assert row["overlap"] == pytest.approx(found[0].truncate(4).overlap(prediction.truncate(4)))
    assert row["chance"] == 4 / tiny.D_MODEL
    λ = found[0].eigenvalues
    assert row["energy"] == pytest.approx(float(λ[:4].sum() / λ.sum()))
    pair = found.overlaps.query("a == 'layer 0' and b == 'layer 1' and rank == 4")["overlap"].item()
    assert pair == pytest.approx(found[0].truncate(4).overlap(found[1].truncate(4)))
    check_listed(found)
    found.save(tmp_path / "p")
    back = load(tmp_path / "p")
    assert isinstance(back, PredictionPullback)
    assert torch.equal(back[0].basis, found[0].basis)
    assert back.overlaps.equals(found.overlaps)
    for words in (back.summary(), back._repr_html_(), back.to_html(tmp_path / "p.html").read_text()):
        assert "overlaps" in words
    assert back.plot_spectrum().data
    assert back.plot_overlaps().data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [5]}, "expected layers from 0 to 1, got 5"),
        ({"positions": [9]}, "expected positions from 0 to 4"),
        ({"rank": 0}, "expected a rank from 1 to 48, got 0; pass such a rank or None"),
        ({"rank": 49}, "expected a rank from 1 to 48, got 49"),
        ({"sources": "mean"}, 'expected sources "same" or "sum", got \'mean\''),
        ({"method": "fast"}, "expected a method among auto, einsum, autograd, got 'fast'"),
        ({"sources": "sum", "method": "einsum"}, 'expected method "auto" or "autograd" for sources="sum"'),
        ({"chunk": 0}, "expected a chunk of at least 1, got 0"),
    ],
)
def test_bad_input(options, message):
    model = tiny.build("gpt2", KIND)
    with pytest.raises(ValueError, match=message):
        prediction_pullback(model, tokens=tiny.tokens(1, T), progress=False, **options)


def test_no_tokens_and_no_memory(monkeypatch):
    model = tiny.build("gpt2", KIND)
    found = prediction_pullback(model, max_tokens=40, progress=False)
    assert found.config["tokens"] == 40
    texts, short = found.notes
    assert texts.startswith("activations come from the package's calibration texts; texts like those the model is used")
    assert short == "only the first 40 tokens were used (max_tokens)"
    monkeypatch.setattr(pullback, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="expected a call that fits into 1e-06 GB, got one that needs about"):
        prediction_pullback(model, tokens=tiny.tokens(1, T), progress=False)


def test_a_wrong_closed_form_is_found_out(monkeypatch):
    model, tokens = tiny.build("gpt2", KIND, torch.float64), tiny.tokens(1, T)
    view = ModelView(model)
    view._adapter.point(1, "resid_post")[0].register_forward_hook(lambda m, a, out: out * out)
    with pytest.warns(
        UserWarning, match="take autograd, `rank` backward passes per token, since it is .* off autograd"
    ):
        found = prediction_pullback(model, tokens=tokens, progress=False)
    assert found.config["method"] == "autograd"
