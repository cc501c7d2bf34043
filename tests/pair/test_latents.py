"""Latent attention (DeepSeek): what reads a latent against that latent, circuits through the products, in float64."""

from __future__ import annotations

import pytest
import torch
import transformers

from benchmarks.architectures import changed
from tests.irregular import analyses, tokens
from tl_asymmetry import analyze_pair, analyze_spectra, compare
from tl_asymmetry.names import LATENTS, reads_latent

RANK = 3
OPTIONS = {"tokens": tokens(), "ranks": [RANK], "groups": 1, "progress": False}
NAMES = ("deepseek-v3", "deepseek-v2, whole queries")


@pytest.fixture(scope="module")
def analysed():
    return analyses(**OPTIONS)


def entered(base, layer, path):
    """What enters a projection of a layer's attention, `[batch, pos, width]`, by its own module."""
    seen = []
    module = base.blocks[layer].self_attn.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        base.run(tokens(), False, layer + 1)
    handle.remove()
    return seen[0].reshape(*tokens().shape, -1)


def maps(adapter, layer):
    """W_UQ, W_UK, W_UV `[head, latent, width]` by the parameters of transformers."""
    attention = adapter.blocks[layer].self_attn
    heads, key = attention.num_heads, attention.qk_nope_head_dim
    up = attention.kv_b_proj.weight.detach().mT.unflatten(-1, (heads, -1)).movedim(1, 0)
    found = {"W_UK": up[..., :key], "W_UV": up[..., key:]}
    if attention.q_lora_rank is not None:
        found["W_UQ"] = attention.q_b_proj.weight.detach().mT.unflatten(-1, (heads, -1)).movedim(1, 0)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rows_against_the_latent_that_is_read(name, analysed):
    base, twin, result = analysed(name)
    rows = result.table[result.table["matrix"].map(reads_latent)]
    assert set(rows["subspace"]) <= set(LATENTS)
    assert set(rows["matrix"]) == set(maps(base, 0))
    for row in rows.itertuples():
        path = "q_b_proj" if row.matrix == "W_UQ" else "kv_b_proj"
        x = entered(base, row.layer, path)
        d, counted = x.shape[-1], x[:, 1:].flatten(0, 1)
        Q = torch.linalg.eigh(counted.mT @ counted).eigenvectors.flip(-1)[:, :RANK]
        Δ = (maps(twin, row.layer)[row.matrix] - maps(base, row.layer)[row.matrix])[row.head]
        fraction = float((Q.mT @ Δ).square().sum() / Δ.square().sum())
        assert (row.fraction, row.relative) == pytest.approx((fraction, fraction * d / RANK), rel=1e-8)
        # keys and values have gradients at first positions too
        learned = counted if row.matrix == "W_UQ" else x.flatten(0, 1)
        Σ = learned.mT @ learned
        R = Σ / torch.outer(Σ.diagonal().sqrt(), Σ.diagonal().sqrt())
        assert row.activation_matched == pytest.approx(float((Q.mT @ R @ Q).trace() / R.trace()), rel=1e-8)
        assert 0 <= row.isotropic_p <= 1
    expected = result.nulls[(result.nulls["matrix"] == "W_UK") & (result.nulls["null"] == "isotropic")]["expected"]
    assert expected.unique().tolist() == [RANK / 12]


@pytest.mark.parametrize("name", NAMES)
def test_circuits_go_through_the_products(name, analysed):
    base, twin, result = analysed(name)

    def products(adapter, layer):
        attention, up = adapter.blocks[layer].self_attn, maps(adapter, layer)
        down = attention.kv_a_proj_with_mqa.weight.detach().mT[:, : attention.kv_lora_rank]
        down = down * attention.kv_a_layernorm.weight.detach()
        key = attention.qk_nope_head_dim
        if "W_UQ" in up:
            queries = attention.q_a_proj.weight.detach().mT * attention.q_a_layernorm.weight.detach() @ up["W_UQ"]
        else:
            queries = attention.q_proj.weight.detach().mT.unflatten(-1, (attention.num_heads, -1)).movedim(1, 0)
        out = attention.o_proj.weight.detach().mT.unflatten(0, (attention.num_heads, -1))
        return {"QK": queries[..., :key] @ (down @ up["W_UK"]).mT, "OV": down @ up["W_UV"] @ out}

    assert set(result.circuits["circuit"]) == {"QK", "OV"}
    for layer in range(len(base.blocks)):
        before, after = products(base, layer), products(twin, layer)
        x = entered(base, layer, "kv_a_proj_with_mqa")[:, 1:].flatten(0, 1)
        Q = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)[:, :RANK]
        for row in result.circuits[result.circuits["layer"] == layer].itertuples():
            if row.subspace != "attn_in":
                continue
            Δ = (after[row.circuit] - before[row.circuit])[row.head]
            inside = Q.mT @ Δ if row.side in ("query", "value") else Δ @ Q
            assert row.delta_norm == pytest.approx(float(Δ.norm()), rel=1e-9)
            assert row.fraction == pytest.approx(float(inside.square().sum() / Δ.square().sum()), rel=1e-9)


def test_from_a_folder(analysed, tmp_path):
    base, twin, live = analysed("deepseek-v3")
    twin.inner.save_pretrained(tmp_path)
    found = analyze_pair(base.inner, tmp_path, **OPTIONS)
    columns = ["layer", "head", "matrix", "subspace", "rank", "fraction", "relative", "activation_matched"]
    latent = [result.table[result.table["matrix"].map(reads_latent)][columns] for result in (found, live)]
    assert len(latent[0]) == len(latent[1]) > 0
    assert (latent[0].reset_index(drop=True) == latent[1].reset_index(drop=True)).all(axis=None)
    assert found.circuits.equals(live.circuits)


def test_words_figures_and_refusals(analysed, tmp_path):
    base, twin, result = analysed("deepseek-v3")
    summary = result.summary()
    assert "Reading from a latent, W_UQ in the 3 leading directions of q_latent (8 tested)" in summary
    assert "W_UQ, W_UK, W_UV read latents" in summary
    hover = next(trace for trace in result.plot_heads("W_UK").data if trace.name == "hover")
    assert "reads a latent, not the residual stream" in hover.hovertemplate
    row = result.table.query("matrix == 'W_UK' and layer == 1 and head == 2").iloc[0]
    assert hover.customdata[1][2][5] == f"{row['fraction_unrounded'] * 12 / RANK:.3g}"
    most = next(trace for trace in result.plot_rank_curve("L1H2.W_UK").data if trace.name == "most possible, d/k")
    assert list(most.y) == [12 / RANK]
    few = analyze_pair(base.inner, twin.inner, **OPTIONS, matrices=["W_UK", "W_DKV", "W_O"])
    few.to_explorer(tmp_path / "explorer.html", model=base.inner, directions=1, progress=False)
    with pytest.raises(ValueError, match="expected a matrix on the residual stream, got 'W_UK'"):
        result.directions("L1H2.W_UK")
    with pytest.raises(ValueError, match="expected a matrix that kv_latent applies to, got W_DKV; pass other"):
        analyze_pair(base.inner, changed(base.inner), matrices=["W_DKV"], subspaces="kv_latent", **OPTIONS)
    chosen = analyze_pair(base.inner, twin.inner, subspaces=["attn_in", "kv_latent"], **OPTIONS)
    places = set(zip(chosen.table["matrix"], chosen.table["subspace"], strict=True))
    assert ("W_UV", "kv_latent") in places
    assert not {("W_UV", "attn_in"), ("W_DKV", "kv_latent"), ("W_UQ", "attn_in")} & places


def test_comparisons_take_a_latents_width(analysed):
    base, twin, result = analysed("deepseek-v3")
    other = analyze_pair(base.inner, changed(twin.inner), **OPTIONS, matrices=["W_UK", "W_O"])
    compared = compare({"a": result, "b": other})
    rows = compared.overlap[compared.overlap["matrix"] == "W_UK"]
    assert rows["chance"].tolist() == pytest.approx((rows["directions"] / 12).tolist())
    spectra = analyze_spectra(base.inner, twin.inner, ranks=[2], progress=False)
    assert any("W_UQ, W_UK, W_UV, which read a latent and not the stream, are left out" in n for n in spectra.notes)


def test_choices_of_a_latents_subspace(analysed):
    """At the ranks below its width alone; routing is captured beside."""
    base, twin, _ = analysed("deepseek-v3")
    options = OPTIONS | {"ranks": [RANK, 14], "matrices": ["W_UK", "W_in"]}
    result = analyze_pair(base.inner, twin.inner, sensitivity=True, **options)
    choices, stability = result.sensitivity(), result.stability()
    assert set(choices.loc[choices["matrix"] == "W_UK", "rank"]) == {RANK}
    assert set(choices.loc[choices["matrix"] == "W_in", "rank"]) == {RANK, 14}
    rows = stability[stability["matrix"] == "W_UK"]
    assert len(rows) == 8
    assert (rows["low"] <= rows["relative"] * (1 + 1e-5)).all()


def test_several_streams_are_refused_as_such():
    """And not by what a latent looks like between them."""
    config = transformers.HYV4Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=512, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1,
        q_lora_rank=24, kv_lora_rank=24, topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="expected one residual stream, got 4 side by side"):
        analyze_pair(model, changed(model), **OPTIONS)
