"""The study of couplings: windows, ratios, peaks, and what a random direction gives."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from tests.listing import check_listed
from tests.oracles.reference import float64
from tl_asymmetry import CouplingStudy, direction_coupling
from tl_asymmetry.coupling import BlockTrajectory, GrokTrajectory, centroid_response, coupling_sensitivity
from tl_asymmetry.coupling.analysis import window_rows
from tl_asymmetry.demo import demo_model
from tl_asymmetry.grokking import Recipe, train
from tl_asymmetry.results.result import load

SMALL = {"d_model": 16, "d_mlp": 32}


@pytest.fixture(scope="module")
def run():
    return train(("add", "sub"), p=11, seed=3, recipe=Recipe(steps=120, every=10), sizes=SMALL)


PROBES = 192
"""Of 242 pairs: the definitions hold for any; that 1,024 are taken by default is held below."""


@pytest.fixture(scope="module")
def small(run):
    return GrokTrajectory(run, probes=PROBES)


@pytest.fixture(scope="module")
def study(small):
    options = {"windows": (4, 1), "alignments": ("backward", "forward"), "checkpoints": 5, "draws": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return direction_coupling(small, **options, maximum=True)


def test_a_row_equals_the_definition(run, study):
    """One cell of the table from first principles: NumPy's SVD of the right rows, explicit responses."""
    step, index = 60, 6
    θ = [
        np.concatenate([float64(w).ravel() for n, w in run.weights(step=s).items() if ".attn.W_" in n])
        for s in run.steps
    ]
    names = [n for n in run.weights(step=0) if ".attn.W_" in n]
    order = list(run.model(step=0).attention_parameters())
    assert sorted(names) == sorted(order)
    θ = [np.concatenate([float64(run.weights(step=s)[n]).ravel() for n in order]) for s in run.steps]
    windows = {
        "backward": np.stack([θ[i + 1] - θ[i] for i in range(index - 4, index)]),
        "forward": np.stack([θ[i + 1] - θ[i] for i in range(index, index + 4)]),
    }
    probes = run.task.sample(PROBES, seed=100)
    for alignment, rows in windows.items():
        V = torch.from_numpy(np.linalg.svd(rows, full_matrices=False)[2][:3]).float()
        A = centroid_response(run.model(step=step), probes, V, targets=run.task.targets(probes)[:, 1] + 11)
        table = study.table.query("step == @step and objective == 'sub' and estimator == 'update' and window == 4")
        table = table[table["alignment"] == alignment]
        np.testing.assert_allclose(table["response"], float64(A), rtol=2e-3)
        level = study.levels.query("step == @step and objective == 'sub'")["random_median"].item()
        np.testing.assert_allclose(table["ratio"], table["response"] / level)
        np.testing.assert_allclose(table["singular_value"], np.linalg.svd(rows, compute_uv=False)[:3], rtol=1e-4)


def test_gradient_rows_are_gradients_of_their_own_objective(run, study):
    """W = 1: the direction is the gradient itself, so its response can be had without any SVD."""
    batch, probes = run.task.sample(512, seed=0), run.task.sample(PROBES, seed=100)
    for head in range(2):
        op = run.task.names[head]  # noqa: F841 - read by the query below
        model = run.model(step=90)
        loss = torch.nn.functional.cross_entropy(model(batch)[:, head], run.task.targets(batch)[:, head])
        parameters = list(model.attention_parameters().values())
        g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters)])
        A = centroid_response(
            model, probes, (g / g.norm())[None], targets=run.task.targets(probes)[:, head] + 11 * head
        )
        row = study.table.query(
            "step == 90 and objective == @op and estimator == 'gradient' and window == 1 and alignment == 'backward'"
        )
        assert row["response"].item() == pytest.approx(A.item(), rel=1e-4)
        assert row["singular_value"].item() == pytest.approx(g.norm().item(), rel=1e-5)


def test_nothing_exceeds_the_largest_response(study):
    assert (study.table["share_of_max"] <= 1 + 2e-2).all()
    assert (study.levels["random_high"] <= study.levels["largest"]).all()
    assert (study.levels["trace"] > study.levels["largest"] * 0.5).all()


def test_windows():
    rows = torch.arange(10.0)[:, None]

    def held(*arguments, **keywords):
        return window_rows(rows, *arguments, **keywords)[:, 0].tolist()

    assert held(6, 3, "backward", differences=False) == [4, 5, 6]
    assert held(1, 3, "backward", differences=False) == [0, 1]
    assert held(6, 3, "backward", differences=True) == [3, 4, 5]  # row 5 leads from checkpoint 5 to 6
    assert held(0, 3, "backward", differences=True) == []
    assert held(6, 3, "forward", differences=False) == [6, 7, 8]
    assert held(9, 3, "forward", differences=False) == [7, 8, 9]  # moved back to fit
    assert held(10, 3, "forward", differences=True) == [7, 8, 9]
    assert held(2, 99, "forward", differences=False) == list(range(10))


def test_table_has_a_row_for_everything(study):
    table = study.table
    assert table["step"].unique().tolist() == [0, 30, 60, 90, 120]
    assert set(table["estimator"]) == {"update", "gradient"}
    late = table[table["step"] > 30]
    sizes = late.groupby(["step", "objective", "estimator", "alignment", "window"]).size().unstack()
    assert (sizes[4] == 3).all()
    assert (sizes[1] == 1).all()
    # the first checkpoint has no update behind it
    assert table.query("step == 0 and estimator == 'update' and alignment == 'backward'").empty
    assert table.query("step == 30 and alignment == 'backward' and estimator == 'update' and window == 4")[
        "rows"
    ].unique().tolist() == [3]


def test_peaks_are_maxima_over_full_windows(study):
    means = study.mean_ratios
    peak = study.peaks.set_index(["objective", "estimator", "window", "alignment"])
    curve = means.query("objective == 'add' and estimator == 'gradient' and window == 4 and alignment == 'backward'")
    assert curve["directions"].tolist() == [1, 3, 3, 3, 3]  # one gradient at step 0, four at step 30
    row = peak.loc[("add", "gradient", 4, "backward")]
    assert row["mean_ratio"] == curve["mean_ratio"][curve["directions"] == 3].max()
    block = study.table.query("objective == 'add' and estimator == 'gradient' and window == 4 and step == 60")
    block = block[block["alignment"] == "backward"]
    assert curve.set_index("step").loc[60, "mean_ratio"] == pytest.approx(block["ratio"].mean())


def test_a_random_direction_has_ratio_one(run):
    """Median of draws against one more draw: 1 within the scatter of both."""
    from tl_asymmetry.coupling.response import CentroidProblem, random_directions

    probes = run.task.sample(64, seed=0)
    problem = CentroidProblem(run.model(step=120), probes, targets=run.task.targets(probes)[:, 0])
    A = problem.exact(random_directions(200, problem.θ.size, seed=1))
    ratios = A[20:] / A[:20].quantile(0.5)
    scatter = (A.std() / A.mean()).item()
    assert abs(ratios.mean().item() - 1) < 4 * scatter * (1.25 / 20**0.5 + 1 / 180**0.5)


def test_shared_or_fresh_draws(small):
    shared = direction_coupling(small, windows=(2,), checkpoints=3, draws=3, fresh=False, rank=1)
    fresh = direction_coupling(small, windows=(2,), checkpoints=3, draws=3, rank=1)
    again = direction_coupling(small, windows=(2,), checkpoints=3, draws=3, rank=1)
    pd.testing.assert_frame_equal(fresh.table, again.table)
    assert not np.allclose(shared.levels["random_median"], fresh.levels["random_median"])
    np.testing.assert_allclose(shared.table["response"], fresh.table["response"])


def test_finite_difference_agrees(small):
    keywords = {"windows": (3,), "checkpoints": 3, "draws": 5}
    exact = direction_coupling(small, **keywords)
    steps = direction_coupling(small, method="finite_difference", epsilon=3e-4, **keywords)
    # The error falls as ε²: along the gradient of this run ε = 0.003 is off by 25 %, and 0.001 by 3 %.
    np.testing.assert_allclose(steps.table["ratio"], exact.table["ratio"], rtol=0.01)


def test_sensitivity(run, small):
    table = coupling_sensitivity(small, step=120, window=3, epsilons=(0.0003, 0.05), seeds=(0, 1), draws=8)
    assert len(table) == 2 * 2 * 3
    fine = table[table["epsilon"] == 0.0003].set_index(["objective", "seed"])["mean_ratio"]
    exact = table[table["method"] == "exact"].set_index(["objective", "seed"])["mean_ratio"]
    np.testing.assert_allclose(fine, exact, rtol=0.01)
    other = GrokTrajectory(run, probes=PROBES, probe_seed=7)
    other = coupling_sensitivity(other, step=120, window=3, epsilons=(), seeds=(0,), draws=8)
    assert not np.allclose(other["mean_ratio"], exact.xs(0, level="seed"))
    with pytest.raises(ValueError, match="expected a step with a checkpoint, got 7"):
        coupling_sensitivity(run, step=7)


def test_saves_loads_and_speaks(study, tmp_path):
    check_listed(study)
    study.save(tmp_path / "study")
    again = load(tmp_path / "study")
    assert isinstance(again, CouplingStudy)
    for name in CouplingStudy.TABLES:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(study, name), check_dtype=False)
    assert "Directions and centroids: add + sub modulo 11, seed 3" in study.summary()
    page = study.to_html(tmp_path / "study.html").read_text()
    for words in ("Couplings along the run", "Does the window matter?", "share_of_max"):
        assert words in page
    assert study._repr_html_().startswith("<div>")


@pytest.mark.parametrize("kind", ["auto", "bridge"])
def test_language_model(kind):
    checkpoints = {step: demo_model(f"step{step}", kind) for step in (400, 0, 50, 150)}
    tokens = torch.randint(5, 90, (4, 10), generator=torch.Generator().manual_seed(0))
    study = direction_coupling(BlockTrajectory(checkpoints, tokens, layer=1), windows=(2,), rank=2, draws=4)
    assert study.table["step"].unique().tolist() == [0, 50, 150, 400]
    assert (study.table["ratio"] > 0).all()
    assert study.accuracy.empty
    assert "attention of layer 1" in study.summary()
    assert study.plot_time().layout.yaxis.title.text == "mean ratio R̄"
    assert study.config["parameters"] == 4 * 64 * 64


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"estimators": ("weights",)}, r"expected estimators out of update, gradient, got \['weights'\]"),
        ({"alignments": ()}, "expected alignments out of backward, forward"),
        ({"method": "guess"}, "expected method out of exact, finite_difference"),
        ({"windows": (0,)}, "expected windows >= 1, got 0"),
        ({"windows": ()}, "expected windows >= 1, got 0"),
        ({"draws": 10**12}, "expected draws from 1 to 100,000, got 1000000000000; pass draws=20"),
        ({"rank": 0}, "expected rank >= 1, got 0"),
    ],
)
def test_bad_input(run, keywords, message):
    with pytest.raises(ValueError, match=message):
        direction_coupling(run, **keywords)


def test_bad_sources(run):
    with pytest.raises(ValueError, match="expected a GrokRun or a trajectory, got int"):
        direction_coupling(3)
    bare = train("add", p=7, seed=0, recipe=Recipe(steps=2, every=1), sizes=SMALL, keep_checkpoints=False)
    with pytest.raises(ValueError, match="expected a run with two checkpoints or more, got 0"):
        direction_coupling(bare)
    with pytest.raises(ValueError, match="expected two checkpoints or more, got 1"):
        BlockTrajectory({0: None}, torch.zeros(1, 3, dtype=torch.int64), layer=0)


def test_a_window_longer_than_the_run_is_said(run):
    with pytest.warns(UserWarning, match="expected 99 rows for a window, got 12 in all"):
        study = direction_coupling(run, windows=(99,), checkpoints=2, draws=2)
    assert len(study.notes) == 1
    published = {"probes": 1024, "probe_seed": 100, "gradient_batch": 512, "gradient_seed": 0, "centroid": "logit"}
    assert published.items() <= study.config["trajectory"].items()
