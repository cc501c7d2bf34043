"""The graded control: copies, equal data, resumed after a kill, and tables that say what the parts say."""

import functools
import inspect

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tl_asymmetry import ControlStudy, ModelView, analyze_pair, contrastive_control, gradient_covariance
from tl_asymmetry.control.table import CONTROL_COLUMNS, CORRELATION_COLUMNS
from tl_asymmetry.objectives import DPO, CrossEntropy, InfoNCE, Optimizer, PreferenceBatch, TokenBatch
from tl_asymmetry.plots import grades_figure
from tl_asymmetry.results.result import load
from tl_asymmetry.store import StoreReader
from tl_asymmetry.training.data import rebatched, shuffled
from tl_asymmetry.training.runs import distance, train, trainable_copy

FAST = Optimizer(lr=1e-3, warmup=2)
MATRICES = ["W_Q", "W_O", "W_out"]


@functools.cache
def model(kind=tiny.KINDS[0]):
    return tiny.build("gpt2", kind)


def pairs(rows=12, seed=0):
    tokens = [tiny.tokens(rows, n, seed + n) for n in (12, 10)]
    masks = [torch.arange(t.shape[1]).expand_as(t) >= 4 for t in tokens]
    return PreferenceBatch(*(TokenBatch(t, m) for t, m in zip(tokens, masks, strict=True)))


def objectives():
    return {"sharp": CrossEntropy(), "soft": CrossEntropy(8.0), "contrast": InfoNCE(0.2), "preference": DPO(model())}


def run(chosen=None, **options):
    options = {"steps": 3, "seeds": [0, 1], "batch_size": 4, "optimizer": FAST, "ranks": [1, 4], "progress": False,
               "matrices": MATRICES, "gradient_rows": 8} | options  # fmt: skip
    return contrastive_control(model(), chosen or objectives(), [pairs()], **options)


@functools.cache
def study():
    return run()


def same(a, b):
    for name in ControlStudy.TABLES:
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), obj=name)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_copy_is_trained_and_the_model_is_untouched(kind):
    origin = tiny.build("gpt2", kind)
    origin.train()
    next(origin.parameters()).requires_grad_(False)
    before = [p.detach().clone() for p in origin.parameters()]
    view = ModelView(origin)
    view.run(tiny.tokens(), logits=True)  # the Bridge then holds a pattern with its graph
    state = torch.random.get_rng_state()
    policy = trainable_copy(origin)
    result = train(
        policy, origin, CrossEntropy(), shuffled([pairs().chosen], 4, seed=0), steps=3, optimizer=FAST,
        matrices=view.matrices,
    )  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(origin.parameters(), before, strict=True))
    assert [p.requires_grad for p in origin.parameters()] == [False] + [True] * (len(before) - 1)
    assert all(p.grad is None for p in origin.parameters())
    assert origin.training
    assert torch.equal(state, torch.random.get_rng_state())
    trained = ModelView(policy)
    assert all(distance(trained, view, [matrix]) > 0 for matrix in view.matrices)
    assert result.distances[-1] == pytest.approx(distance(trained, view, view.matrices))
    assert len(result.losses) == len(result.distances) == 3


def test_training_is_adamw_with_warm_up_and_clipping():
    """Against a loop written out with plain autograd on the same batches."""
    origin = tiny.build("gpt2", tiny.KINDS[0], torch.float64)
    policy, other = trainable_copy(origin), trainable_copy(origin)
    settings = Optimizer(lr=2e-3, warmup=4, betas=(0.8, 0.9), weight_decay=0.1, clip=0.05)
    batches = list(b for b, _ in zip(shuffled([pairs().chosen], 4, seed=3), range(5), strict=False))
    matrices = ModelView(origin).matrices
    train(policy, origin, CrossEntropy(), iter(batches), steps=5, optimizer=settings, matrices=matrices)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in other.parameters()]
    view = ModelView(other)
    for step, batch in enumerate(batches, start=1):
        with view.evaluating():
            loss = CrossEntropy()(view, batch)
        gradients = torch.autograd.grad(loss, list(other.parameters()), allow_unused=True)
        norm = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
        lr = 2e-3 * min(1, step / 4)
        with torch.no_grad():
            for p, g, (m, v) in zip(other.parameters(), gradients, moments, strict=True):
                if g is None:
                    continue
                g = g * min(1, 0.05 / (norm + 1e-6))
                m.mul_(0.8).add_(0.2 * g)
                v.mul_(0.9).add_(0.1 * g * g)
                p.mul_(1 - lr * 0.1)
                p.sub_(lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8))
    for p, q in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("unchecked_types")
def test_training_refusals():
    with pytest.raises(ValueError, match="expected float32 or float64 weights to train, got torch.bfloat16"):
        trainable_copy(tiny.build("gpt2", tiny.KINDS[0], torch.bfloat16))
    with pytest.raises(ValueError, match="expected lr > 0"):
        Optimizer(lr=0.0)

    class Failing(CrossEntropy):
        def __call__(self, model, batch):
            return super().__call__(model, batch) * torch.nan

    with pytest.raises(ValueError, match="expected a finite loss, got nan at step 0; pass a smaller lr"):
        train(
            trainable_copy(model()), model(), Failing(), shuffled([pairs().chosen], 4, seed=0), steps=2,
            optimizer=FAST, matrices=["W_O"],
        )  # fmt: skip


# --- the study ------------------------------------------------------------------------------------------------------


def test_its_parts_are_those_one_makes_by_hand():
    result = study()
    assert list(result.table) == list(CONTROL_COLUMNS)
    assert list(result.correlations) == list(CORRELATION_COLUMNS)
    objective, data = CrossEntropy(8.0), [pairs().chosen]
    gradient = gradient_covariance(
        model(), objective, rebatched(data, 4)[:2], matrices=MATRICES, full_mlp=True, progress=False
    )
    ours = result.gradients[result.gradients["objective"] == "soft"].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours[list(gradient.table)], gradient.table)
    policy = trainable_copy(model())
    made = train(policy, model(), objective, shuffled(data, 4, seed=1), steps=3, optimizer=FAST, matrices=MATRICES)
    sequences = [row[: int(n)] for row, n in zip(data[0].tokens, data[0].lengths, strict=True)]
    pair = analyze_pair(
        model(), policy, tokens=sequences, matrices=MATRICES, ranks=[1, 4], groups=1, gradient=gradient, progress=False
    )
    query = "objective == 'soft' and seed == 1 and compared == 'steps'"
    heads = result.heads.query(query).reset_index(drop=True)
    pd.testing.assert_frame_equal(heads[list(pair.table)], pair.table)
    (entry,) = result.runs.query(query).to_dict("records")
    assert entry["distance"] == made.distances[-1]
    assert (entry["first_loss"], entry["last_loss"]) == (made.losses[0], made.losses[-1])
    row = result.table.query(query + " and matrix == 'W_O' and subspace == 'prediction' and rank == 4").iloc[0]
    block = pair.table.query("matrix == 'W_O' and subspace == 'prediction' and rank == 4")
    energy = block["delta_norm"] ** 2
    assert row["fraction"] == pytest.approx((block["fraction"] * energy).sum() / energy.sum())
    assert row["relative"] == pytest.approx(row["fraction"] * tiny.D_MODEL / 4)
    expected = (block["fraction"] * energy).sum() / (block["gradient_matched"] * energy).sum()
    assert row["gradient_excess"] == pytest.approx(expected)
    assert row["delta_norm"] == pytest.approx(energy.sum() ** 0.5)
    assert row["significant"] == (block["isotropic_q"] < 0.05).mean()


def test_every_grade_sees_the_same_rows_in_the_same_order():
    seen = {}

    class Watching(CrossEntropy):
        def __call__(self, model, batch):
            if torch.is_grad_enabled() and any(p.requires_grad for p in model.model.parameters()):
                seen.setdefault(self.temperature, []).append(batch.tokens.clone())
            return super().__call__(model, batch)

    run([Watching(1.0), Watching(2.0)], match_norm=False, matrices=["W_O"], ranks=[4], seeds=[5])
    assert len(seen[1.0]) == len(seen[2.0]) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen[1.0], seen[2.0], strict=True))


def test_equal_norm_is_equal_distance():
    runs = study().runs
    for _, block in runs.groupby("seed"):
        whole = block[block["compared"] == "steps"].set_index("objective")
        cut = block[block["compared"] == "norm"].set_index("objective")
        slowest = whole["distance"].min()
        assert (whole["steps"] == 3).all()
        assert (cut["distance"] >= slowest).all()
        assert cut.loc[whole["distance"].idxmin(), "distance"] == slowest
        assert (cut["steps"] <= 3).all()


def test_correlations_are_those_of_the_table():
    from tl_asymmetry.geometry.rank_correlation import grouped_spearman

    result = study()
    names = list(result.config["grades"])
    block = result.table.query("compared == 'norm' and matrix == 'W_O' and subspace == 'prediction' and rank == 4")
    groups = torch.tensor([names.index(name) for name in block["objective"]])
    of_δ = (
        result.gradients.query("matrix == 'W_O' and side == 'gradient'").groupby("objective")["effective_rank"].mean()
    )
    for measure in ("relative", "gradient_excess"):
        for against, held in (("grade", [0.0, 1.0, 2.0, 3.0]), ("gradient_effective_rank", of_δ[names].tolist())):
            expected = grouped_spearman(torch.tensor(block[measure].to_numpy()), groups, torch.tensor(held))
            row = result.correlations.query(
                "compared == 'norm' and matrix == 'W_O' and subspace == 'prediction' and rank == 4 and "
                f"measure == '{measure}' and against == '{against}'"
            ).iloc[0]
            assert (row["rho"], row["p"]) == pytest.approx(expected[:2])


def test_overview_has_a_row_for_each_objective():
    overview = study().overview(rank=4, compared="steps")
    assert overview["objective"].tolist() == list(objectives())
    soft = study().table.query(
        "objective == 'soft' and compared == 'steps' and matrix == 'W_O' and subspace == 'prediction' and rank == 4"
    )
    row = overview[overview["objective"] == "soft"].iloc[0]
    assert row["write W_O"] == pytest.approx(soft["relative"].mean())
    assert row["write W_O excess"] == pytest.approx(soft["gradient_excess"].mean())
    assert {"erank δ W_O", "read W_Q", "read W_Q excess"} <= set(overview)


def test_saved_loaded_and_told(tmp_path):
    result = study()
    check_listed(result)
    result.save(tmp_path / "study")
    loaded = load(tmp_path / "study")
    assert isinstance(loaded, ControlStudy)
    same(loaded, result)
    assert loaded.config == result.config
    assert np.array_equal(loaded.spectrum("soft", "W_O"), result.spectrum("soft", "W_O"))
    assert loaded.summary() == result.summary()
    assert "With 4 grades no p can be small" in loaded.summary()
    assert loaded.to_html(tmp_path / "report.html").stat().st_size > 10_000


class Killed(BaseException):
    pass


def test_resumed_after_a_kill_repeats_nothing(tmp_path, monkeypatch):
    # the function's own module: collecting doctests may have put another copy into sys.modules
    control = inspect.unwrap(contrastive_control).__globals__
    made = []

    def counting(policy, *arguments, **options):
        if len(made) == 3:
            raise Killed
        made.append(1)
        return train(policy, *arguments, **options)

    chosen = {"sharp": CrossEntropy(), "soft": CrossEntropy(8.0)}
    options = {"matrices": ["W_O"], "ranks": [4]}
    monkeypatch.setitem(control, "train", counting)
    with pytest.raises(Killed):
        run(chosen, store=tmp_path, **options)
    monkeypatch.setitem(control, "train", train)
    assert StoreReader(tmp_path).names == [
        "00-gradients",
        "00-seed0-norm",
        "00-seed0-steps",
        "01-gradients",
        "01-seed0-steps",
    ]
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("parts/*")}
    resumed = run(chosen, store=tmp_path, **options)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    same(resumed, run(chosen, **options))

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setitem(control, "train", never)
    same(run(chosen, store=tmp_path, **options), resumed)
    with pytest.raises(ValueError, match=r"was begun with, got others: steps \(3 there, 4 here\)"):
        run(chosen, store=tmp_path, steps=4, **options)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": [CrossEntropy()]}, "expected two objectives or more to grade, got 1"),
        ({"chosen": [CrossEntropy(), CrossEntropy()]}, "expected objectives that differ in their settings"),
        ({"chosen": {"a": CrossEntropy(), "b": 3}}, "expected objectives, got int as 'b'"),
        ({"chosen": {"a": CrossEntropy(), "b": DPO}}, "expected objectives, got the class DPO as 'b'"),
        ({"grades": [1.0]}, "expected a grade for each of 4 objectives, got 1"),
        ({"steps": 0}, "expected steps >= 1 and at least one seed, got 0"),
        ({"seeds": []}, "expected steps >= 1 and at least one seed"),
        ({"batch_size": 99}, r"expected a batch_size from 1 to the number of rows \(12\), got 99"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)
    with pytest.raises(ValueError, match="expected a PreferenceBatch for this objective, got TokenBatch as batch 0"):
        contrastive_control(model(), objectives(), [pairs().chosen], 2, [0], progress=False)
    with pytest.raises(ValueError, match="expected an objective among sharp, .* got 'x' and 'W_O'"):
        study().spectrum("x", "W_O")


# --- figures --------------------------------------------------------------------------------------------------------


def test_fraction_against_grade():
    figure = study().plot_grades(rank=4)
    shown = [t for t in figure.data if t.visible]
    line = next(t for t in shown if t.name == "W_O")
    rows = study().table.query("compared == 'norm' and matrix == 'W_O' and subspace == 'prediction' and rank == 4")
    means = rows.groupby("objective", sort=False)["relative"].mean()
    np.testing.assert_allclose(line.y, means[list(objectives())])
    points = next(t for t in shown if t.name == "W_O, seeds")
    np.testing.assert_allclose(sorted(points.y), sorted(rows["relative"]))
    reference = next(t for t in shown if t.name == "W_O matched reference")
    np.testing.assert_allclose(
        reference.y, (rows.assign(m=rows["gradient_matched"] * 12).groupby("objective", sort=False)["m"].mean())
    )
    assert [b.label for b in figure.layout.updatemenus[0].buttons] == ["at equal norm", "at equal steps"]
    assert list(figure.layout.xaxis.ticktext) == list(objectives())
    with pytest.raises(ValueError, match="expected rank to be one of 1, 4, got 3"):
        grades_figure(study().table, rank=3)


def test_spectra_and_effective_ranks_of_all_objectives():
    figure = study().plot_spectrum("W_O", layer=1)
    λ = study().spectrum("contrast", "W_O")[1, 0]
    λ = λ / λ.sum()
    np.testing.assert_allclose(next(t for t in figure.data if t.name == "contrast").y, λ[λ > 0])
    assert {t.name for t in study().plot_effective_rank(matrices=["W_O"]).data} == set(objectives())
