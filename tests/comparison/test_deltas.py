"""compare_deltas against float64 SVDs, on planted deltas, adapters and runs of several seeds."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.listing import check_listed
from tl_asymmetry import DeltaComparison, ModelView, compare_deltas, load
from tl_asymmetry.comparison.deltas_result import ARM_COLUMNS, DELTA_COLUMNS

MATRICES = ["W_Q", "W_out"]


@functools.cache
def models() -> tuple[Any, ...]:
    base = tiny.build("llama", tiny.KINDS[0])
    return base, tiny.perturbed(base, 0.02, 1), tiny.perturbed(base, 0.05, 2)


@functools.cache
def compared() -> DeltaComparison:
    base, a, b = models()
    return compare_deltas(base, {"one": a, "two": b}, matrices=MATRICES, rank=3, progress=False)


def deltas(layer: int, matrix: str, head: int | None) -> list[torch.Tensor]:
    W = [ModelView(model).weight(layer, matrix).detach().double() for model in models()]
    W = W if head is None else [w[head] for w in W]
    return [w - W[0] for w in W[1:]]


@pytest.mark.parametrize(("layer", "matrix", "head"), [(0, "W_Q", 2), (1, "W_out", None)])
def test_every_number_against_the_definition(layer, matrix, head):
    A, B = deltas(layer, matrix, head)
    (U, S, V), (X, T, Y) = (torch.linalg.svd(x, full_matrices=False) for x in (A, B))
    table = compared().table
    row = table[(table["layer"] == layer) & (table["matrix"] == matrix)].iloc[head or 0]
    sizes = A.norm() * B.norm()
    spread = torch.trace(A @ A.T @ B @ B.T) * torch.trace(A.T @ A @ B.T @ B)
    expected = {
        "cosine": (A * B).sum() / sizes,
        "cosine_sd": spread.sqrt() / sizes**2,
        "leading_cosine": (U[:, 0] @ X[:, 0]) * (V[0] @ Y[0]),
        "overlap_in": (U[:, :3].T @ X[:, :3]).square().sum() / 3,
        "overlap_out": (V[:3] @ Y[:3].T).square().sum() / 3,
        "chance_in": torch.tensor(3 / A.shape[0]),
        "chance_out": torch.tensor(3 / A.shape[1]),
        "share_a": S[:3].square().sum() / S.square().sum(),
        "share_b": T[:3].square().sum() / T.square().sum(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-8), name
    assert row["z_in"] == pytest.approx((row["overlap_in"] - row["chance_in"]) / _spread(A.shape[0], 3), rel=1e-6)
    assert (row["a"], row["b"], row["same"], row["rounding_share_a"]) == ("one", "two", False, 0)


def _spread(d: int, k: int) -> float:
    """Of ‖Q₁ᵀQ₂‖²/k for Haar spaces of dimension k in R^d: 2 (d − k)² / (d² (d − 1)(d + 2)) under the root."""
    return (2 * (d - k) ** 2 / (d**2 * (d - 1) * (d + 2))) ** 0.5


def test_pooled_cosines_are_of_the_deltas_as_one_vector():
    parts = [[], []]
    for layer in range(2):
        for name in MATRICES:
            for part, delta in zip(parts, deltas(layer, name, None), strict=True):
                part.append(delta.flatten())
    a, b = (torch.cat(part) for part in parts)
    expected = ((a @ b) / (a.norm() * b.norm())).item()
    assert compared().cosines().loc["one", "two"] == pytest.approx(expected, abs=1e-9)
    whole = compared().arms[compared().arms["matrix"].isna()].iloc[0]
    assert whole["cosine"] == pytest.approx(expected, abs=1e-9)
    assert np.isnan(whole["within"])
    assert np.isnan(whole["p"])
    A, B = (x.flatten() for x in deltas(1, "W_out", None))
    assert compared().cosines(1, "W_out").loc["one", "two"] == pytest.approx(
        ((A @ B) / A.norm() / B.norm()).item(), abs=1e-8
    )


@functools.cache
def seeds() -> DeltaComparison:
    """Two trainings of three runs each that share an aim, one of a single run that has another."""
    model = tiny.build("gpt2", tiny.KINDS[0])
    base = ModelView(model)
    rest = base.headless(include_tied=True)
    weights = {(layer, m): base.weight(layer, m).detach() for layer in range(base.n_layers) for m in base.matrices}

    def run(aim: int, noise: int) -> dict[str, torch.Tensor]:
        state = {name: tensor.detach() for name, tensor in rest.items()}
        for (layer, matrix), W in weights.items():
            drawn = [torch.randn(W.shape, generator=torch.Generator().manual_seed(seed)) for seed in (aim, noise)]
            part = "attn" if W.ndim == 3 else "mlp"
            state[f"blocks.{layer}.{part}.{matrix}"] = W + 0.01 * (drawn[0] + 0.7 * drawn[1])
        return state

    runs = {"dpo": [run(1, 10 + i) for i in range(3)], "sft": [run(2, 20 + i) for i in range(3)], "other": run(3, 30)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a state dict may say that it cannot tell processing
        return compare_deltas(model, runs, matrices=["W_O"], progress=False)


def test_runs_of_one_training_are_the_null():
    found = seeds()
    arms = found.arms[found.arms["matrix"].isna()].set_index(["arm_a", "arm_b"])
    told = arms.loc["dpo", "sft"]
    assert told["within"] == pytest.approx(1 / 1.49, abs=0.03)  # 1 / (1 + 0.7²)
    assert told["cosine"] == pytest.approx(0, abs=0.05)
    assert (told["p"], told["relabelings"]) == (0.1, 10)  # of ten ways to halve six runs, theirs is the best
    alone = arms.loc["dpo", "other"]
    assert (alone["p"], alone["relabelings"]) == (0.25, 4)
    assert found.table[found.table["same"]][["a", "b"]].drop_duplicates().shape[0] == 6
    assert "1 of 10 labelings of the runs tell them apart at least as well (p 0.1, too few" in found.summary()


def test_neighbours_in_the_order_are_alike():
    names = list(seeds().cosines().index)
    arms = [name.partition(" ")[0] for name in names]
    assert sum(a != b for a, b in zip(arms, arms[1:], strict=False)) == 2  # three blocks
    grid = seeds().cosines()
    assert list(grid.columns) == names
    np.testing.assert_allclose(np.diag(grid), 1)
    # W_O reads from a head: the input side is as wide as one
    assert set(seeds().table["chance_in"]) == {4 / tiny.D_HEAD}
    assert set(seeds().table["chance_out"]) == {4 / tiny.D_MODEL}


def test_adapters_are_compared_by_their_factors(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = tiny.hf_directory("llama")
    shelf: dict[str, dict[str, Any]] = {"adapter": {}, "merged": {}}
    for seed, rank in ((0, 2), (1, 3)):
        config = peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        tuned.save_pretrained(tmp_path / f"adapter{seed}")
        tuned.merge_and_unload().save_pretrained(tmp_path / f"merged{seed}")
        for kind, models in shelf.items():
            models[f"run{seed}"] = tmp_path / f"{kind}{seed}"
    matrices = ["W_Q", "W_V", "W_out"]
    factored, merged = (
        compare_deltas(folder, models, matrices=matrices, rank=4, progress=False).table for models in shelf.values()
    )
    changed = merged["matrix"] != "W_V"
    assert set(factored.loc[changed, "directions"]) == {2}  # as many as both have
    columns = ["cosine", "cosine_sd", "leading_cosine", "overlap_in", "overlap_out"]
    pd.testing.assert_frame_equal(factored.loc[changed, columns], merged.loc[changed, columns], rtol=1e-3, atol=1e-4)
    assert factored.loc[~changed, columns].isna().all(axis=None)  # neither adapter touches W_V
    assert set(factored.loc[~changed, "directions"]) == {0}


def test_it_is_saved_loaded_and_shown(tmp_path):
    found = seeds()
    check_listed(found)
    again = load(found.save(tmp_path))
    assert isinstance(again, DeltaComparison)
    assert again == found
    assert list(again.table.columns) == list(DELTA_COLUMNS)
    assert list(again.arms.columns) == list(ARM_COLUMNS)
    assert "Who is near whom" in found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    figure = found.plot_map("W_O")
    assert [trace.visible for trace in figure.data] == [True, False, False]
    assert list(figure.data[0].x) == list(found.cosines().index)
    assert found.overlaps("out").loc["dpo [1]", "dpo [2]"] > found.overlaps("out").loc["dpo [1]", "other"]
    assert "input side" in found.plot_heads("dpo [1]", "dpo [2]", "W_O").layout.title.text
    assert found.top(2)["cosine"].is_monotonic_decreasing


def test_bad_input_is_refused():
    base, a, b = models()
    for given, message in [
        ({"a": a}, "expected two models or more, got 1"),
        ([a, b], "expected a mapping from names to models, got list"),
        ({"a": a, "b": tiny.build("gpt2", tiny.KINDS[0])}, "expected two models of one architecture"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare_deltas(base, given, progress=False)
    with pytest.raises(ValueError, match="expected a rank from 1 to 11, got 12"):
        compare_deltas(base, {"a": a, "b": b}, rank=12, progress=False)
    for wrong in ({"layer": 9}, {"matrix": "W_X"}):
        with pytest.raises(ValueError, match="expected a layer from 0 to 1 and a matrix among W_Q, W_out"):
            compared().cosines(**wrong)
    with pytest.raises(ValueError, match="expected a side 'in' or 'out'"):
        compared().overlaps("left")
    with pytest.raises(ValueError, match="expected two models among one, two"):
        compared().plot_heads("one", "three", "W_Q")


def test_one_model_twice_is_told():
    base, a, _ = models()
    with pytest.warns(UserWarning, match="x and y are the same model, weight for weight"):
        found = compare_deltas(base, {"x": a, "y": a}, matrices=["W_K"], progress=False)
    np.testing.assert_allclose(found.table["cosine"], 1)
    np.testing.assert_allclose(found.table["overlap_in"], 1, rtol=1e-6)


def test_another_family_is_told():
    """Llama and Mistral have one shape: what differs between their weights is not what training changed."""
    folders = {"same": tiny.hf_directory("llama", delta=0.05), "other": tiny.hf_directory("mistral")}
    with pytest.warns(UserWarning, match=r"two families, llama \(base\) and mistral \(other\): unless one is"):
        found = compare_deltas(tiny.hf_directory("llama"), folders, matrices=["W_K"], progress=False)
    assert sum("two families" in note for note in found.notes) == 1
