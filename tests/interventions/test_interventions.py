"""Rank-1 studies against a plain one, against planted truth, and on what they promise."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tests.models.test_edits import fingerprint, make_edit
from tests.oracles import reference_study
from tl_asymmetry import ModelView, RankOneEdit, RankOneStudy, Subspace, apply_edits, rank_one_study
from tl_asymmetry.demo import demo_model
from tl_asymmetry.edits import commit_edits, head_delta, removal_edit
from tl_asymmetry.interventions import analysis as module
from tl_asymmetry.interventions import runs
from tl_asymmetry.interventions.design import CONTROL_KINDS
from tl_asymmetry.interventions.tables import study_table
from tl_asymmetry.models.resume import EditedRuns
from tl_asymmetry.results.result import load
from tl_asymmetry.training.data import as_batches
from tl_asymmetry.training.objectives import PreferenceBatch, TokenBatch

pytestmark = pytest.mark.filterwarnings("ignore:q is NaN")
CELL = ["layer", "head", "matrix", "intervention", "direction", "index"]


def pair(architecture="gpt2", kind=tiny.KINDS[0], dtype=torch.float64, delta=0.05):
    return tiny.build(architecture, kind, dtype), tiny.build(architecture, kind, dtype, delta=delta)


def planted(architecture, kind, matrix, head, dtype=torch.float32, layer=1):
    """A pair of which the aligned half is the base plus one rank-1 edit."""
    base, aligned = tiny.build(architecture, kind, dtype), tiny.build(architecture, kind, dtype)
    edit = make_edit(ModelView(aligned), layer, matrix, head, scale=0.1)
    commit_edits(aligned, edit)
    return base, aligned, edit


def preferred(pairs=3, length=7):
    def half(seed):
        mask = torch.zeros(pairs, length, dtype=torch.bool)
        mask[:, 3:] = True
        mask[0, 5:] = False
        return TokenBatch(tiny.tokens(pairs, length, seed=seed), mask)

    return PreferenceBatch(half(11), half(12))


@pytest.fixture(scope="module")
def small():
    """A study with everything in it."""
    base, aligned = pair()
    with pytest.warns(UserWarning, match="q is NaN"):
        return rank_one_study(
            base, aligned, tokens=tiny.tokens(3, 9), preferences=preferred(2), directions=("delta", "prediction"),
            interventions=("removal", "insertion"), draws=3, scales=(0.5, 2.0), n_directions=2,
            controls=CONTROL_KINDS, progress=False,
            sites=[(1, "W_O", 2), (0, "W_Q", 1), (1, "W_in", None)], seed=4,
        )  # fmt: skip


# --- right numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kind", "interventions"), [
    ("gpt2", tiny.KINDS[0], ("removal", "insertion")), *[("gpt2", kind, ("insertion",)) for kind in tiny.KINDS[1:]],
    ("llama", "bridge", ("removal",)),
])  # fmt: skip
def test_every_edit_has_the_outcomes_of_a_plain_study(architecture, kind, interventions):
    base, aligned = pair(architecture, kind)
    tokens, preferences = tiny.tokens(3, 9), preferred()
    study = rank_one_study(
        base, aligned, tokens=tokens, preferences=preferences, directions=("delta", "activation"), draws=2,
        sites=[(0, "W_K", 1), (1, "W_O", 0), (1, "W_out", None)], interventions=interventions,
        scales=[2], controls=("complement",), progress=False, batch_size=2,
    )  # fmt: skip
    views = {"base": ModelView(base), "aligned": ModelView(aligned)}
    sequences = list(tokens)
    clean = {name: reference_study.predictions(view, sequences) for name, view in views.items()}
    margins = {name: reference_study.margin(view, preferences) for name, view in views.items()}
    for row in study.baseline.to_dict("records"):
        original, other = ("aligned", "base") if row["intervention"] == "removal" else ("base", "aligned")
        assert row["ce_original"] == pytest.approx(reference_study.cross_entropy(clean[original], sequences), rel=1e-10)
        assert row["ce_other"] == pytest.approx(reference_study.cross_entropy(clean[other], sequences), rel=1e-10)
        assert row["kl_other"] == pytest.approx(reference_study.kl(clean[other], clean[original]), rel=1e-9)
        assert row["places"] == 3 * 8
        assert row["pairs"] == 3
        for column, name in (("margin_original", original), ("margin_other", other)):
            assert row[column] == pytest.approx(margins[name] - margins["base"], abs=1e-10)
    targets = study.edits[study.edits["control"] == "target"]
    assert len(targets) == 3 * 2 * 2 * len(interventions)
    for row in targets.to_dict("records"):
        head = None if pd.isna(row["head"]) else int(row["head"])
        original, other = ("aligned", "base") if row["intervention"] == "removal" else ("base", "aligned")
        ΔW = head_delta(base, aligned, row["layer"], row["matrix"], head)
        read = row["matrix"] not in ("W_O", "W_out")
        if row["direction"] == "delta":
            U, S, _ = torch.linalg.svd(ΔW if read else ΔW.mT)
            q = U[:, 0]
            assert row["delta_share"] == pytest.approx((S[0] ** 2 / (S**2).sum()).item(), rel=1e-9)
        else:
            q = top_activation(views["base"], row["layer"], row["matrix"], sequences)
        edit = removal_edit(row["layer"], row["matrix"], head, ΔW, q).scaled(
            row["dose"] * (1.0 if row["intervention"] == "removal" else -1.0)
        )
        assert row["norm"] == pytest.approx(edit.norm, rel=1e-9)
        edited = reference_study.under(views[original], edit, sequences)
        expected = {
            "kl": reference_study.kl(clean[original], edited),
            "ce": reference_study.cross_entropy(edited, sequences)
            - reference_study.cross_entropy(clean[original], sequences),
            "shift": 1 - reference_study.kl(clean[other], edited) / reference_study.kl(clean[other], clean[original]),
            "margin": reference_study.margin(views[original], preferences, edit) - margins[original],
        }
        expected["margin_shift"] = expected["margin"] / (margins[other] - margins[original])
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-11), (name, row)


def top_activation(view, layer, matrix, sequences):
    """Leading eigenvector of the second moment of what a matrix reads, or of the stream it writes into."""
    point = {"W_K": "attn_in", "W_O": "resid_mid", "W_out": "resid_post"}[matrix]
    rows = []
    with torch.no_grad(), view.evaluating(), view.hooks({(point, layer): rows.append}):
        for tokens in sequences:
            view.run(tokens[None])
    x = torch.cat([r[0, 1:] for r in rows])  # without first positions
    return torch.linalg.eigh(x.mT @ x)[1][:, -1]


@pytest.mark.parametrize(("architecture", "kind", "matrix", "head"), [
    ("gpt2", tiny.KINDS[0], "W_Q", 2), ("gpt2", "bridge", "W_O", 1), ("llama", "bridge", "W_K", 1),
    ("llama", tiny.KINDS[0], "W_V", 0), ("neox", "bridge", "W_out", None),
])  # fmt: skip
def test_a_planted_edit_is_found_and_its_removal_undoes_the_shift(architecture, kind, matrix, head):
    base, aligned, edit = planted(architecture, kind, matrix, head)
    before = fingerprint(base), fingerprint(aligned)
    matrices = list(dict.fromkeys((matrix, "W_V", "W_in")))
    study = rank_one_study(
        base, aligned, tokens=tiny.tokens(4, 12), matrices=matrices, draws=19,
        interventions=("removal", "insertion"), progress=False,
    )  # fmt: skip
    assert (fingerprint(base), fingerprint(aligned)) == before
    for intervention in ("removal", "insertion"):
        first, second = (r for _, r in study.top(2, intervention=intervention).iterrows())
        assert (first["layer"], first["matrix"]) == (1, matrix)
        assert pd.isna(first["head"]) if head is None else first["head"] == head
        assert first["shift"] >= 0.99
        assert first["delta_share"] == pytest.approx(1, abs=1e-3)
        assert first["percentile_random"] == 100
        # A rank-1 delta has no other part: what undoes as much as its direction undoes all of it.
        assert first["percentile_undo_matched"] == 50
        assert first["p"] == 1
        assert second["shift"] == 0
    q = removal_edit(1, matrix, head, edit.change(), edit.residual)
    assert abs(q.norm - edit.norm) < 1e-9 * edit.norm


def test_a_model_against_itself_shows_nothing():
    base = tiny.build("gpt2", tiny.KINDS[0])
    with pytest.warns(UserWarning, match="the two models are identical, weight for weight: there is nothing to remove"):
        study = rank_one_study(
            base, tiny.build("gpt2", tiny.KINDS[0]), tokens=tiny.tokens(3, 8), preferences=preferred(), draws=4,
            directions=("delta", "activation", "prediction"), scales=(1, 2), progress=False,
            controls=("random", "low_variance", "permuted_heads"),
        )  # fmt: skip
    known = study.table[~study.table["outcome"].isin(["shift", "margin_shift"])]
    assert len(known) == 2 * 16 * 3 * 3 * 3
    assert (known["effect"] == 0).all()
    assert known[["p", "q", "percentile"]].isna().all().all()  # where nothing is edited there is no test
    assert (study.edits[["kl", "ce", "margin", "norm"]] == 0).all().all()
    # of no difference there is no share
    assert study.table.loc[study.table["outcome"] == "shift", ["effect", "p"]].isna().all().all()
    assert "No edit changes a weight" in study.summary()


def test_a_head_that_did_not_change_has_exactly_no_effect():
    base, aligned, _ = planted("gpt2", tiny.KINDS[0], "W_Q", 2)
    study = rank_one_study(base, aligned, tokens=tiny.tokens(2, 8), draws=2, progress=False, matrices=["W_Q"])
    other = study.edits[(study.edits["layer"] != 1) | (study.edits["head"] != 2)]
    assert (other[["kl", "ce", "shift", "norm"]] == 0).all().all()


def test_numbers_do_not_depend_on_batches_or_company():
    base, aligned = pair()
    options = dict(tokens=tiny.tokens(5, 9), draws=2, progress=False, seed=7)
    alone = rank_one_study(base, aligned, sites=[(1, "W_V", 3)], batch_size=2, **options)
    among = rank_one_study(base, aligned, matrices=["W_V", "W_O"], batch_size=5, **options)
    keys = [*CELL, "control", "draw", "dose"]
    both = alone.edits.merge(among.edits, on=keys, suffixes=("", "_among"))
    assert len(both) == len(alone.edits) == 5
    for column in ("kl", "ce", "shift", "norm"):
        np.testing.assert_allclose(both[column], both[f"{column}_among"], rtol=1e-9)
    other_seed = rank_one_study(base, aligned, sites=[(1, "W_V", 3)], **{**options, "seed": 8})
    drawn = other_seed.edits["control"] != "target"
    assert not np.isclose(other_seed.edits["kl"][drawn], alone.edits["kl"][drawn], rtol=1e-3).any()


def test_masked_tokens_do_not_count():
    base, aligned = pair()
    tokens, mask = tiny.tokens(3, 9), torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = False
    options = dict(draws=2, progress=False, sites="L1H3.W_V")
    masked = rank_one_study(base, aligned, tokens=tokens, mask=mask, **options)
    cut = rank_one_study(base, aligned, tokens=[tokens[0], tokens[1, :6], tokens[2]], **options)
    pd.testing.assert_frame_equal(masked.edits, cut.edits)
    assert masked.config["tokens"] == 24


def test_whole_passes_give_the_same_with_a_note(monkeypatch):
    base, aligned = pair()
    options = dict(tokens=tiny.tokens(3, 8), draws=2, progress=False, sites=[(0, "W_Q", 1), (1, "W_V", 0)])
    expected = rank_one_study(base, aligned, **options)
    monkeypatch.setattr(EditedRuns, "again", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="cannot be resumed above an edited block .* every edit runs the whole model"):
        study = rank_one_study(base, aligned, **options)
    assert any("cannot be resumed" in note for note in study.notes)
    pd.testing.assert_frame_equal(study.edits, expected.edits, rtol=1e-9)


def test_given_directions_are_used_as_they_are():
    base, aligned = pair()
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(tiny.D_MODEL, 2, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(columns).Q
    options = dict(tokens=tiny.tokens(2, 8), draws=1, sites=[(1, "W_Q", 0)], n_directions=2, progress=False)
    ours = rank_one_study(base, aligned, directions={"mine": 3 * columns, "basis": Subspace(basis)}, **options)
    layers = rank_one_study(base, aligned, directions={"mine": [torch.ones(tiny.D_MODEL), columns[:, 1]]}, **options)
    edit = removal_edit(1, "W_Q", 0, head_delta(base, aligned, 1, "W_Q", 0), columns[:, 1])
    norms = ours.edits[ours.edits["control"] == "target"].set_index(["direction", "index"])["norm"]
    assert norms["mine", 2] == pytest.approx(edit.norm)
    assert len(norms) == 4
    assert layers.edits["norm"].iloc[0] == pytest.approx(edit.norm)


def test_preferences_may_be_rows_of_a_dataset():
    base, aligned = demo_model("base"), demo_model("dpo")
    rows = [
        {"prompt": "Mira lost", "chosen": " the cup.", "rejected": " a song."},
        {"prompt": "Leo went to the garden.", "chosen": " He found it.", "rejected": " He was sad."},
    ]
    read = as_batches(ModelView(base), rows, PreferenceBatch, note=pytest.fail, warn=pytest.fail)
    options = dict(tokens=torch.arange(16).view(2, 8), sites=[(1, "W_V", 0)], draws=2, progress=False)
    found = rank_one_study(base, aligned, preferences=rows, **options)
    expected = rank_one_study(base, aligned, preferences=read[0], **options)
    pd.testing.assert_frame_equal(found.edits, expected.edits)
    assert found.baseline["pairs"].item() == 2
    assert found.config["preferences_xxh3"] == expected.config["preferences_xxh3"]
    with pytest.raises(ValueError, match="expected columns prompt, chosen and rejected, got prompt in row 0"):
        rank_one_study(base, aligned, preferences=[{"prompt": "Mira"}], **options)


def test_a_headline_counts_cells_in_which_something_was_edited():
    base, aligned, _ = planted("gpt2", tiny.KINDS[0], "W_Q", 2)
    options = dict(tokens=tiny.tokens(3, 8), draws=19, progress=False)
    study = rank_one_study(base, aligned, controls=["random"], **options)
    (said,) = (sentence for sentence in study._headline() if sentence.startswith("Removal"))
    assert "the strongest of 1 cells" in said
    assert "no controls that undo as much, so no test" in said
    assert study.table["p"].isna().all()
    study = rank_one_study(base, aligned, controls=["random", "undo_matched"], **options)
    (said,) = (sentence for sentence in study._headline() if sentence.startswith("Removal"))
    assert "0 of 1 cells exceed all their controls that undo as much (0.05 expected of random directions)" in said
    assert study.table["p"].notna().sum() == 3  # one cell, three outcomes: the other heads are no tests


def test_sites_without_a_delta_do_not_dilute_q():
    """One of sixteen heads changed: 19 draws are enough for a q over the one test that there is."""
    base, aligned, _ = planted("gpt2", tiny.KINDS[0], "W_V", 2)
    apply = make_edit(ModelView(aligned), 1, "W_V", 2, seed=5, scale=0.02)
    commit_edits(aligned, apply)
    study = rank_one_study(base, aligned, tokens=tiny.tokens(3, 8), draws=19, progress=False)
    tested = study.table[study.table["control"] == "undo_matched"]
    assert len(tested) == 16 * 2 * 3
    assert tested["q"].notna().sum() == 3
    assert not any("q is NaN" in note for note in study.notes)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_models_that_predict_fewer_tokens_than_they_read(kind):
    """Two outputs, sixteen tokens: predictions are compared, targets are not."""
    if kind == "bridge":
        pytest.skip("a Bridge's unembedding is as wide as its embedding")
    base = tiny.toy(d_vocab=16, d_vocab_out=2)
    aligned = tiny.perturbed(base, 0.1)
    tokens = tiny.tokens(3, 8) % 16
    options, largest = dict(tokens=tokens, draws=2, progress=False, sites="L1H2.W_O"), int(tokens.max())
    study = rank_one_study(base, aligned, **options)
    assert study.config["outcomes"] == ["kl", "shift"]
    assert (study.table["effect"] != 0).all()
    assert any(f"ce left out: the texts have tokens up to {largest} as targets" in note for note in study.notes)
    with pytest.raises(
        ValueError, match=f"got tokens up to {largest} as targets of ce where the models predict the first 2;"
    ):
        rank_one_study(base, aligned, outcomes=["kl", "ce"], **options)


def test_predictions_in_pieces_are_the_same(monkeypatch):
    base, aligned = pair()
    options = dict(
        tokens=tiny.tokens(5, 9), preferences=preferred(), draws=2, progress=False, sites=["L1H0.W_V", (0, "W_Q", 1)]
    )
    expected = rank_one_study(base, aligned, **options)
    monkeypatch.setattr(runs, "_FLOATS_OF_LOGITS", 7 * tiny.D_VOCAB)
    monkeypatch.setattr(runs, "_FLOATS_OF_STREAMS", 2 * 40 * tiny.D_MODEL)
    found = rank_one_study(base, aligned, **options)
    pd.testing.assert_frame_equal(found.edits, expected.edits, rtol=1e-9)
    pd.testing.assert_frame_equal(found.baseline, expected.baseline, rtol=1e-9)


def test_too_little_memory_is_said_before_anything_runs(monkeypatch):
    base, aligned = pair()
    monkeypatch.setattr(module, "free_memory", lambda _: 1 << 20)
    with pytest.raises(
        ValueError, match=r"expected 0\.\d+ GB of free memory on cpu .* got 0.001; pass a smaller batch"
    ):
        rank_one_study(base, aligned, tokens=tiny.tokens(), progress=False)


def test_the_bar_counts_whole_passes(capsys):
    base, aligned = pair()
    rank_one_study(base, aligned, tokens=tiny.tokens(3, 8), draws=2, sites=["L0H1.W_Q", "L1.W_in"], batch_size=2)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert " 20/20 " in last  # two sites, five edits each, two batches


def test_an_aligned_vocabulary_with_more_tokens_is_cut():
    base, aligned = pair()
    wide = ModelView(aligned)
    run = wide.run

    def wide_run(tokens, logits=False):
        narrow = run(tokens, logits=logits)
        more = torch.full((*tokens.shape, 3), 5.0, dtype=torch.float64)
        return torch.cat([narrow, more], -1) if logits else None

    from tl_asymmetry.interventions.runs import evaluation_batches, measure

    evaluated = evaluation_batches(list(tiny.tokens(2, 6)), None, 2)
    edits = [make_edit(wide, 0, "W_Q")]
    expected = measure(wide, ModelView(base), edits, evaluated, outputs=tiny.D_VOCAB)
    wide.run = wide_run
    found = measure(wide, ModelView(base), edits, evaluated, outputs=tiny.D_VOCAB)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]


# --- tables ---------------------------------------------------------------------------------------


def test_rows_are_complete(small):
    sites, directions, kinds, outcomes = 3, 4, 6, 5
    headless = 2 * 4 * outcomes  # a matrix of the MLP has no permuted heads
    assert len(small.table) == 2 * sites * directions * kinds * outcomes - headless
    draws = small.edits[small.edits["control"] != "target"].groupby([*CELL, "control"], dropna=False).size()
    assert (draws == 3).all()
    assert (small.edits[small.edits["control"] == "target"].groupby(CELL, dropna=False).size() == 3).all()
    assert small.table["head"].isna().sum() > 0
    assert set(small.table["pathway"]) == {"read", "write"}
    assert small.table["effect"].notna().all()
    assert small.table["q"].isna().all()


def test_percentiles_and_p_are_those_of_the_controls(small):
    for row in small.table.sample(80, random_state=1).to_dict("records"):
        mine = np.logical_and.reduce(
            [small.edits[c].isna() if pd.isna(row[c]) else (small.edits[c] == row[c]).fillna(False) for c in CELL]
        )
        controls = small.edits[mine & (small.edits["control"] == row["control"])][row["outcome"]].to_numpy()
        effect = row["effect"]
        if row["outcome"] in ("ce", "margin"):
            controls, effect = np.abs(controls), abs(effect)
        if row["control"] == "undo_matched":
            assert row["p"] == (1 + (controls >= effect).sum()) / 4
        else:
            assert np.isnan(row["p"])
        assert row["percentile"] == pytest.approx(100 * (controls < effect).mean())
        assert row["draws"] == 3


def made_up(sites, draws, effect):
    rows = []
    for site in range(sites):
        cell = {"layer": site, "head": 0, "matrix": "W_Q", "pathway": "read", "intervention": "removal",
                "direction": "delta", "index": 1, "dose": 1.0, "norm_ratio": 1.0, "norm_matched": True,
                "overlap": 0.1, "delta_share": 0.5, "norm": 1.0}  # fmt: skip
        rows.append({**cell, "control": "target", "draw": None, "kl": effect(site)})
        rows += [{**cell, "control": "undo_matched", "draw": i, "kl": float(i)} for i in range(draws)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("draws", "reaches"), [(39, True), (38, False)])
def test_q_is_given_where_enough_draws_can_reach_the_level(draws, reaches):
    """Two sites at 0.05: 2 / 0.05 − 1 = 39 draws."""
    table, lacking = study_table(made_up(2, draws, lambda site: 1e9 if site else -1.0), ["kl"])
    assert table["p"].tolist() == [1.0, 1 / (draws + 1)]
    if reaches:
        np.testing.assert_allclose(table["q"], [1.0, 0.05])
        assert lacking == 0
    else:
        assert table["q"].isna().all()
        assert lacking == 39


def test_ties_count_half_for_percentiles_and_fully_for_p():
    table, _ = study_table(made_up(1, 4, lambda _: 2.0), ["kl"])
    assert table["percentile"].tolist() == [62.5]
    assert table["p"].tolist() == [3 / 5]


def test_top_sorts_and_filters(small):
    top = small.top(4, by="kl", intervention="insertion", direction="prediction")
    assert (top["intervention"] == "insertion").all()
    assert (top["direction"] == "prediction").all()
    assert top["kl"].is_monotonic_decreasing
    assert {"percentile_random", "percentile_undo_matched", "p", "q", "margin_shift"} <= set(top.columns)
    assert not {"p_random", "p_equal_variance"} & set(top.columns)
    by_size = small.top(50, by="ce")["ce"].abs()
    assert by_size.is_monotonic_decreasing
    assert len(by_size) == 24
    for bad in ({"by": "loss"}, {"intervention": "swap"}, {"direction": "up"}):
        with pytest.raises(ValueError, match="expected .* among .*, got .*; pass one of these"):
            small.top(**bad)


# --- store ----------------------------------------------------------------------------------------


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch):
    base, aligned = pair()
    options = dict(tokens=tiny.tokens(3, 8), draws=2, progress=False, matrices=["W_Q", "W_O"])
    expected = rank_one_study(base, aligned, **options)
    monkeypatch.setattr(module, "_EDITS_AT_A_TIME", 5)  # one site at a time
    real, done = module.measure, []

    def measured(view, other, edits, *args, **kwargs):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append((edits[0].layer, edits[0].matrix, edits[0].head))
        return real(view, other, edits, *args, **kwargs)

    monkeypatch.setattr(module, "measure", measured)
    before = fingerprint(base), fingerprint(aligned)
    with pytest.raises(KeyboardInterrupt):
        rank_one_study(base, aligned, store=tmp_path / "study", **options)
    assert (fingerprint(base), fingerprint(aligned)) == before
    first = list(done)
    done.clear()
    done += [None] * 7  # so that nothing stops it any more
    resumed = rank_one_study(base, aligned, store=tmp_path / "study", **options)
    later = done[7:]
    assert len(first) == 6
    assert len(later) == 16 - 6
    assert not set(first) & set(later)
    pd.testing.assert_frame_equal(resumed.edits, expected.edits, rtol=1e-9)
    pd.testing.assert_frame_equal(resumed.table, expected.table, rtol=1e-9)
    pd.testing.assert_frame_equal(resumed.baseline, expected.baseline, rtol=1e-9)
    done.clear()
    done += [None] * 7
    more = rank_one_study(base, aligned, store=tmp_path / "study", **{**options, "matrices": ["W_Q", "W_O", "W_V"]})
    assert [site[1] for site in done[7:]] == ["W_V"] * 8
    assert len(more.edits) == len(expected.edits) * 3 / 2


def test_a_store_of_another_study_is_refused(tmp_path):
    base, aligned = pair()
    options = dict(tokens=tiny.tokens(3, 8), draws=2, progress=False, sites=[(0, "W_Q", 0)], store=tmp_path)
    rank_one_study(base, aligned, **options)
    for change, named in (
        (dict(draws=3), "draws"), (dict(seed=1), "seed"), (dict(tokens=tiny.tokens(3, 8, seed=5)), "texts"),
        (dict(directions={"delta": torch.ones(tiny.D_MODEL)}), "directions"), (dict(scales=(2,)), "scales"),
        (dict(preferences=preferred()), "preferences"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"was begun with, got others: {named}"):
            rank_one_study(base, aligned, **{**options, **change})
    with pytest.raises(ValueError, match="was begun with, got others: weights.aligned"):
        rank_one_study(base, tiny.build("gpt2", tiny.KINDS[0], torch.float64, delta=0.01), **options)


# --- the result -----------------------------------------------------------------------------------


def test_it_is_saved_loaded_and_shown(small, tmp_path):
    check_listed(small)
    folder = small.save(tmp_path / "study")
    for again in (RankOneStudy.load(folder), load(folder)):
        for name in RankOneStudy.TABLES:
            pd.testing.assert_frame_equal(getattr(again, name), getattr(small, name))
        assert again.notes == small.notes
        assert again.config == json.loads(json.dumps(small.config))
    assert again.summary() == small.summary() == repr(small)
    assert "<table" in small._repr_html_()
    page = small.to_html(tmp_path / "study.html").read_text(encoding="utf-8")
    for words in ("Which heads carry it", "Each head against its controls", "Dose and response", "[choice]"):
        assert words in page
    assert "mean over places" in page


def test_figures_show_the_tables(small):
    figure = small.plot_controls("W_O", outcome="kl", intervention="removal", direction="delta")
    rows = small.edits[(small.edits["matrix"] == "W_O") & (small.edits["intervention"] == "removal")
                       & (small.edits["direction"] == "delta") & (small.edits["index"] == 1)
                       & (small.edits["dose"] == 1)]  # fmt: skip
    for trace in figure.data:
        kind = "target" if trace.marker.symbol == "star" else trace.name
        assert sorted(trace.y) == sorted(rows.loc[rows["control"] == kind, "kl"])
    assert "Removing delta direction 1 of each W_O" in figure.layout.title.text
    heads = small.plot_heads("W_Q", outcome="ce", direction="prediction", index=2, intervention="insertion")
    row = small.table.query(
        "matrix == 'W_Q' and outcome == 'ce' and direction == 'prediction' and index == 2 and "
        "intervention == 'insertion' and control == 'random'"
    )
    assert np.nansum(heads.data[0].z) == pytest.approx(row["effect"].sum())
    doses = small.plot_doses(2, outcome="kl")
    assert list(doses.data[0].x) == [0.5, 1.0, 2.0]
    assert len({t.legendgroup for t in doses.data}) == 2
    for template in ("light", "dark", "plotly_white"):
        assert small.plot_controls(template=template, width=500, height=400).layout.width == 500
    for bad in (dict(matrix="W_V"), dict(outcome="x"), dict(direction="x"), dict(index=9), dict(intervention="x")):
        with pytest.raises(ValueError, match="expected .* to be one of"):
            small.plot_heads(**bad)
        with pytest.raises(ValueError, match="expected .* to be one of"):
            small.plot_controls(**bad)


def test_the_config_says_what_was_done(small):
    config = small.config
    assert config["arguments"]["draws"] == 3
    assert config["models"]["base"]["weights_xxh3"] != config["models"]["aligned"]["weights_xxh3"]
    assert config["tokens"] == 27
    assert config["sites"] == 3
    json.dumps(config)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
def test_bad_arguments_are_refused_before_anything_runs(monkeypatch):
    base, aligned = pair(dtype=torch.float32)
    monkeypatch.setattr(ModelView, "run", lambda *_, **__: pytest.fail("a model ran"))
    d = tiny.D_MODEL
    cases = [
        (dict(sites=[(2, "W_Q", 0)]), r"expected sites that the model has \(2 layers; .*got L2H0.W_Q"),
        (dict(sites=[(0, "W_Q", None)]), r"got L0.W_Q; pass \(layer, matrix, head\)"),
        (dict(sites=["L0H0.W_in"]), r"got L0H0.W_in"),
        (dict(sites="L0E1.W_in"), r"got L0E1.W_in"),
        (dict(sites=["W_Q"]), r"expected a place, got 'W_Q'; pass \"L7H3.W_Q\""),
        (dict(sites=[]), "expected at least one site, got none"),
        (dict(sites=[(0, "W_Q", 0)], matrices=["W_Q"]), "expected sites or matrices, got both"),
        (dict(matrices=["W_gate"]), "expected matrices among"),
        (dict(matrices=[]), "expected matrices among"),
        (dict(directions=["up"]), "expected directions among delta, activation, prediction, got"),
        (dict(directions={}), "expected at least one direction, got an empty mapping"),
        (dict(directions={"a": torch.ones(d + 1)}), rf"expected directions \[{d}, n\] for 'a', got \({d + 1}, 1\)"),
        (dict(directions={"a": torch.zeros(d)}), "expected finite directions of some length for 'a'"),
        (dict(directions={"a": [torch.ones(d)] * 3}), "expected columns, or 2 of them, for 'a', got 3"),
        (dict(n_directions=0), "expected n_directions of at least 1, got 0"),
        (dict(n_directions=d + 1), rf"expected n_directions up to {d} \(d_model\)"),
        (dict(controls=["placebo"]), "expected controls among undo_matched, random, .* got"),
        (dict(controls=["random", "random"]), "expected each of controls once"),
        (dict(interventions=[]), "expected interventions among removal, insertion, got"),
        (dict(draws=0), "expected draws from 1 to 100,000, got 0"),
        (dict(scales=[0.0]), "expected finite scales other than 0"),
        (dict(scales=[math.inf]), "expected finite scales other than 0"),
        (dict(outcomes=["loss"]), "expected outcomes among kl, ce, shift .those of the margin need preferences="),
        (dict(outcomes=["margin"]), "those of the margin need preferences="),
        (dict(tokens=torch.tensor([[5]])), "expected sequences of two tokens or more, got none"),
        (dict(tokens=tiny.tokens(), texts=["a"]), "expected texts or tokens, got both"),
        (dict(preferences=PreferenceBatch(*[TokenBatch(torch.tensor([[1, 999]]), torch.ones(1, 2).bool())] * 2)),
         "expected token ids from 0 to 95, got 999"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            rank_one_study(base, aligned, **{"tokens": tiny.tokens(), "progress": False, **arguments})
    with pytest.raises(ValueError, match="expected two models of one architecture"):
        rank_one_study(base, tiny.build("llama", tiny.KINDS[0]), tokens=tiny.tokens())


def test_16_bit_weights_are_worth_a_warning():
    base, aligned = pair(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="weights are torch.bfloat16: edits are rounded to their spacing"):
        study = rank_one_study(base, aligned, tokens=tiny.tokens(2, 8), draws=1, sites=[(0, "W_Q", 0)], progress=False)
    assert np.isfinite(study.edits["kl"]).all()


def test_both_models_come_back_as_they_were():
    base, aligned = pair(dtype=torch.float32)
    base.train()
    for model in (base, aligned):
        ModelView(model).run(tiny.tokens(), logits=True)  # a Bridge sets hooks of its own at its first pass
    before, state = (fingerprint(base), fingerprint(aligned)), torch.random.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*base.modules(), *aligned.modules())]
    rank_one_study(base, aligned, tokens=tiny.tokens(2, 8), draws=1, sites=[(0, "W_Q", 0)], progress=False,
                   interventions=("removal", "insertion"))  # fmt: skip
    assert (fingerprint(base), fingerprint(aligned)) == before
    assert all(m.training for m in base.modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*base.modules(), *aligned.modules())] == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all("forward" not in m.__dict__ for m in (*ModelView(base).blocks, *ModelView(aligned).blocks))


@pytest.mark.gpu
def test_on_the_gpu():
    base, aligned, _ = planted("gpt2", tiny.KINDS[0], "W_O", 1)
    on_cpu = rank_one_study(base, aligned, tokens=tiny.tokens(4, 12), draws=3, matrices=["W_O"], progress=False)
    study = rank_one_study(
        base.to("cuda"), aligned.to("cuda"), tokens=tiny.tokens(4, 12), draws=3, matrices=["W_O"], progress=False
    )
    np.testing.assert_allclose(study.edits["kl"], on_cpu.edits["kl"], rtol=1e-2, atol=1e-9)


def test_an_edit_of_a_study_can_be_made_by_hand(small):
    """What the table says of a site is what `removal_edit` and `apply_edits` do."""
    base, aligned = pair()
    view, tokens = ModelView(aligned), tiny.tokens(3, 9)
    ΔW = head_delta(base, aligned, 1, "W_O", 2)
    edit = removal_edit(1, "W_O", 2, ΔW, torch.linalg.svd(ΔW.mT).U[:, 0])
    assert isinstance(edit, RankOneEdit)
    clean = reference_study.predictions(view, list(tokens))
    with apply_edits(aligned, edit):
        edited = reference_study.predictions(view, list(tokens))
    row = small.table.query("layer == 1 and matrix == 'W_O' and intervention == 'removal' and direction == 'delta' and "
                            "index == 1 and outcome == 'kl'").iloc[0]  # fmt: skip
    assert row["effect"] == pytest.approx(reference_study.kl(clean, edited), rel=1e-6)
