"""Gradients where layers differ or have experts, against float64 autograd of transformers' own modules."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks.architectures import changed
from tests.irregular import tokens
from tests.models.test_sites import adapter_of
from tl_asymmetry import analyze_pair, gradient_covariance, load
from tl_asymmetry.models.backward import outer_products
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.objectives import CrossEntropy, TokenBatch

NAMES = ("qwen3.5", "lfm2", "mixtral", "gpt-oss", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gemma4", "llama4")


TOKENS = tokens(6, 10)


def batch() -> TokenBatch:
    return TokenBatch(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))


@pytest.fixture(scope="module")
def measured():
    """By name: the model's adapter, its parameters' gradients by autograd, and what was measured."""
    made = {}

    def of(name):
        if name not in made:
            base = adapter_of(name)
            found = gradient_covariance(base.inner, CrossEntropy(), [batch()], groups=3, full_mlp=True, progress=False)
            parameters = list(base.inner.parameters())
            for parameter in parameters:
                parameter.requires_grad_(True)
            logits = base.inner(input_ids=TOKENS).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            by_parameter = {id(p): g for p, g in zip(parameters, gradients, strict=True)}
            made[name] = base, by_parameter, found
        return made[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_those_of_autograd(name, measured):
    """‖Σ_t a_t δ_tᵀ‖ of every head, expert, router and further map: of all that the sites cover."""
    base, gradients, found = measured(name)
    rows = {}
    for row in found.gradients.itertuples():
        unit = row.expert if pd.notna(row.expert) else row.head if pd.notna(row.head) else None
        rows[row.layer, row.matrix, unit] = row
    assert not any("shows no product" in note for note in found.notes)
    expected = {
        (layer, matrix, unit)
        for layer, sites in enumerate(base.sites)
        for matrix, site in sites.items()
        for unit in (range(len(site.weight)) if site.unit else [None])
    }
    assert set(rows) == expected
    for (layer, matrix, unit), row in rows.items():
        site = base.sites[layer][matrix]
        gradient = gradients[id(getattr(site.module, site.parameter))]
        of_matrix = site.split(gradient.mT if site.transposed else gradient)
        exact = float((of_matrix if unit is None else of_matrix[unit]).norm())
        # transformers' linear attention runs in float32, whatever the model's type, and so do DeepSeek's routers
        single = name == "qwen3.5" or (name, matrix) == ("deepseek-v3", "W_router")
        near = pytest.approx(exact, rel=1e-5 if single else 1e-7, abs=1e-12)
        assert row.gradient_norm == near, (layer, matrix, unit)


def test_each_expert_has_the_tokens_that_the_router_gave_it(measured):
    base, _, found = measured("mixtral")
    routed = found.gradients[found.gradients["matrix"] == "W_out"]
    chosen = base.text_config.num_experts_per_tok
    assert (routed.groupby("layer")["tokens"].sum() <= chosen * TOKENS.numel()).all()
    assert (routed["expert"].nunique(), routed["head"].notna().sum()) == (base.text_config.num_local_experts, 0)
    whole = found.table[(found.table["matrix"] == "W_out") & (found.table["side"] == "gradient")]
    assert whole["tokens"].tolist() == routed.groupby("layer")["tokens"].sum().tolist()


def test_sides_of_experts_and_of_their_sum(measured):
    """What a reader is shown adds up to autograd's gradient, and to the moments of all experts together."""
    base, gradients, found = measured("gpt-oss")
    view, seen = ModelView(base.inner), {}
    with (
        view.evaluating(),
        outer_products(
            view,
            [(1, "W_in")],
            lambda *_: None,
            lambda index, site, expert, a, δ, row: seen.__setitem__(expert, (a, δ)),
        ) as backward,
    ):
        backward.run(CrossEntropy()(view, batch()) * CrossEntropy().count(batch()))
    site = base.sites[1]["W_in"]
    gradient = site.split(gradients[id(getattr(site.module, site.parameter))])
    shown = found.gradients[(found.gradients["layer"] == 1) & (found.gradients["matrix"] == "W_in")].set_index("expert")
    idle = 0
    for expert, (a, δ) in seen.items():
        torch.testing.assert_close(a.mT @ δ, gradient[expert], rtol=1e-9, atol=1e-12)
        used = (δ != 0).any(-1)  # last positions predict nothing
        idle += int((~used).sum())
        assert shown.loc[expert, "tokens"] == used.sum()
        for side, x in (("input_trace", a), ("gradient_trace", δ)):
            assert shown.loc[expert, side] == pytest.approx(float(x[used].square().sum() / used.sum()), rel=1e-9)
    assert idle > 0
    together = [torch.cat(side) for side in zip(*seen.values(), strict=True)]
    counted = (together[1] != 0).any(-1)
    Σ_a, Σ_δ = ((x[counted].mT @ x[counted]) / counted.sum() for x in together)
    torch.testing.assert_close(found.input_moment(1, "W_in"), Σ_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gradient_moment(1, "W_in"), Σ_δ, rtol=1e-9, atol=1e-12)
    assert not any("forward" in vars(module) for module in base.inner.modules())


def test_layers_that_lack_a_matrix_have_no_rows_and_no_moment(measured, tmp_path):
    base, _, found = measured("qwen3.5")
    has = [layer for layer, sites in enumerate(base.sites) if "W_O" in sites]
    assert sorted(set(found.table[found.table["matrix"] == "W_O"]["layer"])) == has
    assert found.gradient_moment(has[0], "W_O").isfinite().all()
    lacking = next(layer for layer in range(len(base.sites)) if layer not in has)
    with pytest.raises(ValueError, match=f"expected a layer that has W_O, got {lacking}; pass one"):
        found.gradient_moment(lacking, "W_O")
    again = load(found.save(tmp_path / "found"))
    torch.testing.assert_close(again.gradient_moment(has[0], "W_O"), found.gradient_moment(has[0], "W_O"))
    assert "nan" not in found.summary().lower()


def test_heads_of_two_widths(measured):
    base, _, found = measured("gemma4")
    for layer, sites in enumerate(base.sites):
        heads, width, _ = sites["W_O"].weight.shape
        assert found.input_moment(layer, "W_O", heads - 1).shape == (width, width)
        with pytest.raises(ValueError, match=f"expected a head from 0 to {heads - 1} for this side of W_O"):
            found.input_moment(layer, "W_O", heads)


@pytest.mark.parametrize("name", ["qwen3.5", "gpt-oss"])
def test_they_are_the_reference_of_a_pair(name, measured):
    base, _, found = measured(name)
    options = {"tokens": TOKENS, "ranks": [2], "groups": 1, "progress": False}
    result = analyze_pair(base.inner, changed(base.inner), gradient=found, **options)
    writes = result.table[result.table["pathway"] == "write"]
    assert writes["gradient_excess"].notna().all()
    assert "weighted" in set(result.nulls["null"])
