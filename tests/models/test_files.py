"""Files that are not what they should be: each is refused by name, before anything is read of them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tl_asymmetry.models.readers.files import ADAPTER_FILES, TensorFiles, open_files, read_json


@pytest.fixture(name="sharded")
def sharded_fixture(tmp_path: Path) -> Path:
    """Two shards of two tensors each, with their index."""
    listed = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        tensors = {f"{name}{i}": torch.arange(12.0).view(3, 4) + i for name in "ab"}
        save_file(tensors, tmp_path / file)
        listed |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return tmp_path


def reindex(folder: Path, **changes: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def test_tensors_are_read_when_they_are_asked_for(sharded: Path) -> None:
    files = open_files(sharded)
    assert sorted(files) == ["a0", "a1", "b0", "b1"]
    assert len(files) == 4
    assert files.shape("b1") == (3, 4)
    assert torch.equal(files["b1"], torch.arange(12.0).view(3, 4) + 1)
    assert files.bytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    (sharded / "model-00002-of-00002.safetensors").unlink()  # nothing was kept
    with pytest.raises(ValueError, match="got model-00002-of-00002.safetensors that cannot be read .*; pass the file"):
        files["b1"]
    assert torch.equal(files["a0"], torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("keep", [0, 4, 60, -8])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match="expected a whole file of tensors, got model-00002-of-00002.safetensors that"):
        open_files(sharded)


def test_a_corrupt_header_is_named(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[8:20] = b"no json here"
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="got model-00001-of-00002.safetensors that cannot be read"):
        open_files(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="expected the shard model-00001-of-00002.safetensors beside its index, got"):
        open_files(sharded)


def test_an_index_that_lists_what_is_not_there(sharded: Path) -> None:
    reindex(sharded, c0="model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match="expected c0 in model-00001-of-00002.safetensors, where .*, got no such tensor there; pass"
    ):
        open_files(sharded)


def test_an_index_that_points_to_the_wrong_shard(sharded: Path) -> None:
    reindex(sharded, a0="model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="expected a0 in model-00002-of.*, got the tensor in model-00001-of-00002"):
        open_files(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a1": torch.zeros(2), "a0": torch.ones(2)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ValueError, match="expected every tensor in one file, got a0 in model-00001-.* and in model-0000"
    ):
        open_files(sharded)


@pytest.mark.parametrize("evil", ["../evil.safetensors", "/etc/passwd", "a/../../evil", "..", "", "sub/shard"])
def test_an_index_does_not_lead_out_of_its_folder(sharded: Path, evil: str) -> None:
    save_file({"x": torch.zeros(2)}, sharded.parent / "evil.safetensors")
    reindex(sharded, x=evil)
    with pytest.raises(ValueError, match=r"expected plain file names in '.*', got .*; pass an index whose shards lie"):
        open_files(sharded)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="; pass "):
        open_files(sharded)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected weights \(.*\) in '.*', got none; pass a folder"):
        open_files(tmp_path)
    for name in "ab":
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="got 2 safetensors files without an index; pass"):
        open_files(tmp_path)


def test_files_of_torch_are_read_without_running_what_is_pickled_in_them(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for old in (False, True):
        torch.save({"w": torch.arange(6.0)}, path, _use_new_zipfile_serialization=not old)
        assert torch.equal(open_files(tmp_path)["w"], torch.arange(6.0))

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"w": Evil()}, path)
    with pytest.raises(ValueError, match="pytorch_model.bin that is none, or holds Python objects") as refusal:
        open_files(tmp_path)
    assert "weights_only" not in str(refusal.value)  # torch's own words advise to run it
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="pytorch_model.bin that is none, or holds Python objects"):
        open_files(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"state": {"w": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="expected a state dict"):
        TensorFiles([path])


def test_json_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected JSON in"):
        read_json(tmp_path / "x.json")


def test_transformers_order_of_names_and_the_adapters_own(tmp_path: Path) -> None:
    for i, name in enumerate(("model.safetensors", "adapter_model.safetensors")):
        save_file({"w": torch.full((1,), float(i))}, tmp_path / name)
    torch.save({"w": torch.full((1,), 2.0)}, tmp_path / "pytorch_model.bin")
    assert open_files(tmp_path)["w"].item() == 0
    assert open_files(tmp_path, ADAPTER_FILES)["w"].item() == 1
    assert open_files(tmp_path / "pytorch_model.bin")["w"].item() == 2
