"""Models whose modules lie on several devices, run by accelerate's hooks; and such as are not all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tl_asymmetry import ModelView, analyze_pair

PLACES = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1,
          "model.rotary_emb": 0}  # fmt: skip
OPTIONS: dict[str, Any] = {"tokens": tiny.tokens(4, 12), "ranks": [4], "groups": 1, "progress": False}


def llama(delta: float = 0.0) -> Any:
    """A model of transformers, as `from_pretrained` gives it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.hf_directory("llama", 0, delta), attn_implementation="eager")


def spread_out(model: Any, on: dict[int, str], **options: Any) -> Any:
    """What `device_map=` makes of a model: hooks that bring inputs to each module's device, and weights where asked."""
    from accelerate import dispatch_model

    device_map = {name: on[number] for name, number in PLACES.items()}
    return dispatch_model(model, device_map=device_map, main_device="cpu", force_hooks=True, **options)


def test_a_model_with_a_device_map_gives_the_same_numbers() -> None:
    plain = analyze_pair(llama(), llama(0.05), **OPTIONS)
    base, aligned = (spread_out(llama(delta), {0: "cpu", 1: "cpu"}) for delta in (0.0, 0.05))
    assert any(hasattr(module, "_hf_hook") for module in base.modules())
    found = analyze_pair(base, aligned, **OPTIONS)
    torch.testing.assert_close(torch.tensor(found.table["fraction"]), torch.tensor(plain.table["fraction"]))
    assert found.table["fraction"].notna().all()
    assert not any("put into" in note for note in found.notes)  # accelerate's hooks edit nothing


def test_offloaded_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = spread_out(llama(), {0: "cpu", 1: "disk"}, offload_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"expected weights in memory, got none for .*offload.*device_map"):
        analyze_pair(model, llama(0.05), **OPTIONS)


def test_parts_of_weights_are_refused_by_name() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = llama()
    init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        projection = model.model.layers[0].mlp.down_proj
        part = distribute_tensor(projection.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
        projection.weight = torch.nn.Parameter(part)
        with pytest.raises(ValueError, match=r"expected whole weights, got this process's part of .*tp_plan.*moments="):
            ModelView(model)
    finally:
        destroy_process_group()
