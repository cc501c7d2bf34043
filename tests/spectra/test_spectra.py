"""`analyze_spectra` against the definitions written out, on every source of weights, with planted answers."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tests.oracles.naive_spectra import matrix_numbers
from tl_asymmetry import ModelView, SpectralAnalysis, analyze_spectra, load
from tl_asymmetry.cli import main
from tl_asymmetry.demo import demo_gpt2, demo_pair
from tl_asymmetry.geometry.nulls import adjusted_p
from tl_asymmetry.spectra.result import SPECTRAL_COLUMNS


@pytest.fixture(scope="module")
def pair():
    return demo_pair("bridge")


@pytest.fixture(scope="module")
def result(pair) -> SpectralAnalysis:
    return analyze_spectra(*pair, ranks=[1, 4], progress=False)


def at(result: SpectralAnalysis, **where: object) -> pd.DataFrame:
    rows = result.table
    for name, value in where.items():
        rows = rows[rows[name].isna() if value is None else rows[name] == value]
    return rows


@pytest.mark.parametrize(
    ("layer", "matrix", "head"), [(0, "W_Q", 2), (1, "W_O", 3), (3, "W_in", None), (2, "W_out", None)]
)
def test_every_number_against_the_definition(pair, result, layer, matrix, head):
    W, other = (ModelView(model).weight(layer, matrix).detach() for model in pair)
    if head is not None:
        W, other = W[head], other[head]
    for rank in (1, 4):
        row = at(result, layer=layer, matrix=matrix, head=head, rank=rank).iloc[0]
        expected = matrix_numbers(W, other.double() - W.double(), rank)
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_table_has_its_columns_and_q_counts_heads_of_one_matrix_and_rank(result):
    assert list(result.table.columns) == list(SPECTRAL_COLUMNS)
    assert len(result.table) == 4 * 2 * (4 * 4 + 2)
    block = at(result, matrix="W_Q", rank=4)
    assert block["on_principal_q"].to_numpy() == pytest.approx(adjusted_p(block["on_principal_p"].to_numpy()))
    assert (result.table["changed_share"] > 0.99).all()
    assert (result.table["rounding_share"] == 0).all()


def with_changes(change) -> dict[str, torch.Tensor]:
    """A state dict of the embedded base with ΔW = change(matrix, W) added to every matrix; W has its heads first."""
    base = ModelView(demo_pair("bridge")[0])
    state = {}
    for layer in range(base.n_layers):
        for matrix in base.matrices:
            W = base.weight(layer, matrix).detach().double()
            part = "attn" if W.ndim == 3 else "mlp"
            heads = W if W.ndim == 3 else W[None]
            changed = (heads + change(matrix, heads)).float()
            state[f"blocks.{layer}.{part}.{matrix}"] = changed if W.ndim == 3 else changed[0]
    return state | {name: tensor.detach().clone() for name, tensor in base.headless(include_tied=True).items()}


ONE_OF_EACH = {"matrices": ["W_Q", "W_O", "W_in", "W_out"], "ranks": [4], "progress": False}
"""Heads that read and that write, and the same of an MLP."""


def between(W, first):
    """A delta of 1 % of W between the singular vectors first … first + 1 on both sides."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    ΔW = U[..., first : first + 2] @ Vh[..., first : first + 2, :]
    return 0.01 * ΔW * (W.flatten(1).norm(dim=1) / ΔW.flatten(1).norm(dim=1))[:, None, None]


def test_planted_deltas_are_found_at_their_places(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a state dict may say that it cannot tell processing
        on, off = (
            analyze_spectra(pair[0], with_changes(lambda _, W, i=first: between(W, i)), **ONE_OF_EACH).table
            for first in (0, 8)
        )
    assert (on["on_principal"] > 0.999).all()
    assert (on["on_principal_q"] < 1e-3).all()
    assert (off["on_principal"] < 1e-3).all()
    assert (off["on_principal_q"] > 0.99).all()


def test_chance_is_chance(pair):
    generator = torch.Generator().manual_seed(0)

    def noise(_, W):
        return 0.01 * torch.randn(W.shape, generator=generator, dtype=torch.float64) * W.square().mean().sqrt()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = analyze_spectra(pair[0], with_changes(noise), ranks=[4], progress=False).table
    assert table["on_principal_relative"].mean() == pytest.approx(1, abs=0.12)
    assert table["coupling"].mean() == pytest.approx(1, abs=0.12)
    assert (table["on_principal_p"] < 0.05).mean() < 0.15
    for side in ("left", "right"):
        assert table[f"rotation_{side}"].sum() == pytest.approx(table[f"rotation_{side}_expected"].sum(), rel=0.15)


def test_weight_decay_alone_is_on_principal_and_nothing_without_it(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = analyze_spectra(pair[0], with_changes(lambda _, W: -0.01 * W), **ONE_OF_EACH).table
    assert (table["on_principal_relative"] > 1).all()
    assert table["drift"].to_numpy() == pytest.approx(0.01, rel=1e-3)
    assert (table[["rotation_left", "rotation_right"]] < 1e-6).all(axis=None)


def test_folders_give_the_numbers_of_loaded_models(result, tmp_path):
    for name in ("base", "dpo"):
        demo_gpt2(name).save_pretrained(tmp_path / name)
    matrices = ["W_K", "W_out"]
    read = analyze_spectra(tmp_path / "base", str(tmp_path / "dpo"), matrices=matrices, ranks=[1, 4], progress=False)
    expected = result.table[result.table["matrix"].isin(matrices)].reset_index(drop=True)
    pd.testing.assert_frame_equal(read.table, expected, rtol=1e-5, atol=1e-9)
    assert not any(str(tmp_path) in note for note in read.notes)


def test_an_adapter_is_measured_by_its_factors(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = tiny.hf_directory("llama")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    factored = analyze_spectra(folder, tmp_path / "adapter", ranks=[2], progress=False).table
    merged = analyze_spectra(folder, tmp_path / "merged", ranks=[2], progress=False).table
    changed = merged["matrix"].isin(["W_Q", "W_O", "W_in", "W_out"])
    by_storage = ["changed_share", "changed_expected", "changed_relative", "rounding_share"]
    by_draws = [c for c in merged.columns if c.endswith("_expected")]  # factors are turned by their own draws
    exact = [c for c in merged.columns if c not in (*by_storage, *by_draws)]
    pd.testing.assert_frame_equal(factored.loc[changed, exact], merged.loc[changed, exact], rtol=2e-3, atol=1e-5)
    assert factored["changed_share"].isna().all()
    assert (factored.loc[changed, "rounding_share"] == 0).all()


@pytest.mark.parametrize(("architecture", "module", "matrix", "column"), [
    ("gpt2", "mlp.c_fc", "W_in", "intruders"),  # Conv1D stores W as y = x W does
    ("llama", "mlp.up_proj", "W_in", "intruders_right"),  # nn.Linear stores its transpose
])  # fmt: skip
def test_intruders_are_those_of_peft(architecture, module, matrix, column, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    from transformers import AutoModelForCausalLM

    folder = tiny.hf_directory(architecture)
    name = module.rpartition(".")[2]
    config = peft.LoraConfig(r=4, lora_alpha=24, target_modules=[name], init_lora_weights=False,
                             fan_in_fan_out=architecture == "gpt2")  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    tuned.save_pretrained(tmp_path)
    said = io.StringIO()
    with redirect_stdout(said):
        reduce_intruder_dimension(tuned, top_k=10, threshold_epsilon=0.5)
    found = re.findall(r"No intruders|Intruders: \d+", said.getvalue())
    theirs = [0 if one.startswith("No") else int(one.removeprefix("Intruders: ")) for one in found]
    ours = analyze_spectra(folder, tmp_path, matrices=[matrix], ranks=[10], progress=False).table
    assert ours[column].tolist() == theirs
    assert sum(theirs) > 0


def test_bf16_weights_say_how_much_is_rounding(tmp_path):
    for name in ("base", "dpo"):
        demo_gpt2(name).bfloat16().save_pretrained(tmp_path / name)
    table = analyze_spectra(tmp_path / "base", tmp_path / "dpo", matrices=["W_Q", "W_out"], progress=False).table
    assert table["rounding_share"].between(0.001, 0.99).all()
    assert table["changed_share"].between(0.2, 0.999).all()
    # DPO moves every entry: what does not show in bf16 is small, not absent.
    assert table["changed_relative"].to_numpy() == pytest.approx(1, rel=0.1)


def test_identical_models_are_a_result_with_a_warning(pair):
    with pytest.warns(UserWarning, match="identical, weight for weight"):
        result = analyze_spectra(pair[0], pair[0], matrices=["W_V"], progress=False)
    assert result.table["on_principal"].isna().all()
    assert "Every delta is zero" in result.summary()


def test_ranks_that_fit_no_axis_are_refused_and_some_are_noted(pair):
    for ranks in ([0], [64], 64, []):
        with pytest.raises(ValueError, match=r"expected ranks from 1 to 63, got .*; pass a list of ranks"):
            analyze_spectra(*pair, ranks=ranks, progress=False)
    for ranks in ([1.5], "4", True, object()):
        with pytest.raises(
            ValueError, match="expected ranks as a whole number, or several, got .*; pass ranks from 1 to"
        ):
            analyze_spectra(*pair, ranks=ranks, progress=False)
    result = analyze_spectra(*pair, matrices=["W_K", "W_out"], ranks=[4, 32], progress=False)
    assert sorted(at(result, matrix="W_K")["rank"].unique()) == [4]
    assert any("W_K has a shorter axis of 16: no row at rank 32" in note for note in result.notes)


def test_models_of_other_shapes_and_unknown_matrices_are_refused(pair):
    with pytest.raises(ValueError, match="expected two models of one architecture"):
        analyze_spectra(pair[0], tiny.hf_directory("gpt2"), progress=False)
    with pytest.raises(ValueError, match="expected matrices among"):
        analyze_spectra(*pair, matrices=["W_X"], progress=False)


def test_seeds_decide_and_the_global_state_stays(pair):
    before = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    tables = [analyze_spectra(*pair, matrices=["W_Q"], ranks=[4], seed=s, progress=False).table for s in (0, 0, 1)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]  # noqa: NPY002


def test_a_result_is_saved_reported_and_drawn(result, tmp_path: Path):
    check_listed(result)
    result.save(tmp_path)
    assert load(tmp_path).table.equals(result.table)
    page = result.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "On-principal share" in page
    for value in ("on_principal_relative", "coupling", "changed_relative"):
        figure = result.plot_heads("W_O", value=value, rank=1)
        shown = [trace.name for trace in figure.data if trace.type == "heatmap" and trace.visible]
        assert shown == [value]
    with pytest.raises(ValueError, match="expected"):
        result.plot_heads("W_O", value="nothing")
    top = result.top(3, matrix="W_in")
    assert list(top["on_principal_relative"]) == sorted(top["on_principal_relative"], reverse=True)
    with pytest.raises(ValueError, match="expected by among"):
        result.top(by="nothing")


def test_the_command_reads_two_folders(result, tmp_path, capsys):
    for name in ("base", "dpo"):
        demo_gpt2(name).save_pretrained(tmp_path / name)
    arguments = ["spectra", str(tmp_path / "base"), str(tmp_path / "dpo"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--ranks", "4", "--matrices", "W_O"]) == 0
    assert "of 16 hold more on them than that (q ≤ 0.05)" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()
    expected = at(result, matrix="W_O", rank=4)["on_principal"].to_numpy()
    assert SpectralAnalysis.load(tmp_path / "out").table["on_principal"].to_numpy() == pytest.approx(expected, rel=1e-5)
    assert main([*arguments, "--ranks", "64"]) == 2
    assert "expected ranks from 1 to 63" in capsys.readouterr().err
