"""Pairs whose layers differ or have experts: all rows that there should be, their fractions by a naive path."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch

from benchmarks.architectures import changed
from tests.irregular import analyses, tokens
from tests.models.test_sites import adapter_of
from tl_asymmetry import (
    analyze_pair,
    analyze_spectra,
    analyze_stages,
    analyze_trajectory,
    layer_jacobians,
    load,
    rank_one_study,
    weights_from,
)
from tl_asymmetry.models.huggingface import HuggingFaceAdapter
from tl_asymmetry.names import MATRICES, kind_of

RANK = 2
OPTIONS = {"tokens": tokens(), "ranks": [1, RANK], "groups": 1, "batch_size": 3, "progress": False}
NAMES = ("qwen2-moe", "qwen3.5", "gemma4", "deepseek-v3", "mixtral")


@pytest.fixture(scope="module")
def analysed():
    return analyses(**OPTIONS)


def naive_fraction(base, twin, layer, matrix, unit):
    """‖QᵀΔW‖²/‖ΔW‖², Q the leading directions of what enters the matrix's module, first positions left out."""
    site, other = base.sites[layer][matrix], twin.sites[layer][matrix]
    seen: list[torch.Tensor] = []
    module, side = base.point(layer, kind_of(matrix).point)
    assert side == "input"
    handle = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        base.run(tokens(), False, layer + 1)
    handle.remove()
    x = seen[0].reshape(*tokens().shape, -1)[:, 1:].flatten(0, 1)
    Q = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1)[:, :RANK]
    Δ = other.weight - site.weight
    Δ = Δ if unit is None else Δ[unit]
    return float((Q.mT @ Δ).square().sum() / Δ.square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_layers_that_have_the_matrix(name, analysed):
    base, _, result = analysed(name)
    expected = set()
    for layer, sites in enumerate(base.sites):
        for matrix, site in sites.items():
            for unit in range(len(site.weight)) if site.unit else [None]:
                head, expert = (None, unit) if site.unit == "expert" else (unit, None)
                expected.add((layer, head, expert, matrix))
    rows = result.table.drop_duplicates(["layer", "head", "expert", "matrix"])
    found = {tuple(None if pd.isna(x) else x for x in row)
             for row in rows[["layer", "head", "expert", "matrix"]].itertuples(index=False)}  # fmt: skip
    assert found == expected
    assert result.table["fraction"].notna().all()


@pytest.mark.parametrize("name", NAMES)
def test_read_fractions_are_the_naive_ones(name, analysed):
    base, twin, result = analysed(name)
    table = result.table
    own = table[(table["rank"] == RANK) & (table["subspace"] == table["matrix"].map(lambda m: kind_of(m).point))]
    assert len(own) > 4
    assert set(own["matrix"]) == {name for sites in base.sites for name, site in sites.items() if site.side == "read"}
    for row in own.itertuples():
        unit = row.expert if pd.notna(row.expert) else row.head if pd.notna(row.head) else None
        expected = naive_fraction(base, twin, row.layer, row.matrix, unit)
        assert row.fraction == pytest.approx(expected, rel=1e-8), (row.layer, row.matrix, unit)


def test_a_dense_layer_beside_mixtures_is_tested_as_well(analysed):
    """Its one matrix is where experts' first is, and its own pool."""
    _, _, result = analysed("deepseek-v3")
    table = result.table[(result.table["subspace"] == "mlp_in") & (result.table["matrix"] == "W_in")]
    dense = table[table["expert"].isna()]
    assert len(dense)
    assert dense["excess_p"].notna().all()
    assert table["excess_p"].between(0, 1).all()
    assert any("latent attention" in note for note in result.notes)
    assert not any("W_K rows" in note for note in result.notes)


@pytest.mark.parametrize(
    ("name", "some"),
    [("qwen3.5", ["W_Q", "W_in", "linear_attn.out_proj"]), ("qwen2-moe", ["W_O", "W_in", "W_router"])],
)
def test_a_result_with_gaps_is_told_drawn_saved_and_read(name, some, analysed, tmp_path):
    """All of it but the pages, which are drawn for a matrix with each kind of gap."""
    base, twin, result = analysed(name)
    assert "nan" not in result.summary().lower()
    assert len(result.plot_heads().layout.updatemenus[0].buttons) >= result.table["matrix"].nunique()
    result.save(tmp_path / "saved")
    pd.testing.assert_frame_equal(load(tmp_path / "saved").table, result.table)
    few = analyze_pair(base.inner, twin.inner, **OPTIONS, matrices=some)
    assert set(few.table["matrix"]) == set(some)
    few.to_html(tmp_path / "report.html")
    few.to_explorer(tmp_path / "explorer.html", directions=0)


@pytest.mark.parametrize("name", ["qwen3.5", "falcon-h1"])
def test_a_folder_is_what_the_loaded_model_is(name, analysed, tmp_path):
    base, twin, live = analysed(name)
    twin.inner.save_pretrained(tmp_path)
    folder = analyze_pair(base.inner, tmp_path, **OPTIONS)
    pd.testing.assert_frame_equal(live.table, folder.table, rtol=1e-6)
    assert any(matrix not in MATRICES for matrix in live.table["matrix"])


def test_directions_of_an_expert_are_its_own(analysed):
    base, twin, result = analysed("qwen2-moe")
    layer = next(i for i, sites in enumerate(base.sites) if sites["W_in"].unit == "expert")
    for expert in (0, 2):
        Δ = twin.sites[layer]["W_in"].weight[expert] - base.sites[layer]["W_in"].weight[expert]
        σ = torch.linalg.svdvals(Δ.double())
        shown = result.directions(f"L{layer}E{expert}.W_in", n=1, contexts=1, model=base.inner)
        assert shown["energy"].iloc[0] == pytest.approx(float(σ[0].square() / σ.square().sum()), rel=1e-5)
    count = len(base.sites[layer]["W_in"].weight)
    with pytest.raises(ValueError, match=f"expected an expert from 0 to {count - 1} for W_in, got None; pass that"):
        result.directions(f"L{layer}.W_in", model=base.inner)
    with pytest.raises(
        ValueError, match=f"expected an expert from 0 to {count - 1} for W_in, got expert {count}; pass"
    ):
        result.directions(f"L{layer}E{count}.W_in", model=base.inner)


@pytest.fixture(scope="module")
def adapter_on_a_hybrid(tmp_path_factory):
    """A folder with LoRA factors on attention, linear attention and MLP of Qwen3.5, and the model merged by PEFT."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "in_proj_qkv", "out_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = peft.get_peft_model(copy.deepcopy(adapter_of("qwen3.5").inner), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder, tuned.merge_and_unload()


def test_an_adapter_on_a_hybrid_is_what_peft_merges(adapter_on_a_hybrid):
    folder, merged = adapter_on_a_hybrid
    base = adapter_of("qwen3.5")
    read = weights_from(folder, base=base.inner)
    for layer, sites in enumerate(HuggingFaceAdapter(merged).sites):
        for matrix, site in sites.items():
            assert torch.allclose(read.weight(layer, matrix), site.weight, rtol=1e-5, atol=1e-6), (layer, matrix)
    changed_ones = {m for m in base.sites[0] if not torch.equal(read.weight(0, m), base.sites[0][m].weight)}
    assert changed_ones == {"W_out", "linear_attn.in_proj_qkv", "linear_attn.out_proj"}


def test_an_adapter_that_does_not_fit_is_refused(adapter_on_a_hybrid):
    with pytest.raises(ValueError, match="expected an adapter that PEFT .* can merge into .*; pass the base"):
        weights_from(adapter_on_a_hybrid[0], base=adapter_of("lfm2").inner)


@pytest.mark.parametrize(
    "analysis",
    [lambda base, other: analyze_spectra(base, other, matrices=["W_Q"], progress=False),
     lambda base, other: analyze_trajectory({0: base, 1: other}, tokens=tokens(), matrices=["W_Q"], progress=False),
     lambda base, other: rank_one_study(base, other, tokens=tokens(), matrices=["W_Q"], progress=False),
     lambda base, other: analyze_stages({"a": base, "b": other}, matrices=["W_Q"])],
)  # fmt: skip
def test_what_takes_regular_matrices_only_says_so_and_what_works(analysis):
    base = adapter_of("qwen3.5").inner
    with pytest.raises(
        ValueError, match=r"every layer has in one shape \(W_in, W_gate, W_out\), got 'W_Q'.*analyze_pair"
    ):
        analysis(base, base)


def test_what_is_left_out_of_spectra_is_noted():
    base = adapter_of("qwen3.5").inner
    result = analyze_spectra(base, changed(base), ranks=[1], progress=False)
    assert set(result.table["matrix"]) == {"W_in", "W_gate", "W_out"}
    assert any(
        "W_Q" in note and "linear_attn.out_proj" in note and "analyze_pair takes" in note for note in result.notes
    )


@pytest.mark.parametrize(("name", "module"), [("qwen3.5", "in_proj_qkv"), ("mixtral", "q_proj")])
def test_adapters_beside_the_weights_are_refused(name, module):
    """The weights alone would be the base's, and every delta zero."""
    peft = pytest.importorskip("peft")
    base = adapter_of(name).inner
    tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=[module]))
    for model in (tuned, tuned.base_model.model):
        with pytest.raises(
            ValueError, match=rf"adapters are merged .* got PEFT's un-merged .*{module}; pass model.merge"
        ):
            analyze_pair(base, model, tokens=tokens(), progress=False)


def test_jacobians_of_a_hybrid_name_the_parts_that_there_are():
    with pytest.raises(ValueError, match="expected a part that layer 0 has, got 'mlp'; pass one of block$"):
        layer_jacobians(adapter_of("qwen3.5").inner, tokens=tokens()[:1], layers=[0], part="mlp", progress=False)


@pytest.mark.parametrize("layer", [0, 3])  # linear attention, attention
def test_jacobians_of_a_hybrids_blocks_are_those_of_its_own_modules(layer):
    model = adapter_of("qwen3.5").inner
    ids, block, calls = tokens()[:1, :5], model.model.layers[layer], []
    handle = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    (x, *rest), options = calls[0]
    dense = torch.autograd.functional.jacobian(lambda y: block(y, *rest, **options), x)
    expected = torch.stack([dense[0, t, :, 0, t] for t in range(5)]).mean(0)
    found = layer_jacobians(model, tokens=ids, layers=[layer], positions=list(range(5)), progress=False)
    # transformers runs its delta rule in float32
    assert (torch.as_tensor(found.mean(layer)) - expected).abs().max() < 1e-6 * expected.abs().max()
