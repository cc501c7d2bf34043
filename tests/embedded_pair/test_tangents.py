"""The study of arXiv 2604.08764 on tiny trainings: reproducible, and its tables add up."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pandas as pd
import pytest
import torch

from benchmarks.embedded_pair import tangents as study
from benchmarks.embedded_pair.replication import (
    replication_claims,
    replication_frequency,
    replication_strata,
    replication_table,
)
from benchmarks.embedded_pair.tangents import TangentRecipe, tangent_checkpoints, tangent_study, tangent_windows
from tl_asymmetry import ModelView, TangentAnalysis

SMALL = TangentRecipe(
    n_layers=1, window=24, batch=4, steps=10, kept=(0, 10), warmup=2, analyzed=24, rank=4, starts=1, sample_rows=200
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """What the command prints for a small recipe, and the folder it leaves."""
    out, printed = tmp_path_factory.mktemp("study") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(study, "RECIPES", dict.fromkeys(study.ARCHITECTURES, SMALL))
        patch.setattr(TangentAnalysis, "_figures", lambda self: [])  # drawn in tests/tangents
        study.main(["--seeds", "2", "--workers", "1", "--out", str(out)])
    return printed.getvalue(), out


@pytest.fixture(scope="module")
def runs(command):
    return {(a, seed): TangentAnalysis.load(command[1] / f"{a}-{seed}") for a in study.ARCHITECTURES for seed in (0, 1)}


@pytest.mark.parametrize("architecture", study.ARCHITECTURES)
def test_one_seed_gives_one_training(architecture, unchecked_types):
    before = torch.random.get_rng_state()
    weights = [ModelView(tangent_checkpoints(architecture, seed, SMALL)[10]()).weight(0, "W_Q") for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_windows_are_held_out_and_of_one_length():
    windows = tangent_windows(SMALL)
    assert windows.shape == (24, 24)
    assert torch.equal(windows, tangent_windows(SMALL))
    trained = next(study._windows("tangents:0", "train", SMALL))
    assert not any(torch.equal(trained, window) for window in windows)


def test_replication_is_the_mean_of_the_runs(runs):
    table = replication_table(runs)
    assert len(table) == 2 * 2 * 2 * 2  # models, gradients, methods, phases
    row = table.query("model == 'encoder' and gradient == 'weight' and method == 'pca' and phase == 'late'").iloc[0]
    medians = []
    for seed in (0, 1):
        rows = runs["encoder", seed].table.query("gradient == 'weight' and method == 'pca' and phase == 'late'")
        medians.append(rows[rows["head"].isna()]["excess"].median())
    assert row["excess"] == pytest.approx(sum(medians) / 2)
    assert row["± seeds"] == pytest.approx(abs(medians[0] - medians[1]) / 2**0.5)
    strata = replication_strata(runs)
    assert len(strata) == 2 * 2 * 5
    assert strata.groupby(["model", "method"])["stratum"].apply(list).map(lambda s: s == [1, 2, 3, 4, 5]).all()
    frequency = replication_frequency(runs)
    assert (frequency["min"] <= frequency["pearson"]).all()
    claims = replication_claims(runs)
    assert len(claims) == 4
    ratio = [
        (runs["decoder", s].table.query("gradient == 'weight' and method == 'pca' and head.isna()")
         .groupby("phase")["ratio"].median() > 1).all()
        for s in (0, 1)
    ]  # fmt: skip
    assert f"more energy than the normal controls in PCA {sum(ratio)}/2" in claims[0]


def test_the_command(command, runs):
    printed, out = command
    for words in ("Energy and anisotropy, means over 2 seeds", "rarest fifth", *replication_claims(runs)):
        assert words in printed
    assert (out / "encoder-0" / "report.html").is_file()
    keys = ["model", "gradient", "method", "phase"]
    written, again = (t.set_index(keys).sort_index() for t in (pd.read_csv(out / "table.csv"), replication_table(runs)))
    pd.testing.assert_frame_equal(written, again, check_index_type=False)


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="expected architecture 'decoder' or 'encoder'"):
        tangent_checkpoints("both", 0)
    with pytest.raises(ValueError, match="expected seeds >= 1 and workers >= 1"):
        tangent_study(0, folder=tmp_path)
