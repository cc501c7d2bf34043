"""analyze_tangents against the long way, and its promises: batches, order, resume, models left as they were."""

import copy
import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tests.oracles import naive_tangents as naive
from tests.oracles import reference_tangents
from tests.tiny_encoder import ENCODER_KINDS, MASK_TOKEN, encoder, hf_encoder
from tl_asymmetry import TangentAnalysis, TangentProbe, analyze_tangents
from tl_asymmetry.results.result import load
from tl_asymmetry.tangents.data import INPUT, ORIGINAL, TARGET, tangent_data
from tl_asymmetry.training.masking import mask_tokens

QUIET = {"rank": 4, "batch_size": 3, "strata": 3, "groups": 4, "progress": False}
HAAR = QUIET | {"control": "haar"}
"""Where controls are not the subject: the size of these is known, that of others is simulated."""
KIND = tiny.KINDS[0]


def zipf_tokens(batch=8, length=14, seed=0):
    """Some tokens often, most rarely, as in language."""
    weights = 1 / torch.arange(1, tiny.D_VOCAB - 4).double()
    drawn = torch.multinomial(weights, batch * length, True, generator=torch.Generator().manual_seed(seed))
    return (drawn + 5).view(batch, length)


def encoder_data():
    tokens = zipf_tokens()
    tokens[:, 0], tokens[:, -1] = 1, 2
    return tokens


decoder = functools.cache(functools.partial(tiny.build, "gpt2"))
"""An analysis leaves a model as it was, so that one serves many tests."""


def decoder_run(kind=KIND, dtype=torch.float64):
    return {step: decoder(kind, dtype, seed=seed) for step, seed in ((0, 0), (20, 1), (100, 2))}


def encoder_run(kind, dtype=torch.float64):
    return {step: encoder(kind, dtype, seed=seed) for step, seed in ((0, 0), (20, 1), (100, 2))}


@pytest.fixture(scope="module")
def analysis():
    return analyze_tangents(decoder_run(), tokens=zipf_tokens(), **QUIET)


def assert_same(a, b, tolerance=1e-6, skip=("ci_low", "ci_high")):
    for name in TangentAnalysis.TABLES:
        left, right = (getattr(x, name).drop(columns=list(skip), errors="ignore") for x in (a, b))
        pd.testing.assert_frame_equal(left, right, rtol=tolerance, atol=tolerance)


# --- against the long way ---------------------------------------------------------------------------------------------


def naive_decoder(seed, tokens):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(
        tiny.hf_directory("gpt2", seed), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    rows = list(tokens)
    return naive.NaiveCheckpoint(model, rows, rows, [torch.arange(len(r)) > 0 for r in rows])


def naive_encoder(kind, seed, tokens, mask_seed):
    model = hf_encoder(kind, torch.float64, seed)
    rows = list(tokens)
    masked = [
        mask_tokens(r, mask_token=MASK_TOKEN, d_vocab=tiny.D_VOCAB, special={MASK_TOKEN}, seed=mask_seed) for r in rows
    ]
    return naive.NaiveCheckpoint(model, [m[0] for m in masked], rows, [m[1] for m in masked])


def check_against(result, checkpoints, tokens, inputs, counted, rank):
    """Every number of every table that is not a random draw."""
    n_layers, n_heads = tiny.N_LAYERS, tiny.N_HEADS
    early, late = checkpoints
    counts = torch.bincount(tokens[counted], minlength=tiny.D_VOCAB)
    stratum = np.array(reference_tangents.strata(counts.tolist(), 3))[tokens.numpy()]
    keep = counted.numpy()
    group = np.repeat(np.arange(4), len(tokens) // 4)[:, None] * np.ones_like(tokens.numpy())
    log_frequency = np.log(np.maximum(counts.numpy(), 1e-300) / counts.sum().item())[tokens.numpy()]
    bases = {}
    for point, layer in early[0].activations:
        rows = np.concatenate([np.stack(c.activations[point, layer])[keep] for c in early])
        bases[point, layer] = naive.pca_basis(rows, rank)
        own = result.basis(point, rank=rank)[layer]
        np.testing.assert_allclose(own @ own.T, bases[point, layer] @ bases[point, layer].T, atol=1e-5)
    points = {"W_Q": "attn_in", "W_K": "attn_in", "W_V": "attn_in", "W_in": "mlp_in"}
    for step, checkpoint in zip((0, 20, 100), (*early, late), strict=True):
        table = result.table[result.table["step"] == step].set_index(["site", "layer", "head"])
        for layer in range(n_layers):
            for site, point in points.items():
                G, Q = checkpoint.weights[layer, site], bases[point, layer]
                a = np.stack(checkpoint.activations[point, layer])
                if site == "W_K":  # what the keys of a sequence share is invisible
                    a = np.concatenate([s[k] - s[k].mean(0) for s, k in zip(a, keep, strict=True)])
                else:
                    a = a[keep]
                heads = [pd.NA, *(range(n_heads) if site != "W_in" else ())]
                parts = [G, *(np.split(G, n_heads) if site != "W_in" else ())]
                for head, part in zip(heads, parts, strict=True):
                    at = (
                        table.index.get_level_values("head").isna()
                        if head is pd.NA
                        else (table.index.get_level_values("head") == head)
                    )
                    here = table[at & (table.index.get_level_values("site") == site)
                                 & (table.index.get_level_values("layer") == layer)]  # fmt: skip
                    assert len(here) == 1
                    row = here.iloc[0]
                    for column, value in naive.measured(part, Q, rank).items():
                        assert row[column] == pytest.approx(value, abs=1e-8), (step, site, layer, head, column)
                    assert row["spectrum_expected"] == pytest.approx(reference_tangents.energy(a, Q), abs=1e-9)
                    assert row["excess"] == pytest.approx(row["energy"] / row["spectrum_expected"])
                    assert row["gradient_norm"] == pytest.approx(np.linalg.norm(part), rel=1e-8)
                    assert row["samples"] == len(part)
            g = np.stack(checkpoint.gradients[layer])
            used = keep & (g != 0).any(-1)
            Q = bases["resid_post", layer]
            row = table.loc["resid_post"].loc[layer].iloc[0]
            for column, value in naive.measured(g[used], Q, rank).items():
                assert row[column] == pytest.approx(value, abs=1e-8), (step, layer, column)
            assert row["samples"] == used.sum()
            x = np.stack(checkpoint.activations["resid_post", layer])
            assert row["spectrum_expected"] == pytest.approx(reference_tangents.energy(x[keep], Q), abs=1e-9)
            distance = np.linalg.norm(x - x[keep].mean(0), axis=-1)
            unmasked = keep & (inputs == tokens).numpy()
            strata = result.strata[(result.strata["step"] == step) & (result.strata["layer"] == layer)]
            for number, told in enumerate(strata.to_dict("records")):
                inside = used & (stratum == number)
                assert told["stratum"] == number + 1
                assert told["tokens"] == inside.sum()
                if inside.any():
                    assert told["energy"] == pytest.approx(reference_tangents.energy(g[inside], Q), abs=1e-9)
                assert told["gradient_share"] == pytest.approx((g[inside] ** 2).sum() / (g[used] ** 2).sum(), abs=1e-9)
                assert told["distance"] == pytest.approx(distance[unmasked & (stratum == number)].mean(), rel=1e-9)
            told = result.frequency[(result.frequency["step"] == step) & (result.frequency["layer"] == layer)].iloc[0]
            expected = reference_tangents.correlation_interval(
                log_frequency[unmasked], distance[unmasked], group[unmasked]
            )
            assert (told["pearson"], told["ci_low"], told["ci_high"]) == pytest.approx(expected, abs=1e-8)
            assert told["tokens"] == unmasked.sum()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_decoder_is_what_the_long_way_gives(kind):
    tokens = zipf_tokens()
    result = analyze_tangents(decoder_run(kind), tokens=tokens, **HAAR)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    checkpoints = [naive_decoder(seed, tokens) for seed in range(3)]
    check_against(result, ((checkpoints[0], checkpoints[1]), checkpoints[2]), tokens, tokens, counted, 4)
    assert result.checkpoints["phase"].tolist() == ["early", "early", "late"]
    assert result.config["basis_steps"] == [0, 20]


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_encoder_is_what_the_long_way_gives(kind):
    tokens = encoder_data()
    result = analyze_tangents(encoder_run(kind), tokens=tokens, mask_token=MASK_TOKEN, seed=5, **HAAR)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    checkpoints = [naive_encoder(kind, seed, tokens, 5) for seed in range(3)]
    inputs = torch.stack(
        [mask_tokens(r, mask_token=MASK_TOKEN, d_vocab=tiny.D_VOCAB, special={MASK_TOKEN}, seed=5)[0] for r in tokens]
    )
    check_against(result, ((checkpoints[0], checkpoints[1]), checkpoints[2]), tokens, inputs, counted, 4)
    assert result.config["kind"] == "encoder"
    assert any("post-norm encoder" in note for note in result.notes)


def test_loss_is_cross_entropy(analysis):
    model, tokens = decoder_run()[100], zipf_tokens()
    with torch.no_grad():
        logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert analysis.checkpoints["loss"].iloc[-1] == pytest.approx(loss.item(), rel=1e-6)


def test_what_the_columns_say_of_each_other(analysis):
    rows = analysis.table
    np.testing.assert_allclose(rows["ratio"], rows["energy"] / rows["normal_energy"])
    assert ((rows["p"] * 21).round(9) % 1 == 0).all()
    assert rows["p"].between(1 / 21, 1).all()
    assert (rows["q"] >= rows["p"] - 1e-12).all()
    assert (rows["energy"] <= rows["largest_energy"] + 1e-9).all()
    # controls of the complement: their mean is told by the energy, up to 20 draws
    d, r = tiny.D_MODEL, 4
    expected = (1 - rows["energy"]) * r / (d - r)
    assert np.corrcoef(rows["normal_energy"], expected)[0, 1] > 0.5
    assert (rows["normal_energy"] / expected).mean() == pytest.approx(1, abs=0.1)
    assert rows["size"].between(0, 1).all()
    assert rows.groupby(["step", "site", "layer"])["head"].apply(lambda h: h.isna().sum()).eq(1).all()
    assert not rows.duplicated(["step", "gradient", "site", "layer", "head", "method", "rank"]).any()


# --- batches, order, doors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pca", "semi_nmf"])
def test_batches_and_order_change_nothing(method):
    tokens = zipf_tokens()
    options = QUIET | {"method": method, "sample_rows": 60, "starts": 2}
    first = analyze_tangents(decoder_run(), tokens=tokens, **options)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    second = analyze_tangents(decoder_run(), tokens=tokens[order], **options | {"batch_size": 1})
    assert_same(first, second)


def test_batches_change_nothing_for_an_encoder():
    texts = [" ".join(f"w{i % 7 * (i % 3)}" for i in range(n, 2 * n + 3)) for n in (5, 9, 5, 7, 11, 9)]
    bridge = {step: encoder("bridge", torch.float64, seed=s, tokenizer=True) for step, s in ((0, 0), (10, 1))}
    one = analyze_tangents(bridge, texts, **QUIET | {"strata": 2, "batch_size": 1})
    many = analyze_tangents(bridge, texts, **QUIET | {"strata": 2, "batch_size": 4})
    assert_same(one, many)


def test_a_probe_in_a_training_loop_gives_the_same(analysis):
    probe = TangentProbe(tokens=zipf_tokens(), total_steps=100, **QUIET)
    for step, model in decoder_run().items():
        probe(step, model)
    assert_same(analysis, probe.result(), tolerance=0)


def test_a_generator_gives_the_same(analysis):
    result = analyze_tangents(iter(decoder_run().items()), tokens=zipf_tokens(), total_steps=100, **QUIET)
    assert_same(analysis, result, tolerance=0)


def test_directories_give_the_same(tmp_path):
    from transformers import AutoModelForCausalLM

    folders = []
    for step, seed in ((10, 0), (100, 1)):
        folders.append(tmp_path / f"checkpoint-{step}")
        AutoModelForCausalLM.from_pretrained(tiny.hf_directory("gpt2", seed)).save_pretrained(folders[-1])
    result = analyze_tangents(folders[::-1], tokens=zipf_tokens(), **QUIET)
    models = {10: tiny.bridge("gpt2"), 100: tiny.bridge("gpt2", seed=1)}
    assert_same(result, analyze_tangents(models, tokens=zipf_tokens(), **QUIET), tolerance=1e-5)


def test_one_model_alone():
    result = analyze_tangents(decoder_run()[100], tokens=zipf_tokens(), **QUIET)
    assert result.table["phase"].unique().tolist() == ["single"]
    Q = result.basis("attn_in")
    assert Q.shape == (tiny.N_LAYERS, tiny.D_MODEL, 4)
    explained = result.bases.query("point == 'attn_in'")["explained"].to_numpy()
    rows = result.table.query("site == 'W_Q' and head.isna()")
    np.testing.assert_allclose(rows["spectrum_expected"], explained)  # its own activations: Σ λ_i / Σ λ
    assert result.config["basis_steps"] == [0]


def test_several_methods_and_ranks():
    options = HAAR | {"rank": [2, 6], "method": ["pca", "semi_nmf"], "starts": 2, "sample_rows": 50}
    run = {step: model for step, model in decoder_run().items() if step != 20}
    both = analyze_tangents(run, tokens=zipf_tokens(), **options)
    assert set(zip(both.table["method"], both.table["rank"], strict=True)) == {
        ("pca", 2), ("pca", 6), ("semi_nmf", 2), ("semi_nmf", 6),
    }  # fmt: skip
    alone = analyze_tangents(run, tokens=zipf_tokens(), **options | {"method": "pca", "rank": 6})
    mine = both.table.query("method == 'pca' and rank == 6").reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.table)
    fits = both.bases.query("method == 'semi_nmf'")
    assert fits["overlap_pca"].between(0, 1 + 1e-9).all()
    assert (fits["spread"] >= 0).all()
    pca = both.bases.query("method == 'pca'").set_index(["rank", "point", "layer"])["explained"]
    assert (fits.set_index(["rank", "point", "layer"])["explained"] <= pca + 1e-9).all()


def test_haar_controls():
    result = analyze_tangents(decoder_run(), tokens=zipf_tokens(), **HAAR | {"rank": 30})
    assert (result.table["size"] == 1 / 21).all()
    assert not any("orthogonal complement" in note for note in result.notes)


def test_frequencies_of_a_corpus():
    counts = torch.zeros(tiny.D_VOCAB)
    counts[5:50] = torch.arange(45, 0, -1).float() ** 2
    result = analyze_tangents(decoder_run(), tokens=zipf_tokens(), **QUIET | {"frequencies": counts})
    assert any("do not occur in frequencies" in note for note in result.notes)
    assert result.strata["log_frequency_high"].max() == pytest.approx(math.log(counts.max() / counts.sum()))


def test_gradients_of_one_kind_alone():
    weights = analyze_tangents(decoder_run(), tokens=zipf_tokens(), **QUIET | {"gradients": ("weight",)})
    assert weights.table["gradient"].unique().tolist() == ["weight"]
    assert weights.strata.empty
    assert weights.frequency.empty
    tokens = analyze_tangents(decoder_run(), tokens=zipf_tokens(), **QUIET | {"gradients": "activation", "strata": 0})
    assert tokens.table["site"].unique().tolist() == ["resid_post"]
    assert tokens.strata.empty
    assert len(tokens.frequency) == 3 * tiny.N_LAYERS
    weights.summary()
    tokens.summary()


@pytest.mark.parametrize("architecture", ["neox", "llama", "gemma2", "mixtral"])
def test_other_architectures(architecture):
    run = {0: tiny.build(architecture, KIND), 10: tiny.build(architecture, KIND, seed=1)}
    result = analyze_tangents(run, tokens=zipf_tokens(), **QUIET)
    assert result.table[["energy", "ratio", "p", "spectrum_expected", "anisotropy"]].notna().all().all()
    sites = set(result.table["site"])
    assert ("W_gate" in sites) == (architecture in ("llama", "gemma2"))
    assert ("W_in" in sites) == (architecture != "mixtral")


def planted_run():
    """Two steps whose attention reads four directions alone."""
    models = {}
    for step, seed in ((0, 0), (10, 1)):
        model = tiny.build("gpt2", KIND, torch.float64, seed=seed)
        projector = torch.zeros(tiny.D_MODEL, dtype=torch.float64)
        projector[:4] = 1
        with torch.no_grad():  # a gain and bias that leave four directions of the norm's output
            for name, p in model.named_parameters():
                if p.ndim == 1 and len(p) == tiny.D_MODEL and (".ln1" in name or ".ln_1" in name):
                    p *= projector
        models[step] = model
    return models


def test_planted_gradients_in_the_basis():
    """Activations of rank 4, so that every weight gradient lies in them: energy 1, the smallest p."""
    result = analyze_tangents(planted_run(), tokens=zipf_tokens(), **QUIET)
    rows = result.table[result.table["point"] == "attn_in"]
    np.testing.assert_allclose(rows["energy"], 1, atol=1e-9)
    np.testing.assert_allclose(rows["p"], 1 / 21)
    np.testing.assert_allclose(rows["spectrum_expected"], 1, atol=1e-9)
    assert rows["anisotropy"].isna().all()
    assert (rows["ratio"] > 1e9).all()


# --- resume -----------------------------------------------------------------------------------------------------------


class _Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [20, 100])
def test_a_run_that_was_killed_goes_on(killed_at, tmp_path, analysis, monkeypatch):
    from tl_asymmetry.tangents import probe

    run = decoder_run()
    opened = []

    def of(step, fail):
        def make():
            if fail:
                raise _Killed
            opened.append(step)
            return run[step]

        return make

    broken = {step: of(step, step == killed_at) for step in run}
    with pytest.raises(_Killed):
        analyze_tangents(broken, tokens=zipf_tokens(), store=tmp_path / "run", **QUIET)
    result = analyze_tangents(run, tokens=zipf_tokens(), store=tmp_path / "run", **QUIET)
    assert_same(analysis, result, tolerance=0, skip=())
    monkeypatch.setattr(probe, "observe", None)  # what is finished is not measured again
    again = analyze_tangents(run, tokens=zipf_tokens(), store=tmp_path / "run", **QUIET)
    assert_same(analysis, again, tolerance=0, skip=())


def test_a_basis_filled_up_is_still_said_after_a_resume(tmp_path):
    """Four directions where six are asked for: a resumed run, which fits no basis, must say so too."""
    options = QUIET | {"rank": 6, "method": "semi_nmf", "starts": 1, "sample_rows": 50, "store": tmp_path}
    first, again = (analyze_tangents(planted_run(), tokens=zipf_tokens(), **options) for _ in range(2))
    fits = first.bases.set_index(["point", "layer"])["directions"]
    assert fits["attn_in", 0] == 4
    assert fits["mlp_in", 0] == 6
    said = [note for note in first.notes if "at layer 0 attn_in found 4 independent directions" in note]
    assert len(said) == 1
    assert again.notes == first.notes


def test_a_store_of_another_run_is_refused(tmp_path):
    analyze_tangents(decoder_run(), tokens=zipf_tokens(), store=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="ranks"):
        analyze_tangents(decoder_run(), tokens=zipf_tokens(), store=tmp_path, **QUIET | {"rank": 5})
    other = decoder_run() | {20: tiny.build("gpt2", KIND, torch.float64, seed=9)}
    with pytest.raises(ValueError, match="expected the weights that the store has of step 20"):
        analyze_tangents(other, tokens=zipf_tokens(), store=tmp_path, **QUIET)


# --- results ----------------------------------------------------------------------------------------------------------


def test_saved_and_read_again(analysis, tmp_path):
    check_listed(analysis)
    analysis.save(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, TangentAnalysis)
    assert_same(analysis, again, tolerance=0, skip=())
    assert again.config == analysis.config
    assert again.notes == analysis.notes
    np.testing.assert_array_equal(again.basis("mlp_in"), analysis.basis("mlp_in"))
    assert again.summary() == analysis.summary()


def test_report_and_words(analysis, tmp_path):
    page = analysis.to_html(tmp_path / "report.html").read_text()
    for words in ("Energy in early directions", "By token frequency", "Spectrum-aware null", "2604.08764"):
        assert words in page
    assert "excess" in analysis.summary()
    assert "<table" in analysis._repr_html_()
    with pytest.raises(ValueError, match="expected one of pca/4/attn_in"):
        analysis.basis("z")


# --- models left as they were -----------------------------------------------------------------------------------------


def state_of(model):
    return {
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
    }


def assert_untouched(before, model):
    now = state_of(model)
    for key in ("training", "hooks", "flags"):
        assert before[key] == now[key], key
    for key in ("grads", "weights"):
        for a, b in zip(before[key], now[key], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), key


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [*tiny.KINDS, "encoder"])
def test_models_come_back_as_they_were(kind, fails, monkeypatch, unchecked_types):
    from tl_asymmetry.tangents import observation

    model = encoder("bridge") if kind == "encoder" else tiny.build("gpt2", kind)
    data = encoder_data() if kind == "encoder" else zipf_tokens()
    model.train()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
        if i % 4 == 0 and p.requires_grad:
            p.grad = torch.full_like(p, 0.5)
    with torch.no_grad():
        model(data)  # transformers itself leaves hooks (output capturing) on its first pass
    before, rng = state_of(model), torch.random.get_rng_state()
    if fails:

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(observation._Backward, "_take_distances", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyze_tangents(model, tokens=data, mask_token=MASK_TOKEN, **QUIET)
    else:
        with torch.no_grad():
            analyze_tangents(model, tokens=data, mask_token=MASK_TOKEN, **QUIET)
    assert_untouched(before, model)
    assert torch.equal(rng, torch.random.get_rng_state())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": tiny.D_MODEL}, f"expected a rank from 1 to {tiny.D_MODEL - 1} "),
        ({"rank": tiny.D_MODEL + 5}, f"expected a rank from 1 to {tiny.D_MODEL - 1} "),
        ({"rank": 30}, 'pass a smaller rank or control="haar"'),
        ({"rank": 0}, "expected ranks >= 1"),
        ({"rank": 0.5}, "expected rank as a whole number, or several, got 0.5; pass rank=16"),
        ({"rank": [4, None]}, r"expected rank as a whole number, or several, got \[4, None\]; pass rank=16"),
        ({"method": None}, "expected method as a string, or several, got None; pass method="),
        ({"gradients": 3}, "expected gradients as a string, or several, got 3; pass gradients='weight'"),
        (
            {"frequencies": {"the": 3}},
            "expected frequencies as a tensor of .* counts of token ids, got {'the': 3}; pass",
        ),
        ({"method": "ica"}, "expected method among pca, semi_nmf, got 'ica'"),
        ({"gradients": ("weights",)}, "expected gradients among weight, activation"),
        ({"basis_from": 0.0}, "expected basis_from between 0 and 1"),
        ({"basis_from": 1.0}, "expected basis_from between 0 and 1"),
        ({"draws": 0}, "expected draws from 1 to 100,000, got 0"),
        ({"control": "other"}, 'expected control "complement" or "haar"'),
        ({"batch_size": 0}, "expected batch_size >= 1"),
        ({"frequencies": torch.ones(3)}, f"expected frequencies as {tiny.D_VOCAB} finite counts"),
        ({"frequencies": torch.full((tiny.D_VOCAB,), torch.nan)}, r"none negative, got .* beginning with \[nan, nan"),
        ({"mask_share": 0.0}, "expected mask_share above 0 and at most 1"),
        ({"method": "semi_nmf", "sample_rows": 3}, "expected at least as many sample_rows as the largest rank, 4, got"),
    ],
)
def test_refuses_settings(options, text, unchecked_types):
    with pytest.raises(ValueError, match=text):
        analyze_tangents(decoder_run(), tokens=zipf_tokens(), **QUIET | options)


def test_refuses_checkpoints_that_have_no_early_part():
    models = list(decoder_run().values())
    late = {50: models[0], 100: models[1]}
    with pytest.raises(
        ValueError, match=r"first 30% of 100 steps \(up to 30\).* none in the first part \(steps 50, 100\)"
    ):
        analyze_tangents(late, tokens=zipf_tokens(), **QUIET)
    with pytest.raises(ValueError, match="none in the later part"):
        analyze_tangents({5: models[0], 10: models[1]}, tokens=zipf_tokens(), total_steps=100, **QUIET)
    with pytest.raises(ValueError, match="expected one checkpoint a step"):
        analyze_tangents([(0, models[0]), (0, models[1])], tokens=zipf_tokens(), **QUIET)
    with pytest.raises(ValueError, match="expected at least one checkpoint"):
        analyze_tangents([], tokens=zipf_tokens(), **QUIET)
    with pytest.raises(ValueError, match="expected total_steps with a generator"):
        analyze_tangents(iter(late.items()), tokens=zipf_tokens(), **QUIET)
    with pytest.raises(
        ValueError,
        match="expected a folder with directories named like checkpoint-500, got 'somewhere'; pass the output",
    ):
        analyze_tangents("somewhere", tokens=zipf_tokens(), **QUIET)
    probe = TangentProbe(tokens=zipf_tokens(), total_steps=100, **QUIET)
    with pytest.raises(ValueError, match="where the basis is fitted, got none"):
        probe.observe(50, models[0])


def test_a_probe_refuses_disorder():
    models = decoder_run()
    with pytest.raises(ValueError, match="expected at least one observed step"):
        TangentProbe(tokens=zipf_tokens(), total_steps=100, **QUIET).result()
    probe = TangentProbe(tokens=zipf_tokens(), total_steps=100, **QUIET)
    probe.observe(0, models[0])
    with pytest.raises(ValueError, match="expected steps in rising order, got 0 after 0"):
        probe.observe(0, models[20])
    with pytest.raises(ValueError, match="expected a step from 0 to total_steps=100, got 101"):
        probe.observe(101, models[20])
    probe.result()
    with pytest.raises(ValueError, match="now that the bases are fixed"):
        probe.observe(20, models[20])
    probe.observe(100, models[100])
    assert probe.result().table["step"].unique().tolist() == [0, 100]
    other = TangentProbe(tokens=zipf_tokens(), total_steps=100, **QUIET)
    other.observe(0, models[0])
    with pytest.raises(ValueError, match="expected checkpoints of one model"):
        other.observe(10, tiny.build("qwen3", KIND))
    with pytest.raises(ValueError, match="expected options or settings by name, got both"):
        TangentProbe(total_steps=1, options=probe.options, rank=3)


def test_the_last_early_step_is_early_whatever_binary_makes_of_its_share():
    models = decoder_run()
    assert 0.29 * 100 < 29
    result = analyze_tangents(
        {29: models[0], 100: models[100]},
        tokens=zipf_tokens(),
        **QUIET | {"basis_from": 0.29, "gradients": "activation"},
    )
    assert result.checkpoints["phase"].tolist() == ["early", "late"]


def test_refuses_what_sees_the_tokens_it_would_predict():
    model = tiny.build("gpt2", KIND)
    model.cfg.attention_dir = "bidirectional"
    with pytest.raises(
        ValueError, match="expected a causal model or an encoder of masked tokens, got the bidirectional"
    ):
        analyze_tangents(model, tokens=zipf_tokens(), **QUIET)


def test_refuses_gradients_that_are_not_finite():
    model = tiny.build("gpt2", KIND)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(ValueError, match="expected finite gradients, got others in torch.float32; pass the model in"):
        analyze_tangents(model, tokens=zipf_tokens(), **QUIET)


def test_refuses_texts_too_short_for_the_strata():
    with pytest.raises(ValueError, match="expected texts whose token frequencies fill 5 strata"):
        analyze_tangents(decoder_run(), tokens=torch.arange(40).view(4, 10) + 5, **QUIET | {"strata": 5})
    with pytest.raises(ValueError, match="expected sequences with a token to predict"):
        analyze_tangents(decoder_run(), tokens=torch.tensor([[7], [8]]), **QUIET)
    with pytest.raises(ValueError, match="expected at least as many tokens as the largest rank"):
        analyze_tangents(decoder_run(), tokens=torch.tensor([[7, 8, 8]]), **QUIET | {"strata": 1})


def test_refuses_an_encoder_that_cannot_guess():
    with pytest.raises(ValueError, match="expected a mask token for the encoder"):
        analyze_tangents(encoder("bridge"), tokens=encoder_data(), **QUIET)
    with pytest.raises(ValueError, match="expected mask_token from 0 to"):
        analyze_tangents(encoder("bridge"), tokens=encoder_data(), mask_token=tiny.D_VOCAB, **QUIET)
    headless = encoder("bridge", head="BertForNextSentencePrediction")
    with pytest.raises(
        ValueError, match="masked-language-model head, got BertForNextSentencePrediction; pass e.g. a Bert"
    ):
        analyze_tangents(headless, tokens=encoder_data(), mask_token=MASK_TOKEN, **QUIET)


def test_refuses_broken_and_processed_weights():
    broken = copy.deepcopy(decoder_run()[100])
    with torch.no_grad():
        next(iter(broken.parameters()))[0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite weights"):
        analyze_tangents(decoder_run() | {100: broken}, tokens=zipf_tokens(), **QUIET)
    if tiny.HOOKED_AVAILABLE:
        with pytest.raises(ValueError, match="expected raw weights"):
            analyze_tangents(tiny.hooked("gpt2", fold_ln=True), tokens=zipf_tokens(), **QUIET)


def test_texts_of_an_encoder_are_masked_between_their_marks():
    from tl_asymmetry.models.view import ModelView

    view = ModelView(encoder("bridge", tokenizer=True))
    data = tangent_data(
        view, ["w1 w2 w3 w4 w5 w1 w1", "w2 w6"], None, None,
        max_tokens=None, exclude_first=True, strata=2, frequencies=None,
        groups=2, mask_token=3, mask_share=0.5, seed=0, notes=lambda _: None,
    )  # fmt: skip
    for sequence in data.sequences:
        assert sequence[[0, -1], ORIGINAL].tolist() == [1, 2]
        assert sequence[[0, -1], TARGET].tolist() == [0, 0]
        assert torch.equal(sequence[[0, -1], INPUT], sequence[[0, -1], ORIGINAL])
    assert data.counted == 9
    assert data.targets == round(0.5 * 7) + 1


def test_half_precision_says_so():
    model = tiny.build("gpt2", "bridge", torch.bfloat16)
    with pytest.warns(UserWarning, match="gradients are computed in torch.bfloat16"):
        result = analyze_tangents(model, tokens=zipf_tokens(), **QUIET)
    assert result.table["energy"].notna().all()


@pytest.mark.gpu
def test_on_a_gpu(analysis):
    run = {step: copy.deepcopy(model).to("cuda") for step, model in decoder_run().items()}
    assert_same(analysis, analyze_tangents(run, tokens=zipf_tokens(), **QUIET), tolerance=1e-6)


# --- while a model trains ---------------------------------------------------------------------------------------------


def test_a_recorder_takes_a_probe():
    from tl_asymmetry import TrajectoryRecorder

    model, tokens = tiny.build("gpt2", KIND), zipf_tokens()
    probe = TangentProbe(tokens=tokens, total_steps=10, **QUIET)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = {}
    with TrajectoryRecorder(model, 3, tokens=tokens, ranks=[4], groups=1, probes=[probe]) as recorder:
        for step in range(1, 11):
            seen[step - 1] = copy.deepcopy({n: p.detach() for n, p in model.named_parameters()})
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            recorder.step(step)
            assert all(
                torch.equal(a, p.grad)
                for a, p in zip(before, (p for p in model.parameters() if p.grad is not None), strict=True)
            )
        assert recorder.result().steps == [3, 6, 9]
    result = probe.result()
    assert result.checkpoints["step"].tolist() == [0, 3, 6, 9]
    assert result.checkpoints["phase"].tolist() == ["early", "early", "late", "late"]
    # the model as it was at step 6, after the fact
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(seen[6][name])
    again = TangentProbe(tokens=tokens, total_steps=0, **QUIET | {"gradients": "activation"})
    again.observe(0, model)
    loss = again.result().checkpoints["loss"].iloc[0]
    assert result.checkpoints["loss"].iloc[2] == pytest.approx(loss, rel=1e-6)
