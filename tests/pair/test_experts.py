"""What routers give to experts, and experts held against their own inputs, by a naive path of the routers' outputs."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks.architectures import changed
from tests import tiny
from tests.irregular import analyses, tokens
from tests.models.test_sites import adapter_of
from tl_asymmetry import analyze_pair
from tl_asymmetry.models.capture import capture_moments
from tl_asymmetry.models.routing import Routing
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.saved_moments import save_moments

RANKS = [2, 20]
NAMES = ("mixtral", "gpt-oss", "deepseek-v3", "llama4")
OPTIONS = {"tokens": tokens(), "ranks": RANKS, "groups": 1, "progress": False}


@pytest.fixture(scope="module")
def analysed():
    return analyses(subspaces=["mlp_in", "expert_in"], **OPTIONS)


def routed(base, layer):
    """Of each expert its inputs and weights, first positions left out, by the router's output."""
    router, experts = base.sites[layer]["W_router"].module, len(base.sites[layer]["W_in"].weight)
    seen = {}
    handle = router.register_forward_hook(lambda _, args, out: seen.update(x=args[0].detach(), out=out))
    with torch.no_grad():
        base.run(tokens(), False, layer + 1)
    handle.remove()
    first, second, *last = seen["out"]
    counted = torch.ones_like(tokens(), dtype=torch.bool).index_fill(1, torch.tensor([0]), False).flatten()
    x, found = seen["x"].reshape(-1, seen["x"].shape[-1]), []
    for expert in range(experts):
        if last:  # logits, weights and indices of the chosen
            weight = (second * (last[0] == expert)).sum(-1)
            mine = counted & (last[0] == expert).any(-1)
            found.append((x[mine], weight[mine].double()))
        else:  # Llama 4: scores of all, which multiply the input
            mine = counted & (first[:, expert] > 0)
            found.append((x[mine] * first[mine, expert, None], first[mine, expert]))
    return found


def rows_of(base, result, subspace, rank):
    table = result.table
    rows = table[(table["subspace"] == subspace) & (table["rank"] == rank) & table["expert"].notna()]
    return rows[rows["matrix"].isin(["W_in", "W_gate"])]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_weights_are_the_routers(name, analysed):
    base, _, result = analysed(name)
    rows = rows_of(base, result, "mlp_in", 2)
    assert len(rows)
    for layer, of_layer in rows.groupby("layer"):
        given = routed(base, int(layer))
        for row in of_layer.itertuples():
            x, weight = given[row.expert]
            assert row.tokens_routed == len(x)
            assert row.routing_weight == pytest.approx(float(weight.mean()), rel=1e-6, nan_ok=True)
    others = result.table[result.table["expert"].isna()]
    assert others["tokens_routed"].isna().all()
    assert others["routing_weight"].isna().all()


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_against_its_own_inputs(name, analysed):
    """Fractions in the leading directions of the tokens that it was given, and what training on these gives by chance;
    NaN where they span fewer."""
    base, twin, result = analysed(name)
    missing = 0
    for rank in RANKS:
        for row in rows_of(base, result, "expert_in", rank).itertuples():
            x, _ = routed(base, row.layer)[row.expert]
            if torch.linalg.matrix_rank(x) < rank:
                missing += 1
                assert pd.isna([row.fraction, row.excess, row.isotropic_p, row.excess_p]).all()
                assert row.verdict == "not measurable"
                continue
            Σ = x.mT @ x
            Q = torch.linalg.eigh(Σ).eigenvectors.flip(-1)[:, :rank]
            Δ = (twin.sites[row.layer][row.matrix].weight - base.sites[row.layer][row.matrix].weight)[row.expert]
            assert row.fraction == pytest.approx(float((Q.mT @ Δ).square().sum() / Δ.square().sum()), rel=1e-7)
            R = Σ / torch.outer(Σ.diagonal().sqrt(), Σ.diagonal().sqrt())
            assert row.activation_matched == pytest.approx(float((Q.mT @ R @ Q).trace() / R.trace()), rel=1e-7)
    rows = result.table[(result.table["subspace"] == "expert_in") & (result.table["rank"] == 20)]
    assert missing == 0 or any("span fewer directions" in note for note in result.notes)
    assert len(rows) == len(result.table[(result.table["subspace"] == "mlp_in") & (result.table["rank"] == 20)
                                         & result.table["expert"].notna()])  # fmt: skip
    spectra = torch.as_tensor(result.eigenvalues("expert_in"))
    assert spectra.ndim == 3


def test_some_expert_had_too_few_tokens(analysed):
    assert any("span fewer directions than the rank" in note for name in NAMES for note in analysed(name)[2].notes)


def test_a_layers_experts_together_have_a_row(analysed):
    _, _, result = analysed("mixtral")
    layers = result.tests[(result.tests["level"] == "layer") & (result.tests["matrix"] == "W_in")]
    layers = layers[(layers["subspace"] == "mlp_in") & (layers["null"] == "isotropic") & (layers["side"] == "above")]
    table = result.table[(result.table["matrix"] == "W_in") & (result.table["subspace"] == "mlp_in")]
    for row in layers.itertuples():
        own = table[(table["layer"] == row.layer) & (table["rank"] == row.rank)]
        energy = own["delta_norm"] ** 2
        assert row.fraction == pytest.approx((own["fraction"] * energy).sum() / energy.sum(), rel=1e-10)
        assert row.relative == pytest.approx(row.fraction * 32 / row.rank)


def test_intervals_and_tests_of_experts(analysed):
    base, _, _ = analysed("mixtral")
    options = OPTIONS | {"groups": 4, "ranks": [2], "matrices": ["W_Q", "W_in", "W_gate"]}
    result = analyze_pair(base.inner, changed(base.inner), subspaces=["mlp_in", "expert_in"], **options)
    own = rows_of(base, result, "expert_in", 2)
    assert own[["ci_low", "ci_high", "excess_low", "excess_high", "excess_p", "isotropic_p"]].notna().all(axis=None)
    assert (own["excess_low"] < own["excess_high"]).all()
    assert own["flags"].str.contains("few_tokens").all()
    assert set(result.table.loc[result.table["matrix"] == "W_Q", "subspace"]) == {"mlp_in"}


def test_routing_from_saved_moments_and_a_folder(analysed, tmp_path):
    base, _, direct = analysed("mixtral")
    twin = changed(base.inner)
    twin.save_pretrained(tmp_path / "aligned")
    names = ["mlp_in", "expert_in"]
    save_moments(base.inner, tmp_path / "moments", tokens=tokens(), subspaces=names, groups=1, progress=False)
    again = analyze_pair(
        base.inner, tmp_path / "aligned", moments=tmp_path / "moments", subspaces=names, ranks=RANKS, groups=1,
        progress=False,
    )  # fmt: skip
    columns = ["layer", "expert", "matrix", "subspace", "rank", "fraction", "tokens_routed", "routing_weight"]
    pd.testing.assert_frame_equal(again.table[columns], direct.table[columns], rtol=1e-9)


def test_it_is_an_experts_subspace_alone(analysed):
    base, _, _ = analysed("mixtral")
    result = analyze_pair(base.inner, changed(base.inner), subspaces="expert_in", **OPTIONS)
    assert set(result.table["matrix"]) == {"W_in", "W_gate", "W_out"}
    assert result.table["expert"].notna().all()
    dense = adapter_of("llama")
    with pytest.raises(ValueError, match="got 'expert_in'"):
        analyze_pair(dense.inner, changed(dense.inner), subspaces=["expert_in"], **OPTIONS)
    with pytest.raises(ValueError, match="the name of a built-in one"):
        analyze_pair(base.inner, changed(base.inner), subspaces={"expert_in": torch.ones(32)}, **OPTIONS)


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="needs HookedTransformer")
def test_a_hooked_transformer_shows_the_routing_of_its_original():
    ids = torch.randint(3, tiny.D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    seen: dict[str, Routing] = {}
    for kind in ("hooked", "bridge"):
        view = ModelView(tiny.build("mixtral", kind))
        with view.evaluating(), torch.no_grad(), view.routings({1: lambda r, kind=kind: seen.update({kind: r})}):
            view.run(ids)
    assert torch.equal(seen["hooked"].chosen, seen["bridge"].chosen)
    torch.testing.assert_close(seen["hooked"].weights, seen["bridge"].weights.to(seen["hooked"].weights))
    torch.testing.assert_close(seen["hooked"].hidden, seen["bridge"].hidden, rtol=1e-4, atol=1e-5)


def test_only_a_mixture_shows_a_routing():
    view = ModelView(adapter_of("llama").inner)
    assert not view.shows(0, "routing")
    with (
        pytest.raises(ValueError, match="expected a layer whose routing can be seen, got 0"),
        view.routings({0: print}),
    ):
        pass
    with pytest.raises(ValueError, match="expected a point"):
        capture_moments(view.model, "routing", tokens=tokens(), progress=False)


def test_maps_name_experts_and_say_why_a_cell_is_empty(analysed):
    """DeepSeek's first layer has one MLP."""
    _, _, result = analysed("deepseek-v3")
    figure = result.plot_heads("W_in", subspace="mlp_in", rank=2)
    hover = next(trace for trace in figure.data if trace.name == "hover")
    cells = hover.customdata
    assert figure.layout.xaxis.title.text == "expert"
    assert [cells[0][0][0], cells[0][1][0]] == ["L0", "L0E1: layer 0 has one MLP and no experts"]
    assert cells[0][0][-1] == "all tokens: no experts in this layer"
    rows = result.table.query("matrix == 'W_in' and subspace == 'mlp_in' and rank == 2 and layer == 1")
    for row in rows.itertuples():
        assert cells[1][row.expert][0] == f"L1E{row.expert}"
        assert cells[1][row.expert][-1] == f"{row.tokens_routed} tokens, mean weight {row.routing_weight:.3g}"
    assert "routed to it" in hover.hovertemplate
    curve = result.plot_rank_curve("L1E2.W_in", subspace="expert_in")
    assert "L1E2 · W_in" in curve.layout.title.text
    assert {trace.name for trace in result.plot_spectrum("expert_in").data} >= {"L1E0"}
    router = result.plot_heads("W_router")
    cells = next(trace for trace in router.data if trace.name == "hover").customdata
    assert cells[0][0][0] == "L0: layer 0 has no W_router"


def test_an_expert_without_tokens_in_some_groups(analysed, tmp_path):
    base, twin, _ = analysed("mixtral")
    few = tokens()[:, :3]
    options = {"ranks": [1], "groups": 8, "subspaces": ["mlp_in", "expert_in"], "progress": False}
    options["matrices"] = ["W_in", "W_out"]
    direct = analyze_pair(base.inner, twin.inner, tokens=few, sensitivity=True, **options)
    own = direct.table[direct.table["subspace"] == "expert_in"]
    assert own.groupby(["layer", "matrix"])["tokens_routed"].sum().unique().tolist() == [2 * 8 * 2]
    assert own["fraction"].notna().any()
    save_moments(base.inner, tmp_path / "moments", tokens=few, subspaces=options["subspaces"], groups=8, progress=False)
    again = analyze_pair(base.inner, twin.inner, moments=tmp_path / "moments", **options)
    columns = ["expert", "fraction", "tokens_routed", "excess", "excess_low", "ci_high"]
    pd.testing.assert_frame_equal(again.table[columns], direct.table[columns], rtol=1e-9)
