"""Names that no page is wide enough for, numbers at the ends of what floats can hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.reliability.conftest import OPTIONS
from tl_asymmetry import ModelView, analyze_pair, analyze_trajectory
from tl_asymmetry.geometry import StreamingMoments, capture_moments, prediction_subspace
from tl_asymmetry.models.readers.base import Factors
from tl_asymmetry.pair.deltas import measure_delta, measure_factors
from tl_asymmetry.plots import style
from tl_asymmetry.results.pages import title_markup

LONG = "a" * 5000 + "<b>" + "z" * 5000


def test_a_name_that_no_page_is_wide_enough_for_is_cut_in_the_middle(tmp_path: Path) -> None:
    base = tiny.bridge("gpt2")
    base.cfg.model_name = LONG
    result = analyze_pair(base, tiny.perturbed(base), matrices=["W_Q"], **OPTIONS)
    whole = LONG.replace("<b>", "&lt;b&gt;")
    for page in (result.to_html(tmp_path / "report.html"), result.to_explorer(tmp_path / "explorer.html", model=base)):
        text = page.read_text(encoding="utf-8")
        heading = text[text.index("<h1>") : text.index("</h1>")]
        assert whole in heading.partition('">')[0]  # the tooltip
        assert len(heading.partition('">')[2]) < 200
    assert title_markup("short") == "short"
    assert len(style.text(LONG)) < 180


# -- numbers -----------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = OPTIONS | {"groups": 1, "matrices": ["W_Q"]}


def written(model: Any, change: Callable[[torch.Tensor], object], matrices: tuple[str, ...] = ("W_Q",)) -> Any:
    """A copy with some matrices changed in place."""
    changed = copy.deepcopy(model)
    view = ModelView(changed)
    with torch.no_grad():
        for layer in range(view.n_layers):
            for matrix in matrices:
                change(view.weight(layer, matrix))
    return changed


def unlike(weight: torch.Tensor, relative: float = 0.01) -> torch.Tensor:
    """The same weights, slightly changed."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return weight + relative * weight.abs().mean() * noise


@pytest.mark.parametrize("exponent", [-100, -60, 40, 100])
@pytest.mark.parametrize("heads", [slice(0, 1), slice(None)])
def test_a_delta_has_all_its_digits_at_any_size(exponent: int, heads: slice) -> None:
    """Weights times a power of two, which rounds nothing, all heads or one: norms too, the rest is as it was."""
    W = torch.randn(3, 24, 6, generator=torch.Generator().manual_seed(1)) * 0.02
    scale = torch.ones(3, 1, 1)
    scale[heads] = 2.0**exponent
    plain, scaled = (measure_delta("W_Q", W * s, unlike(W) * s, seed=0).numbers for s in (torch.ones(()), scale))
    square = scale.double().flatten().square()
    assert (scaled.energy > 0).all()
    torch.testing.assert_close(scaled.energy, plain.energy * square, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.base_energy, plain.base_energy * square, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.spectrum / scaled.energy[:, None], plain.spectrum / plain.energy[:, None],
                               rtol=1e-4, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(scaled.shrink, plain.shrink, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scaled.directions, plain.directions, rtol=1e-3, atol=1e-3)
    factors = Factors(torch.ones(24, 1), torch.ones(3, 6, 1))
    by_factors = measure_factors("W_Q", W * scale, factors).numbers.base_energy
    torch.testing.assert_close(by_factors, plain.base_energy * square, rtol=1e-6, atol=0)


def test_what_is_the_same_is_still_the_same() -> None:
    W = torch.randn(3, 24, 6, generator=torch.Generator().manual_seed(1)) * 2.0**-100
    W[1] = 0
    numbers = measure_delta("W_Q", W, W.clone(), seed=0).numbers
    assert (numbers.energy == 0).all()
    assert (numbers.base_energy > 0).tolist() == [True, False, True]


def test_underflow_is_no_sameness() -> None:
    base = tiny.build("gpt2", tiny.KINDS[0])
    results = []
    for scale in (1.0, 2.0**-80):
        start = written(base, lambda W, scale=scale: W.mul_(scale))
        end = written(start, lambda W: W.copy_(unlike(W)))
        results.append(analyze_pair(start, end, **QUICK))
    assert not any("same in both models" in note for note in results[1].notes)
    plain, scaled = (result.table.query("layer == 0") for result in results)  # what the next one reads has changed
    for column in ("fraction", "excess", "isotropic_p", "delta_relative_norm"):
        np.testing.assert_allclose(scaled[column], plain[column], rtol=1e-4, err_msg=column)


def test_half_precision_that_overflows_is_called_so() -> None:
    """In the first tokens, where products are checked, and only later: told apart from a model that was edited."""
    base = tiny.build("gpt2", tiny.KINDS[0], torch.float16)
    large = written(base, lambda W: W.mul_(3000), ("W_in", "W_out"))
    said = r"within what float16 can hold and multiply, got an overflow in .*; pass the model loaded with dtype=torch.f"
    with pytest.raises(ValueError, match=said):
        analyze_pair(large, base, **QUICK)
    with pytest.raises(ValueError, match=said):
        capture_moments(large, "resid_post", tokens=QUICK["tokens"], progress=False)
    wide = capture_moments(large.float(), "resid_post", tokens=QUICK["tokens"], progress=False)  # as it was said
    assert all(moments.mean_square > 0 for moments in wide.values())


def test_weights_of_a_million_billion_are_refused_in_words() -> None:
    base = tiny.build("gpt2", tiny.KINDS[0])
    large = written(base, lambda W: W.mul_(1e15), ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"))
    end = written(large, lambda W: W.copy_(unlike(W)), ("W_O",))
    options = QUICK | {"matrices": ["W_O"]}
    with pytest.raises(ValueError, match=r"float32 can hold and multiply, got an overflow in .*dtype=torch\.float64"):
        analyze_pair(large, end, **options)
    assert analyze_pair(large.double(), end.double(), **options).table["fraction"].between(0, 1).all()  # as it was said


def test_activations_without_squares_are_refused_in_words() -> None:
    base = tiny.build("gpt2", tiny.KINDS[0])
    for parameter in base.parameters():
        parameter.data.mul_(1e-16)
    with pytest.raises(ValueError, match=r"squares float32 can hold, got some of about 1e-1.*model\.double"):
        capture_moments(base, [("resid_pre", 0)], tokens=QUICK["tokens"], progress=False)
    assert capture_moments(base.double(), [("resid_pre", 0)], tokens=QUICK["tokens"], progress=False)


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**60])
def test_prediction_directions_have_their_digits_at_any_size(scale: float) -> None:
    base = tiny.build("llama", tiny.KINDS[0])
    plain = prediction_subspace(base)
    ModelView(base).unembedding()[0].data.mul_(scale)
    scaled = prediction_subspace(base)
    assert plain.eigenvalues is not None
    assert scaled.eigenvalues is not None
    torch.testing.assert_close(scaled.eigenvalues / scale**2, plain.eigenvalues, rtol=1e-5, atol=1e-6)


def test_a_mean_square_is_that_of_all_entries() -> None:
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    moments = StreamingMoments(5)
    moments.update(rows[:10])
    moments.update(rows[10:])
    assert moments.mean_square == pytest.approx(rows.square().mean().item(), rel=1e-12)


def test_inputs_of_rank_one_give_no_numbers_beyond_it() -> None:
    base = tiny.build("gpt2", tiny.KINDS[0])
    tokens = torch.full((4, 12), 7)
    with torch.no_grad():  # one token at places that look alike: every input of a layer is one vector
        for name, parameter in base.named_parameters():
            if "pos" in name or "wpe" in name:
                parameter.zero_()
    end = tiny.perturbed(base)
    options: dict[str, Any] = {"tokens": tokens, "ranks": [1, 4], "groups": 1, "progress": False,
                               "matrices": ["W_Q", "W_K", "W_V", "W_O"]}  # fmt: skip
    result = analyze_pair(base, end, sensitivity=True, **options)
    own = result.table["subspace"] != "prediction"
    assert set(result.table.loc[own, "rank"]) == {1}
    assert set(result.table.loc[~own, "rank"]) == {1, 4}
    assert result.config["shown_rank"] == 1
    assert any("fewer than 4 directions" in note for note in result.notes)
    captured = result.circuits["subspace"] != "prediction"
    assert set(result.circuits.loc[captured, "rank"]) == {1}
    assert set(result.asymmetry["rank"]) == {1}
    profile = result.energy_profile("W_Q", "attn_in")
    assert np.isfinite(profile[..., 0]).all()
    assert np.isnan(profile[..., 1:]).all()
    other = result.sensitivity().query("subspace == 'attn_in'")
    assert other.loc[other["rank"] == 4, "relative"].isna().all()
    of_one = other[(other["rank"] == 1) & (other["activations"] != "both")]
    assert (of_one["relative"].isna() == of_one["centered"]).all()  # equal inputs have no variance
    assert set(result.stability().query("subspace == 'attn_in' and rank == 4")["verdict"]) == {"none"}
    run = analyze_trajectory({0: base, 1: end}, **options)
    assert set(run.table.loc[run.table["subspace"] != "prediction", "rank"]) == {1}
    assert set(run.curves.loc[run.curves["subspace"] != "prediction", "rank"]) == {1}
    assert run.config["shown_rank"] == 1
    assert result.plot_rank_curve("W_Q", 0).data
    assert run.plot_curves().data
