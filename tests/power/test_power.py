"""Planted directions: their making against what it promises, the threshold against the hierarchy, whole runs."""

import copy

import numpy as np
import pytest
import torch

from tests import tiny
from tests.models.test_edits import fingerprint
from tl_asymmetry import ModelView, PowerAnalysis, analyze_pair, detection_power, load
from tl_asymmetry.geometry.hierarchy import hierarchy
from tl_asymmetry.geometry.rounding import storage_dtype
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.pair.deltas import measure_delta
from tl_asymmetry.power import analysis
from tl_asymmetry.power.planting import by_chance, directions_within, lone_threshold, planted

TOKENS = tiny.tokens(40, 16)
OPTIONS = dict(tokens=TOKENS, matrices=["W_Q", "W_O"], progress=False)


@pytest.fixture(scope="module")
def pair():
    base = tiny.toy()
    return base, tiny.perturbed(base)


@pytest.fixture(scope="module")
def found(pair):
    before = [fingerprint(model) for model in pair]
    result = detection_power(*pair, sizes=[0.1, 0.3, 1], plants=16, **OPTIONS)
    assert [fingerprint(model) for model in pair] == before
    return result


def test_chance_has_the_spectrum_and_the_covariance_asked_for():
    spectrum = torch.tensor([[4.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
    delta = by_chance(spectrum, 8, 5, seeded(0))
    torch.testing.assert_close(delta.square().sum((1, 2)), torch.ones(2).double())
    λ = torch.linalg.svdvals(delta).square()[:, :3]
    torch.testing.assert_close(λ, (spectrum / spectrum.sum(1, keepdim=True)).double())
    root = torch.linalg.cholesky(torch.diag(torch.arange(1.0, 9.0).double()))
    whitened = torch.linalg.svdvals(torch.linalg.inv(root) @ by_chance(spectrum, 8, 5, seeded(0), root))[:, :3]
    torch.testing.assert_close(whitened / whitened[:, :1], spectrum.double().sqrt() / spectrum[:, :1].sqrt())


def test_a_plant_has_unit_norm_its_direction_and_its_share():
    basis = torch.linalg.qr(torch.randn(64, 4, generator=seeded(1))).Q
    background = by_chance(torch.ones(500, 8), 64, 8, seeded(2))
    u, v = directions_within(basis, 500, seeded(3)), directions_within(torch.eye(8), 500, seeded(4))
    torch.testing.assert_close((u @ basis.double()).square().sum(1), torch.ones(500).double())
    for share in (0.0, 0.3, 1.0):
        delta = planted(background, u, v, share)
        torch.testing.assert_close(delta.square().sum((1, 2)), torch.ones(500).double())
        inside = (basis.double().mT @ delta).square().sum((1, 2)).mean().item()
        assert inside == pytest.approx(share + (1 - share) * 4 / 64, abs=0.01)


def test_the_threshold_is_where_the_hierarchy_calls_a_lone_head():
    mask = np.ones((3, 4), dtype=bool)
    ragged = mask.copy()
    ragged[1, 2:] = ragged[2] = False
    tested = {"a": mask, "b": ragged, "c": np.ones((3, 1), dtype=bool)}
    for family, layer, head in (("a", 2, 0), ("b", 1, 0), ("c", 0, 0)):
        at = lone_threshold(tested, family, layer)
        for factor, called in ((1 - 1e-6, True), (1 + 1e-6, False)):
            p = {name: np.where(there, 1.0, np.nan) for name, there in tested.items()}
            pooled = {
                name: np.where(there.any(1) & (there.shape[1] > 1), 1.0, np.nan) for name, there in tested.items()
            }
            p[family][layer, head] = at * factor
            q = hierarchy(p, pooled).head_q
            assert (q[family][layer, head] <= 0.05) == called
            assert sum(int((of <= 0.05).sum()) for of in q.values()) == called


def test_nothing_planted_is_not_found_and_all_planted_is(found):
    shares = found.table.set_index(["matrix", "subspace", "null", "size"])["share"]
    assert set(shares.index.droplevel("size")) == {
        (matrix, subspace, null)
        for matrix, subspaces, nulls in (
            ("W_Q", ("attn_in", "prediction"), ("isotropic", "adam")),
            ("W_O", ("resid_mid", "prediction"), ("isotropic",)),
        )
        for subspace in subspaces
        for null in nulls
    }
    assert (shares.xs(0.0, level="size") == 0).all()  # level 0.05 / 64 and less: one of 96 would be found by 7 %
    whole = shares.xs(1.0, level="size")
    assert (whole.xs("isotropic", level="null") == 1).all()


@pytest.mark.parametrize("along", [True, False])
def test_the_reference_finds_what_lies_across_the_mean_input(pair, monkeypatch, along):
    """Gradients with a mean leave a mark along it by chance: its test is made without, and no plant there is found."""
    means = []
    plant = analysis._Work.plant

    def seeing(work, matrix, bases):
        _, mean = bases.covariance(matrix, columns=48)
        means.append(torch.nn.functional.normalize(mean.cpu().double(), dim=0))
        plant(work, matrix, bases)

    def chosen(basis, count, generator):
        directions = directions_within(basis, count, generator)
        if basis.shape[1] == len(basis):
            return directions
        Q = basis.double().cpu()
        inside = torch.nn.functional.normalize(Q @ (Q.mT @ means[-1]), dim=0)
        if along:
            return inside.expand(count, -1)
        across = directions - torch.outer(directions @ inside, inside)
        return torch.nn.functional.normalize(across, dim=1)

    monkeypatch.setattr(analysis._Work, "plant", seeing)
    monkeypatch.setattr(analysis, "directions_within", chosen)
    options = dict(OPTIONS, matrices=["W_Q"], subspaces=["attn_in"])
    rows = detection_power(*pair, sizes=[1], plants=16, rank=3, **options).table.query("size == 1").set_index("null")
    assert rows.loc["isotropic", "share"] == 1
    assert rows.loc["adam", "share"] == (not along)


def test_plants_are_stored_as_the_aligned_weights_are(pair, monkeypatch):
    base = copy.deepcopy(pair[0]).to(torch.bfloat16).to(torch.float32)
    aligned = tiny.perturbed(base).to(torch.bfloat16).to(torch.float32)
    shares = []

    def recording(matrix, before, after, *, seed):
        live = measure_delta(matrix, before, after, seed=seed)
        assert storage_dtype(after) == torch.bfloat16
        shares.append(live.numbers.rounding)
        return live

    monkeypatch.setattr(analysis, "measure_delta", recording)
    options = dict(OPTIONS, matrices=["W_O"], subspaces=["prediction"])
    found = detection_power(base, aligned, sizes=[1], plants=8, **options).table.set_index("size")["share"]
    assert found.to_dict() == {0.0: 0.0, 1.0: 1.0}
    assert len(shares) == 2 * 3
    assert all((share > 0).all() and (share < 0.5).all() for share in shares)


def test_directions_of_another_number_are_corrected_with_what_is_tested_at_that_number(pair):
    """Own directions stand at their number, "attn_in" at the shown rank: `analyze_pair` tests it at theirs too."""
    own = {f"own {n}": torch.linalg.qr(torch.randn(48, n, generator=seeded(n))).Q for n in (2, 4)}
    options = dict(OPTIONS, matrices=["W_Q"], subspaces=["attn_in", own])
    tests = analyze_pair(*pair, groups=1, **options).tests.query("level == 'family' and side == 'above'")
    ends = detection_power(*pair, sizes=[1], plants=8, **options).smallest
    assert ends["rank"].tolist() == [3, 3, 2, 2, 4, 4]
    families = [len(tests.query("rank == @row.rank and null == @row.null")) for row in ends.itertuples()]
    assert families == [1, 1, 1, 1, 2, 2]
    assert ends["threshold"].to_numpy() == pytest.approx(0.05 / (np.array(families) * 2 * 2 * 4))


def test_more_is_found_oftener(found):
    for _, rows in found.table.groupby(["matrix", "subspace", "null"]):
        assert rows["size"].tolist() == [0, 0.1, 0.3, 1]
        assert (rows["found"].diff().dropna() >= -2).all()
        assert rows["low"].le(rows["share"]).all()
        assert rows["high"].ge(rows["share"]).all()
    ends = found.smallest
    assert (ends["smallest_low"] <= ends["smallest"]).all()
    assert (ends["smallest"].isin([0.1, 0.3, 1])).all()


def test_plants_are_judged_as_analyze_pair_would(pair, monkeypatch):
    """p of the very weights that were planted, from an analysis of a pair that holds them."""
    base, aligned = pair
    made = []

    def recording(matrix, before, after, *, seed):
        made.append(after)
        return measure_delta(matrix, before, after, seed=seed)

    monkeypatch.setattr(analysis, "measure_delta", recording)
    options = dict(OPTIONS, matrices=["W_Q"], subspaces=["attn_in"])
    result = detection_power(base, aligned, sizes=[0.2], plants=8, rank=3, **options)
    assert len(made) == 2 * 5  # in each layer the change itself, then without and with a plant under each null
    for null, column, at in (("isotropic", "isotropic_p", 2), ("adam", "excess_p", 4)):
        holding = tiny.perturbed(base)
        with torch.no_grad():
            for layer in (0, 1):
                ModelView(holding).weight(layer, "W_Q").copy_(made[5 * layer + at])
        p = analyze_pair(base, holding, ranks=[3], groups=1, **options).table[column].to_numpy()
        threshold = result.smallest.set_index("null").loc[null, "threshold"]
        assert threshold == pytest.approx(0.05 / (2 * 2 * 4))  # layers, pooled or not, heads
        row = result.table.query("null == @null and size == 0.2").iloc[0]
        assert (row["found"], row["plants"]) == ((p <= threshold).sum(), len(p))


def test_the_same_seed_gives_the_same_numbers(pair):
    first, second = (detection_power(*pair, sizes=0.2, plants=8, subspaces="prediction", **OPTIONS) for _ in range(2))
    assert first == second
    assert first.table["plants"].eq(8).all()


def test_it_is_saved_told_and_drawn(found, tmp_path):
    assert load(found.save(tmp_path / "saved")) == found
    assert isinstance(found, PowerAnalysis)
    said = found.summary()
    assert "Where nothing was planted 0 of 32 were found." in said
    assert "nan" not in said.lower()
    assert len(found.plot().data) == len(found.plot(subspace="prediction").data) == 2
    assert [trace.name for trace in found.plot("adam").data] == ["W_Q in attn_in"]
    with pytest.raises(ValueError, match="null"):
        found.plot("muon")
    found.to_html(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(sizes=[0.1, 1.5]), "expected sizes as shares from 0 to 1, got 1.5; pass"),
        (dict(sizes=[float("nan")]), "expected sizes as shares from 0 to 1, got nan; pass"),
        (dict(sizes=[]), "expected sizes as shares from 0 to 1, got none; pass"),
        (dict(sizes="large"), "expected sizes as a list of shares, got 'large'; pass"),
        (dict(plants=0), "expected plants of at least 1, got 0; pass"),
        (dict(power=1.0), "expected a power above 0 and below 1, got 1.0; pass"),
        (dict(rank=48), "expected ranks from 1 to 47"),
        (dict(optimizer="lion"), "expected optimizer among"),
        (dict(matrices=["W_X"]), "expected matrices among"),
    ],
)
def test_bad_input_is_refused(pair, given, words):
    with pytest.raises(ValueError, match=words):
        detection_power(*pair, **(OPTIONS | given))


def test_a_pair_without_a_change_is_refused(pair):
    with pytest.warns(UserWarning, match="identical"), pytest.raises(ValueError, match="a matrix changed, got none"):
        detection_power(pair[0], pair[0], **OPTIONS)
