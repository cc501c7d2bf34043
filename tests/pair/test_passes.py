"""The same analysis in several passes over the layers is the same; memory; how processes share their work."""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry import PairAnalysis, analyze_pair, estimate_pair
from tl_asymmetry.geometry import StreamingMoments
from tl_asymmetry.geometry.memory import free_memory
from tl_asymmetry.models.capture import capture
from tl_asymmetry.models.processes import ALONE, Processes, present_processes
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import POINTS
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair import memory_plan
from tl_asymmetry.pair.plan import Plan, make_plan
from tl_asymmetry.settings import PairSettings

TOKENS = tiny.tokens(9, 12)
OPTIONS: dict[str, Any] = {"tokens": TOKENS, "ranks": [4], "groups": 3, "batch_size": 2, "progress": False}
EACH_POINT = OPTIONS | {"matrices": ["W_K", "W_O", "W_in", "W_out"]}  # one matrix for each that is read or written
TABLES = PairAnalysis.TABLES


def same_result(one: PairAnalysis, other: PairAnalysis, rtol: float = 1e-6) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), rtol=rtol, atol=1e-9, obj=name)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        if name.split("/")[0] not in ("directions", "partners"):
            torch.testing.assert_close(array, other.arrays[name], rtol=rtol, atol=1e-9, equal_nan=True, msg=name)


# --- layers in passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [*(("gpt2", kind) for kind in tiny.KINDS), ("neox", tiny.KINDS[0]), ("gemma3", "bridge")]
)
def test_a_pass_for_each_layer_gives_what_one_pass_gives(name: str, kind: str) -> None:
    base, aligned = tiny.build(name, kind), tiny.build(name, kind, delta=0.05)
    options = OPTIONS if name == "gpt2" else EACH_POINT
    whole = analyze_pair(base, aligned, **options)
    passes = analyze_pair(base, aligned, **options, layers_per_pass=1)
    same_result(passes, whole)
    assert (whole.config["layers_per_pass"], passes.config["layers_per_pass"]) == (2, 1)
    assert any("captured in 2 passes over the texts, 1 layers at a time" in note for note in passes.notes)
    assert not any("passes over the texts" in note for note in whole.notes)


def test_every_variant_in_passes() -> None:
    base, aligned = tiny.bridge("gpt2"), tiny.bridge("gpt2", delta=0.05)
    options = {**EACH_POINT, "sensitivity": True, "activations": "both"}
    whole, passes = (analyze_pair(base, aligned, **options, layers_per_pass=n) for n in (2, 1))
    same_result(passes, whole)
    pd.testing.assert_frame_equal(passes.sensitivity(), whole.sensitivity(), rtol=1e-6)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_run_stops_behind_the_last_layer_wanted(name: str, kind: str) -> None:
    view = ModelView(tiny.build(name, kind))
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(view._adapter.blocks)
    ]
    points = [point for point in POINTS if view.has_point(point)]
    whole: dict[Any, torch.Tensor] = {}
    part: dict[Any, torch.Tensor] = {}
    with torch.no_grad(), view.evaluating():
        for store, layers in ((whole, 2), (part, 1)):
            ran.clear()
            readers = {(p, 0): lambda x, key=(p, 0), store=store: store.update({key: x.clone()}) for p in points}
            with view.hooks(readers):
                assert view.run(TOKENS, layers=layers) is None
            assert ran[-1] < layers
    for key, seen in whole.items():
        assert torch.equal(part[key], seen)
    assert all(not module._forward_pre_hooks for module in view._adapter.blocks)
    for handle in handles:
        handle.remove()
    for bad in (0, 3):
        with pytest.raises(ValueError, match=f"expected layers from 1 to 2, without logits, got {bad}; pass None"):
            view.run(TOKENS, layers=bad)


# --- memory ----------------------------------------------------------------------------------------------------------


def with_room(monkeypatch: pytest.MonkeyPatch, host: float) -> None:
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: int(host))


def test_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = tiny.bridge("gpt2"), tiny.bridge("gpt2", delta=0.05)
    estimate = estimate_pair(base, aligned, **OPTIONS)
    assert (estimate.layers_per_pass, estimate.passes) == (2, 1)
    with_room(monkeypatch, estimate.peak_bytes / memory_plan.USED_OF_FREE - 10)
    tight = estimate_pair(base, aligned, **OPTIONS)
    assert (tight.layers_per_pass, tight.passes) == (1, 2)
    assert tight.peak_bytes < estimate.peak_bytes
    assert "in 2 passes of 1 layers" in repr(tight)
    result = analyze_pair(base, aligned, **OPTIONS)
    assert result.config["layers_per_pass"] == 1
    same_result(result, analyze_pair(base, aligned, **OPTIONS, layers_per_pass=1))
    with pytest.raises(
        ValueError, match=r"of free memory with 2 layers a pass, got .* to plan with; pass layers_per_pass=1"
    ):
        analyze_pair(base, aligned, **OPTIONS, layers_per_pass=2)
    runs: list[int] = []
    base.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with_room(monkeypatch, 0.95 * tight.peak_bytes / memory_plan.USED_OF_FREE)
    for call in (analyze_pair, estimate_pair):
        with pytest.raises(
            ValueError, match=r"expected .* GB of free memory with 1 layers a pass, got .*; pass .*groups=1"
        ):
            call(base, aligned, **OPTIONS)
    with_room(monkeypatch, 1000)
    with pytest.raises(ValueError, match="; pass shorter texts, or use a larger machine"):
        analyze_pair(base, aligned, **OPTIONS)
    assert not runs
    for bad in (0, 3):
        with pytest.raises(ValueError, match=f"expected layers_per_pass from 1 to 2, got {bad}; pass None"):
            memory_plan.plan_memory(ModelView(base), *_planned(base, layers_per_pass=bad))


def _planned(base: Any, **over: Any) -> tuple[Plan, list[torch.Tensor], PairSettings]:
    settings, sequences = PairSettings(ranks=[1, 4], groups=3, batch_size=2, **over), list(TOKENS)
    return make_plan(ModelView(base), settings, sequences, Notes()), sequences, settings


def test_layers_side_by_side_take_a_gigabyte_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the moments a wide model takes what one layer takes, however many threads there are."""
    base = tiny.bridge("gpt2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def load() -> memory_plan.Workload:
        return memory_plan.workload(ModelView(base), *_planned(base))

    assert load().workers == 2
    alone = load().layers_host() // 2
    monkeypatch.setattr(memory_plan, "SIDE_BY_SIDE", 2 * alone - 1)
    assert load().workers == 1
    monkeypatch.setattr(memory_plan, "SIDE_BY_SIDE", alone - 1)
    assert load().workers == 1


def test_moments_are_counted_right() -> None:
    """What the plan says of moments is what they are."""
    base = tiny.bridge("gpt2")
    view = ModelView(base)
    plan, sequences, settings = _planned(base)
    load = memory_plan.workload(view, plan, sequences, settings)
    sites = [(point, layer) for point in plan.points for layer in range(2)]
    captured = capture(
        view, [sequences[:3], sequences[3:6], sequences[6:]], sites, exclude_first=True, beside=plan.beside,
        batch_size=2, progress=False,
    )  # fmt: skip
    held = sum(t.nbytes for group in captured.groups for m in group.values() for t in m.state_dict().values())
    assert held == pytest.approx(load.moments(2), rel=0.1)


def test_memory_is_known_here() -> None:
    free = free_memory(torch.device("cpu"))
    if sys.platform == "linux":
        assert free is not None
        assert 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_weights_in_files_are_estimated_too() -> None:
    base, directory = tiny.bridge("gpt2"), tiny.hf_directory("gpt2", delta=0.05)
    estimate = estimate_pair(base, directory, **OPTIONS)
    assert estimate.disk_bytes > (directory / "model.safetensors").stat().st_size
    assert estimate.table.set_index("stage").loc["weights", "seconds"] > 0
    assert list(estimate.table.columns) == ["stage", "seconds", "bytes", "device_bytes"]
    assert estimate.device_bytes == 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_shares_and_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(7))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "_exchange", lambda *_: shares)
        assert Processes(1, 3).gathered(shares[1]) == items
    assert ALONE.share(items) == items
    assert ALONE.gathered(items) == items
    assert present_processes() == ALONE


def test_moments_about_another_point_are_the_same_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64) + 4
    moments = StreamingMoments(5, sequences=True)
    moments.update(x)
    moved = moments.about(torch.arange(5.0, dtype=torch.float64))
    for name in ("mean", "second_moment", "covariance", "within_covariance"):
        torch.testing.assert_close(getattr(moved, name), getattr(moments, name), rtol=1e-10, atol=1e-10)
    empty = StreamingMoments(5, sequences=True).about(torch.zeros(5, dtype=torch.float64))
    assert empty.count == 0
    assert moved.merge(empty).count == 21


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_model_spread_over_devices() -> None:
    """The second block lies on the GPU, as accelerate would put it; moments follow their tensors."""
    base, aligned = tiny.bridge("llama"), tiny.bridge("llama", delta=0.05)
    whole = analyze_pair(base, aligned, **OPTIONS)

    def move(value: Any, device: str) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple | list):
            return type(value)(move(v, device) for v in value)
        return {k: move(v, device) for k, v in value.items()} if isinstance(value, dict) else value

    for model in (base, aligned):
        block = model.blocks[1].to("cuda")
        block.register_forward_pre_hook(lambda _, a, k: (move(a, "cuda"), move(k, "cuda")), with_kwargs=True)
        block.register_forward_hook(lambda _, a, output: move(output, "cpu"))
    spread = analyze_pair(base, aligned, **OPTIONS)
    same_result(spread, whole, rtol=1e-3)


@pytest.mark.gpu
def test_weights_in_files_against_a_model_on_the_gpu() -> None:
    directory = tiny.hf_directory("llama", delta=0.05)
    base, aligned = (tiny.bridge("llama", delta=δ).to("cuda") for δ in (0.0, 0.05))
    loaded, streamed = (analyze_pair(base, other, **OPTIONS) for other in (aligned, directory))
    same_result(streamed, loaded, rtol=1e-5)
    estimate = estimate_pair(base, directory, **OPTIONS)
    assert estimate.device_bytes > 0
