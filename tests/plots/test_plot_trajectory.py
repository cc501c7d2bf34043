"""Figures over training say what their tables say."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from tests.synthetic import make_table
from tl_asymmetry.plots import animation_figure, curves_figure, emergence_figure, head_curves_figure
from tl_asymmetry.plots.page import figure_json

STEPS = (1, 10, 400)


@pytest.fixture(name="run")
def run_fixture() -> pd.DataFrame:
    return make_run()


def make_run(kv_heads: int = 4) -> pd.DataFrame:
    frames = [
        make_table(seed=seed, kv_heads=kv_heads).assign(step=step, reference=reference)
        for seed, (step, reference) in enumerate((s, r) for s in STEPS for r in ("first", "previous"))
    ]
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(name="curves")
def curves_fixture(run: pd.DataFrame) -> pd.DataFrame:
    keys = ["step", "reference", "matrix", "pathway", "subspace", "rank"]
    pooled = run.groupby(keys, sort=False, as_index=False)[["relative", "ci_low", "ci_high"]].mean()
    read = pooled["pathway"] == "read"
    return pooled.assign(
        activation_matched=np.where(read, 3.0, np.nan), gradient_matched=np.nan, delta_relative_norm=0.1
    )


def words(figure) -> str:
    return re.sub("<[^>]*>", "", figure.layout.title.text.replace("<br>", " "))


def test_curves(curves: pd.DataFrame) -> None:
    figure = curves_figure(curves, default_rank=4)
    names = {t.name.split(" ·")[0] for t in figure.data if "·" in t.name}
    assert names == {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"}
    for trace in figure.data:
        if "·" not in trace.name:
            continue
        matrix, space = trace.name.split(" · ")
        rows = curves[
            (curves["matrix"] == matrix) & (curves["subspace"] == space) & (curves["rank"] == 4)
            & (curves["reference"] == "first")
        ]  # fmt: skip
        assert list(trace.x) == list(STEPS)
        np.testing.assert_allclose(trace.y, rows["relative"])
        band = next(t for t in figure.data if t.name == f"{matrix} interval")
        expected = [] if space == "prediction" else [*rows["ci_low"], *rows["ci_high"][::-1]]
        np.testing.assert_allclose(np.array(band.y, dtype=float), expected)
    assert figure.layout.xaxis.type == "log"
    assert "since the first checkpoint" in words(figure)
    previous = curves_figure(curves, reference="previous", rank=1, matrices=["W_Q"])
    assert "since the previous checkpoint" in words(previous)
    assert not previous.layout.sliders
    # the slider shows the other ranks' numbers
    step = figure.layout.sliders[0].steps[0]
    at = [t.name for t in figure.data].index("W_Q · attn_in")
    rows = curves.query("matrix == 'W_Q' and subspace == 'attn_in' and rank == 1 and reference == 'first'")
    np.testing.assert_allclose(step.args[0]["y"][at], rows["relative"])
    for bad, message in (
        ({"reference": "last"}, "expected reference to be one of 'first', 'previous', got 'last'"),
        ({"matrices": ["W_X"]}, "expected matrices among"),
        ({"subspace": "nowhere"}, "expected subspace of W_Q"),
        ({"rank": 5}, "expected rank to be one of 1, 4, 16, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            curves_figure(curves, **bad)
    with pytest.raises(ValueError, match="pass TrajectoryAnalysis.curves"):
        curves_figure(curves.drop(columns="step"))


def test_heads(run: pd.DataFrame) -> None:
    figure = head_curves_figure(run, "W_Q", layer=1, rank=4)
    assert [t.name for t in figure.data] == ["L1H0", "L1H1", "L1H2", "L1H3"]
    rows = run.query("matrix == 'W_Q' and layer == 1 and subspace == 'attn_in' and rank == 4 and reference == 'first'")
    for head, trace in enumerate(figure.data):
        mine = rows[rows["head"] == head]
        np.testing.assert_allclose(trace.y, mine["relative"])
        np.testing.assert_allclose(trace.error_y.array, mine["ci_high"] - mine["relative"])
        np.testing.assert_allclose(trace.error_y.arrayminus, mine["relative"] - mine["ci_low"])
        filled = ["-open" not in s for s in trace.marker.symbol]
        assert filled == (mine["isotropic_q"] < 0.05).tolist()
    assert [t.name for t in head_curves_figure(run, "W_in", layer=0).data] == ["L0"]
    assert "KV head" in head_curves_figure(make_run(kv_heads=2), "W_K", layer=0).data[0].name
    with pytest.raises(ValueError, match="expected layer to be one of 0, 1, 2, 3, got 9"):
        head_curves_figure(run, "W_Q", layer=9)


def test_rounding_is_marked_and_told_over_training(run: pd.DataFrame) -> None:
    share = np.where((run["step"] == STEPS[-1]) & (run["layer"] == 0), 0.7, 0.0)
    figure = animation_figure(run.assign(rounding_share=share), "W_Q", rank=4)
    marked = {t.name: sum(v is not None for v in t.x) for t in figure.frames[-1].data if t.type == "scatter"}
    heads = len(run.query("matrix == 'W_Q' and layer == 0")["head"].unique())
    assert marked["rounding share ≥ 0.5 (mostly storage)"] == heads
    assert [sum(v is not None for v in frame.data[3].x) for frame in figure.frames[:-1]] == [0] * (len(STEPS) - 1)
    assert figure.frames[0].traces == tuple(range(len(figure.data)))
    hover = figure.frames[-1].data[0].customdata[0][0]
    assert hover[0] == f"L0H0, step {STEPS[-1]}"
    assert "0.7, mostly storage" in hover
    assert "rounding share %{customdata[4]}" in figure.data[0].hovertemplate
    unrounded = animation_figure(run.assign(rounding_share=0.0), "W_Q", rank=4)
    assert not any("rounding" in (t.name or "") for t in unrounded.data)


def test_animation(run: pd.DataFrame) -> None:
    figure = animation_figure(run, "W_K", rank=4)
    assert [f.name for f in figure.frames] == [str(s) for s in STEPS]
    assert [s.label for s in figure.layout.sliders[0].steps] == [str(s) for s in STEPS]
    scales = {(f.data[0].zmin, f.data[0].zmax) for f in figure.frames}
    assert len(scales) == 1  # one scale, so that frames can be compared
    for frame, step in zip(figure.frames, STEPS, strict=True):
        rows = run[
            (run["matrix"] == "W_K") & (run["subspace"] == "attn_in") & (run["rank"] == 4) & (run["step"] == step)
            & (run["reference"] == "first")
        ].sort_values(["layer", "head"])  # fmt: skip
        np.testing.assert_allclose(
            np.array(frame.data[0].z, dtype=float).ravel(), np.log2(rows["relative"]), atol=1e-3
        )  # fmt: skip
        dots = sum(x is not None for x in frame.data[1].x)
        assert dots == (rows["isotropic_q"] < 0.05).sum()
        assert f"step {step}" in frame.layout.title.text
    assert figure.data[0].z == figure.frames[-1].data[0].z
    assert [b.label for b in figure.layout.updatemenus[0].buttons] == ["Play", "Pause"]
    assert '"frames":[' in figure_json(figure)
    one = animation_figure(run[run["step"] == 1], "W_Q")
    assert not one.layout.sliders


def test_emergence() -> None:
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    table = pd.DataFrame(
        [
            {"reference": "first", "layer": layer, "head": head, "matrix": "W_Q", "pathway": "read",
             "subspace": "attn_in", "rank": k, "step": step, "significant": 2, "checkpoints": 3}
            for k in (1, 4)
            for (layer, head), step in zip(heads, (10, pd.NA, 1000, 10), strict=True)
        ]
    ).astype({"step": "Int64", "layer": "Int64", "head": "Int64"})  # fmt: skip
    figure = emergence_figure(table, "W_Q", level=0.01)
    assert [list(row) for row in figure.data[0].z] == [[1.0, None], [3.0, 1.0]]  # log10 of the step
    assert (list(figure.data[1].x), list(figure.data[1].y)) == ([1], [0])
    assert list(figure.data[0].colorbar.ticktext) == ["10", "1000"]
    assert figure.data[0].customdata[0][1][1] == "not at the last checkpoint"
    assert "from which on q ≤ 0.01" in words(figure)
    never = emergence_figure(table.assign(step=pd.array([pd.NA] * len(table), dtype="Int64")), "W_Q", rank=1)
    assert len(never.data[1].x) == 4
    with pytest.raises(ValueError, match="expected matrix to be one of 'W_Q', got 'W_K'"):
        emergence_figure(table, "W_K")


def test_foreign_words_are_escaped(run: pd.DataFrame, curves: pd.DataFrame) -> None:
    bad = "<img src=x>%{x}"
    run = run.assign(subspace=run["subspace"].replace("attn_in", bad))
    curves = curves.assign(subspace=curves["subspace"].replace("attn_in", bad))
    for figure in (
        animation_figure(run, "W_Q", subspace=bad, title=bad), head_curves_figure(run, "W_Q", layer=0, subspace=bad),
        curves_figure(curves, subspace=None, matrices=["W_O"], title=bad),
        curves_figure(curves, subspace=bad, matrices=["W_Q"]),
    ):  # fmt: skip
        text = figure.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        assert "<img" not in text
        assert "%{x}<" not in text.replace("step %{x}<br>", "")
