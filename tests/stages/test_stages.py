"""Chains of stages: the ledger on models, files and the way there and back."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.listing import check_listed
from tl_asymmetry import ModelView
from tl_asymmetry.cli import main
from tl_asymmetry.results.result import load
from tl_asymmetry.stages.analysis import analyze_stages
from tl_asymmetry.stages.result import LEDGER_COLUMNS, StageAnalysis


def chain(kind=tiny.KINDS[-1], architecture="llama", dtype=torch.float64):
    return {
        name: tiny.build(architecture, kind, dtype, delta=d)
        for name, d in (("base", 0.0), ("sft", 0.02), ("dpo", 0.05))
    }


@pytest.fixture(scope="module")
def analysis():
    return analyze_stages(chain(), tokens=tiny.tokens(3, 8), progress=False)


def test_rows_and_numbers_are_those_of_the_weights(analysis):
    assert list(analysis.table.columns) == list(LEDGER_COLUMNS)
    heads = 2 * (4 + 2 + 2 + 4 + 3)  # W_Q, W_K, W_V, W_O, three matrices of the MLP, two layers
    assert len(analysis.table) == 2 * heads
    assert len(analysis.pairs) == heads
    views = {name: ModelView(model) for name, model in chain().items()}
    for row in analysis.table.sample(12, random_state=0).to_dict("records"):
        W = [view.weight(row["layer"], row["matrix"]) for view in views.values()]
        W = W if pd.isna(row["head"]) else [w[int(row["head"])] for w in W]
        Δ = [W[1] - W[0], W[2] - W[1]]
        i = ["sft", "dpo"].index(row["stage"])
        assert row["norm"] == pytest.approx(Δ[i].norm().item(), rel=1e-9)
        assert row["relative_norm"] == pytest.approx((Δ[i].norm() / W[0].norm()).item(), rel=1e-9)
        inner = (Δ[0] * Δ[1]).sum().item()
        assert row["kept"] == pytest.approx(1 + inner / Δ[i].norm().item() ** 2, rel=1e-8)
        assert row["undone"] == pytest.approx(max(0.0, -inner) / Δ[0].norm().item() ** 2 if i == 0 else 0.0, abs=1e-9)
        assert row["total_norm"] == pytest.approx((W[2] - W[0]).norm().item(), rel=1e-8)
        assert row["rounding"] == 0
    pair = analysis.pairs[analysis.pairs["matrix"] == "W_O"].iloc[0]
    assert pair["overlap_expected"] == 4 / tiny.D_MODEL
    assert pair["cosine_unrounded"] == pair["cosine"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_there_and_back(kind):
    base, aligned = (tiny.build("gpt2", kind, delta=delta) for delta in (0.0, 0.05))
    found = analyze_stages({"A": base, "B": aligned, "again": base}, progress=False)
    of = {stage: rows for stage, rows in found.table.groupby("stage")}
    np.testing.assert_allclose(of["B"]["kept"], 0, atol=1e-9)
    np.testing.assert_allclose(of["B"]["undone"], 1, atol=1e-9)
    np.testing.assert_allclose(found.pairs["cosine"], -1, atol=1e-9)
    assert "keeps 0.0%" in found.summary()
    assert found.pooled("matrix")["kept"].abs().max() < 1e-9


def test_files_give_what_loaded_models_give(tmp_path):
    folders = {name: tiny.hf_directory("llama", 0, d) for name, d in (("base", 0.0), ("sft", 0.02), ("dpo", 0.05))}
    models = chain(dtype=torch.float32)
    loaded = analyze_stages(models, matrices=["W_Q", "W_out"], progress=False)
    for mixed in (folders, {**folders, "base": models["base"]}):
        found = analyze_stages(mixed, matrices=["W_Q", "W_out"], progress=False)
        pd.testing.assert_frame_equal(found.table, loaded.table)
    run = analyze_stages({**folders, "base": models["base"]}, matrices=["W_Q"], tokens=tiny.tokens(), progress=False)
    assert (run.predictions["kl"] > 0).all()
    alone = {**folders, "dpo": load_file(folders["dpo"] / "model.safetensors")}
    with pytest.raises(ValueError, match="expected an aligned model that can be run, got weights alone"):
        analyze_stages(alone, tokens=tiny.tokens(), progress=False)


def test_predictions_of_every_two(analysis):
    assert analysis.predictions[["first", "second"]].to_numpy().tolist() == [
        ["base", "sft"], ["base", "dpo"], ["sft", "dpo"],
    ]  # fmt: skip
    assert (analysis.predictions["kl"] > 0).all()
    ce = analysis.predictions.set_index(["first", "second"])
    assert ce.loc[("base", "sft"), "ce_second"] == pytest.approx(ce.loc[("sft", "dpo"), "ce_first"], rel=1e-9)


def test_it_is_saved_loaded_and_shown(analysis, tmp_path):
    check_listed(analysis)
    again = load(analysis.save(tmp_path / "stages"))
    assert isinstance(again, StageAnalysis)
    pd.testing.assert_frame_equal(again.table, analysis.table)
    assert again.summary() == analysis.summary()
    page = analysis.to_html(tmp_path / "stages.html").read_text(encoding="utf-8")
    for words in ("What became of each stage", "How alike the stages are", "Storage noise"):
        assert words in page
    assert len(analysis.plot_flow().data) == 2 * 3
    assert analysis.top(3)["undone"].is_monotonic_decreasing


def test_bad_input_is_refused():
    models = chain(dtype=torch.float32)
    for stages, message in [
        ({"base": models["base"]}, "expected a mapping from names to models, 2 to 6 .* got 1 stages"),
        (list(models.values()), "expected a mapping from names to models, .* got list"),
        ({"a": models["base"], "b": tiny.build("gpt2", tiny.KINDS[-1])}, "expected two models of one architecture"),
    ]:
        with pytest.raises(ValueError, match=message):
            analyze_stages(stages, progress=False)
    with pytest.raises(ValueError, match="expected matrices among W_Q, .* got 'W_X'"):
        analyze_stages(models, matrices="W_X", progress=False)
    with pytest.raises(ValueError, match="expected a rank from 1 to 47, got 48"):
        analyze_stages(models, rank=48, progress=False)


def test_the_command(tmp_path, capsys):
    named = [f"{name}={tiny.hf_directory('llama', 0, d)}" for name, d in (("base", 0.0), ("sft", 0.02), ("dpo", 0.05))]
    assert main(["stages", *named, "--matrices", "W_Q", "W_out", "--out", str(tmp_path / "out")]) == 0
    assert "StageAnalysis: base → sft → dpo" in capsys.readouterr().out
    again = load(tmp_path / "out")
    assert set(again.table["matrix"]) == {"W_Q", "W_out"}
    for bad in (["base"], ["base=x", "base=y"]):
        assert main(["stages", *bad, "--out", str(tmp_path / "bad")]) == 2
        assert "expected stages as NAME=MODEL, each name once, got " in capsys.readouterr().err
