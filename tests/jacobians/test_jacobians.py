"""Layer Jacobians against jacrev of the models' own forward, on every architecture, and what the call promises."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch

import tl_asymmetry.jacobians.work as work
from tests import tiny
from tests.listing import check_listed
from tests.oracles import reference_jacobians as reference
from tests.pair.test_pair_promises import state
from tl_asymmetry import LayerJacobians, ModelView, Subspace, layer_jacobians, prediction_pullback
from tl_asymmetry.geometry import random_subspace
from tl_asymmetry.jacobians import jacobian_sketch
from tl_asymmetry.models.texts import check_tokens
from tl_asymmetry.results.result import load

T = 5
HALF_FLOAT32 = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma1", "gemma2", "gemma3", "phi", "gptj"}
"""Families whose Hugging Face code runs its norms, its softmax or both in float32 whatever the model's type: there
jacrev itself is right to 2e-7 or so, and two ways of one derivative agree to that."""

built = functools.cache(tiny.build)
"""For the tests that leave a model as it was."""

EVERYWHERE = [(architecture, kind) for architecture in tiny.ARCHITECTURES for kind in tiny.KINDS]


def accuracy(architecture, kind):
    # HookedTransformer routes tokens to experts in float32 as well
    half = architecture in HALF_FLOAT32 and (kind == "bridge" or architecture == "mixtral")
    return 2e-6 if half else 1e-9


def jacobians(model, tokens, **options):
    options = {"reduce": None, "progress": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return layer_jacobians(model, tokens=tokens, **options)


@functools.cache
def closed_form(architecture, kind, part, sources):
    """Of every token of the last layer."""
    return jacobians(
        built(architecture, kind, torch.float64), tiny.tokens(1, T), layers=[1], part=part, sources=sources
    )


def largest_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("architecture", "kind", "part"),
    # attention alone where kinds of it differ; of all it is held to the block in `test_parts_compose_to_the_block`
    [(*case, "block") for case in EVERYWHERE]
    + [(*case, "attn") for case in EVERYWHERE if case[0] in ("gpt2", "neox", "llama", "qwen3", "gemma2", "gemma3")],
)
def test_equals_jacrev_of_the_whole(architecture, kind, part):
    """Same position and summed over sources, closed form and autograd, every token."""
    model, tokens = built(architecture, kind, torch.float64), tiny.tokens(1, T)
    layer = 1
    full = reference.jacobian(*reference.part_function(model, tokens, layer, part)).detach()
    expected = {"same": reference.same_position(full), "sum": reference.summed_sources(full)}
    for sources, truth in expected.items():
        found = closed_form(architecture, kind, part, sources)
        assert found.config["method"] == "einsum"
        assert largest_error(found.per_token(layer)[0], truth) <= accuracy(architecture, kind)
        assert largest_error(found.mean(layer), truth.mean(0)) <= accuracy(architecture, kind)
        if kind == tiny.KINDS[0]:  # what is averaged are the factors held above, of whichever kind
            short = jacobians(model, tokens, layers=[layer], part=part, sources=sources, reduce="mean")
            assert largest_error(short.mean(layer), truth.mean(0)) <= accuracy(architecture, kind)
    plain = jacobians(model, tokens, layers=[layer], part=part, method="autograd")
    assert plain.config["method"] == "autograd"
    assert largest_error(plain.per_token(layer)[0], expected["same"]) <= accuracy(architecture, kind)
    plain = jacobians(model, tokens, layers=[layer], part=part, method="autograd", sources="sum")
    assert largest_error(plain.per_token(layer)[0], expected["sum"]) <= accuracy(architecture, kind)


@pytest.mark.parametrize(("architecture", "kind"), EVERYWHERE)
def test_parts_compose_to_the_block(architecture, kind):
    """(I + J_mlp)(I + J_attn), or I + J_attn + J_mlp: so the MLP with its norms is right where the others are."""
    model, tokens = built(architecture, kind, torch.float64), tiny.tokens(1, T)
    view = ModelView(model)
    block, attn, mlp = (jacobians(model, tokens, layers=[0], part=p).per_token(0)[0] for p in ("block", "attn", "mlp"))
    eye = torch.eye(view.d_model, dtype=torch.float64)
    composed = eye + attn + mlp if view.parallel else (eye + mlp) @ (eye + attn)
    assert largest_error(composed, block) <= accuracy(architecture, kind)
    plain = jacobians(model, tokens, layers=[0], part="mlp", method="autograd")
    assert largest_error(mlp, plain.per_token(0)[0]) <= accuracy(architecture, kind)


@pytest.mark.parametrize("part", ["ln", "ln2"])
@pytest.mark.parametrize(("architecture", "kind"), [c for c in EVERYWHERE if c[0] in ("gpt2", "llama", "gemma2")])
def test_norms(architecture, kind, part):
    model, tokens = built(architecture, kind, torch.float64), tiny.tokens(1, T)
    closed = jacobians(model, tokens, layers=[1], part=part)
    plain = jacobians(model, tokens, layers=[1], part=part, method="autograd")
    assert largest_error(closed.per_token(1), plain.per_token(1)) <= accuracy(architecture, kind)
    assert torch.equal(closed.mean(1), jacobians(model, tokens, layers=[1], part=part, sources="sum").mean(1))


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama", "gemma2"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_central_differences(architecture, kind):
    """The stream itself moved a little, by the model's own forward pass."""
    model, tokens = built(architecture, kind, torch.float64), tiny.tokens(1, T)
    function, x = reference.part_function(model, tokens, 0, "block")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape[-1], generator=generator, dtype=torch.float64)
    exact = kind == "hooked" or architecture not in HALF_FLOAT32
    # where norms are float32 the step must stand out of their rounding
    step, tolerance = (1e-5, 1e-6) if exact else (1e-2, 2e-3)
    summed = jacobians(model, tokens, layers=[0], sources="sum").per_token(0)[0]
    moved = reference.central_difference(function, x, direction.expand_as(x), step)
    assert largest_error(summed @ direction, moved) <= tolerance
    same = jacobians(model, tokens, layers=[0]).per_token(0)[0]
    for t in (0, T - 1):
        alone = torch.zeros_like(x)
        alone[t] = direction
        assert (
            largest_error(same[t] @ direction, reference.central_difference(function, x, alone, step)[t]) <= tolerance
        )


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="needs both kinds")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("sources", ["same", "sum"])
def test_both_kinds_of_model_agree(architecture, sources):
    one, other = (closed_form(architecture, kind, "block", sources).per_token(1) for kind in ("hooked", "bridge"))
    assert largest_error(one, other) <= 5e-6


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="toys are HookedTransformers")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("plain", {}),
        ("plain", {"attention_dir": "bidirectional"}),
        ("plain", {"use_local_attn": True, "window_size": 2, "attn_types": ["local", "global"]}),
        ("plain", {"attn_scores_soft_cap": 0.7}),
        ("plain", {"act_fn": "relu"}),
        ("plain", {"normalization_type": "LNPre"}),
        ("rms_rotary_gated_gqa", {}),
        ("rms_rotary_gated_gqa", {"normalization_type": "RMSPre", "attention_dir": "bidirectional"}),
        ("rms_rotary_gated_gqa", {"rotary_adjacent_pairs": True, "rotary_dim": 6, "use_qk_norm": True}),
        ("alibi", {}),
        ("parallel", {}),
        ("no_norm", {}),
        ("attn_only", {}),
    ],
)
def test_every_variant_of_a_block(name, fields):
    model, tokens = tiny.toy(name, "hooked", torch.float64, **fields), tiny.tokens(1, T)
    for part in ("block", "attn"):
        full = reference.jacobian(*reference.part_function(model, tokens, 0, part))
        for sources, truth in (
            ("same", reference.same_position(full)), ("sum", reference.summed_sources(full)),
        ):  # fmt: skip
            found = jacobians(model, tokens, layers=[0], part=part, sources=sources)
            assert found.config["method"] == "einsum"
            assert largest_error(found.per_token(0)[0], truth) <= 1e-9
            short = jacobians(model, tokens, layers=[0], part=part, sources=sources, reduce="mean")
            assert largest_error(short.mean(0), truth.mean(0)) <= 1e-9


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="processing needs a HookedTransformer")
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_folded_weights(architecture):
    model, tokens = tiny.hooked(architecture, torch.float64, fold_ln=True), tiny.tokens(1, T)
    full = reference.jacobian(*reference.part_function(model, tokens, 1, "block"))
    found = jacobians(model, tokens, layers=[1])
    assert found.config["method"] == "einsum"
    assert largest_error(found.per_token(1)[0], reference.same_position(full)) <= 1e-9


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "gemma2"])
def test_layers_compose_along_a_token(architecture, kind):
    """A causal model leads nothing from t to a later position and back, so the product is the whole, attention on."""
    model, tokens = built(architecture, kind, torch.float64), tiny.tokens(1, T)
    found = jacobians(model, tokens)
    product = found.per_token(1)[0] @ found.per_token(0)[0]
    through = reference.part_function(model, tokens, 0, "block", until=1)
    truth = reference.same_position(reference.jacobian(*through))
    assert largest_error(product, truth) <= accuracy(architecture, kind)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_layers_compose_where_attention_is_off(kind):
    """Then the same position is the only source, and both kinds of Jacobian compose."""
    model, tokens = tiny.build("gpt2", kind, torch.float64), tiny.tokens(1, T)
    view = ModelView(model)
    for layer in range(2):
        view.weight(layer, "W_O").zero_()
    same, summed = (jacobians(model, tokens, sources=sources) for sources in ("same", "sum"))
    truth = reference.jacobian(*reference.part_function(model, tokens, 0, "block", until=1))
    product = same.per_token(1)[0] @ same.per_token(0)[0]
    assert largest_error(product, reference.same_position(truth)) <= 1e-9
    assert largest_error(product, reference.summed_sources(truth)) <= 1e-9
    assert largest_error(summed.per_token(0), same.per_token(0)) <= 1e-9


# --- what the call promises ----------------------------------------------------------------------------------------

KIND = tiny.KINDS[0]
EXACT = "llama" if tiny.HOOKED_AVAILABLE else "neox_sequential"
"""A family that is float64 throughout in this environment."""


@pytest.fixture(scope="module")
def model():
    return tiny.build(EXACT, KIND, torch.float64)


@pytest.fixture(scope="module")
def result(model):
    return jacobians(model, tiny.tokens(2, 6))


@pytest.mark.parametrize("sources", ["same", "sum"])
@pytest.mark.parametrize("method", ["einsum", "autograd"])
def test_chunks_and_batches_change_nothing(model, sources, method):
    tokens, options = tiny.tokens(2, T), {"layers": [1], "sources": sources, "method": method}
    whole = jacobians(model, tokens, **options)
    for chunk in (1, 4, 1000):
        parts = [jacobians(model, row.unsqueeze(0), chunk=chunk, **options) for row in tokens]
        every = torch.cat([part.arrays["per_token"] for part in parts], 1)
        torch.testing.assert_close(whole.arrays["per_token"], every, rtol=1e-9, atol=1e-12)
        mean = sum(part.arrays["mean"] for part in parts) / 2
        torch.testing.assert_close(whole.arrays["mean"], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(every.mean(1), mean, rtol=1e-9, atol=1e-12)
        assert parts[0].config["memory"]["chunk"] == chunk


def test_texts_of_different_lengths_count_by_their_tokens(model):
    texts = ["w1 w2 w3 w4 w5", "w6 w7"]
    found = layer_jacobians(model, texts, progress=False)
    alone = [layer_jacobians(model, [text], progress=False) for text in texts]
    assert [part.config["tokens"] for part in alone] == [6, 3]
    torch.testing.assert_close(found.mean(1), (6 * alone[0].mean(1) + 3 * alone[1].mean(1)) / 9, rtol=1e-9, atol=1e-12)
    V = torch.eye(model.cfg.d_model, dtype=torch.float64)[:, :2]
    sketch = jacobian_sketch(model, V, texts, layers=1, progress=False)
    torch.testing.assert_close(sketch[0], found.mean(1) @ V, rtol=1e-9, atol=1e-12)
    last = layer_jacobians(model, texts, positions=-1, layers=1, progress=False)
    assert last.arrays["tokens"].flatten().tolist() == [8, 10]  # w5 and w7
    with pytest.raises(ValueError, match=r"expected positions from 0 to 2 .*, got 4; pass such positions"):
        layer_jacobians(model, texts, positions=[4], progress=False)
    with pytest.raises(
        ValueError, match="expected sequences of one length with reduce=None, got several lengths; pass"
    ):
        layer_jacobians(model, texts, reduce=None, progress=False)


@pytest.mark.parametrize("sources", ["same", "sum"])
def test_positions_and_layers_choose(model, result, sources):
    tokens = tiny.tokens(2, 6)
    whole = jacobians(model, tokens, sources=sources)
    some = jacobians(model, tokens, layers=[-1], positions=[4, 1, -1], sources=sources)
    assert some.layers == (1,)
    torch.testing.assert_close(some.per_token(1), whole.per_token(1)[:, [4, 1, 5]], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(some.mean(1), whole.per_token(1)[:, [4, 1, 5]].mean((0, 1)), rtol=1e-9, atol=1e-12)
    assert some.tokens["position"].tolist() == [4, 1, 5] * 2
    assert some.tokens["token"].tolist() == tokens[:, [4, 1, 5]].flatten().tolist()


def test_heads_sum_to_attention(model):
    tokens = tiny.tokens(2, 6)
    attn = jacobians(model, tokens, part="attn", per_head=True)
    total = sum(attn.head(1, h) for h in range(tiny.N_HEADS))
    torch.testing.assert_close(total, attn.mean(1), rtol=1e-9, atol=1e-12)
    block = jacobians(model, tokens, per_head=True, reduce="mean")
    torch.testing.assert_close(block.arrays["heads"], attn.arrays["heads"], rtol=1e-9, atol=1e-12)
    # one head alone: silence the others
    other = copy.deepcopy(model)
    W_O = ModelView(other).weight(0, "W_O")
    kept = W_O[2].clone()
    W_O.zero_()
    W_O[2] = kept
    alone = jacobians(other, tokens, part="attn", layers=[0])
    torch.testing.assert_close(attn.head(0, 2), alone.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sources", ["same", "sum"])
@pytest.mark.parametrize("part", ["block", "attn", "mlp", "ln"])
@pytest.mark.parametrize("method", ["einsum", "autograd"])
def test_sketch_is_the_product(model, sources, part, method):
    tokens = tiny.tokens(2, 6)
    V = torch.randn(tiny.D_MODEL, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = jacobians(model, tokens, layers=[1], part=part, sources=sources)
    options = dict(layers=[1], part=part, sources=sources, method=method, progress=False, chunk=2)
    mean = jacobian_sketch(model, V, tokens=tokens, **options)
    torch.testing.assert_close(mean, whole.arrays["mean"] @ V, rtol=1e-9, atol=1e-11)
    every = jacobian_sketch(model, V, tokens=tokens, reduce=None, **options)
    torch.testing.assert_close(every, whole.arrays["per_token"] @ V, rtol=1e-9, atol=1e-11)


def test_table_and_accessors(result):
    J, every = result.mean(1).numpy(), result.per_token(1).flatten(0, 1).numpy()
    row = result.table.set_index("layer").loc[1]
    σ = np.linalg.svd(J, compute_uv=False)
    np.testing.assert_allclose(result.singular_values(1).numpy(), σ, atol=1e-12)
    assert row["norm"] == pytest.approx(np.sqrt((J**2).sum()))
    assert row["from_identity"] == pytest.approx(np.linalg.norm(J - np.eye(len(J))) / np.sqrt(len(J)))
    assert row["trace"] == pytest.approx(np.trace(J) / len(J))
    assert (row["largest"], row["smallest"]) == (pytest.approx(σ[0]), pytest.approx(σ[-1]))
    p = σ**2 / (σ**2).sum()
    assert row["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert row["stable_rank"] == pytest.approx(1 / p.max())
    away = np.array([np.linalg.norm(each - J) for each in every])
    assert row["spread"] == pytest.approx(np.sqrt((away**2).mean()) / np.linalg.norm(J))
    rows = result.tokens[result.tokens["layer"] == 1]
    np.testing.assert_allclose(rows["departure"], away / np.linalg.norm(J))
    np.testing.assert_allclose(rows["norm"], [np.linalg.norm(each) for each in every])
    sign, volume = result.determinant(1)
    expected = np.linalg.slogdet(J)
    assert (float(sign), float(volume)) == (expected[0], pytest.approx(expected[1]))
    signs, volumes = result.determinant(1, per_token=True)
    assert signs.shape == (2, 6)
    assert float(volumes[1, 2]) == pytest.approx(np.linalg.slogdet(every[8])[1])


def test_gain(result):
    space = random_subspace(tiny.D_MODEL, 3, seed=0)
    table = result.gain(space)
    assert list(table.columns) == ["layer", "rank", "gain", "direction_gain", "name"]
    J, Q = result.mean(0), space.basis
    rows = table[table["layer"] == 0]
    for k in (1, 2, 3):
        assert rows["gain"].iloc[k - 1] == pytest.approx(float((J @ Q[:, :k]).norm() / k**0.5))
        assert rows["direction_gain"].iloc[k - 1] == pytest.approx(float((J @ Q[:, k - 1]).norm()))
    assert result.gain([space, random_subspace(tiny.D_MODEL, 3, seed=1)], layer=1)["layer"].unique().tolist() == [1]
    everything = Subspace(torch.eye(tiny.D_MODEL, dtype=torch.float64))
    whole = result.gain(everything).groupby("layer")["gain"].last() * tiny.D_MODEL**0.5
    np.testing.assert_allclose(whole, result.table["norm"])
    with pytest.raises(ValueError, match=r"expected subspaces of R\^48, got one of R\^5; pass bases"):
        result.gain(random_subspace(5, 2, seed=0))
    with pytest.raises(ValueError, match="expected one subspace or 2, one for each layer, got 3"):
        result.gain([space] * 3)


def test_save_load_and_words(result, tmp_path):
    check_listed(result)
    result.save(tmp_path / "r")
    back = LayerJacobians.load(tmp_path / "r")
    assert isinstance(load(tmp_path / "r"), LayerJacobians)
    for name, array in result.arrays.items():
        assert torch.equal(array, back.arrays[name]), name
    assert back.table.equals(result.table)
    assert back.tokens.equals(result.tokens)
    assert back.config == result.config
    for words in (back.summary(), back._repr_html_(), back.to_html(tmp_path / "r.html").read_text()):
        assert "the mean stands for them only so far" in words
    assert "same position" in back.summary()
    assert result.config["memory"]["chunk"] >= 1
    assert set(result.config) >= {"versions", "model", "shape", "method", "sources", "part", "arguments"}


def test_float32_and_bfloat16():
    tokens = tiny.tokens(1, 6)
    exact = jacobians(tiny.build("gpt2", KIND, torch.float64), tokens)
    single = jacobians(tiny.build("gpt2", KIND, torch.float32), tokens)
    assert single.arrays["mean"].dtype == torch.float32
    assert largest_error(single.arrays["per_token"].double(), exact.arrays["per_token"]) <= 1e-5
    rough = jacobians(tiny.build("gpt2", KIND, torch.bfloat16), tokens)
    assert rough.arrays["mean"].dtype == torch.float32
    assert any("computes in torch.bfloat16" in note for note in rough.notes)
    assert largest_error(rough.arrays["per_token"].double(), exact.arrays["per_token"]) <= 0.1


def test_mixture_of_experts_says_how():
    model = tiny.build("mixtral", KIND, torch.float64)
    found = jacobians(model, tiny.tokens(1, T), layers=[0])
    assert found.config["method"] == "einsum"
    assert any("mixtures of experts and are differentiated by autograd" in note for note in found.notes)
    assert not any("mixtures" in note for note in jacobians(model, tiny.tokens(1, T), layers=[0], part="attn").notes)


# --- falling back --------------------------------------------------------------------------------------------------


def test_auto_falls_back_where_the_closed_form_is_wrong(model):
    """A hook of the user's that the closed form cannot know of."""
    tokens = tiny.tokens(1, T)
    handle = ModelView(model)._adapter.point(1, "resid_post")[0].register_forward_hook(lambda m, a, out: out * out)
    try:
        with pytest.warns(UserWarning, match="computed by autograd, since the closed form does not hold here: it is"):
            found = layer_jacobians(model, tokens=tokens, layers=[1], reduce=None, progress=False)
        assert found.config["method"] == "autograd"
        assert any("computed by autograd" in note for note in found.notes)
        with pytest.warns(UserWarning, match="1 hook on blocks.1.") as warned:
            plain = layer_jacobians(model, tokens=tokens, layers=[1], reduce=None, method="autograd", progress=False)
        (hooked,) = (str(warning.message) for warning in warned)
        assert "is analysed with what has been put into it: 1 hook on " in hooked
        assert hooked in found.notes
        assert hooked in plain.notes
        assert torch.equal(found.arrays["per_token"], plain.arrays["per_token"])
        with pytest.raises(ValueError, match="expected a block with a closed form, but it is .* off autograd"):
            layer_jacobians(model, tokens=tokens, layers=[1], method="einsum", progress=False)
    finally:
        handle.remove()


# --- the caller's model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("method", ["auto", "autograd"])
@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.usefixtures("unchecked_types")
def test_the_model_comes_back_as_it_was(kind, method, interrupted, monkeypatch):
    model, tokens = tiny.build("gemma2", kind), tiny.tokens(1, T)
    model.train()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    calls = []

    def interfere(*_):
        calls.append(1)
        if interrupted and len(calls) > 1:  # in the midst of the work
            raise KeyboardInterrupt

    ModelView(model).run(tokens)  # transformers itself leaves hooks on its first pass
    ModelView(model)._adapter.point(1, "resid_post")[0].register_forward_hook(interfere)
    before = state(model)

    def both():
        for sources in ("same", "sum"):
            layer_jacobians(model, tokens=tokens, method=method, sources=sources, progress=False)

    if interrupted:
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            both()
    else:
        both()
    assert state(model) == before


def test_result_does_not_depend_on_the_caller_s_mode(model):
    tokens = tiny.tokens(1, T)
    plain = jacobians(model, tokens)
    with torch.no_grad():
        assert torch.equal(jacobians(model, tokens).arrays["per_token"], plain.arrays["per_token"])
        summed = jacobians(model, tokens, sources="sum", method="autograd")
    again = jacobians(model, tokens, sources="sum", method="autograd")
    assert torch.equal(summed.arrays["per_token"], again.arrays["per_token"])
    assert not plain.arrays["per_token"].requires_grad


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [T]}, f"expected positions from 0 to {T - 1} .* got {T}; pass such positions"),
        ({"positions": [-T - 1]}, f"expected positions from 0 to {T - 1}"),
        ({"positions": []}, "expected a list of positions, got \\[\\]; pass positions=\\[0\\] or leave it out"),
        ({"layers": [2]}, "expected layers from 0 to 1, got 2; pass such layers"),
        ({"layers": []}, "expected a list of layers, got \\[\\]"),
        ({"part": "head"}, "expected a part among block, attn, mlp, ln, ln2, got 'head'; pass one of these"),
        ({"sources": "all"}, 'expected sources "same" or "sum", got \'all\'; pass sources="same"'),
        ({"method": "exact"}, "expected a method among auto, einsum, autograd, got 'exact'; pass one of these"),
        ({"reduce": "sum"}, 'expected reduce "mean" or None, got \'sum\'; pass reduce="mean"'),
        ({"chunk": 0}, "expected a chunk of at least 1, got 0; pass None to have it chosen"),
        ({"per_head": True, "part": "mlp"}, 'expected part "attn" or "block" and sources "same" with per_head=True'),
        ({"per_head": True, "sources": "sum"}, "with per_head=True, got 'block' and 'sum'"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        layer_jacobians(model, tokens=tiny.tokens(1, T), progress=False, **options)


@pytest.mark.usefixtures("unchecked_types")
def test_positions_and_layers_may_be_vectors(model):
    options = dict(tokens=tiny.tokens(1, T), progress=False)
    expected = layer_jacobians(model, **options, positions=[2, T - 1], layers=[1])
    for vector in (torch.tensor, np.array):
        found = layer_jacobians(model, **options, positions=vector([2, -1]), layers=vector([-1]))
        assert torch.equal(found.mean(1), expected.mean(1))
    with pytest.raises(ValueError, match=r"expected a list of positions, got float32 \[1\]; pass positions="):
        layer_jacobians(model, **options, positions=torch.tensor([1.5]))


def test_weights_that_are_not_finite_are_named():
    model = tiny.build("gpt2", tiny.KINDS[0])
    ModelView(model).weight(1, "W_O").view(-1)[0] = torch.nan
    for call in (layer_jacobians, prediction_pullback):
        with pytest.raises(ValueError, match=r"expected finite weights, got 1 NaN .* in blocks.1.attn.W_O"):
            call(model, tokens=tiny.tokens(1, T), progress=False)


def test_bad_tokens_and_directions(model):
    with pytest.raises(ValueError, match="expected token ids from 0 to 95, got 96"):
        layer_jacobians(model, tokens=torch.full((1, 3), 96))
    with pytest.raises(ValueError, match="expected sequences of at most 64 tokens"):
        layer_jacobians(model, tokens=tiny.tokens(1, 65))
    with pytest.raises(ValueError, match=r"expected directions \[48, c\], got \[3, 2\]; pass them in columns"):
        jacobian_sketch(model, torch.ones(3, 2), tokens=tiny.tokens(1, T))
    with pytest.raises(ValueError, match="expected tokens as an integer tensor"):
        check_tokens(ModelView(model), torch.ones(2))


def test_a_part_the_model_does_not_have():
    if tiny.HOOKED_AVAILABLE:
        attention = tiny.toy("attn_only", "hooked")
        with pytest.raises(
            ValueError, match="expected a part that layer 0 has, got 'mlp'; pass one of block, attn, ln"
        ):
            layer_jacobians(attention, tokens=tiny.tokens(1, T), part="mlp")
        bare = tiny.toy("no_norm", "hooked")
        with pytest.raises(ValueError, match="got 'ln'; pass one of block, attn, mlp"):
            layer_jacobians(bare, tokens=tiny.tokens(1, T), part="ln")
    attention = tiny.toy("attn_only", "bridge")
    with pytest.raises(ValueError, match="expected a part that layer 0 has, got 'mlp'"):
        layer_jacobians(attention, tokens=tiny.tokens(1, T), part="mlp")


def test_what_cannot_fit_is_refused_beforehand(model, monkeypatch):
    tokens = tiny.tokens(2, 6)
    monkeypatch.setattr(work, "free_memory", lambda device: 500_000)
    fits = jacobians(model, tokens, layers=[0], reduce="mean")
    assert fits.config["memory"]["free_bytes"] == 500_000
    ran = []
    monkeypatch.setattr(work, "closed_forms", lambda *a, **k: ran.append(a) or iter(()))
    monkeypatch.setattr("tl_asymmetry.jacobians.layers.closed_forms", work.closed_forms)
    message = r"fits into the 0.0005 GB free on the CPU, got one that needs about .* GB \(26 matrices of 48 × 48"
    with pytest.raises(ValueError, match=message) as error:
        layer_jacobians(model, tokens=tokens, reduce=None, method="autograd", progress=False)
    assert 'pass reduce="mean", fewer layers, positions or sequences' in str(error.value)
    assert not ran
    monkeypatch.setattr(work, "free_memory", lambda device: None)  # a system that does not say
    assert (
        work.plan_memory(
            work.make_request(ModelView(model), list(tokens), None, "block", "same", None),
            6,
            "einsum",
            matrices=2,
            chunk=None,
        ).chunk
        == 6
    )


def test_more_memory_means_more_at_once(model, monkeypatch):
    request = work.make_request(ModelView(model), list(tiny.tokens(1, 6)), None, "block", "same", None)
    chunks = []
    for free in (1e6, 2e6, 1e9):
        monkeypatch.setattr(work, "free_memory", lambda device, free=free: int(free))
        chunks.append(work.plan_memory(request, 6, "einsum", matrices=0, chunk=None).chunk)
    assert chunks[0] < chunks[1] <= chunks[2] == 6


def test_accessors_refuse(result, model):
    short = jacobians(model, tiny.tokens(1, T), layers=[1], reduce="mean")
    assert not len(short.tokens)
    assert short.table["spread"].isna().all()
    with pytest.raises(ValueError, match="expected a layer among 1, got 0; pass one of these"):
        short.mean(0)
    with pytest.raises(ValueError, match="expected Jacobians of every token, got their mean only; pass reduce=None"):
        short.per_token(1)
    with pytest.raises(ValueError, match="expected contributions of heads, got none; pass per_head=True"):
        result.head(0, 0)
    heads = jacobians(model, tiny.tokens(1, T), layers=[1], reduce="mean", per_head=True)
    with pytest.raises(ValueError, match="expected a head from 0 to 3, got 4; pass such a head"):
        heads.head(1, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
@pytest.mark.parametrize("sources", ["same", "sum"])
def test_gpu_agrees_with_cpu(architecture, sources):
    model, tokens = tiny.build(architecture, KIND, torch.float64), tiny.tokens(2, 6)
    expected = jacobians(model, tokens, sources=sources)
    model.to("cuda")
    for method in ("einsum", "autograd"):
        found = jacobians(model, tokens, sources=sources, method=method)
        assert largest_error(found.arrays["per_token"], expected.arrays["per_token"]) <= 5e-6
