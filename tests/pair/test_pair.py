"""The whole table of analyze_pair against a naive float64 oracle, on both kinds of model."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.oracles import reference
from tests.oracles.naive_pair import NaivePair
from tl_asymmetry import PairAnalysis, Subspace, analyze_pair
from tl_asymmetry.geometry import random_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.tables import PAIR_COLUMNS

needs_hooked = pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")

D = tiny.D_MODEL
PATTERN = (9, 14, 6)
"""Lengths of the sequences of one group: repeated, so that balanced groups are the repeats."""
GROUPS = [
    [tiny.tokens(1, n, seed=10 * g + i)[0] for i, n in enumerate(PATTERN)] for g in range(4)
]  # fmt: skip
SEQUENCES = [s for group in GROUPS for s in group]
ROTARY = ("llama", "neox", "rms_rotary_gated_gqa")
PARALLEL = ("neox",)
NO_MEAN = ("llama", "rms_rotary_gated_gqa")

# Both kinds of one architecture, and one kind of the others: that the other gives their tables is tested by itself.
CASES = [("gpt2", kind) for kind in tiny.KINDS]
CASES += [("llama", tiny.KINDS[0]), ("neox", "bridge"), ("rms_rotary_gated_gqa", "bridge")]
EACH_POINT = ["W_K", "W_O", "W_in", "W_out"]
"""One matrix for each point that is read or written."""


@functools.cache
def models(name: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    if name in tiny.TOYS:
        base = tiny.toy(name, kind, dtype)
        return base, tiny.perturbed(base, 0.05)
    return tiny.build(name, kind, dtype), tiny.build(name, kind, dtype, delta=0.05)


def run(base: Any, aligned: Any, sequences: list[torch.Tensor] = SEQUENCES, **options: Any) -> PairAnalysis:
    """analyze_pair on sequences of uneven lengths, as texts of exactly those tokens, the begin token in front."""
    for model in (base, aligned):
        if isinstance(model, torch.nn.Module) and ModelView(model).tokenizer is None:
            if hasattr(model, "adapter"):
                model._tokenizer = tiny.tokenizer()
            else:
                model.set_tokenizer(tiny.tokenizer())
    texts = [" ".join(f"w{t - 3}" for t in s[1:].tolist()) for s in sequences]
    return analyze_pair(base, aligned, texts, **{"groups": 4, "progress": False} | options)


def with_begin(groups: list[list[torch.Tensor]] = GROUPS) -> list[list[torch.Tensor]]:
    """The sequences as the tokenizer makes them: the first token is the begin token."""
    return [[torch.cat([torch.zeros(1, dtype=torch.long), s[1:]]) for s in group] for group in groups]


def naive(name: str, base: Any, aligned: Any, ranks: Any, **options: Any) -> NaivePair:
    return NaivePair(
        base, aligned, options.pop("groups", with_begin()), ranks,
        positional="rotary" if name in ROTARY else "standard", layer_norm=name not in NO_MEAN,
        parallel=name in PARALLEL, **options,
    )  # fmt: skip


def exact_under_padding(name: str, kind: str) -> bool:
    return kind == "hooked" or name in ("gpt2", "neox", "plain")


def keyed(table: pd.DataFrame, *names: str) -> dict[Any, pd.Series]:
    """Rows by key, NA heads as None, integers plain."""
    found = {}
    for _, row in table.iterrows():
        key = tuple(None if pd.isna(row[n]) else row[n] if isinstance(row[n], str) else int(row[n]) for n in names)
        assert key not in found, key
        found[key] = row
    return found


def assert_same(result: PairAnalysis, oracle: NaivePair, tolerance: float, skip: tuple[str, ...] = ()) -> None:
    targets = result.config["subspaces"]
    expected = oracle.table(targets)
    got = keyed(result.table, "matrix", "subspace", "layer", "head", "rank")
    assert set(got) == set(expected)
    for column in next(iter(expected.values())):
        if column in skip:
            continue
        ours = np.array([got[key][column] for key in expected], dtype=float)
        theirs = np.array([row[column] for row in expected.values()])
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=column)
    if {"W_Q", "W_K", "W_O"} <= set(targets) and all(
        s in targets[m] for m, s in (("W_Q", "attn_in"), ("W_K", "attn_in"), ("W_O", "prediction"))
    ):
        expected_asymmetry = oracle.asymmetry(mlp="W_out" in targets)
        got_asymmetry = keyed(result.asymmetry, "layer", "head", "rank")
        assert set(got_asymmetry) == set(expected_asymmetry)
        for column in next(iter(expected_asymmetry.values())):
            if column in skip:
                continue
            ours = np.array([got_asymmetry[key][column] for key in expected_asymmetry], dtype=float)
            theirs = np.array([row[column] for row in expected_asymmetry.values()])
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=f"asymmetry {column}")


def same_tables(a: PairAnalysis, b: PairAnalysis, tolerance: float) -> None:
    for name in ("table", "asymmetry", "circuits", "other_changes"):
        ours, theirs = (getattr(result, name) for result in (a, b))
        if name == "other_changes":  # in the order in which each kind of model lists its parameters
            ours, theirs = (t.sort_values("parameter", ignore_index=True) for t in (ours, theirs))
        pd.testing.assert_frame_equal(ours, theirs, rtol=tolerance, atol=tolerance, obj=name)


class Gradient:
    """Some second moments in place of a gradient covariance."""

    def gradient_moment(self, layer: int, matrix: str, head: int | None = None) -> torch.Tensor:
        seed = 100 * layer + (7 if head is None else head) + 50 * (matrix == "W_out")
        X = torch.randn(30, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return X.mT @ X / 30


# --- against the oracle ----------------------------------------------------------------------------------------------


@functools.cache
def analysed(name: str, kind: str) -> PairAnalysis:
    """With nothing left out; at the default ranks where it is a HookedTransformer."""
    # Hugging Face's own attention takes its softmax in float32, whose sums depend on padding: so none here
    batch_size = 8 if exact_under_padding(name, kind) else 1
    ranks = None if kind == tiny.KINDS[0] else [1, 4, 16]
    return run(*models(name, kind), gradient=Gradient(), batch_size=batch_size, ranks=ranks)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_table_in_float64(name: str, kind: str) -> None:
    base, aligned = models(name, kind)
    result = analysed(name, kind)
    assert list(result.table.columns) == list(PAIR_COLUMNS)
    assert result.config["ranks"] == ([1, 3, 4, 12, 16] if kind == tiny.KINDS[0] else [1, 4, 16])
    assert result.config["tokens"] == sum(len(s) - 1 for s in SEQUENCES)
    into = "resid_post" if name in PARALLEL else "resid_mid"
    expected = {
        "W_Q": ["attn_in", "prediction"], "W_K": ["attn_in", "prediction"], "W_V": ["attn_in", "prediction"],
        "W_O": [into, "prediction"], "W_in": ["mlp_in", "prediction"], "W_gate": ["mlp_in", "prediction"],
        "W_out": ["resid_post", "prediction"],
    }  # fmt: skip
    if name in ("gpt2", "neox"):
        del expected["W_gate"]
    assert result.config["subspaces"] == expected
    oracle = naive(name, base, aligned, result.config["ranks"], gradient=Gradient().gradient_moment)
    assert_same(result, oracle, 1e-10)
    assert (result.table["rounding_share"] == 0).all()
    pd.testing.assert_series_equal(result.table["fraction_unrounded"], result.table["fraction"], check_names=False)
    write = result.table["matrix"].isin(["W_O", "W_out"])
    assert (result.table["pathway"] == np.where(write, "write", "read")).all()
    table = result.table
    small = table["eigengap"] < 0.05
    uncertain = (table["rank"] <= 4) | (table["ci_high"] > 2 * table["ci_low"])
    assert (table["flags"].str.contains("eigengap") == (small & uncertain)).all()
    sampled = table["ci_low"].notna() | table["excess_low"].notna()
    assert (table["flags"].str.contains("few_tokens") == sampled).all()


@pytest.mark.parametrize(("name", "kind"), [("gpt2", tiny.KINDS[0]), ("llama", "bridge")])
def test_the_table_in_float32(name: str, kind: str) -> None:
    base, aligned = models(name, kind, torch.float32)
    result = run(base, aligned, ranks=[1, 4], gradient=Gradient())
    # the end of an interval moves by the rounding of every replicate
    oracle = naive(name, base, aligned, [1, 4], gradient=Gradient().gradient_moment)
    assert_same(result, oracle, 1e-5, skip=("ci_low", "ci_high"))
    assert_same(result, oracle, 1e-4)


def test_weights_stored_in_bf16() -> None:
    base, aligned = (m.to(torch.bfloat16) for m in (tiny.bridge("gpt2"), tiny.bridge("gpt2", delta=0.004)))
    stored = run(base, aligned, ranks=[1, 4])
    loaded = run(base.to(torch.float32), aligned.to(torch.float32), ranks=[1, 4])
    oracle = naive("gpt2", base, aligned, [1, 4])  # the same two models, now in float32
    assert_same(loaded, oracle, 1e-5, skip=("ci_low", "ci_high"))
    weights_only = [
        "delta_norm", "delta_relative_norm", "delta_shrink", "delta_effective_rank", "rounding_share", "matrix", "rank",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(stored.table[weights_only], loaded.table[weights_only], rtol=1e-6, atol=1e-7)
    on_prediction = [r.table[r.table["subspace"] == "prediction"] for r in (stored, loaded)]
    columns = [*weights_only, "fraction", "relative", "isotropic_z", "fraction_unrounded"]
    pd.testing.assert_frame_equal(*(t[columns] for t in on_prediction), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stored.table["fraction"], loaded.table["fraction"], atol=0.05)  # bf16 activations
    for result in (stored, loaded):
        table = result.table
        assert table["rounding_share"].between(0.01, 0.6).all()
        # What was taken out is the noise's own fraction, which for weights of one scale is near k/d.
        ρ = table["rounding_share"]
        noise = (table["fraction"] - (1 - ρ) * table["fraction_unrounded"]) / ρ * D / table["rank"]
        assert noise.between(0.5, 1.5).all()
        assert abs(noise.mean() - 1) < 0.02
        assert (table["flags"].str.contains("rounding") == (table["rounding_share"] >= 0.1)).all()
    assert stored.config["models"]["base"]["storage"] == "torch.bfloat16"
    assert loaded.config["models"]["base"] | {"dtype": 0, "weights_xxh3": 0} == stored.config["models"]["base"] | {
        "dtype": 0, "weights_xxh3": 0,
    }  # fmt: skip


def test_p_and_q() -> None:
    result = analysed("gpt2", tiny.KINDS[0])
    table = result.table
    generator = np.random.default_rng(0)
    layers = result.tests.query("level == 'layer' and null == 'isotropic' and side == 'above'")
    held = table.merge(layers[["matrix", "subspace", "rank", "layer", "q"]], on=["matrix", "subspace", "rank", "layer"])
    assert len(held) == len(table)
    assert (held["isotropic_q"] >= held["isotropic_p"] - 1e-15).all()
    # nothing is found in a layer that was not
    assert (held["isotropic_q"] >= held["q"] - 1e-15).all()
    for k, block in table.groupby("rank"):
        assert set(block["p_method"]) <= ({"exact"} if k == 1 else {"beta", "draws", "saddlepoint"})
    for k in (1, 4):
        row = table[(table["matrix"] == "W_Q") & (table["rank"] == k)].iloc[3]
        spectrum = result.delta_spectrum("W_Q")[row["layer"], row["head"]]
        draws = reference.haar_fractions(spectrum, D, k, 4000, generator)
        p = (draws >= row["fraction"]).mean()
        assert abs(p - row["isotropic_p"]) < 4 * np.sqrt(p * (1 - p) / 4000) + 2e-3


def test_profiles_and_spectra_hold_the_table() -> None:
    base, aligned = models("llama", tiny.KINDS[0])
    result = analysed("llama", tiny.KINDS[0])
    for (matrix, subspace), block in result.table.groupby(["matrix", "subspace"]):
        profile = result.energy_profile(matrix, subspace)
        assert profile.dtype == np.float32
        # never more than the largest rank's directions are promised, but those that are there add up
        assert profile.shape[-1] >= 16
        for row in block.itertuples():
            head = 0 if pd.isna(row.head) else row.head
            got = profile[row.layer, head, : row.rank].sum()
            assert got == pytest.approx(row.fraction, rel=1e-5)
    oracle = naive("llama", base, aligned, [1])
    for layer in range(2):
        λ = np.sort(np.linalg.eigvalsh(oracle.moment("attn_in", layer, centred=False)))[::-1]
        np.testing.assert_allclose(result.eigenvalues("attn_in")[layer], λ, rtol=1e-6, atol=1e-8)
        for head in range(2):
            ΔW = oracle.weight(aligned, layer, "W_K")[head] - oracle.weight(base, layer, "W_K")[head]
            s2 = np.linalg.svd(ΔW, compute_uv=False) ** 2
            np.testing.assert_allclose(result.delta_spectrum("W_K")[layer, head], s2, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="expected one of W_K/attn_in, .*, got 'W_K/resid_mid'; pass 'W_O/resid_mid'"):
        result.energy_profile("W_K", "resid_mid")


# --- what must make no difference ------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.parametrize("name", ["llama", "neox"])  # gpt2: both against the oracle
def test_both_kinds_give_the_same_table(name: str) -> None:
    pairs = {kind: models(name, kind) for kind in tiny.KINDS}
    hooked, bridge = (run(*pairs[kind], ranks=[4]) for kind in ("hooked", "bridge"))
    same_tables(hooked, bridge, 1e-5)  # Hugging Face's RMS norms and softmax are float32 in float64 models too
    found = [hooked, bridge]
    if name == "llama":  # one of each
        found.append(run(pairs["hooked"][0], pairs["bridge"][1], ranks=[4]))
        same_tables(found[-1], hooked, 1e-5)
    hashes = [[r.config["models"][m]["weights_xxh3"] for m in ("base", "aligned")] for r in found]
    assert all(each == hashes[0] for each in hashes)


@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    # one of each way to leave padding out: TransformerLens's, Hugging Face's, the Bridge's own; and one in float32
    [("gpt2", tiny.KINDS[0], torch.float64), ("neox", "bridge", torch.float64), ("plain", "bridge", torch.float64)]
    + [("llama", "bridge", torch.float32)],
)
def test_batch_size_and_padding_make_no_difference(name: str, kind: str, dtype: torch.dtype) -> None:
    base, aligned = models(name, kind, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    options: dict[str, Any] = {"ranks": [1, 4], "matrices": None if name == "gpt2" else EACH_POINT}
    alone, other = (run(base, aligned, batch_size=n, **options) for n in (1, 2))  # 3 uneven sequences a group
    columns = [c for c in PAIR_COLUMNS if dtype == torch.float64 or c not in ("ci_low", "ci_high")]
    pd.testing.assert_frame_equal(alone.table[columns], other.table[columns], rtol=tolerance, atol=tolerance)
    pd.testing.assert_frame_equal(alone.circuits, other.circuits, rtol=tolerance, atol=tolerance)
    pd.testing.assert_frame_equal(alone.table, other.table, rtol=max(tolerance, 1e-4), atol=max(tolerance, 1e-4))


def test_the_order_of_sequences_within_and_of_groups_makes_no_difference() -> None:
    base, aligned = models("gpt2", tiny.KINDS[-1])
    result = run(base, aligned, ranks=[4])
    turned = run(base, aligned, [s for group in reversed(GROUPS) for s in group[::-1]], ranks=[4])
    same_tables(result, turned, 1e-10)


# --- other choices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "aligned"},
        {"activations": "both"},
        {"centered": True},
        {"exclude_first": False},
        {"exclude_first": False, "centered": True, "activations": "both"},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_other_choices_of_subspace(options: dict[str, Any]) -> None:
    base, aligned = models("gpt2", tiny.KINDS[-1])
    several = len(options) > 1  # all matrices, the asymmetry and the circuits of them together
    result = run(base, aligned, ranks=[1, 4], matrices=None if several else EACH_POINT, **options)
    assert_same(result, naive("gpt2", base, aligned, [1, 4], **options), 1e-10)
    tokens = sum(len(s) - options.get("exclude_first", True) for s in SEQUENCES)
    assert result.config["tokens"] == tokens * (2 if options.get("activations") == "both" else 1)


def test_a_subset_of_matrices_and_named_subspaces() -> None:
    base, aligned = models("neox", tiny.KINDS[-1])
    whole = analysed("neox", tiny.KINDS[-1])
    part = run(base, aligned, ranks=whole.config["ranks"], matrices=["W_out", "W_K"], gradient=Gradient())
    assert part.table["matrix"].unique().tolist() == ["W_K", "W_out"]  # in canonical order
    assert part.asymmetry.empty
    assert part.circuits.empty
    expected = whole.table[whole.table["matrix"].isin(["W_K", "W_out"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part.table, expected, rtol=1e-12, atol=1e-13)
    named = run(base, aligned, ranks=[1, 4], subspaces=["resid_pre", "mlp_in"], matrices=["W_Q", "W_in", "W_O"])
    assert named.config["subspaces"] == {m: ["resid_pre", "mlp_in"] for m in ("W_Q", "W_O", "W_in")}
    assert_same(named, naive("neox", base, aligned, [1, 4]), 1e-10)


def full_basis() -> Subspace:
    eigenvalues = torch.arange(D, 0, -1, dtype=torch.float64)
    return Subspace(random_subspace(D, D, 9).basis, eigenvalues, "other texts")


def ranks_of(result: PairAnalysis) -> dict[str, list[int]]:
    return result.table.groupby("subspace")["rank"].unique().map(list).to_dict()


def test_given_subspaces() -> None:
    """Measured at their own size, and below it only where they have eigenvalues."""
    base, aligned = models("llama", tiny.KINDS[0])
    ordered, several = full_basis(), [random_subspace(D, 5, 2), random_subspace(D, 5, 3)]
    options: dict[str, Any] = {"ranks": [2, 7], "matrices": ["W_Q", "W_K", "W_O"]}
    result = run(base, aligned, **options, subspaces=[{"ordered": ordered, "several": several}])
    assert (
        "only own subspaces are measured: for the default ones beside them pass the mapping by itself" in result.notes
    )
    assert ranks_of(result) == {"ordered": [2, 7], "several": [5]}
    for name, bases, ranks in (
        ("ordered", [ordered.basis] * 2, [2, 7]), ("several", [space.basis for space in several], [5]),
    ):  # fmt: skip
        alone = run(
            base, aligned, **options, subspaces=[{name: ordered if name == "ordered" else several}],
            batch_size=8 if exact_under_padding("llama", tiny.KINDS[0]) else 1,
        )  # fmt: skip
        oracle = naive("llama", base, aligned, ranks, given={name: bases})
        assert_same(alone, oracle, 1e-10, skip=("eigengap",))
    assert np.isnan(result.eigenvalues("several")).all()
    result.plot_heads("W_Q")
    result.plot_layers()
    result.plot_rank_curve("W_Q", 0, 1)
    with pytest.raises(ValueError, match="expected a subspace with eigenvalues, got 'several', given without; pass"):
        result.plot_spectrum("several")
    with pytest.raises(ValueError, match="expected an analysis of W_Q and W_K against attn_in .*; pass the default"):
        result.plot_asymmetry()


def test_own_directions_in_every_form_beside_the_built_in_ones() -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    Q = random_subspace(D, 3, 0).basis
    v, skew = Q[:, 0], Q @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.5], [0.0, 0.0, 1.0]], dtype=Q.dtype)
    own = {"line": 7 * v, "array": v.numpy(), "matrix": skew, "list": list(skew.mT), "space": Subspace(Q)}
    own["layers"] = [Q, Q]
    result = run(base, aligned, ranks=4, matrices="W_Q", subspaces=["attn_in", own])
    assert ranks_of(result) == {
        "attn_in": [4], "line": [1], "array": [1], "matrix": [3], "list": [3], "space": [3], "layers": [3],
    }  # fmt: skip
    fractions = {name: rows["fraction"].to_numpy() for name, rows in result.table.groupby("subspace")}
    for first, second in (("line", "array"), ("matrix", "space"), ("list", "space"), ("layers", "space")):
        np.testing.assert_allclose(fractions[first], fractions[second], rtol=1e-10)
    assert (fractions["space"] > fractions["line"]).all()


def test_own_directions_come_beside_the_defaults_and_move_no_headline() -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    Q = random_subspace(D, 5, 0).basis
    own = {"line": Q[:, 0], "five": Q, "ordered": Subspace(Q, torch.arange(5.0, 0, -1))}
    options: dict[str, Any] = {"ranks": [1, 3, 12], "matrices": ["W_Q", "W_O"]}
    usual, beside = run(base, aligned, **options), run(base, aligned, subspaces=own, **options)
    there = beside.table[~beside.table["subspace"].isin([*own])].reset_index(drop=True)
    compared = ["fraction", "relative", "ci_low", "excess", "isotropic_p", "excess_p"]
    pd.testing.assert_frame_equal(there[compared], usual.table[compared])
    assert {name: ranks_of(beside)[name] for name in own} == {"line": [1], "five": [5], "ordered": [1, 3, 5]}
    assert beside.config["shown_rank"] == usual.config["shown_rank"] == 3
    table = beside._summary_table()
    assert table[table["matrix"] == "W_Q"].set_index("subspace")["rank"].to_dict() == {
        "attn_in": 3, "prediction": 3, "line": 1, "five": 5, "ordered": 3,
    }  # fmt: skip
    assert "rank" not in usual._summary_table()
    assert beside._headline()[0].startswith("Reading, in the 3 leading directions of each matrix's own input")
    pd.testing.assert_frame_equal(beside.top()[["place", "excess"]], usual.top()[["place", "excess"]])
    for name, k in (("line", 1), ("five", 5), ("attn_in", 3)):
        slider = beside.plot_heads("W_Q", subspace=name).layout.sliders
        assert not slider or slider[0].steps[slider[0].active].label == str(k)
        assert len(beside.plot_layers("W_Q", subspace=name).data)
        assert len(beside.plot_heads(["W_Q"], subspace=name, side_by_side=2).data)
    for name, ks in (("five", [5]), ("ordered", [1, 2, 3, 4, 5])):  # no curve through ranks that mean nothing
        assert list(beside.plot_rank_curve("W_Q", 0, 1, subspace=name).data[-2].x) == ks
    alone = run(base, aligned, subspaces=[{"line": Q[:, 0], "five": Q}], **options)
    assert alone.config["shown_rank"] == 1
    assert sorted(alone._summary_table()["rank"]) == [1, 1, 5, 5]
    assert not any("leading" in line for line in alone._headline())


@pytest.mark.usefixtures("unchecked_types")
def test_own_directions_that_are_none_are_refused() -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    v = random_subspace(D, 1, 0).basis[:, 0]
    for subspaces, text in (
        (
            {"attn_in": v},
            "expected own subspaces under names of their own, got 'attn_in', which is the name of a",
        ),
        ({"prediction": v}, "got 'prediction', which is the name of a built-in one; pass another name"),
        ({3: v}, "got 3, which is none; pass another name"),
        ({" ": v}, "got ' ', which is none; pass another name"),
        ({"Attn_In ": v}, "got 'Attn_In ', which is the name of a built-in one; pass another name"),
        ({"mine": v[:5]}, r"expected 'mine' as directions \[48, k\] in columns, got \[5, 1\]; pass them so"),
        ({"mine": v * 0}, "expected 'mine' as directions independent of each other and not zero"),
        ({"mine": [v, 2 * v]}, "expected 'mine' as directions independent of each other and not zero"),
        ({"mine": v / 0}, "expected 'mine' as directions that are finite, got NaN or infinity"),
        ({"mine": "v"}, "expected 'mine' as directions .*, got str; pass a tensor"),
        ({"mine": torch.eye(D)}, "expected fewer than 48 directions for 'mine', got all of them in no order"),
        ({"mine": [torch.eye(D)[:, :2]] * 3}, "expected one subspace, or 2 of them, for 'mine', got 3; pass one per"),
        ({}, "expected at least one subspace among .*, got {}; leave it out for the default"),
        ([], r"expected at least one subspace among .*, got \[\]; leave it out for the default"),
        (["attnin"], "expected subspaces among attn_in, .*, got 'attnin'; pass 'attn_in' or a mapping from names"),
        (v, "expected at least one subspace among"),
    ):
        with pytest.raises(ValueError, match=text):
            run(base, aligned, subspaces=subspaces)
    with pytest.raises(ValueError, match="expected matrices among W_Q, .*, got 'WQ'; pass 'W_Q'"):
        run(base, aligned, matrices="WQ")


# --- deltas of known place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_planted_delta_has_fraction_one(name: str) -> None:
    k = 3
    base = models(name, tiny.KINDS[0])[0]
    aligned = tiny.perturbed(base, 0.0)
    oracle = naive(name, base, aligned, [k])
    generator = torch.Generator().manual_seed(5)
    view = ModelView(aligned)
    with torch.no_grad():
        for layer in range(2):
            U, P = (torch.from_numpy(oracle.basis(s, layer)[:, :k].copy()) for s in ("attn_in", "prediction"))
            for matrix, Q in (("W_Q", U), ("W_K", U), ("W_O", P)):
                W = view.weight(layer, matrix)
                if matrix == "W_O":
                    W += torch.randn(*W.shape[:2], k, generator=generator, dtype=W.dtype) @ Q.mT
                else:
                    W += Q @ torch.randn(len(W), k, W.shape[-1], generator=generator, dtype=W.dtype)
            view.weight(layer, "W_out").mul_(0.9)
    table = run(base, aligned, ranks=[k]).table
    for matrix, subspace in (("W_Q", "attn_in"), ("W_K", "attn_in"), ("W_O", "prediction")):
        rows = table[(table["matrix"] == matrix) & (table["subspace"] == subspace)]
        np.testing.assert_allclose(rows["fraction"], 1, atol=1e-10)
        np.testing.assert_allclose(rows["relative"], D / k, rtol=1e-10)
        assert (rows["isotropic_p"] < 1e-3).all()
    shrunk = table[table["matrix"] == "W_out"]
    np.testing.assert_allclose(shrunk["delta_shrink"], -0.1, rtol=1e-10)
    np.testing.assert_allclose(shrunk["delta_relative_norm"], 0.1, rtol=1e-10)
    unchanged = table[table["matrix"] == "W_V"]
    assert unchanged["fraction"].isna().all()
    assert (unchanged["delta_norm"] == 0).all()


def test_unchanged_matrices_are_noted() -> None:
    base = models("gpt2", tiny.KINDS[0])[0]
    aligned = tiny.perturbed(base, 0.0)
    with torch.no_grad():
        for layer in range(2):
            ModelView(aligned).weight(layer, "W_Q").add_(0.01)
    result = run(base, aligned, ranks=[1])
    assert "W_K, W_V, W_O, W_in, W_out are the same in both models: their rows are NaN" in result.notes
    result.summary()


def test_other_changes() -> None:
    base, aligned = models("gpt2", "bridge")
    table = run(base, aligned, ranks=[1]).other_changes
    pairs = {
        "pos_embed.W_pos": (base.pos_embed, aligned.pos_embed, "weight"),
        "embed.W_E": (base.embed, aligned.embed, "weight"),
        "blocks.1.ln1.w": (base.blocks[1].ln1, aligned.blocks[1].ln1, "weight"),
        "ln_final.b": (base.ln_final, aligned.ln_final, "bias"),
        "blocks.0.attn.b_O": (base.blocks[0].attn.o, aligned.blocks[0].attn.o, "bias"),
    }
    rows = keyed(table, "parameter")
    assert ("unembed.W_U",) not in rows  # tied: it is the embedding
    for name, (ours, theirs, attribute) in pairs.items():
        W, W_new = (reference.float64(getattr(module, attribute)) for module in (ours, theirs))
        row = rows[(name,)]
        assert row["base_norm"] == pytest.approx(np.linalg.norm(W), rel=1e-10)
        assert row["delta_norm"] == pytest.approx(np.linalg.norm(W_new - W), rel=1e-10)
        assert row["delta_relative_norm"] == pytest.approx(np.linalg.norm(W_new - W) / np.linalg.norm(W), rel=1e-10)
        assert row["delta_shrink"] == pytest.approx(((W_new - W) * W).sum() / (W**2).sum(), rel=1e-9)
    assert rows[("blocks.1.ln1.w",)]["layer"] == 1
    assert pd.isna(rows[("embed.W_E",)]["layer"])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tokens_added_to_the_aligned_vocabulary_change_nothing(kind: str) -> None:
    base, aligned = (tiny.toy("plain", kind, torch.float64, d_vocab=v) for v in (90, 96))
    with torch.no_grad():
        for name, value in base.state_dict().items():
            there = aligned.state_dict()[name]
            if value.is_floating_point():
                there[tuple(slice(0, n) for n in value.shape)] = value * 1.01
    same_size = tiny.perturbed(base, 0.0)
    with torch.no_grad():
        for parameter in same_size.parameters():
            parameter.mul_(1.01)
    tokens = tiny.tokens(9, 12).clamp(max=89)
    options = {"tokens": tokens, "progress": False, "ranks": [4], "sensitivity": True, "groups": 1}
    options["matrices"] = ["W_Q", "W_K", "W_O"]  # those of the asymmetry; all are held against the same unembedding
    plain = analyze_pair(base, same_size, **options)
    with pytest.warns(UserWarning, match="the aligned model has 6 more tokens than the base"):
        grown = analyze_pair(base, aligned, **options)
    same_tables(plain, grown, 1e-10)
    pd.testing.assert_frame_equal(plain.sensitivity(), grown.sensitivity(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grown.table["delta_shrink"], 0.01, rtol=1e-9)


# --- sequences of every size -----------------------------------------------------------------------------------------


def test_one_token_sequences_have_no_within_sequence_reference() -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    result = analyze_pair(
        base, aligned, tokens=tiny.tokens(60, 1), exclude_first=False, ranks=[4], matrices=["W_K", "W_V", "W_in"],
        progress=False,
    )  # fmt: skip
    keys = result.table["matrix"] == "W_K"
    assert result.table.loc[keys, ["activation_matched", "excess"]].isna().all(axis=None)
    assert result.table.loc[~keys & (result.table["pathway"] == "read"), "excess"].notna().all()


def test_short_sequences_among_others() -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    groups = [[tiny.tokens(1, n, seed=g + n)[0] for n in (2, 14, 3)] for g in range(3)]
    result = run(base, aligned, [s for g in groups for s in g], ranks=[1, 4], matrices=EACH_POINT, groups=3)
    assert_same(result, naive("gpt2", base, aligned, [1, 4], groups=with_begin(groups)), 1e-10)


@pytest.mark.parametrize(("max_tokens", "used"), [(116, 116), (58, 58), (30, 30)])
def test_max_tokens(max_tokens: int, used: int) -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    result = run(base, aligned, ranks=[1], matrices=["W_K"], groups=1, max_tokens=max_tokens)
    assert int(result.arrays["lengths"].sum()) == used
    note = f"only the first {max_tokens} tokens were used (max_tokens)"
    assert (note in result.notes) == (used < 116)


@pytest.mark.parametrize(("groups", "intervals"), [(1, False), (2, False), (3, True), (100, True)])
def test_groups(groups: int, intervals: bool, recwarn: pytest.WarningsRecorder) -> None:
    base, aligned = models("gpt2", tiny.KINDS[0])
    result = run(base, aligned, ranks=[1], matrices=["W_K", "W_O"], groups=groups)
    captured = result.table["subspace"] != "prediction"
    assert result.table.loc[captured, "ci_low"].notna().all() == intervals
    assert result.table.loc[~captured, "ci_low"].isna().all()
    warned = any("intervals need at least 3 groups" in str(w.message) for w in recwarn)
    assert warned == (groups == 2)
    if intervals:
        rows = result.table[captured]
        assert (rows["ci_low"] <= rows["relative"]).all()
        assert (rows["relative"] <= rows["ci_high"]).all()
    if groups == 100:  # one group a sequence
        alone = naive("gpt2", base, aligned, [1], groups=[[s] for group in with_begin() for s in group])
        assert_same(result, alone, 1e-10)


def test_a_mixture_of_experts_has_rows_for_each_expert_and_its_router() -> None:
    base, aligned = tiny.bridge("mixtral"), tiny.bridge("mixtral", delta=0.05)
    result = run(base, aligned, ranks=[4])
    table = result.table
    assert table["matrix"].unique().tolist() == ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_router"]
    of_experts = table[table["expert"].notna()]
    assert of_experts["matrix"].unique().tolist() == ["W_in", "W_gate", "W_out"]
    assert set(of_experts["expert"]) == {0, 1, 2}
    assert "every layer has W_in, W_gate, W_out, one for each of 3 experts" in result.notes
    assert not result.other_changes["parameter"].str.contains("expert|router").any()
    assert len(result.asymmetry)


def test_norms_after_the_block_are_noted() -> None:
    result = run(tiny.bridge("gemma2"), tiny.bridge("gemma2", delta=0.05), ranks=[4], matrices=["W_O"])
    assert any("followed by a norm before the residual stream" in note for note in result.notes)


def test_an_aligned_directory() -> None:
    base = tiny.build("gpt2", tiny.KINDS[0])
    directory = tiny.hf_directory("gpt2", delta=0.05)
    by_path, loaded = (run(base, aligned, ranks=[4]) for aligned in (directory, tiny.bridge("gpt2", delta=0.05)))
    same_tables(by_path, loaded, 0)


@pytest.mark.gpu
def test_cuda_gives_the_table_of_the_cpu() -> None:
    base, aligned = (tiny.bridge("llama", delta=δ) for δ in (0.0, 0.05))
    on_cpu = run(base, aligned, ranks=[1, 4])
    on_gpu = run(base.to("cuda"), aligned.to("cuda"), ranks=[1, 4])
    assert on_gpu.config["models"]["base"]["device"].startswith("cuda")
    columns = [c for c in PAIR_COLUMNS if c not in ("ci_low", "ci_high")]
    pd.testing.assert_frame_equal(on_cpu.table[columns], on_gpu.table[columns], rtol=1e-5, atol=1e-5)
    pd.testing.assert_frame_equal(on_cpu.table, on_gpu.table, rtol=1e-3, atol=1e-3)
