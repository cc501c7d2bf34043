"""Gradient covariances against naive loops, and what does not change them."""

import functools

import numpy as np
import pytest
import torch

from benchmarks.embedded_pair.encoding import encode_preferences, encode_stories
from tests import tiny
from tests.listing import check_listed
from tests.oracles import reference, reference_gradients
from tests.oracles.reference import float64
from tl_asymmetry import GradientCovariance, gradient_covariance
from tl_asymmetry.demo import demo_model, demo_preferences, demo_texts, demo_tokenizer
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.side_moments import HeadMoments, SketchedMoments, sketch_matrix
from tl_asymmetry.gradients.table import CROSS_COLUMNS, GRADIENT_COLUMNS
from tl_asymmetry.results.result import load
from tl_asymmetry.training.data import rebatched
from tl_asymmetry.training.objectives import (
    DPO,
    ORPO,
    CrossEntropy,
    InfoNCE,
    Mix,
    PreferenceBatch,
    TokenBatch,
)

ATTENTION = ("W_Q", "W_K", "W_V", "W_O")


def batch(rows=5, length=10, seed=0):
    tokens = tiny.tokens(rows, length, seed)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, :4] = False
    return TokenBatch(tokens, mask)


@functools.cache
def toy():
    return tiny.toy("plain", tiny.KINDS[0], torch.float64)


@functools.cache
def of_toy(**options):
    return gradient_covariance(toy(), CrossEntropy(), [batch()], full_mlp=True, progress=False, **options)


def quiet(*arguments, **options):
    return gradient_covariance(*arguments, **{"progress": False, "groups": 1, **options})


# --- against the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"])
def test_both_sides_and_the_gradient_itself_against_loops(matrix):
    result, data = of_toy(), batch()
    for layer in (0, 1):
        loss = reference_gradients.summed_cross_entropy(data.tokens, data.mask)
        (δ,) = reference_gradients.upstream_gradients(toy(), loss, layer, matrix)
        a = reference_gradients.inputs(toy(), data.tokens, layer, matrix)
        heads = range(tiny.N_HEADS) if matrix in ATTENTION else [None]
        for head in heads:
            rows = result.table.query(f"matrix == '{matrix}' and layer == {layer} and half == 'all'")
            rows = rows if head is None else rows[rows["head"] == head]
            own_δ = (δ if δ.ndim == 3 else δ[:, :, head]).reshape(-1, δ.shape[-1])
            own_a = (a if a.ndim == 3 else a[:, :, head]).reshape(-1, a.shape[-1])
            # all heads of a layer count the same tokens
            counted = (δ.reshape(len(own_δ), -1) != 0).any(1)
            Σ = reference.second_moment(own_δ[counted])
            np.testing.assert_allclose(result.gradient_moment(layer, matrix, head), Σ, rtol=1e-9, atol=1e-14)
            of_δ = rows[rows["side"] == "gradient"].iloc[0]
            λ = np.sort(np.linalg.eigvalsh(Σ))[::-1]
            assert of_δ["tokens"] == counted.sum()
            assert of_δ["trace"] == pytest.approx(np.trace(Σ), rel=1e-9)
            assert of_δ["effective_rank"] == pytest.approx(reference.effective_rank(λ.clip(0)), rel=1e-8)
            assert of_δ["participation_ratio"] == pytest.approx(np.trace(Σ) ** 2 / np.trace(Σ @ Σ), rel=1e-9)
            assert of_δ["stable_rank"] == pytest.approx(np.trace(Σ) / λ[0], rel=1e-9)
            assert of_δ["top_energy"] == pytest.approx(λ[: of_δ["rank"]].sum() / λ.sum(), rel=1e-9)
            edge = reference_gradients.marchenko_pastur_edge(λ, int(counted.sum()))
            assert of_δ["mp_edge"] == pytest.approx(edge, rel=0.15)
            assert of_δ["spikes"] == (λ > of_δ["mp_edge"]).sum()
            G = reference_gradients.cross_moment(own_a, own_δ)
            cross = result.gradients.query(f"matrix == '{matrix}' and layer == {layer}")
            cross = (cross if head is None else cross[cross["head"] == head]).iloc[0]
            assert cross["gradient_norm"] == pytest.approx(np.linalg.norm(G), rel=1e-9)
            sizes = (own_a**2).sum(1) @ (own_δ**2).sum(1)
            assert cross["coherence"] == pytest.approx((G**2).sum() / sizes, rel=1e-9)
        weighted = result.weighted_input(layer, matrix)
        assert (weighted is None) == (matrix in ("W_K", "W_O", "W_out"))  # keys' δ cancel over every sequence
        if weighted is not None:
            rows = np.linalg.norm(δ.reshape(len(own_a), -1), axis=1, keepdims=True) * own_a
            np.testing.assert_allclose(weighted[0], reference.second_moment(rows[counted]), rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(weighted[1], rows[counted].mean(0), rtol=1e-9, atol=1e-14)
            for head in range(tiny.N_HEADS) if matrix in ATTENTION else []:
                rows = np.linalg.norm(δ[:, :, head].reshape(len(own_a), -1), axis=1, keepdims=True) * own_a
                own = result.weighted_input(layer, matrix, head)
                np.testing.assert_allclose(own[0], reference.second_moment(rows[counted]), rtol=1e-9, atol=1e-14)
                np.testing.assert_allclose(own[1], rows[counted].mean(0), rtol=1e-9, atol=1e-14)
        if matrix in ("W_O", "W_out"):
            P = _prediction(toy())[:, : of_δ["rank"]]
            energy = np.trace(P.T @ Σ @ P) / np.trace(Σ)
            assert of_δ["prediction_energy"] == pytest.approx(energy, rel=1e-9)
            assert of_δ["prediction_relative"] == pytest.approx(energy * tiny.D_MODEL / of_δ["rank"], rel=1e-9)


def test_weights_of_every_head_are_kept_where_they_are_small_or_asked_for(monkeypatch):
    monkeypatch.setattr("tl_asymmetry.gradients.analysis._HEAD_WEIGHTS", 0)
    by_default, asked = (
        quiet(toy(), CrossEntropy(), [batch()], matrices=["W_Q"], head_weights=given) for given in (None, True)
    )
    assert by_default.weighted_input(0, "W_Q", 0) is None
    assert by_default.weighted_input(0, "W_Q") is not None
    assert any("head_weights=True" in note for note in by_default.notes)
    assert not any("head_weights" in note for note in asked.notes)
    heads = [asked.weighted_input(0, "W_Q", head)[0] for head in range(tiny.N_HEADS)]
    np.testing.assert_allclose(sum(heads), asked.weighted_input(0, "W_Q")[0], rtol=1e-9, atol=1e-14)
    with pytest.raises(ValueError, match=r"expected a head from 0 to \d+ of W_Q, got 99"):
        asked.weighted_input(0, "W_Q", 99)


@pytest.mark.parametrize(
    ("point", "matrices"), [("attn_in", "QKV"), ("z", "O"), ("mlp_in", ["in"]), ("mlp_post", ["out"])]
)
def test_inputs_count_the_tokens_at_which_any_of_their_readers_has_a_gradient(point, matrices):
    result, data = of_toy(), batch()
    names = [f"W_{letter}" for letter in matrices]
    loss = reference_gradients.summed_cross_entropy(data.tokens, data.mask)
    counted = np.zeros(data.tokens.numel(), dtype=bool)
    for name in names:
        (δ,) = reference_gradients.upstream_gradients(toy(), loss, 1, name)
        counted |= (δ.reshape(len(counted), -1) != 0).any(1)
    a = reference_gradients.inputs(toy(), data.tokens, 1, names[0])
    for head in range(tiny.N_HEADS) if point == "z" else [None]:
        rows = (a if head is None else a[:, :, head]).reshape(len(counted), -1)[counted]
        np.testing.assert_allclose(
            result.input_moment(1, names[0], head), reference.second_moment(rows), rtol=1e-9, atol=1e-12
        )
    of_a = result.table.query(f"matrix == '{names[0]}' and layer == 1 and side == 'input'").iloc[0]
    assert of_a["tokens"] == counted.sum()
    assert np.isnan(of_a["prediction_energy"])


def _prediction(model):
    W_U = float64(model.unembed.W_U)
    W = float64(model.ln_final.w if hasattr(model.ln_final, "w") else model.ln_final.weight)[:, None] * (
        W_U - W_U.mean(axis=1, keepdims=True)
    )
    return np.linalg.svd(W - W.mean(axis=0))[0]


def test_intervals_leave_out_one_group_of_sequences_at_a_time():
    from scipy import stats

    result, t = of_toy(groups=5), stats.t(4).ppf(0.975)
    data = batch()
    left_out = []
    for i in range(5):
        keep = [j for j in range(5) if j != i]
        rest = quiet(toy(), CrossEntropy(), [TokenBatch(data.tokens[keep], data.mask[keep])], full_mlp=True)
        left_out.append(rest.table)
    for column in ("effective_rank", "participation_ratio", "stable_rank", "top_energy", "prediction_energy"):
        for row, values in enumerate(zip(*(rest[column] for rest in left_out), strict=True)):
            estimate = result.table[column][row]
            ends = result.table.loc[row, [f"{column}_low", f"{column}_high"]].to_list()
            if np.isnan(estimate):
                assert np.isnan(ends).all()
                continue
            expected = reference.log_jackknife(estimate, list(values), t, corrected=False)
            assert ends == pytest.approx(expected[:2], rel=1e-6)


# --- shape of the result --------------------------------------------------------------------------------------------


def test_one_row_for_each_layer_head_matrix_and_side():
    result = of_toy()
    assert list(result.table) == list(GRADIENT_COLUMNS)
    assert list(result.gradients) == list(CROSS_COLUMNS)
    keys = result.table[["layer", "head", "matrix", "side"]]
    assert not keys.duplicated().any()
    assert len(keys) == 2 * tiny.N_LAYERS * (4 * tiny.N_HEADS + 2)
    assert result.table["shared"].sum() == tiny.N_LAYERS * 4 * tiny.N_HEADS
    for column in result.table:
        if column not in ("head", "prediction_energy", "prediction_relative") and not column.endswith(("low", "high")):
            assert result.table[column].notna().all(), column


@functools.cache
def of_family(name, kind):
    return quiet(tiny.build(name, kind), CrossEntropy(), [batch()])


@pytest.mark.parametrize(("name", "kind"), [(n, k) for k in tiny.KINDS for n in ("llama", "gemma3", "mixtral", "gptj")])
def test_every_family_has_its_rows_and_both_kinds_agree(name, kind):
    result = of_family(name, kind)
    heads = result.table.groupby("matrix")["head"].nunique()
    grouped = name in ("llama", "gemma3", "mixtral")
    assert heads["W_K"] == heads["W_V"] == (tiny.N_KV_HEADS if grouped else tiny.N_HEADS)
    assert heads["W_Q"] == heads["W_O"] == tiny.N_HEADS
    assert ("W_in" in result.config["matrices"]) == (name != "mixtral" or kind == "bridge")
    if kind == "bridge" and tiny.HOOKED_AVAILABLE:
        other = of_family(name, "hooked")
        np.testing.assert_allclose(
            result.gradient_moment(0, "W_O"), other.gradient_moment(0, "W_O"), rtol=2e-3, atol=1e-6
        )


@pytest.mark.usefixtures("unchecked_types")
def test_saved_and_loaded_is_the_same(tmp_path):
    result = of_toy(permutations=3)
    check_listed(result)
    result.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert isinstance(loaded, GradientCovariance)
    assert loaded.table.equals(result.table)
    assert loaded.gradients.equals(result.gradients)
    assert (loaded.config, loaded.notes) == (result.config, result.notes)
    assert torch.equal(loaded.gradient_moment(1, "W_V", 2), result.gradient_moment(1, "W_V", 2))
    Q = torch.eye(tiny.D_MODEL, dtype=torch.float64)
    assert torch.equal(loaded.permuted_fractions(0, "W_Q", Q), result.permuted_fractions(0, "W_Q", Q))
    assert loaded.summary() == result.summary()
    assert loaded.to_html(tmp_path / "report.html").stat().st_size > 10_000


# --- what does not change it ----------------------------------------------------------------------------------------


@functools.cache
def demo_data():
    tokenizer = demo_tokenizer()
    pairs = [encode_preferences(tokenizer, demo_preferences(8))]
    return {"pairs": pairs, "texts": [encode_stories(tokenizer, demo_texts(8))]}


@pytest.mark.parametrize("objective", ["tempered", "DPO", "Mix"])
def test_neither_batch_size_nor_order_changes_an_additive_objectives_moments(objective):
    model = demo_model("base")
    made = {
        "tempered": (CrossEntropy(temperature=3.0, label_smoothing=0.1), "texts"),
        "DPO": (DPO(model), "pairs"),
        "Mix": (Mix([(0.7, CrossEntropy()), (0.3, CrossEntropy(2.0))]), "texts"),
    }
    chosen, data = made[objective]
    assert chosen.additive
    options = {"full_mlp": True} if objective == "DPO" else {"matrices": ["W_K", "W_V", "W_O"]}
    whole = quiet(model, chosen, demo_data()[data], **options)
    again = quiet(model, chosen, rebatched(demo_data()[data], 3)[::-1], **options)
    assert again.config["loss"] == pytest.approx(whole.config["loss"], rel=1e-6)
    for name, array in whole.arrays.items():
        if name.startswith("moment/"):
            error = (again.arrays[name] - array).norm() / array.norm()
            assert error < 1e-6, (name, error)
    np.testing.assert_allclose(again.gradients["gradient_norm"], whole.gradients["gradient_norm"], rtol=1e-5)
    assert again.table["tokens"].equals(whole.table["tokens"])


def test_where_the_batch_is_part_of_the_definition_the_result_says_so():
    model = demo_model("base")
    for objective, data in ((InfoNCE(), "texts"), (ORPO(), "pairs")):
        result = quiet(model, objective, demo_data()[data], matrices=["W_O"])
        assert any("depends on how the data are batched" in note for note in result.notes)
    batches = demo_data()["texts"], rebatched(demo_data()["texts"], 4)
    whole, split = (quiet(model, InfoNCE(), b, matrices=["W_O"]).gradient_moment(0, "W_O") for b in batches)
    assert (whole - split).norm() > 0.01 * whole.norm()


def test_padding_changes_nothing():
    data = demo_data()["texts"][0]
    wide = TokenBatch(
        torch.nn.functional.pad(data.tokens, (0, 9), value=7), torch.nn.functional.pad(data.mask, (0, 9), value=False)
    )
    model = demo_model("base")
    for options in ({}, {"permutations": 2, "matrices": ["W_Q", "W_K"]}):
        narrow, padded = (quiet(model, CrossEntropy(), [b], **options) for b in (data, wide))
        assert narrow.config["data_xxh3"] == padded.config["data_xxh3"]
        for name, array in narrow.arrays.items():
            if name.startswith(("moment/", "permuted/")):
                torch.testing.assert_close(padded.arrays[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_model_comes_back_as_it_was(kind):
    model = demo_model("base", kind)
    model.train()
    some = list(model.parameters())
    some[0].requires_grad_(False)
    some[1].grad = torch.ones_like(some[1])
    before = [p.detach().clone() for p in some]
    state = torch.random.get_rng_state()
    quiet(model, DPO(model), demo_data()["pairs"], matrices=["W_Q"])
    bad = demo_data()["texts"][0]
    with pytest.raises(ValueError, match="expected a finite loss, got nan for batch 1"):
        quiet(model, _Failing(), [bad, bad])
    assert [p.requires_grad for p in some] == [False] + [True] * (len(some) - 1)
    assert [p.grad is None for p in some] == [True, False] + [True] * (len(some) - 2)
    assert all(torch.equal(p, q) for p, q in zip(some, before, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    assert all(module.training for module in model.modules())


class _Failing(CrossEntropy):
    """Not a number from the second batch on."""

    def __call__(self, model, batch):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return super().__call__(model, batch) * (1 if self.calls < 2 else torch.nan)


# --- halves, permutations, sketches ---------------------------------------------------------------------------------


def test_chosen_and_rejected_make_up_the_whole():
    model = demo_model("base")
    data = demo_data()["pairs"]
    result = quiet(model, DPO(model), data, halves=True, matrices=["W_V", "W_out"])
    assert result.halves == ("all", "chosen", "rejected")
    rows = result.table.query("matrix == 'W_out' and side == 'gradient' and layer == 2").set_index("half")
    n = rows["tokens"]
    assert n["all"] == n["chosen"] + n["rejected"]
    moments = {half: result.gradient_moment(2, "W_out", half=half) for half in result.halves}
    torch.testing.assert_close(
        n["all"] * moments["all"], n["chosen"] * moments["chosen"] + n["rejected"] * moments["rejected"],
        rtol=1e-6, atol=1e-9,
    )  # fmt: skip
    # the model is its own reference: half of each pair's loss pulls on either half, and the chosen half's gradient is
    # minus that of plain cross-entropy's sum, times β/2
    plain = quiet(model, CrossEntropy(), [data[0].chosen], matrices=["W_out"])
    torch.testing.assert_close(
        moments["chosen"], plain.gradient_moment(2, "W_out") * 0.05**2, rtol=1e-3, atol=1e-7
    )  # fmt: skip
    with pytest.raises(ValueError, match="expected half among all, got 'chosen'"):
        plain.gradient_moment(2, "W_out", half="chosen")


def test_permuted_gradients_are_permutations_within_sequences():
    tokens = tiny.tokens(2, 4)
    data = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    draws = 60
    result = quiet(toy(), CrossEntropy(), [data], permutations=draws, matrices=["W_V", "W_in"], full_mlp=True)
    loss = reference_gradients.summed_cross_entropy(data.tokens, data.mask)
    import itertools

    for matrix, head in (("W_V", 1), ("W_in", None)):
        (δ,) = reference_gradients.upstream_gradients(toy(), loss, 0, matrix)
        a = reference_gradients.inputs(toy(), data.tokens, 0, matrix)
        δ = δ if head is None else δ[:, :, head]
        orders = list(itertools.permutations(range(3)))  # the last token has no gradient
        possible = [
            sum(reference_gradients.cross_moment(a[s, :3], δ[s][list(order)]) for s, order in enumerate(pair))
            for pair in itertools.product(orders, orders)
        ]
        drawn = result.arrays[f"permuted/{matrix}"][:, 0, head or 0].numpy()
        found = [int(np.argmin([np.abs(g - p).max() for p in possible])) for g in drawn]
        for g, which in zip(drawn, found, strict=True):
            np.testing.assert_allclose(g, possible[which], atol=1e-10)
        assert len(set(found)) > 20  # of 36: no order is preferred
        Q = torch.eye(tiny.D_MODEL, dtype=torch.float64)[:, 5:8]
        expected = [reference.subspace_fraction(g, Q.numpy()) for g in drawn]
        fractions = result.permuted_fractions(0, matrix, Q)
        np.testing.assert_allclose(fractions[:, head or 0, -1], expected, rtol=1e-9)
    assert result.permuted_fractions(0, "W_V", Q).shape == (draws, tiny.N_HEADS, 3)


def test_permutations_belong_to_sequences_not_to_batches():
    model = demo_model("base")
    whole = quiet(model, CrossEntropy(), demo_data()["texts"], permutations=3, matrices=["W_Q"])
    split = quiet(model, CrossEntropy(), rebatched(demo_data()["texts"], 5), permutations=3, matrices=["W_Q"])
    other = quiet(model, CrossEntropy(), demo_data()["texts"], permutations=3, matrices=["W_Q"], seed=1)
    name = "permuted/W_Q"
    torch.testing.assert_close(split.arrays[name], whole.arrays[name], rtol=1e-4, atol=1e-5)
    assert (other.arrays[name] - whole.arrays[name]).norm() > 0.1 * whole.arrays[name].norm()


def test_the_sketch_comes_close_to_the_whole():
    exact, sketched = (
        quiet(demo_model("base"), CrossEntropy(), demo_data()["texts"], full_mlp=full) for full in (True, False)
    )
    for matrix, side in (("W_in", "gradient"), ("W_out", "input")):
        query = f"matrix == '{matrix}' and side == '{side}'"
        true, near = exact.table.query(query), sketched.table.query(query)
        np.testing.assert_allclose(near["trace"], true["trace"], rtol=1e-5)
        np.testing.assert_allclose(near["participation_ratio"], true["participation_ratio"], rtol=0.25)
        np.testing.assert_allclose(near["stable_rank"], true["stable_rank"], rtol=0.1)
        assert near["effective_rank"].isna().all()
        with pytest.raises(ValueError, match="pass full_mlp=True"):
            (sketched.gradient_moment if side == "gradient" else sketched.input_moment)(0, matrix)
    norms = sketched.gradients["gradient_norm"] / exact.gradients["gradient_norm"]
    assert norms[exact.gradients["head"].notna()].sub(1).abs().max() < 1e-5
    assert norms.sub(1).abs().max() < 0.2
    assert any("sketch" in note for note in sketched.notes)


def test_sketched_moments_against_the_matrix_itself():
    generator = torch.Generator().manual_seed(0)
    scale = 1 / torch.arange(1, 301, dtype=torch.float64)
    x = torch.randn(1000, 300, dtype=torch.float64, generator=generator) * scale
    mask = torch.rand(1000, generator=generator) < 0.7
    Σ = reference.second_moment(x[mask].numpy())
    moments = SketchedMoments(sketch_matrix(300, 0))
    moments.update(x[:400], mask[:400])
    rest = SketchedMoments(moments.test)
    rest.update(x[400:], mask[400:])
    moments.merge(rest)
    assert moments.count == int(mask.sum())
    assert moments.trace == pytest.approx(np.trace(Σ), rel=1e-12)
    λ = np.sort(np.linalg.eigvalsh(Σ))[::-1]
    np.testing.assert_allclose(moments.leading_eigenvalues[:8], λ[:8], rtol=0.02)
    assert bool((moments.leading_eigenvalues.numpy() <= λ[:32] * (1 + 1e-4)).all())
    estimates = []
    for seed in range(40):
        one = SketchedMoments(sketch_matrix(300, seed))
        one.update(x, mask)
        estimates.append(one.squared_norm)
    spread = np.std(estimates) / 40**0.5
    assert abs(np.mean(estimates) - (Σ**2).sum()) < 4 * spread


def test_sketch_of_fewer_rows_than_columns():
    x = torch.randn(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = SketchedMoments(sketch_matrix(200, 0))
    moments.update(x)
    λ = np.linalg.svd(x.numpy(), compute_uv=False) ** 2 / 3
    np.testing.assert_allclose(moments.leading_eigenvalues[:3], λ, rtol=1e-4)
    assert float(moments.leading_eigenvalues[3:].max()) < 1e-3 * λ[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_head_moments_are_one_moment_for_each_head(dtype):
    x = (torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    x[0, 0] = torch.nan
    mask[0, 0] = False
    heads = HeadMoments(3, 5)
    heads.update(x[:2], mask[:2])
    later = HeadMoments(3, 5)
    later.update(x[2:], mask[2:])
    heads.merge(later)
    for h in range(3):
        one = StreamingMoments(5)
        one.update(x[:, :, h], mask)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(heads.second_moment[h], one.second_moment, rtol=tolerance, atol=tolerance)
        assert heads.count == one.count
    with pytest.raises(ValueError, match=r"expected rows \[..., 3, 5\]"):
        heads.update(x[..., :4])
    with pytest.raises(ValueError, match="expected moments of at least one row"):
        _ = HeadMoments(1, 2).second_moment


def test_layers_above_a_contrast_have_no_gradient_and_no_numbers():
    model = demo_model("base")
    result = quiet(model, InfoNCE(layer=1), demo_data()["texts"])
    rows = result.table[result.table["layer"] > 1]
    assert (rows["tokens"] == 0).all()
    assert rows["effective_rank"].isna().all()
    assert result.table.query("layer <= 1 and side == 'gradient' and axis != 'mlp'")["effective_rank"].notna().all()
    assert any("no gradient reaches" in note for note in result.notes)
    assert result.summary()


def test_precision_of_the_models_dtype():
    exact = quiet(tiny.build("gpt2", tiny.KINDS[0], torch.float64), CrossEntropy(), [batch()])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        near = quiet(tiny.build("gpt2", tiny.KINDS[0], dtype), CrossEntropy(), [batch()])
        for name in ("moment/all/gradient/W_O", "moment/all/gradient/W_Q"):
            assert near.arrays[name].dtype == torch.float64
            error = (near.arrays[name] - exact.arrays[name]).norm() / exact.arrays[name].norm()
            assert error < tolerance, (dtype, name, error)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("objective", "data", "options", "message"),
    [
        (object(), "texts", {}, r"expected an objective, got object; pass CrossEntropy\(\), DPO"),
        (CrossEntropy, "texts", {}, r"expected an objective, got the class CrossEntropy; pass CrossEntropy\(\)"),
        ("DPO", "texts", {}, r"expected a PreferenceBatch for this objective, got TokenBatch as batch 0; pass prompts"),
        (InfoNCE(), "one", {}, r"expected two sequences or more for InfoNCE, got one: .*; pass a larger batch"),
        (
            CrossEntropy(),
            "texts",
            {"halves": True},
            r"expected an objective with two kinds of.*leave out halves",
        ),
        (CrossEntropy(), "texts", {"groups": 0}, r"expected groups >= 1, got 0; pass groups=1"),
        (CrossEntropy(), "texts", {"permutations": -1}, r"expected permutations >= 0, got -1; pass 199"),
        (CrossEntropy(), "texts", {"matrices": ["W_X"]}, r"expected matrices among W_Q, .*got 'W_X'; pass "),
        (CrossEntropy(), "far", {}, r"expected token ids from 0 to \d+, got 99999"),
        (CrossEntropy(), "none", {}, r"expected at least one batch, text or row, got none"),
    ],
)
def test_refusals(objective, data, options, message):
    model = demo_model("base")
    texts = demo_data()["texts"][0]
    held = {
        "texts": [texts],
        "one": [texts.rows(slice(0, 1))],
        "far": [TokenBatch(texts.tokens + 99_000 + (99_999 - 99_000 - int(texts.tokens.max())), texts.mask)],
        "none": [],
    }[data]
    objective = DPO(model) if objective == "DPO" else objective
    with pytest.raises(ValueError, match=message):
        quiet(model, objective, held, **options)


def test_a_gradient_that_is_not_finite_names_its_batch():
    class Steep(CrossEntropy):
        """Finite, but with an infinite slope."""

        def __call__(self, model, batch):
            loss = super().__call__(model, batch)
            return loss + (loss - loss.detach()).abs().sqrt()

    with pytest.raises(ValueError, match=r"expected finite gradients, got NaN or infinity for batch 0; pass data"):
        quiet(demo_model("base"), Steep(), demo_data()["texts"])


def test_looking_up_what_is_not_there():
    result = of_toy()
    with pytest.raises(ValueError, match=r"expected a head from 0 to 3 for this side of W_Q, got None; pass head="):
        result.gradient_moment(0, "W_Q")
    with pytest.raises(ValueError, match=r"expected a layer from 0 to 1, got 7"):
        result.gradient_moment(7, "W_O")
    with pytest.raises(ValueError, match=r'expected side "input" or "gradient", got "?.*; pass one'):
        result.spectrum("W_O", "both")
    assert torch.equal(result.gradient_moment(0, "W_O", 2), result.gradient_moment(0, "W_O"))


def test_pairs_serve_objectives_of_texts_by_their_chosen_half():
    model, data = demo_model("base"), demo_data()["pairs"]
    of_pairs = quiet(model, CrossEntropy(), data, matrices=["W_O"])
    of_chosen = quiet(model, CrossEntropy(), [PreferenceBatch.__getattribute__(data[0], "chosen")], matrices=["W_O"])
    assert torch.equal(of_pairs.gradient_moment(0, "W_O"), of_chosen.gradient_moment(0, "W_O"))
