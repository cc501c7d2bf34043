"""Measured gradients as references of a pair: against naive gradients, and refused where they are another model's."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.oracles import reference, reference_gradients
from tests.oracles.naive_pair import NaivePair
from tests.oracles.reference import float64
from tl_asymmetry import analyze_pair, gradient_covariance
from tl_asymmetry.geometry.matched import MatchedCovariance
from tl_asymmetry.geometry.references import correlation
from tl_asymmetry.objectives import CrossEntropy, TokenBatch

D, RANKS = tiny.D_MODEL, [1, 3, 12]


@functools.cache
def pair():
    base = tiny.toy("plain", tiny.KINDS[0], torch.float64)
    return base, tiny.perturbed(base)


def data():
    tokens = tiny.tokens(6, 10, seed=3)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 7:] = False
    return TokenBatch(tokens, mask)


@functools.cache
def gradients(permutations=0):
    return gradient_covariance(
        pair()[0], CrossEntropy(), [data()], full_mlp=True, permutations=permutations, progress=False
    )


def analysed(gradient, **options):
    options = {"tokens": tiny.tokens(6, 12), "ranks": RANKS, "progress": False} | options
    return analyze_pair(*pair(), gradient=gradient, **options)


def naive_moment(layer, matrix, head):
    """Σ_δ of a write matrix from perturbations and loops."""
    batch = data()
    loss = reference_gradients.summed_cross_entropy(batch.tokens, batch.mask)
    (δ,) = reference_gradients.upstream_gradients(pair()[0], loss, layer, matrix)
    return reference_gradients.moment_of_nonzero(δ.reshape(-1, D))[0]


@functools.cache
def sized(layer, matrix, head):
    """‖δ_t‖ a_t, a row for each token, δ those of a head or (None) of all."""
    batch = data()
    loss = reference_gradients.summed_cross_entropy(batch.tokens, batch.mask)
    (δ,) = reference_gradients.upstream_gradients(pair()[0], loss, layer, matrix)
    a = reference_gradients.inputs(pair()[0], batch.tokens, layer, matrix).reshape(-1, D)
    δ = δ if head is None else δ[:, :, head]
    return np.stack([(row**2).sum() ** 0.5 * x for x, row in zip(a, δ.reshape(len(a), -1), strict=True)])


@functools.cache
def naive_weighted(layer, matrix, head):
    """Σ ‖δ_t‖² a_t a_tᵀ, one token after the other; keys, whose δ cancel over a sequence, have none."""
    return None if matrix == "W_K" else sum(np.outer(row, row) for row in sized(layer, matrix, head))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_read_rows_weigh_their_inputs_by_their_gradients(optimizer):
    result = analysed(gradients(), optimizer=optimizer, ranks=[3])
    plain = analysed(None, optimizer=optimizer, ranks=[3], matrices=["W_Q"])
    oracle = NaivePair(
        *pair(), groups=[[s] for s in tiny.tokens(6, 12)], ranks=[3], optimizer=optimizer, weighted=naive_weighted
    )
    read = result.table[result.table["pathway"] == "read"]
    for row in read.itertuples():
        head = None if pd.isna(row.head) else int(row.head)
        expected = oracle.activation_matched(row.matrix, row.subspace, int(row.layer), 3, head)
        assert row.activation_matched == pytest.approx(expected, rel=1e-9)
        assert row.excess == pytest.approx(row.fraction / expected, rel=1e-9)
    assert read["excess_p"].notna().all()
    own = read["subspace"] != "prediction"
    assert (read["excess_low"].notna() == (own | (read["matrix"] == "W_K"))).all()  # else nothing varies with the texts
    keys = ["layer", "head", "matrix", "subspace"]
    nulls = result.nulls.merge(read[[*keys, "excess_p", "excess_q", "activation_matched"]], on=keys)
    for matrix, null in (("W_Q", "weighted"), ("W_V", "weighted"), ("W_in", "weighted"), ("W_K", optimizer)):
        held = nulls[(nulls["matrix"] == matrix) & (nulls["null"] == null)]
        assert len(held) == (read["matrix"] == matrix).sum()
        np.testing.assert_allclose(held["expected"], held["activation_matched"])
        np.testing.assert_allclose(held[["p", "q"]], held[["excess_p", "excess_q"]])
        tested = result.tests[result.tests["matrix"] == matrix]
        assert set(tested["null"]) == {"isotropic", null}
    # The unweighted references stay beside it, without a test.
    queries = (result.nulls["matrix"] == "W_Q") & (result.nulls["null"] == optimizer)
    assert result.nulls.loc[queries, "p"].isna().all()
    before = plain.nulls[(plain.nulls["matrix"] == "W_Q") & (plain.nulls["null"] == optimizer)]
    np.testing.assert_allclose(result.nulls.loc[queries, "expected"], before["expected"])
    words = " ".join(result.summary().split())
    assert "these inputs weighted by gradients" in words
    assert "Where gradients weigh the inputs, whether a head holds less than that was not tested." in words


def test_each_head_is_tested_on_inputs_weighted_by_its_own_gradients():
    result = analysed(gradients(), matrices=["W_Q"], subspaces=["attn_in"], ranks=[3])
    oracle = NaivePair(*pair(), groups=[list(tiny.tokens(6, 12))], ranks=[3])
    W, W_new = (model.W_Q.detach().numpy() for model in pair())
    for row in result.table.itertuples():
        rows = torch.from_numpy(sized(row.layer, "W_Q", row.head))
        C, mean = correlation(rows.T @ rows), rows.mean(0) / rows.square().sum(0).sqrt()
        change = torch.from_numpy(W_new[row.layer, row.head] - W[row.layer, row.head])
        Q = torch.from_numpy(oracle.basis("attn_in", row.layer))
        covariance, off = MatchedCovariance.of(C, mean), torch.eye(D) - torch.outer(mean, mean) / mean.square().sum()
        halves = zip((Q, off @ Q), (change, off @ change), covariance.whitened_spectra(change[None]), strict=True)
        p = [
            law.tails(spectrum, 3, ((frame[:, :3].T @ X).square().sum() / X.square().sum())[None])
            for law, (frame, X, spectrum) in zip(covariance.laws(Q), halves, strict=True)
        ]
        assert row.excess_p == pytest.approx(float(torch.stack(p)[:, 0].max()), rel=1e-6)


class Alike:
    """Weights of each head that are those of all; or, without `apart`, of all heads together."""

    def __init__(self, apart):
        self.apart = apart

    def gradient_moment(self, layer, matrix, head=None):
        return torch.eye(D, dtype=torch.float64)

    def weighted_input(self, layer, matrix, head=None):
        generator = torch.Generator().manual_seed(layer)
        rows = torch.randn(3 * D, D, generator=generator, dtype=torch.float64) * torch.arange(1, D + 1)
        return None if head is not None and not self.apart else (rows.T @ rows, rows.sum(0))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_heads_that_weigh_their_inputs_alike_have_one_reference(optimizer):
    apart, together = (
        analysed(Alike(apart), optimizer=optimizer, ranks=[3], matrices=["W_Q", "W_K", "W_O", "W_in"])
        for apart in (True, False)
    )
    for name in ("table", "nulls", "tests", "asymmetry"):
        pd.testing.assert_frame_equal(getattr(apart, name), getattr(together, name), rtol=1e-9)
    curves = [result.plot_rank_curve("W_Q", 1, 0).to_dict() for result in (apart, together)]
    assert len(curves[0]["data"]) == len(curves[1]["data"])


def test_write_rows_and_the_asymmetry_against_naive_gradients():
    result = analysed(gradients())
    oracle = NaivePair(
        *pair(), groups=[[s] for s in tiny.tokens(6, 12)], ranks=RANKS, gradient=functools.cache(naive_moment),
        weighted=naive_weighted,
    )  # fmt: skip
    columns = ("gradient_matched", "gradient_excess")
    written = result.table[result.table["pathway"] == "write"]
    assert written[list(columns)].notna().all().all()
    for row in written[written["subspace"] == "prediction"].itertuples():
        head = None if pd.isna(row.head) else int(row.head)
        expected = oracle.row(row.matrix, "prediction", int(row.layer), head, int(row.rank))
        assert row.gradient_matched == pytest.approx(expected["gradient_matched"], rel=1e-9)
        assert row.gradient_excess == pytest.approx(expected["gradient_excess"], rel=1e-8)
    read = result.table[result.table["pathway"] == "read"]
    assert read[list(columns)].isna().all().all()
    expected = oracle.asymmetry(mlp=True)
    for row in result.asymmetry.itertuples():
        head = None if pd.isna(row.head) else int(row.head)
        for column in ("log2_expected", "log2_excess"):
            assert getattr(row, column) == pytest.approx(
                expected[int(row.layer), head, row.rank][column], rel=1e-7, abs=1e-9
            )


def with_draws(start, end=None):
    """The gradients with some of the permuted ones, which are drawn once."""
    captured = gradients(permutations=239)
    drawn = {name: array[start:end] for name, array in captured.arrays.items() if name.startswith("permuted/")}
    return dataclasses.replace(captured, arrays={**captured.arrays, **drawn})


def permuted(result):
    """Rows of the permutation null, with the fraction of the table."""
    keys = ["layer", "head", "matrix", "subspace", "rank"]
    return result.nulls[result.nulls["null"] == "permutation"].merge(result.table[[*keys, "fraction"]], on=keys)


def test_permutation_range_on_read_rows():
    captured = with_draws(0, 199)
    result = analysed(captured, matrices=["W_Q", "W_V", "W_O", "W_in"])
    held = permuted(result)
    assert set(held["pathway"]) == {"read"}
    assert len(held) == (result.table["pathway"] == "read").sum()
    assert (held["low"] < held["high"]).all()
    assert held[["p", "q"]].isna().all().all()
    oracle = NaivePair(*pair(), groups=[[s] for s in tiny.tokens(6, 12)], ranks=RANKS)
    for row in held[(held["subspace"] != "prediction") & (held["layer"] == 1)].itertuples():
        Q = oracle.basis(row.subspace, 1)[:, : row.rank]
        head = int(row.head) if row.matrix != "W_in" else 0
        drawn = captured.arrays[f"permuted/{row.matrix}"][:, 1, head]
        fractions = sorted(reference.subspace_fraction(float64(g), Q) for g in drawn)
        # order statistics at α(n + 1): the 5th and the 195th of 199
        assert row.expected == pytest.approx(np.mean(fractions), rel=1e-9)
        assert row.low == pytest.approx(row.fraction / fractions[194], rel=1e-9)
        assert row.high == pytest.approx(row.fraction / fractions[4], rel=1e-9)
    assert permuted(analysed(with_draws(0, 50), matrices=["W_Q"])).empty  # too few for a range
    assert permuted(analysed(gradients(), matrices=["W_Q"])).empty


def test_the_range_covers_a_gradient_whose_order_says_nothing():
    """A gradient with δ in an order drawn at random falls within the 95 % range about 95 % of the time."""
    others = with_draws(199).arrays["permuted/W_V"]
    result = analysed(with_draws(0, 199), matrices=["W_V"])
    held = permuted(result)
    inside = []
    for row in held[(held["subspace"] == "attn_in") & (held["rank"] == 3)].itertuples():
        Q = NaivePair(*pair(), groups=[[s] for s in tiny.tokens(6, 12)], ranks=RANKS).basis("attn_in", int(row.layer))
        for g in others[:, row.layer, row.head]:
            f = reference.subspace_fraction(float64(g), Q[:, :3])
            inside.append(row.fraction / row.high <= f <= row.fraction / row.low)
    assert 0.85 < np.mean(inside) < 0.99


def test_gradients_of_another_model_are_refused_or_named():
    few = {"matrices": ["W_O", "W_out"], "ranks": [3]}
    other = tiny.toy("plain", tiny.KINDS[0], torch.float64, seed=9)
    elsewhere = gradient_covariance(other, CrossEntropy(), [data()], full_mlp=True, groups=1, progress=False)
    with pytest.warns(UserWarning, match="gradients were measured on other weights"):
        result = analysed(elsewhere, **few)
    assert any("measured on other weights" in note for note in result.notes)
    at_aligned = gradient_covariance(pair()[1], CrossEntropy(), [data()], groups=1, progress=False)
    result = analysed(at_aligned, **few)
    assert "the gradients were measured at the aligned model, not at the base" in result.notes
    assert not any("gradients were measured" in note for note in analysed(gradients(), **few).notes)
    narrow = tiny.toy("plain", tiny.KINDS[0], torch.float64, d_mlp=80)
    small = gradient_covariance(narrow, CrossEntropy(), [data()], groups=1, progress=False)
    with pytest.raises(ValueError, match=r"got d_mlp 80 \(.*\) against 96 .*; pass gradient_covariance\(base"):
        analysed(small, **few)
    partial = gradient_covariance(pair()[0], CrossEntropy(), [data()], groups=1, matrices=["W_O"], progress=False)
    with pytest.raises(ValueError, match=r"expected gradients of W_out, got only W_O; pass gradient_covariance"):
        analysed(partial, **few)
    assert analysed(partial, matrices=["W_Q", "W_O"], ranks=[3]).table["gradient_matched"].notna().any()


def test_sequences_of_different_lengths_may_stand_for_texts():
    sequences = [tiny.tokens(1, n, seed=n)[0] for n in (9, 12, 7, 11)]
    result = analysed(None, tokens=sequences, ranks=[1, 3])
    assert result.config["tokens"] == sum(map(len, sequences)) - 4
    with pytest.raises(ValueError, match="expected at least one sequence of tokens, got none"):
        analysed(None, tokens=[])
