"""The shift of mean activations against means taken by hand, its first order against differences, its direct term."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from tests import tiny
from tests.listing import check_listed
from tests.models.test_edits import fingerprint
from tl_asymmetry import ModelView
from tl_asymmetry.results.result import load
from tl_asymmetry.rewinding.units import moved
from tl_asymmetry.shift.analysis import _cosine_p, _expected_cosine, activation_shift

TOKENS = tiny.tokens(3, 8)
OPTIONS = dict(tokens=TOKENS, batch_size=2, progress=False)
CASES = [("gpt2", kind) for kind in tiny.KINDS] + [("llama", tiny.KINDS[-1]), ("neox", tiny.KINDS[0])]


def means(view, point, layer):
    seen = []
    with torch.no_grad(), view.evaluating(), view.hooks({(point, layer): seen.append}):
        for tokens in TOKENS:
            view.run(tokens[None])
    return torch.cat([x[0, 1:] for x in seen]).mean(0)


def pair(architecture, kind, delta=0.02, dtype=torch.float64):
    return tiny.build(architecture, kind, dtype), tiny.build(architecture, kind, dtype, delta=delta)


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_shift_direct_writes_and_first_order(architecture, kind):
    base, aligned = pair(architecture, kind)
    before = [fingerprint(model) for model in (base, aligned)]
    parameters = list(base.parameters())
    found = activation_shift(base, aligned, **OPTIONS)
    assert [fingerprint(model) for model in (base, aligned)] == before
    assert all(a is b for a, b in zip(base.parameters(), parameters, strict=True))
    b, a = ModelView(base), ModelView(aligned)
    h = 2e-2
    for layer in (0, 1):
        shift = means(a, "resid_post", layer) - means(b, "resid_post", layer)
        torch.testing.assert_close(found.vector(layer), shift, rtol=1e-9, atol=1e-12)
        ahead = []
        for share in (h, -h):
            with moved(b, a, share):
                ahead.append(means(b, "resid_post", layer))
        slope = (ahead[0] - ahead[1]) / (2 * h)
        # transformers takes some steps in float32 whatever the weights are, and differences are second order in h
        assert (found.vector(layer, which="first_order") - slope).norm() < 2e-3 * slope.norm()
    direct = torch.zeros(b.d_model, dtype=torch.float64)
    for layer in (0, 1):
        ΔO, Δout = (a.weight(layer, m) - b.weight(layer, m) for m in ("W_O", "W_out"))
        direct += torch.einsum("hi,hid->d", means(b, "z", layer), ΔO) + means(b, "mlp_post", layer) @ Δout
    torch.testing.assert_close(found.vector(1, which="direct"), direct, rtol=1e-9, atol=1e-12)
    last = found.table.iloc[-1]
    assert last["first_order_explained"] > 0.9  # a small step
    row = found.heads[(found.heads["layer"] == 1) & (found.heads["head"] == 2)].iloc[0]
    own = means(b, "z", 1)[2] @ (a.weight(1, "W_O") - b.weight(1, "W_O"))[2]
    assert row["write_norm"] == pytest.approx(own.norm().item(), rel=1e-9)
    assert len(found.heads) == 2 * 5


def test_the_shift_is_all_direct_where_only_the_last_write_changed():
    base, aligned = (tiny.build("gpt2", tiny.KINDS[0], torch.float64) for _ in range(2))
    ModelView(aligned).weight(1, "W_out").mul_(1.1)
    found = activation_shift(base, aligned, **OPTIONS)
    assert found.table["direct_explained"].iloc[-1] == pytest.approx(1)
    assert found.table["first_order_explained"].iloc[-1] == pytest.approx(1)
    assert found.table["shift_norm"].iloc[:-1].eq(0).all()
    assert found.table["direct_explained"].iloc[:-1].isna().all()


def test_a_random_directions_cosine():
    x = torch.randn(20000, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = (x[:, 0] / x.norm(dim=-1)).abs()
    assert cosines.mean().item() == pytest.approx(_expected_cosine(12), rel=0.02)
    assert stats.kstest([_cosine_p(c, 12) for c in cosines[:2000].tolist()], "uniform").pvalue > 1e-3
    assert math.isnan(_cosine_p(math.nan, 12))


def test_models_of_two_kinds_have_no_first_order():
    if len(tiny.KINDS) < 2:
        pytest.skip("one kind of model only")
    base, aligned = tiny.build("gpt2", "hooked", torch.float64), tiny.build("gpt2", "bridge", torch.float64, delta=0.02)
    found = activation_shift(base, aligned, **OPTIONS)
    assert found.table["first_order_explained"].isna().all()
    assert any("no first-order prediction" in note for note in found.notes)
    assert np.isfinite(found.table["direct_explained"]).all()


def test_it_is_saved_loaded_and_shown(tmp_path):
    found = activation_shift(*pair("gpt2", tiny.KINDS[-1]), **OPTIONS)
    check_listed(found)
    again = load(found.save(tmp_path / "shift"))
    pd.testing.assert_frame_equal(again.heads, found.heads)
    assert again.summary() == found.summary()
    assert "Does the weight explain the shift" in found.to_html(tmp_path / "shift.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="expected one of shift/resid_mid, .* got shift/resid_post/7; pass which"):
        found.vector(7)
