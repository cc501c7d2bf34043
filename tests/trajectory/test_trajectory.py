"""analyze_trajectory against analyze_pair and naive oracles; kills, stores, generators; models left as they were."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.killing import Fatal, deaths
from tests.listing import check_listed
from tests.pair.test_pair_promises import state
from tl_asymmetry import TrajectoryAnalysis, analyze_pair, analyze_trajectory
from tl_asymmetry.geometry import capture_moments, prediction_subspace, random_subspace
from tl_asymmetry.geometry.subspace import principal_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.store import StoreReader
from tl_asymmetry.trajectory.checkpoints import Checkpoint, checkpoints_of

TOKENS = tiny.tokens(9, 12)
OPTIONS: dict[str, Any] = {"tokens": TOKENS, "ranks": [1, 4], "groups": 3, "progress": False}
FEW = OPTIONS | {
    "matrices": ["W_K", "W_O"],
    "ranks": [4],
}  # where the subject is not the numbers: a quarter of the time
ONE = FEW | {"matrices": ["W_O"]}
EACH_POINT = OPTIONS | {"matrices": ["W_K", "W_O", "W_in", "W_out"]}  # one for each point that is read or written
STEPS = (0, 10, 30, 100)
VERDICTS = ("vs_chance", "vs_reference", "verdict")
REGULAR = {"mixtral": {"matrices": ["W_Q", "W_K", "W_V", "W_O", "W_router"]}}  # a trajectory follows what is there once
TABLES = ("table", "asymmetry", "curves", "checkpoints")


@functools.cache
def models(kind: str = tiny.KINDS[0], name: str = "gpt2") -> tuple[Any, ...]:
    """Four checkpoints of a random walk."""
    found = [tiny.build(name, kind)]
    for seed in range(1, len(STEPS)):
        found.append(tiny.perturbed(found[-1], 0.02, seed))
    return tuple(found)


def run(kind: str = tiny.KINDS[0], name: str = "gpt2") -> dict[int, Any]:
    return dict(zip(STEPS, models(kind, name), strict=True))


@functools.cache
def analysed() -> TrajectoryAnalysis:
    return analyze_trajectory(run(), **OPTIONS, reference="both")


def identical(a: TrajectoryAnalysis, b: TrajectoryAnalysis, *, config: bool = True) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True, obj=name)
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert torch.equal(array.nan_to_num(nan=-7.0), b.arrays[name].nan_to_num(nan=-7.0)), name
    if config:
        assert a.config == b.config
        assert a.notes == b.notes


def rows(result: TrajectoryAnalysis, table: str, step: int, reference: str) -> pd.DataFrame:
    frame = getattr(result, table)
    frame = frame[(frame["step"] == step) & (frame["reference"] == reference)]
    return frame.drop(columns=["step", "reference"]).reset_index(drop=True)


def close(ours: pd.DataFrame, theirs: pd.DataFrame, columns: list[str] | None = None) -> None:
    columns = list(theirs.columns) if columns is None else columns
    z = [c for c in columns if c == "isotropic_z"]  # near 0 a difference of two float32-accurate numbers
    rest = [c for c in columns if c not in z]
    pd.testing.assert_frame_equal(ours[rest], theirs[rest], rtol=2e-5, atol=1e-9, check_dtype=False)
    pd.testing.assert_frame_equal(ours[z], theirs[z], rtol=2e-5, atol=2e-5, check_dtype=False)


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, tiny.KINDS[i % len(tiny.KINDS)]) for i, name in enumerate(("llama", "gpt2", "neox", "gemma2", "mixtral"))],
)
def test_each_checkpoint_is_the_pair_it_makes_with_the_first(name: str, kind: str) -> None:
    """Subspaces from the first one: the table of the pair, row for row, null for null, interval for interval."""
    checkpoints = run(kind, name)
    if name != "llama":  # the others differ in their weights
        checkpoints = {step: checkpoints[step] for step in (0, 100)}
    options = EACH_POINT if name in ("neox", "gemma2") else OPTIONS
    result = analyze_trajectory(checkpoints, **options)
    assert result.table["step"].unique().tolist() == [*checkpoints][1:]
    for step in (10, 100) if name == "llama" else (100,):
        pair = analyze_pair(checkpoints[0], checkpoints[step], **options | REGULAR.get(name, {}))
        close(rows(result, "table", step, "first"), pair.table)
        close(rows(result, "asymmetry", step, "first"), pair.asymmetry)
        for matrix in pair.table["matrix"].unique():
            found = result.delta_spectrum(matrix)[result.steps.index(step)]
            np.testing.assert_allclose(found, pair.delta_spectrum(matrix), rtol=1e-6, atol=1e-12)


def test_float64_agrees_to_ten_digits() -> None:
    base, later = (tiny.bridge("llama", torch.float64, delta=δ) for δ in (0.0, 0.03))
    result = analyze_trajectory({0: base, 5: later}, **EACH_POINT)
    pair = analyze_pair(base, later, **EACH_POINT)
    ours, theirs = rows(result, "table", 5, "first"), pair.table
    columns = ["fraction", "relative", "isotropic_z", "ci_low", "ci_high", "excess", "eigengap", "delta_norm"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], rtol=1e-10, atol=1e-13)


def test_bfloat16_keeps_its_rounding_share() -> None:
    base = tiny.bridge("gpt2", torch.bfloat16)
    later = tiny.perturbed(base, 0.002)
    result = analyze_trajectory([(0, base), (1, later)], **EACH_POINT)
    close(rows(result, "table", 1, "first"), analyze_pair(base, later, **EACH_POINT).table)
    assert (result.table["rounding_share"] > 0.1).any()


def test_the_interval_delta_is_the_pair_of_neighbours() -> None:
    checkpoints, result = run(), analysed()
    given = {"first inputs": first_subspaces("attn_in"), "first outlet": prediction_subspace(checkpoints[0])}
    for before, step in ((0, 10), (10, 30), (30, 100)):
        matrices = ["W_Q", "W_K", "W_V"]
        pair = analyze_pair(checkpoints[before], checkpoints[step], **OPTIONS, subspaces=[given], matrices=matrices)
        ours = rows(result, "table", step, "previous")
        theirs = pair.table.reset_index(drop=True)
        theirs["subspace"] = theirs["subspace"].replace({"first inputs": "attn_in", "first outlet": "prediction"})
        ours = ours[ours["matrix"].isin(matrices)].reset_index(drop=True)
        columns = ["layer", "head", "matrix", "subspace", "rank", "fraction", "isotropic_p", "p_method",
                   "delta_norm", "delta_relative_norm", "delta_shrink", "delta_effective_rank"]  # fmt: skip
        close(ours, theirs, columns)
    # the first interval is the first cumulative change
    pd.testing.assert_frame_equal(
        rows(result, "table", 10, "previous"), rows(result, "table", 10, "first"), check_exact=True
    )


def first_subspaces(point: str) -> list[Any]:
    moments = capture_moments(run()[0], point, tokens=TOKENS, progress=False)
    return [principal_subspace(moments[point, layer]) for layer in range(tiny.N_LAYERS)]


def test_subspaces_from_each_checkpoint() -> None:
    checkpoints = run()
    result = analyze_trajectory(checkpoints, **EACH_POINT, subspaces_from="each")
    for step in (10, 100):
        pair = analyze_pair(checkpoints[0], checkpoints[step], **EACH_POINT, activations="aligned").table
        captured = pair["subspace"] != "prediction"
        ours = rows(result, "table", step, "first")
        measured = [column for column in pair if not column.endswith("_q") and column not in VERDICTS]
        close(ours[captured], pair[captured], measured)  # the other families are others
        if step == 100:
            continue
        weights = {"outlet": prediction_subspace(checkpoints[step])}
        by_weights = analyze_pair(checkpoints[0], checkpoints[step], **EACH_POINT, subspaces=[weights]).table
        columns = ["layer", "head", "matrix", "rank", "fraction", "isotropic_p", "eigengap"]
        close(ours[~captured].reset_index(drop=True), by_weights, columns)
    assert any("already seen the change" in note for note in result.notes)


def test_subspaces_from_one_model() -> None:
    checkpoints = run()
    last, options = checkpoints[100], OPTIONS | {"matrices": ["W_Q", "W_O", "W_in", "W_out"]}
    result = analyze_trajectory(checkpoints, **options, subspaces_from=last)
    pair = analyze_pair(checkpoints[0], last, **options, activations="aligned").table
    captured = pair["subspace"] != "prediction"
    measured = [column for column in pair if not column.endswith("_q") and column not in VERDICTS]
    close(rows(result, "table", 100, "first")[captured], pair[captured], measured)
    moments = capture_moments(last, "attn_in", tokens=TOKENS, progress=False)
    given = {"last inputs": [principal_subspace(moments["attn_in", layer]) for layer in range(tiny.N_LAYERS)]}
    first = analyze_pair(checkpoints[0], checkpoints[10], **OPTIONS, subspaces=[given], matrices=["W_Q"]).table
    ours = rows(result, "table", 10, "first")
    ours = ours[(ours["matrix"] == "W_Q") & (ours["subspace"] == "attn_in")].reset_index(drop=True)
    close(ours, first, ["layer", "head", "rank", "fraction", "isotropic_p", "eigengap"])
    assert set(result.config["subspaces_from"]) == {"weights_xxh3"}
    given_directly = analyze_trajectory(checkpoints, **OPTIONS, subspaces=[given], matrices=["W_Q"])
    close(rows(given_directly, "table", 10, "first"), first, ["layer", "head", "rank", "fraction", "isotropic_p"])
    other = tiny.build("llama", tiny.KINDS[0])
    with pytest.raises(ValueError, match="expected subspaces_from as a model like the checkpoints, got"):
        analyze_trajectory(checkpoints, **OPTIONS, subspaces_from=other)


def test_given_subspaces_smaller_than_the_largest_rank() -> None:
    checkpoints = run()
    given = {"first inputs": first_subspaces("attn_in"), "random": random_subspace(tiny.D_MODEL, 5, seed=0)}
    options = OPTIONS | {"ranks": [1, 4, 5, 6, 20], "subspaces": given, "matrices": ["W_Q", "W_O"]}
    result = analyze_trajectory({step: checkpoints[step] for step in (0, 30)}, **options)
    pair = analyze_pair(checkpoints[0], checkpoints[30], **options).table
    close(rows(result, "table", 30, "first"), pair)
    assert set(result.table.loc[result.table["subspace"] == "random", "rank"]) == {5}  # no order among its directions
    assert result.table.loc[result.table["subspace"] == "random", "eigengap"].isna().all()


def test_curves_pool_heads_by_energy() -> None:
    """Σ‖QᵀΔW‖²/Σ‖ΔW‖² over layers and heads, and its jackknife, by hand from the pair's table."""
    result = analysed()
    for pooled in (["W_Q"], ["W_Q", "W_K"], ["W_O", "W_out"], ["W_in"]):
        space = "attn_in" if pooled[0] == "W_Q" else "mlp_in" if pooled == ["W_in"] else "prediction"
        for step in (10, 100):
            table = rows(result, "table", step, "first")
            table = table[table["matrix"].isin(pooled) & (table["subspace"] == space) & (table["rank"] == 4)]
            energy = table["delta_norm"] ** 2
            expected = (table["fraction"] * energy).sum() / energy.sum() * tiny.D_MODEL / 4
            curves = rows(result, "curves", step, "first")
            found = curves[(curves["matrix"] == "+".join(pooled)) & (curves["subspace"] == space)]
            found = found[found["rank"] == 4].iloc[0]
            assert found["relative"] == pytest.approx(expected, rel=1e-12)
            matched = (table["activation_matched"] * energy).sum(skipna=False) / energy.sum() * tiny.D_MODEL / 4
            assert found["activation_matched"] == pytest.approx(matched, rel=1e-12, nan_ok=True)
            assert found["delta_norm"] == pytest.approx(energy.sum() ** 0.5)
            assert np.isnan(found["ci_low"]) == (space == "prediction")
            if space != "prediction":
                assert found["ci_low"] < found["relative"] < found["ci_high"]


def test_the_pooled_interval_is_a_jackknife_of_the_pool() -> None:
    """From three analyses that leave one group of texts out each."""
    checkpoints = {step: run()[step] for step in (0, 30)}
    options = OPTIONS | {"matrices": ["W_Q", "W_K"], "ranks": [4]}
    found = analyze_trajectory(checkpoints, **options).curves
    found = found[(found["matrix"] == "W_Q+W_K") & (found["step"] == 30)].iloc[0]
    θ, whole = [], np.log(found["relative"])
    for left_out in range(3):
        kept = torch.cat([TOKENS[3 * i : 3 * i + 3] for i in range(3) if i != left_out])
        part = analyze_trajectory(checkpoints, **(options | {"tokens": kept, "groups": 1})).curves
        part = part[(part["matrix"] == "W_Q+W_K") & (part["step"] == 30)].iloc[0]
        θ.append(np.log(part["relative"]))
    v = 2 / 3 * np.square(np.array(θ) - np.mean(θ)).sum()
    half = 4.302652729749464 * np.sqrt(v)  # Student's t with 2 degrees of freedom, 0.975
    center = whole - 2 * (np.mean(θ) - whole)  # less the bias of an average of fewer texts
    assert found["ci_low"] == pytest.approx(np.exp(center - half), rel=1e-4)
    assert found["ci_high"] == pytest.approx(np.exp(center + half), rel=1e-4)


def test_emergence_is_the_first_step_from_which_q_stays_below() -> None:
    result = analysed()
    for level in (0.05, 0.5):
        found = result.emergence(level=level)
        keys = ["reference", "layer", "head", "matrix", "subspace", "rank"]
        assert not found.duplicated(keys).any()
        assert len(found) == len(result.table) / 3
        ordered = result.table.sort_values("step").groupby(keys, dropna=False)
        q_of = {key: list(zip(rows["step"], rows["isotropic_q"], strict=True)) for key, rows in ordered}
        # a place without a head has a missing one, which equals nothing, itself neither
        q_of = {tuple(None if pd.isna(part) else part for part in key): q for key, q in q_of.items()}
        for row in found.to_dict("records"):
            steps = q_of[tuple(None if pd.isna(row[key]) else row[key] for key in keys)]
            expected = None
            for step, q in reversed(steps):
                if not q <= level:
                    break
                expected = step
            assert (None if pd.isna(row["step"]) else row["step"]) == expected
            assert row["significant"] == sum(q <= level for _, q in steps)
            assert row["checkpoints"] == len(steps) == 3
    with pytest.raises(ValueError, match=r"expected a level between 0 and 1, got 1\.5"):
        result.emergence(level=1.5)


class Matched:
    """Second moments that are the model's own W_O: recognisable."""

    def __init__(self, model: Any) -> None:
        self.view = ModelView(model)

    def gradient_moment(self, layer: int, matrix: str, head: int | None = None) -> torch.Tensor:
        W = self.view.weight(layer, matrix)
        W = W if head is None else W[head]
        return (W.mT @ W).double()


def test_gradients_are_made_of_each_checkpoint() -> None:
    checkpoints, options = run(), OPTIONS | {"matrices": ["W_Q", "W_K", "W_O", "W_out"], "ranks": [4]}
    result = analyze_trajectory(checkpoints, **options, gradient=Matched)
    pair = analyze_pair(checkpoints[0], checkpoints[30], **options, gradient=Matched(checkpoints[30]))
    close(rows(result, "table", 30, "first"), pair.table)
    close(rows(result, "asymmetry", 30, "first"), pair.asymmetry)
    curves = rows(result, "curves", 30, "first")
    assert curves.loc[curves["pathway"] == "write", "gradient_matched"].notna().all()
    spectra = result.gradient_spectrum("W_O")
    assert spectra.shape == (3, tiny.N_LAYERS, tiny.N_HEADS, tiny.D_MODEL)
    moment = Matched(checkpoints[30]).gradient_moment(1, "W_O", 2)
    np.testing.assert_allclose(spectra[1, 1, 2], torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0), atol=1e-12)
    with pytest.raises(ValueError, match=r"expected one of none \(made without gradient=\), got 'W_O'"):
        analysed().gradient_spectrum("W_O")
    with pytest.raises(ValueError, match="expected gradient to return an object with a method gradient_moment"):
        analyze_trajectory(checkpoints, **OPTIONS, gradient=lambda model: 3)


# --- where checkpoints come from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_generator_may_yield_the_same_model_again(kind: str) -> None:
    def training() -> Iterator[tuple[int, Any]]:
        model = tiny.build("gpt2", kind)
        yield 0, model
        for seed, step in enumerate(STEPS[1:3], start=1):
            tiny.perturb_(model, 0.02, seed)
            yield step, model

    copies = [(step, tiny.perturbed(model, 0.0)) for step, model in training()]
    expected = analyze_trajectory(copies, **FEW, reference="both")
    identical(analyze_trajectory(training(), **FEW, reference="both"), expected)


def test_directories_and_functions(tmp_path: Path) -> None:
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (0, 10, 30)}
    for seed, folder in enumerate(folders.values()):
        shutil.copytree(tiny.hf_directory("gpt2", delta=0.02 * seed), folder)
    expected = analyze_trajectory(folders, **FEW)
    identical(analyze_trajectory(list(folders.values()), **FEW), expected)
    makers = [(step, functools.partial(tiny.bridge, "gpt2", delta=δ)) for step, δ in ((0, 0.0), (10, 0.02), (30, 0.04))]
    made = analyze_trajectory(makers, **FEW)
    assert made.table["step"].unique().tolist() == [10, 30]
    pd.testing.assert_frame_equal(
        rows(expected, "table", 10, "first"), rows(made, "table", 10, "first"), check_exact=True
    )
    (folders[30] / "trainer_state.json").write_text(json.dumps({"global_step": 77}), encoding="utf-8")
    assert [c.step for c in checkpoints_of(list(folders.values()))] == [0, 10, 77]
    (folders[30] / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="expected global_step in"):
        list(checkpoints_of([folders[30]]))
    for name, step in {"step143000": 143000, "global_step7": 7, "my-run-checkpoint_12": 12, "iter-3": 3}.items():
        assert [c.step for c in checkpoints_of([str(tmp_path / name)])] == [step]
    for name in ("final", "misstep5", "step5-merged"):
        with pytest.raises(ValueError, match="expected a directory named like checkpoint-500 or step500, got"):
            list(checkpoints_of([tmp_path / name]))


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        ("checkpoint-5", "expected a folder with directories named like checkpoint-500, got 'checkpoint-5'; pass the"),
        ([], "expected two checkpoints at least, got none"),
        ([3], r"expected a directory or a pair \(step, model\), got int"),
        ([("x", None)], "expected a whole number as a step, got 'x'"),
        ([(0, "nowhere/at/all")], "expected"),
    ],
)
def test_what_are_no_checkpoints(checkpoints: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        analyze_trajectory(checkpoints, **FEW)


@pytest.mark.usefixtures("unchecked_types")
def test_what_no_type_checker_has_seen() -> None:
    with pytest.raises(ValueError, match="expected checkpoints as a list, got int"):
        analyze_trajectory(7, **FEW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected gradient as a function of a model, got int"):
        analyze_trajectory(run(), **FEW, gradient=3)  # type: ignore[arg-type]


def test_bad_input_is_said(tmp_path: Path) -> None:
    checkpoints = run()
    for options, words in (
        ({"reference": "last"}, "expected reference to be one of first, previous, both, got 'last'"),
        ({"duplicates": "drop"}, "expected duplicates to be one of refuse, keep, got 'drop'"),
        ({"ranks": [0]}, "expected ranks from 1 to 47"),
        ({"matrices": ["W_X"]}, "expected matrices among"),
        ({"texts": ["w1"]}, "expected texts or tokens, got both"),
        ({"subspaces_from": "no/such/place/here"}, "expected an existing directory or a name on the Hub"),
    ):
        with pytest.raises(ValueError, match=words):
            analyze_trajectory(checkpoints, **(ONE | options), store=tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="expected two checkpoints at least, got one"):
        analyze_trajectory({0: checkpoints[0]}, **ONE)
    with pytest.raises(ValueError, match="expected checkpoints in the order of their steps, got 10 after 30"):
        analyze_trajectory([(s, checkpoints[s]) for s in (0, 30, 10)], **ONE)
    with pytest.raises(
        ValueError, match=r"expected checkpoints of one run, got n_kv_heads 4 \(step 0\) and 2 \(step 5"
    ):
        analyze_trajectory({0: checkpoints[0], 5: tiny.build("llama", tiny.KINDS[0])}, **ONE)


def test_duplicates_are_refused_by_name(tmp_path: Path) -> None:
    checkpoints = run()
    wrong = {**checkpoints, 200: checkpoints[10]}
    words = "got step 200 with exactly those of step 10; one of the two is mislabelled"
    with pytest.raises(ValueError, match=words):
        analyze_trajectory(wrong, **ONE, store=tmp_path / "run")
    assert StoreReader(tmp_path / "run").steps == [10, 30, 100]  # what came before is kept
    with pytest.raises(ValueError, match=words):  # also when step 10 was measured by another process
        analyze_trajectory({0: checkpoints[0], 200: checkpoints[10]}, **ONE, store=tmp_path / "run")
    with pytest.warns(UserWarning, match="step 200 holds exactly the weights of step 10"):
        kept = analyze_trajectory(wrong, **ONE, duplicates="keep")
    pd.testing.assert_frame_equal(rows(kept, "table", 200, "first"), rows(kept, "table", 10, "first"), check_exact=True)
    with pytest.raises(ValueError, match="got step 10 with exactly those of step 0"):
        analyze_trajectory({0: checkpoints[0], 10: checkpoints[0]}, **ONE)


def test_a_nan_is_named_and_what_came_before_is_kept(tmp_path: Path) -> None:
    checkpoints = run()
    broken = tiny.perturbed(checkpoints[30], 0.02, 9)
    ModelView(broken).weight(1, "W_K")[0, 3, 2] = torch.nan
    words = (
        r"expected finite weights, got 1 NaN and 0 infinite values in blocks\.1\.attn\.W_K of the checkpoint at step 3"
    )
    with pytest.raises(ValueError, match=words):
        analyze_trajectory({**checkpoints, 30: broken}, **FEW, store=tmp_path / "run")
    assert StoreReader(tmp_path / "run").steps == [10]
    identical(analyze_trajectory(checkpoints, **FEW, store=tmp_path / "run"), analyze_trajectory(checkpoints, **FEW))


# --- the store ------------------------------------------------------------------------------------------------------


def test_killed_anywhere_it_resumes_to_the_same_table(tmp_path: Path) -> None:
    """SIGKILL at every single durable call of the whole run in turn."""
    folder = tmp_path / "run"
    options = ONE | {"reference": "both", "store": folder}
    checkpoints = {step: run()[step] for step in STEPS[:3]}
    expected = analyze_trajectory(checkpoints, **(options | {"store": None}))
    count = 0
    for count in deaths(
        lambda: analyze_trajectory(checkpoints, **options), lambda: shutil.rmtree(folder, ignore_errors=True)
    ):
        if count % 5 == 1 or count < 4:
            identical(analyze_trajectory(checkpoints, **options), expected)
        else:
            StoreReader(folder) if (folder / "store.json").exists() else None
    assert count == 3 * 4  # written, flushed, renamed, its folder flushed: the settings and two checkpoints


def test_killed_three_times_in_a_row(tmp_path: Path) -> None:
    """In a part, in the forward pass of a checkpoint, in the last part: each time the next process goes on."""
    folder = tmp_path / "run"
    options = ONE | {"reference": "both", "store": folder, "subspaces_from": "each"}
    finished = []

    def kill_in_forward() -> None:
        checkpoints = run()
        checkpoints[30].blocks[1].hook_resid_post.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        analyze_trajectory(checkpoints, **options)

    def kill_at(call: int) -> Callable[[], None]:
        def work() -> None:
            Fatal(call).install()
            analyze_trajectory(run(), **options)

        return work

    for work in (kill_at(9), kill_in_forward, kill_at(6)):
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        finished.append(StoreReader(folder).steps)
    assert finished[-1] == sorted(finished[-1])
    assert len(finished[0]) <= len(finished[1]) <= len(finished[2])
    assert finished[1]
    expected = analyze_trajectory(run(), **(options | {"store": None}))
    identical(analyze_trajectory(run(), **options), expected)
    identical(TrajectoryAnalysis.from_store(folder), expected)


def test_what_is_finished_is_not_opened_again(tmp_path: Path) -> None:
    opened: list[int] = []
    held: list[int] = []

    def checkpoint(step: int) -> Checkpoint:
        import contextlib

        @contextlib.contextmanager
        def opening() -> Iterator[Any]:
            opened.append(step)
            held.append(step)
            assert len(held) == 1, "two checkpoints are held at a time"
            yield run()[step]
            held.remove(step)

        return Checkpoint(step, f"step {step}", opening, lambda: f"print of {step}")

    for reference, again in (("first", [0]), ("both", [0, 30])):
        options = ONE | {"store": tmp_path / reference, "reference": reference}
        opened.clear()
        first = analyze_trajectory([checkpoint(s) for s in STEPS[:3]], **options)
        assert opened == [0, 10, 30]
        opened.clear()
        identical(analyze_trajectory([checkpoint(s) for s in STEPS[:3]], **options), first)
        assert opened == [0]
        opened.clear()
        more = analyze_trajectory([checkpoint(s) for s in STEPS], **options)
        assert opened == [*again, 100]  # an interval needs the weights before it
        identical(more, analyze_trajectory(run(), **(options | {"store": None})))


def test_a_store_of_other_models_or_settings_is_refused(tmp_path: Path) -> None:
    checkpoints = run()
    options = ONE | {"store": tmp_path / "run"}
    analyze_trajectory(checkpoints, **options)
    for over, words in (
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"ranks": [1]}, r".*, ranks \(\[4\] there"),
        ({"tokens": tiny.tokens(9, 12, seed=1)}, "tokens"),
        ({"reference": "previous"}, "references"),
        ({"subspaces_from": "each"}, "subspaces_from"),
        ({"gradient": Matched}, "gradient"),
        ({"centered": True}, "centered"),
    ):
        with pytest.raises(ValueError, match=f"was begun with, got others: {words}"):
            analyze_trajectory(checkpoints, **(options | over))
    with pytest.raises(ValueError, match="got others: start"):
        analyze_trajectory({0: checkpoints[10], 20: checkpoints[30]}, **options)
    with pytest.raises(
        ValueError, match=r"expected the weights that the store has for step 30 \(step 30\), got others"
    ):
        analyze_trajectory({0: checkpoints[0], 30: tiny.perturbed(checkpoints[10], 0.02, 77)}, **options)
    identical(analyze_trajectory(checkpoints, **options), TrajectoryAnalysis.from_store(tmp_path / "run"))


def test_another_predecessor_makes_another_interval(tmp_path: Path) -> None:
    checkpoints = run()
    options = ONE | {"store": tmp_path / "run", "reference": "previous"}
    analyze_trajectory({s: checkpoints[s] for s in (0, 30, 100)}, **options)
    between = analyze_trajectory(checkpoints, **options)
    identical(between, analyze_trajectory(checkpoints, **ONE, reference="previous"))
    assert between.checkpoints["previous_step"].tolist() == [pd.NA, 0, 10, 30]


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    options = ONE | {"store": tmp_path / "run"}
    expected = analyze_trajectory(run(), **options)
    file = tmp_path / "run" / "parts" / "step-30.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"expected .*step-30\.safetensors as it was written"):
        TrajectoryAnalysis.from_store(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"step-30\.safetensors .* removed and counts as missing"):
        again = analyze_trajectory(run(), **options)
    identical(again, expected)
    identical(TrajectoryAnalysis.from_store(tmp_path / "run"), expected)


def test_from_store_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with store\.json"):
        TrajectoryAnalysis.from_store(tmp_path)
    with pytest.raises(ValueError, match="expected two checkpoints"):
        analyze_trajectory({0: run()[0]}, **ONE, store=tmp_path / "run")
    with pytest.raises(ValueError, match="expected a finished checkpoint in"):
        TrajectoryAnalysis.from_store(tmp_path / "run")


# --- what it leaves behind -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("end", ["success", "in a hook", "Ctrl-C"])
def test_everything_is_left_as_it_was(kind: str, end: str, tmp_path: Path) -> None:
    first, second, third = (tiny.build("llama", kind, delta=δ) for δ in (0.0, 0.03, 0.06))
    for model in (first, second, third):
        model.train()
        next(iter(model.parameters())).requires_grad_(False)
        last = list(model.parameters())[-1]
        last.grad = torch.ones_like(last)
        model(TOKENS)  # transformers itself leaves hooks (output capturing) on its first pass
    stop: list[BaseException] = []
    calls = []

    def interfere(*_: Any) -> None:
        calls.append(1)
        if stop and len(calls) > 1:  # past the self-check
            raise stop[0]

    third.blocks[1].hook_resid_post.register_forward_hook(interfere)
    before = state(first, second, third)
    options = ONE | {"reference": "both", "subspaces_from": "each", "store": tmp_path / "run"}
    checkpoints = {0: first, 1: second, 2: third}
    if end == "success":
        analyze_trajectory(checkpoints, **options)
    else:
        stop.append(RuntimeError("in a hook") if end == "in a hook" else KeyboardInterrupt())
        with pytest.raises(type(stop[0])):
            analyze_trajectory(checkpoints, **options)
        assert StoreReader(tmp_path / "run").steps == [1]
        stop.clear()
        analyze_trajectory(checkpoints, **options)  # nobody holds the store any more
    assert calls
    assert state(first, second, third) == before


def test_the_same_call_gives_the_same_bits_whatever_the_batches() -> None:
    first = analyze_trajectory(run(), **FEW, reference="both")
    torch.manual_seed(5)
    identical(analyze_trajectory(run(), **FEW, reference="both"), first)
    other = analyze_trajectory(run(), **FEW, reference="both", batch_size=2)
    pd.testing.assert_frame_equal(other.table, first.table, rtol=1e-4, atol=1e-5)


def test_save_load_summary_report(tmp_path: Path) -> None:
    result = analysed()
    check_listed(result)
    loaded = TrajectoryAnalysis.load(result.save(tmp_path / "saved"))
    identical(result, loaded)
    assert loaded.summary() == result.summary()
    assert json.loads(json.dumps(result.config)) == result.config
    text = result.summary()
    assert text.startswith("TrajectoryAnalysis: ")
    assert "Reading (W_Q+W_K in attn_in, rank 4)" in text
    few = analyze_trajectory(run(), **FEW)  # a page of two matrices is drawn in a third of the time
    page = few.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The heads in motion" in page
    assert "<table" in result._repr_html_()
    with pytest.raises(ValueError, match="expected one of W_K/first"):
        result.delta_spectrum("W_X")


def test_identical_weights_are_a_valid_answer() -> None:
    model = run()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = analyze_trajectory({0: model, 5: model}, **ONE, duplicates="keep")
    assert result.table["fraction"].isna().all()
    assert (result.table["delta_norm"] == 0).all()
    assert "No matrix differs" in result.summary()
    assert result.emergence()["step"].isna().all()


def test_few_sequences_have_no_intervals() -> None:
    with pytest.warns(UserWarning, match="intervals need at least 3 groups of sequences, got 2"):
        result = analyze_trajectory(run(), **(ONE | {"tokens": TOKENS[:2], "groups": 8}))
    assert result.table["ci_low"].isna().all()
    assert result.curves["ci_low"].isna().all()
    assert any("intervals need" in note for note in result.notes)
