"""Rewinding: all of it undoes all, nothing undoes nothing, and each unit what weights written anew give."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tests.models.test_edits import fingerprint, make_edit
from tests.oracles import reference_study
from tl_asymmetry import ModelView
from tl_asymmetry.edits import commit_edits
from tl_asymmetry.results.result import load
from tl_asymmetry.rewinding import analysis as module
from tl_asymmetry.rewinding.analysis import rewind_study
from tl_asymmetry.rewinding.result import RewindStudy
from tl_asymmetry.rewinding.units import matched_order, moved, units_of

OPTIONS = dict(tokens=tiny.tokens(4, 9), steps=2, orders=2, matched=2, shares=(0, 0.5, 1), batch_size=3, progress=False)


def pair(architecture="gpt2", kind=tiny.KINDS[0], dtype=torch.float64, delta=0.1):
    return tiny.build(architecture, kind, dtype), tiny.build(architecture, kind, dtype, delta=delta)


@pytest.fixture(scope="module", params=tiny.KINDS)
def studied(request):
    base, aligned = pair(kind=request.param)
    before = fingerprint(base), fingerprint(aligned)
    study = rewind_study(base, aligned, **OPTIONS)
    assert (fingerprint(base), fingerprint(aligned)) == before
    return base, aligned, study


def written_anew(base, aligned, places, tokens):
    """Share undone with weights copied into a model by hand, whole passes, float64."""
    b, a = ModelView(base), ModelView(aligned)
    sequences = list(tokens)
    p_base, p_aligned = (reference_study.predictions(view, sequences) for view in (b, a))
    saved = []
    for layer, matrix, head in places:
        target, source = (v.weight(layer, matrix) if head is None else v.weight(layer, matrix)[head] for v in (a, b))
        saved.append((target, target.clone()))
        target.copy_(source)
    edited = reference_study.predictions(a, sequences)
    for target, original in saved:
        target.copy_(original)
    return 1 - reference_study.kl(p_base, edited) / reference_study.kl(p_base, p_aligned)


def test_each_head_alone_is_what_weights_written_anew_give(studied):
    base, aligned, study = studied
    assert len(study.table) == 8
    for row in study.table.sample(3, random_state=0).to_dict("records"):
        places = [(row["layer"], matrix, int(row["head"])) for matrix in row["matrices"].split()]
        assert len(places) == 4
        expected = written_anew(base, aligned, places, OPTIONS["tokens"])
        assert row["shift"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_all_heads_together_are_what_weights_written_anew_give(studied):
    base, aligned, study = studied
    everything = [(layer, m, h) for layer in (0, 1) for m in ("W_Q", "W_K", "W_V", "W_O") for h in range(4)]
    expected = written_anew(base, aligned, everything, OPTIONS["tokens"])
    whole = study.curve[study.curve["count"] == 8]
    assert set(whole["order"]) == {"importance", "norm", "random"}
    np.testing.assert_allclose(whole["shift"], expected, rtol=1e-6)
    np.testing.assert_allclose(whole["delta_share"], 1)
    assert (study.curve.loc[study.curve["count"] == 0, ["kl", "ce", "shift"]] == 0).all().all()


def test_the_whole_model_undoes_all_and_nothing_nothing(studied):
    _, _, study = studied
    assert study.path["share"].tolist() == [0, 0.5, 1]
    assert study.path["shift"].tolist()[::2] == [0, 1]
    assert study.path["barrier"].tolist()[::2] == [0, 0]
    assert 0 < study.path["shift"].iloc[1] < 1
    assert study.barrier == study.path["barrier"].max()


def test_the_first_in_order_are_those_that_undo_most(studied):
    _, _, study = studied
    areas = study.areas().set_index("order")
    assert areas.loc["random", "draws"] == 2
    assert areas.loc["matched", "up_to"] == 0.5
    assert areas.loc["importance", "area"] >= areas.loc["random", "low"]
    assert study.top(8)["shift"].is_monotonic_decreasing
    assert "All 8 units together undo" in study.summary()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("matrix", ["W_O", "W_V"])
def test_a_planted_head_is_found(kind, matrix):
    """One head of one matrix changed: setting that head back undoes everything, W_O's columns included."""
    base, aligned = (tiny.build("gpt2", kind) for _ in range(2))
    commit_edits(aligned, make_edit(ModelView(aligned), 1, matrix, 2, scale=0.1))
    study = rewind_study(base, aligned, **{**OPTIONS, "shares": ()})
    first = study.top(1).iloc[0]
    assert (first["layer"], first["head"]) == (1, 2)
    assert first["shift"] == pytest.approx(1, abs=1e-6)
    others = study.table[study.table["delta_norm"] == 0]
    assert len(others) == 7
    assert (others["shift"] == 0).all()


def test_key_value_heads_and_mlps_are_units_of_their_own():
    base, aligned = (ModelView(model) for model in pair("llama", tiny.KINDS[-1]))
    units = units_of(base, aligned, base.matrices)
    assert [unit.name for unit in units if unit.layer == 1] == ["L1H0", "L1H1", "L1H2", "L1H3", "L1KV0", "L1KV1", "L1"]
    assert units[0].matrices == ("W_Q", "W_O")
    assert units[-1].matrices == ("W_in", "W_gate", "W_out")
    total = sum(unit.norm**2 for unit in units)
    deltas = [aligned.weight(i, m) - base.weight(i, m) for i in (0, 1) for m in base.matrices]
    assert total == pytest.approx(sum(delta.square().sum().item() for delta in deltas), rel=1e-9)
    matched = matched_order(units)
    assert len(set(matched)) == len(matched) <= len(units) // 2
    assert all(other.part == unit.part for unit, other in zip(units, matched, strict=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_moved_model_comes_back_bit_for_bit(dtype):
    base, aligned = (ModelView(model) for model in pair(kind=tiny.KINDS[-1], dtype=dtype))
    before = fingerprint(aligned.model)

    def fail():
        with moved(aligned, base, 0.5):
            assert fingerprint(aligned.model) != before
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert fingerprint(aligned.model) == before
    with moved(aligned, base, 1.0):
        assert fingerprint(aligned.model) == fingerprint(base.model)
    assert fingerprint(aligned.model) == before
    W, target = aligned.weight(0, "W_K").clone(), base.weight(0, "W_K")
    with moved(aligned, base, 0.25):  # once, also where two parameters are one memory
        wide = torch.promote_types(dtype, torch.float32)
        expected = W.to(wide).lerp(target.to(wide), 0.25).to(dtype)
        torch.testing.assert_close(aligned.weight(0, "W_K"), expected)


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch):
    base, aligned = pair(kind=tiny.KINDS[-1])
    expected = rewind_study(base, aligned, **OPTIONS)
    real, calls = module.measure, []

    def measured(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "measure", measured)
    before = fingerprint(aligned)
    with pytest.raises(KeyboardInterrupt):
        rewind_study(base, aligned, store=tmp_path / "study", **OPTIONS)
    assert fingerprint(aligned) == before
    done = len(calls)
    resumed = rewind_study(base, aligned, store=tmp_path / "study", **OPTIONS)
    total = 1 + 5 + 3  # heads alone, five orders, three shares
    assert len(calls) - done == total - 2
    for name in RewindStudy.TABLES:
        pd.testing.assert_frame_equal(getattr(resumed, name), getattr(expected, name))


def test_it_is_saved_loaded_and_shown(studied, tmp_path):
    _, _, study = studied
    check_listed(study)
    again = load(study.save(tmp_path / "study"))
    for name in RewindStudy.TABLES:
        pd.testing.assert_frame_equal(getattr(again, name), getattr(study, name))
    assert again.summary() == study.summary()
    page = study.to_html(tmp_path / "study.html").read_text(encoding="utf-8")
    for words in ("How much of the shift is undone", "Each alone", "The whole model by degrees", "Order of importance"):
        assert words in page
    for figure in (study.plot_curve(), study.plot_heads(template="dark"), study.plot_path(width=500)):
        assert figure.layout.title.text


def test_bad_input_is_refused():
    base, aligned = pair(dtype=torch.float32)
    for arguments, message in [
        (dict(matrices="W_X"), "expected matrices among W_Q, .* got 'W_X'"),
        (dict(steps=0), "expected steps of at least 1, got 0"),
        (dict(shares=[2.0]), r"expected shares from 0 to 1, got \[2.0\]"),
        (dict(tokens=torch.tensor([[5]])), "expected sequences of two tokens or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            rewind_study(base, aligned, **{**OPTIONS, **arguments})
    with pytest.raises(ValueError, match="expected two models of one architecture"):
        rewind_study(base, tiny.build("llama", tiny.KINDS[0]), **OPTIONS)
