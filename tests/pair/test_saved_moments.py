"""Moments captured elsewhere: the numbers of the direct call, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry import analyze_pair, save_moments
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair import saved_moments as module

TOKENS = torch.randint(4, 40, (6, 9), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"ranks": [1, 4], "groups": 3, "progress": False}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny.bridge("gpt2"), tiny.bridge("gpt2", delta=0.01)


@pytest.fixture(scope="module")
def folder(pair: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moments(
        pair[0], tmp_path_factory.mktemp("moments") / "here", tokens=TOKENS, groups=3, layers_per_pass=1, progress=False
    )


def test_the_numbers_are_those_of_the_direct_call(
    pair: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = analyze_pair(*pair, tokens=TOKENS, **OPTIONS)
    monkeypatch.setattr(ModelView, "run", lambda *_, **__: pytest.fail("a text was run"))
    apart = analyze_pair(*pair, moments=folder, **OPTIONS)
    for name in ("table", "nulls", "tests", "asymmetry", "circuits", "other_changes"):
        pd.testing.assert_frame_equal(getattr(apart, name), getattr(direct, name), rtol=1e-12)
    torch.testing.assert_close(dict(apart.arrays), dict(direct.arrays), rtol=1e-12, atol=0, equal_nan=True)
    assert apart.config["tokens"] == direct.config["tokens"]


def test_it_goes_on_at_the_first_layer_that_is_missing(
    pair: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> None:
        save_moments(pair[0], folder, tokens=TOKENS, groups=3, layers_per_pass=1, progress=False)

    (folder / "parts" / "layer-1.safetensors").unlink()
    with pytest.raises(ValueError, match="none of 1 of them, the first being layer 1; call save_moments"):
        analyze_pair(*pair, moments=folder, **OPTIONS)
    run, asked = module.capture, []

    def counted(view: Any, groups: Any, sites: Any, **options: Any) -> Any:
        asked.append({layer for _, layer in sites})
        return run(view, groups, sites, **options)

    monkeypatch.setattr(module, "capture", counted)
    again()
    assert asked == [{1}]
    again()
    assert asked == [{1}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 8}, "expected groups=3, as these moments were captured, got 8; pass groups=3"),
        ({"exclude_first": False}, "expected exclude_first=True"),
        ({"tokens": TOKENS}, "expected either moments or texts and tokens, got both"),
        ({"sensitivity": True}, "expected activations='base' and sensitivity=False with moments="),
        ({"max_tokens": 20}, "expected max_tokens=None with moments="),
    ],
)
def test_other_settings_are_refused(pair: tuple[Any, Any], folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyze_pair(*pair, moments=folder, **(OPTIONS | change))


def test_other_weights_and_missing_points_are_refused(pair: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected moments of the base's weights .* pass the base that save_moments"):
        analyze_pair(pair[1], pair[0], moments=folder, **OPTIONS)
    few = save_moments(pair[0], tmp_path, tokens=TOKENS, matrices=["W_in"], groups=3, progress=False)
    result = analyze_pair(*pair, moments=few, matrices=["W_in"], **OPTIONS)
    assert set(result.table["matrix"]) == {"W_in"}
    with pytest.raises(ValueError, match="expected moments at attn_in.*, got only mlp_in; pass fewer matrices"):
        analyze_pair(*pair, moments=few, matrices=["W_Q"], **OPTIONS)


def test_what_is_no_store_of_moments(pair: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with store.json"):
        analyze_pair(*pair, moments=tmp_path, **OPTIONS)
