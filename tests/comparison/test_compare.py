"""compare against naive oracles: paired jackknife from leave-one-group-out analyses, overlaps from float64 SVDs."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tl_asymmetry import Comparison, PairAnalysis, analyze_pair, compare
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.plots import differences_figure
from tl_asymmetry.results.result import load

TOKENS = tiny.tokens(9, 12)
OPTIONS: dict[str, Any] = {"tokens": TOKENS, "ranks": [1, 4], "groups": 3, "progress": False}
STUDENT = 4.302652729749464  # 0.975 quantile, 2 degrees of freedom


@functools.cache
def models() -> tuple[Any, ...]:
    base = tiny.build("llama", tiny.KINDS[0])
    return base, tiny.perturbed(base, 0.02, 1), tiny.perturbed(base, 0.05, 2)


@functools.cache
def results() -> tuple[PairAnalysis, ...]:
    base, a, b = models()
    return analyze_pair(base, a, **OPTIONS), analyze_pair(base, b, **OPTIONS)


@functools.cache
def small_results() -> tuple[PairAnalysis, ...]:
    """Of what reads and what writes, for questions that every row answers alike."""
    base, a, b = models()
    return tuple(analyze_pair(base, m, **OPTIONS, matrices=["W_Q", "W_K", "W_O"]) for m in (a, b))


@functools.cache
def compared() -> Comparison:
    return compare(*results(), names=["one", "two"])


def test_values_are_those_of_the_analyses() -> None:
    found, (a, b) = compared(), results()
    assert len(found.table) == len(a.table)
    keys = ["layer", "head", "expert", "matrix", "subspace", "rank"]
    pd.testing.assert_frame_equal(found.table[keys], a.table[keys])
    for side, result in (("a", a), ("b", b)):
        for column in ("relative", "excess", "isotropic_q", "rounding_share", "delta_relative_norm"):
            assert found.table[f"{column}_{side}"].equals(result.table[column])
    np.testing.assert_allclose(found.table["log2_ratio"], np.log2(a.table["relative"] / b.table["relative"]))
    np.testing.assert_allclose(found.table["difference"], a.table["relative"] - b.table["relative"])
    captured = found.table["subspace"] != "prediction"
    for column in ("ci_low", "ci_high", "difference_low", "difference_high"):
        assert found.table.loc[captured, column].notna().all()
        assert found.table.loc[~captured, column].isna().all()
    assert (found.table["ci_low"] <= found.table["log2_ratio"])[captured].all()
    assert found.table["a"].unique().tolist() == ["one"]


def test_intervals_are_a_paired_jackknife() -> None:
    """Three comparisons of analyses that leave the same group of texts out of both."""
    base, a, b = models()
    few = OPTIONS | {"ranks": [4], "matrices": ["W_Q", "W_K", "W_O"]}
    found = compare(*(analyze_pair(base, m, **few) for m in (a, b)), names=["one", "two"])
    columns = ["layer", "head", "matrix", "subspace", "rank"]
    parts, asymmetries = [], []
    for left_out in range(3):
        kept = torch.cat([TOKENS[3 * i : 3 * i + 3] for i in range(3) if i != left_out])
        options = few | {"tokens": kept, "groups": 1}
        part = compare(analyze_pair(base, a, **options), analyze_pair(base, b, **options), names=["one", "two"])
        assert part.table["ci_low"].isna().all()
        assert any("without intervals" in note for note in part.notes)
        pd.testing.assert_frame_equal(part.table[columns], found.table[columns])
        parts.append(part.table)
        asymmetries.append(part.asymmetry)
    captured = (found.table["subspace"] != "prediction").to_numpy()
    for column, low, high in (("log2_ratio", "ci_low", "ci_high"), ("difference", "difference_low", "difference_high")):
        θ = np.stack([part[column].to_numpy() for part in parts])
        half = STUDENT * np.sqrt(2 / 3 * np.square(θ - θ.mean(0)).sum(0))
        for name, sign in ((low, -1), (high, 1)):
            expected = found.table[column] + sign * half
            np.testing.assert_allclose(found.table.loc[captured, name], expected[captured], rtol=1e-4, atol=1e-5)
    θ = np.stack([part["difference"].to_numpy(float) for part in asymmetries])
    half = STUDENT * np.sqrt(2 / 3 * np.square(θ - θ.mean(0)).sum(0))
    np.testing.assert_allclose(found.asymmetry["ci_high"], found.asymmetry["difference"] + half, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.asymmetry["ci_low"], found.asymmetry["difference"] - half, rtol=1e-4, atol=1e-4)


def test_asymmetry_is_the_difference_of_the_two() -> None:
    found, (a, b) = compared(), results()
    merged = a.asymmetry.merge(b.asymmetry, on=["layer", "head", "rank"])
    np.testing.assert_allclose(found.asymmetry["difference"], merged["log2_ratio_x"] - merged["log2_ratio_y"])
    assert found.asymmetry["ci_low"].notna().all()
    assert found.asymmetry["head"].isna().sum() == 2 * tiny.N_LAYERS


def test_overlap_is_that_of_the_singular_vectors() -> None:
    """Left singular vectors of float64 deltas on the residual axis, by hand."""
    base, a, b = (ModelView(m) for m in models())
    found = compared().overlap
    assert (found["directions"] == 5).all()
    assert np.allclose(found["chance"], 5 / tiny.D_MODEL)
    for row in found.sample(30, random_state=0).to_dict("records"):
        deltas = []
        for view in (a, b):
            W = [v.weight(row["layer"], row["matrix"]).double() for v in (view, base)]
            Δ = W[0] - W[1]
            Δ = Δ if pd.isna(row["head"]) else Δ[row["head"]]
            deltas.append(Δ.mT if row["matrix"] in ("W_O", "W_out") else Δ)
        svds = [torch.linalg.svd(Δ, full_matrices=False) for Δ in deltas]
        U = [svd[0][:, :5] for svd in svds]
        overlap = (U[0].mT @ U[1]).square().sum().item() / 5
        assert row["overlap"] == pytest.approx(overlap, abs=2e-4)
        assert row["leading_cosine"] == pytest.approx((U[0][:, 0] @ U[1][:, 0]).abs().item(), abs=1e-3)
        best = [(svd[0][:, :5] * svd[1][:5]) @ svd[2][:5] for svd in svds]
        cosine = ((best[0] * best[1]).sum() / best[0].norm() / best[1].norm()).item()
        assert row["cosine"] == pytest.approx(cosine, abs=1e-3)
        assert row["share_a"] == pytest.approx((best[0].norm() ** 2 / deltas[0].norm() ** 2).item(), rel=1e-3)
        assert row["share_b"] == pytest.approx((best[1].norm() ** 2 / deltas[1].norm() ** 2).item(), rel=1e-3)


def test_chance_of_an_overlap_is_that_of_random_spaces() -> None:
    """Independent deltas: p is uniform, and the mean overlap n/d; the same delta: overlap 1, cosine 1."""
    overlap = compared().overlap
    assert overlap["overlap"].mean() == pytest.approx(5 / tiny.D_MODEL, rel=0.1)
    assert 0.25 < overlap["p"].mean() < 0.75
    assert (overlap["q"] < 0.05).mean() < 0.1
    base, a, _ = models()
    doubled = tiny.perturbed(a, 0.0)
    with torch.no_grad():
        for mine, theirs in zip(doubled.parameters(), base.parameters(), strict=True):
            mine.copy_(theirs + 2 * (mine - theirs))
    same = compare(small_results()[0], analyze_pair(base, doubled, **OPTIONS, matrices=["W_Q", "W_O"]))
    for column in ("overlap", "cosine", "leading_cosine"):
        np.testing.assert_allclose(same.overlap[column], 1, atol=2e-3)
    assert (same.overlap["q"] < 1e-3).all()
    np.testing.assert_allclose(same.table["log2_ratio"], 0, atol=1e-4)
    np.testing.assert_allclose(same.table["delta_relative_norm_b"], 2 * same.table["delta_relative_norm_a"], rtol=1e-4)


def test_a_delta_of_low_rank_has_fewer_directions() -> None:
    base, a, _ = models()
    thin = tiny.perturbed(base, 0.0)
    for layer in range(tiny.N_LAYERS):
        W = ModelView(thin).weight(layer, "W_Q")
        generator = torch.Generator().manual_seed(layer)
        for head in W[1:]:  # head 0 stays as it was
            left, right = torch.randn(tiny.D_MODEL, 2, generator=generator), torch.randn(2, 12, generator=generator)
            head += 0.1 * left @ right
    found = compare(small_results()[0], analyze_pair(base, thin, **OPTIONS, matrices=["W_Q", "W_O"])).overlap
    queries = found[found["matrix"] == "W_Q"]
    assert (queries.loc[queries["head"] > 0, "directions"] == 2).all()
    assert np.allclose(queries.loc[queries["head"] > 0, "share_b"], 1)
    untouched = found[(found["matrix"] != "W_Q") | (found["head"] == 0)]
    assert (untouched["directions"] == 0).all()
    assert untouched[["overlap", "cosine", "p", "q", "share_a"]].isna().all(axis=None)
    assert (untouched["p_method"] == "none").all()


def test_three_analyses_make_three_pairs() -> None:
    base, a, b = models()
    third = analyze_pair(base, tiny.perturbed(base, 0.01, 3), **(OPTIONS | {"ranks": [4], "matrices": ["W_Q", "W_O"]}))
    found = compare(*small_results(), third, names=["one", "two", "three"])
    pairs = found.table[["a", "b"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [["one", "two"], ["one", "three"], ["two", "three"]]
    assert set(found.table.loc[found.table["b"] == "three", "matrix"]) == {"W_Q", "W_O"}
    assert found.plot_differences("W_Q", "two", "three").layout.title.text.startswith("<b>W_Q: two against three")
    with pytest.raises(ValueError, match="expected one of one and two, one and three, two and three, got 'three' and"):
        found.plot_differences("W_Q", "three", "one")
    unnamed = compare(*small_results(), third)
    assert len(set(unnamed.config["names"])) == 3


def test_what_cannot_be_compared() -> None:
    base, a, b = models()
    one, two = small_results()
    few = OPTIONS | {"matrices": ["W_Q"], "ranks": [4]}
    elsewhere = analyze_pair(a, b, **few)
    with pytest.raises(ValueError, match="expected analyses of one base, got one from .* whose weights differ"):
        compare(one, elsewhere, names=["one", "other"])
    for over, words in (
        (
            {"tokens": tiny.tokens(9, 12, seed=3)},
            "expected analyses on the same texts, got other tokens in one than in",
        ),
        ({"optimizer": "sgd"}, "got optimizer='adam' in one and 'sgd' in two"),
        ({"exclude_first": False}, "got exclude_first=True in one and False in two"),
        ({"groups": 4}, "got groups=3 in one and 4 in two"),
        ({"centered": True}, "got centered=False in one and True in two"),
        ({"activations": "aligned"}, "got activations='base' in one and 'aligned' in two"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(one, analyze_pair(base, b, **(few | over)), names=["one", "two"])
    with pytest.raises(ValueError, match="expected analyses with a matrix, subspace and rank in common, got none"):
        compare(one, analyze_pair(base, b, **(few | {"ranks": [7]})))
    with pytest.raises(ValueError, match="expected 2 names, got 1; pass one for each"):
        compare(one, two, names=["one"])
    with pytest.raises(ValueError, match="expected names that differ, got x, x"):
        compare(one, two, names=["x", "x"])
    with pytest.raises(ValueError, match="expected directions from 1 to 5, got 6"):
        compare(one, two, directions=6)
    with pytest.warns(UserWarning, match="one and two are the same model, weight for weight"):
        compare(one, one, names=["one", "two"])
    both = [analyze_pair(base, m, **few, activations="aligned") for m in (a, b)]
    with pytest.warns(UserWarning, match="subspaces come from different activations"):
        assert any("different activations" in note for note in compare(*both).notes)


@pytest.mark.parametrize("form", [lambda v: {"mine": v}, lambda v: ["attn_in", {"mine": v.numpy()}]])
def test_own_directions_must_be_the_same(form: Any) -> None:
    """Not of the same name or kind alone: the same numbers."""
    base, first, second, *_ = models()
    v, w = torch.eye(ModelView(base).d_model)[:2]
    options: dict[str, Any] = {"tokens": TOKENS, "ranks": 1, "groups": 1, "matrices": "W_Q", "progress": False}
    a, b = (analyze_pair(base, model, subspaces=form(v), **options) for model in (first, second))
    assert len(compare(a, b, names=["a", "b"]).table)
    other = analyze_pair(base, second, subspaces=form(w), **options)
    with pytest.raises(ValueError, match="expected analyses against the same given subspaces, got others in a than in"):
        compare(a, other, names=["a", "b"])


def test_saved_analyses_compare_as_well(tmp_path: Path) -> None:
    found = compared()
    one, two = (PairAnalysis.load(r.save(tmp_path / str(i))) for i, r in enumerate(results()))
    again = compare(one, two, names=["one", "two"])
    for name in Comparison.TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(again, name), check_exact=True)
    check_listed(found)
    loaded = load(found.save(tmp_path / "comparison"))
    assert isinstance(loaded, Comparison)
    for name in Comparison.TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(loaded, name), check_exact=True)
    assert loaded.summary() == found.summary()
    assert json.loads(json.dumps(found.config)) == found.config
    assert "One trained model of each kind" in found.summary()


def another(result: PairAnalysis, seed: int, config: dict[str, Any] | None = None, **planted: float) -> PairAnalysis:
    """What another run of the same recipe might give: every fraction 1 % off, and those of a matrix in layer 1 more."""
    table = result.table.copy()
    noise = np.random.default_rng(seed).standard_normal(len(table))
    table["relative"] *= np.exp2(0.01 * noise)
    for matrix, factor in planted.items():
        table.loc[(table["matrix"] == matrix) & (table["layer"] == 1) & (table["rank"] == 4), "relative"] *= factor
    models = result.config["models"]
    models = models | {"aligned": models["aligned"] | {"weights_xxh3": f"run {seed} {planted}"}}
    return dataclasses.replace(result, table=table, config=result.config | {"models": models} | (config or {}))


@functools.cache
def arms() -> Comparison:
    """Three runs an arm; one arm's W_Q of layer 1 reads twice as much in every run."""
    one = results()[0]
    return compare(
        {"more": [another(one, seed, W_Q=2.0) for seed in (1, 2, 3)], "plain": [another(one, i) for i in (4, 5, 6)]}
    )


def test_arms_of_several_runs_are_told_apart_by_their_spread() -> None:
    found = arms()
    assert found.config["runs"] == {"more": 3, "plain": 3}
    table = found.table
    assert set(table["runs_a"]) == set(table["runs_b"]) == {3}
    planted = (table["matrix"] == "W_Q") & (table["layer"] == 1) & (table["rank"] == 4)
    assert (table.loc[planted, "vs_other"] == "larger").all()
    assert (table.loc[~planted, "vs_other"] == "not told apart").mean() > 0.97
    assert (table["seed_low"] < table["log2_ratio"]).all()
    assert (table["seed_high"] > table["log2_ratio"]).all()
    assert (table["seed_q"] >= table["seed_p"]).all()
    summary = found.summary()
    assert "held against the spread between 3 runs of more and 3 of plain, 4 of 20 are larger in more" in summary
    assert "One trained model" not in summary
    figure = found.plot_differences("W_Q", subspace="attn_in", rank=4)
    assert {(x, y) for x, y in zip(figure.data[1].x, figure.data[1].y, strict=True)} == {(h, 1) for h in range(4)}


def test_numbers_of_an_arm_are_means_over_its_runs() -> None:
    runs = small_results()
    one = another(runs[0], 1)
    found = compare({"two": runs, "one": one})
    log2 = [np.log2(run.table["relative"].to_numpy()) for run in (*runs, one)]
    np.testing.assert_allclose(found.table["log2_ratio"], (log2[0] + log2[1]) / 2 - log2[2])
    np.testing.assert_allclose(found.table["relative_a"], np.exp2((log2[0] + log2[1]) / 2))
    np.testing.assert_allclose(found.table["isotropic_q_a"], np.maximum(*(run.table["isotropic_q"] for run in runs)))
    parts = [compare(run, one) for run in runs]
    for column in ("overlap", "cosine", "share_a"):
        np.testing.assert_allclose(found.overlap[column], sum(part.overlap[column] for part in parts) / 2)
    np.testing.assert_allclose(found.overlap["p"], np.maximum(*(part.overlap["p"] for part in parts)))
    np.testing.assert_allclose(found.overlap["within"], compare(*runs).overlap["overlap"])
    np.testing.assert_allclose(found.asymmetry["difference"], sum(part.asymmetry["difference"] for part in parts) / 2)
    assert (found.table["vs_other"] == "").all()  # one arm has one run
    assert found.table[["seed_low", "seed_p", "seed_q"]].isna().all(axis=None)
    assert "One trained model of one:" in found.summary()


def test_arms_that_cannot_be_compared() -> None:
    one, two = small_results()
    there = one.config["models"]
    elsewhere = another(one, 1, {"models": there | {"base": there["base"] | {"weights_xxh3": "another"}}})
    with pytest.raises(ValueError, match=r"expected analyses of one base, got x \(run 1\) from .* and y from"):
        compare({"x": [one, two], "y": elsewhere})
    with pytest.raises(ValueError, match=r"got the same weights in x \(run 1\) and x \(run 2\); pass each run once"):
        compare({"x": [one, one], "y": two})
    with pytest.raises(ValueError, match="expected at least one analysis in y, got none"):
        compare({"x": one, "y": []})
    with pytest.raises(ValueError, match="expected two analyses or more, got x"):
        compare({"x": [one, two]})
    with pytest.raises(ValueError, match="expected names from the mapping alone"):
        compare({"x": one, "y": two}, names=["x", "y"])


def test_another_model_is_named_in_a_comparison() -> None:
    unrelated = another(small_results()[0], 1, {"unrelated": ["W_Q"]})
    with pytest.warns(UserWarning, match="W_Q of two point elsewhere than the base's"):
        found = compare(small_results()[0], unrelated, names=["one", "two"])
    assert any("were not trained from these" in note for note in found.notes)
    assert found.summary().index("W_Q of two point elsewhere") < found.summary().index("Reading, in")


def test_names_are_escaped(tmp_path: Path) -> None:
    bad = '<img src=x onerror="alert(1)">'
    found = compare(*small_results(), names=[bad, "two"])
    page = found.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert bad not in page
    assert bad not in found._repr_html_()
    for figure in (found.plot_differences("W_Q"), found.plot_overlap("W_Q")):
        assert "<img" not in figure.to_json().replace("\\u003c", "<")


def test_differences_figure_marks_what_is_rounding_on_either_side() -> None:
    table = compared().table
    share = table["rounding_share_a"].where(table["layer"] != 0, 0.6)
    figure = differences_figure(table.assign(rounding_share_b=share), "W_Q", rank=4)
    rows = table[(table["matrix"] == "W_Q") & (table["subspace"] == "attn_in") & (table["rank"] == 4)]
    crosses = next(t for t in figure.data if t.name == "rounding share ≥ 0.5 (mostly storage)")
    assert len(crosses.x) == (rows["layer"] == 0).sum()
    assert set(crosses.y) == {0}
    assert figure.data[0].customdata[0][0][10] == "0.6"
    assert not any("rounding" in (t.name or "") for t in differences_figure(table, "W_Q").data)


def test_differences_figure_says_what_the_table_says() -> None:
    found = compared()
    figure = found.plot_differences("W_K", subspace="attn_in", rank=4)
    rows = found.table.query("matrix == 'W_K' and subspace == 'attn_in' and rank == 4")
    z = np.array(figure.data[0].z, dtype=float)
    assert z.shape == (tiny.N_LAYERS, tiny.N_KV_HEADS)
    np.testing.assert_allclose(z.ravel(), rows["log2_ratio"], atol=1e-3)
    beyond = differences_figure(found.table.assign(ci_low=0.1, ci_high=0.2), "W_K", subspace="attn_in", rank=4)
    assert beyond.data[1].x == figure.data[1].x == (None,)  # an interval over texts alone makes no dot
    assert "One run an arm: nothing is counted as different." in figure.layout.title.text
    assert "KV head" in figure.layout.xaxis.title.text
    overlap = found.plot_overlap("W_out")
    rows = found.overlap.query("matrix == 'W_out'")
    np.testing.assert_allclose(
        np.array(overlap.data[0].z, dtype=float).ravel(), np.log2(rows["overlap"] / rows["chance"]), atol=1e-3
    )  # fmt: skip
    assert len(found.plot_differences("W_Q").layout.sliders[0].steps) == 2
    with pytest.raises(ValueError, match="expected matrix to be one of"):
        found.plot_differences("W_X")
