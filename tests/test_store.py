"""The store: what is finished stays, what is half-written is never read, nobody else writes, nothing leads out."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killing import deaths
from tl_asymmetry.store import DamagedFile, MemoryStore, PartStore, StoreReader, open_store, read_part, write_part

SETTINGS: dict[str, Any] = {"ranks": [1, 4], "seed": 0, "recipe": {"lr": 0.1, "betas": [0.9, 0.98]}, "none": None}


def opened(folder: Path, **over: Any) -> PartStore:
    return PartStore(folder, "trajectory", SETTINGS | over, {"name": "naïve <b>"})


def numbers(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "a/b": torch.randn(3, 4, dtype=torch.float64, generator=generator),
        "count": torch.tensor(step),
        "half": torch.ones(2, 0, 3, dtype=torch.bfloat16),
        "ü\udc80".encode(errors="replace").decode(): torch.tensor([True, False]),
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(x: torch.Tensor) -> bytes:
        return x.reshape(-1).view(torch.uint8).numpy().tobytes()

    shapes = all(x.dtype == b[n].dtype and x.shape == b[n].shape for n, x in a.items())
    return list(a) == list(b) and shapes and all(raw(x) == raw(b[n]) for n, x in a.items())


def part(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.safetensors"


def test_what_was_put_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    entry = {"name": "naïve \udc80", "previous": [0, "x"], "none": None, "small": 5e-324}
    with opened(folder) as store:
        store.put(400, numbers(400), entry)
        store.put(50, numbers(50), {})
        store.put("removal-L2H3.W_O", {}, entry)
        assert store.steps == [50, 400]
        assert same(store.arrays(50), numbers(50))
    reader = StoreReader(folder)
    assert reader.names == ["removal-L2H3.W_O", "step-400", "step-50"]
    assert (reader.kind, reader.settings, reader.about) == ("trajectory", SETTINGS, {"name": "naïve <b>"})
    assert reader.entry(400) == reader.entry("removal-L2H3.W_O") == entry
    assert same(reader.arrays(400), numbers(400))
    assert 400 in reader
    assert 401 not in reader
    with opened(folder) as store:  # the same name again supersedes, nothing else moves
        before = part(folder, "step-400").read_bytes()
        assert store.entry(50) == {}
        store.put(50, numbers(51), {"name": "again"})
        assert store.entry(50) == {"name": "again"}
        assert part(folder, "step-400").read_bytes() == before
        store.drop(400)
        store.drop(400)
    reader = StoreReader(folder)
    assert same(reader.arrays(50), numbers(51))
    assert reader.steps == [50]
    with pytest.raises(ValueError, match="expected a store opened for writing"):
        reader.put(1, {}, {})


def test_memory_keeps_what_a_disk_would() -> None:
    memory = open_store(None, "trajectory", SETTINGS, {})
    assert isinstance(memory, MemoryStore)
    with memory:
        memory.put(50, numbers(50), {"name": "step50"})
        memory.put("bases", {}, {})
        assert (memory.names, memory.steps, memory.entry(50)) == (["bases", "step-50"], [50], {"name": "step50"})
        assert same(memory.arrays(50), numbers(50))
        memory.drop("bases")
        assert "bases" not in memory


def test_tensors_that_share_memory_and_those_that_are_not_contiguous(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    shared = {
        "one": torch.ones(1).expand(1, 1),
        "none": torch.ones(0, 3),
        "whole": whole,
        "row": whole[1],
        "turned": whole.mT,
        "again": whole,
    }
    with opened(tmp_path) as store:
        store.put("x", shared, {})
        assert same(store.arrays("x"), {name: tensor.contiguous() for name, tensor in shared.items()})


# --- kills ----------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_durable_call_loses_nothing_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with opened(folder) as store:
            store.put(50, numbers(50), {"name": "step50"})

    def work() -> None:
        with opened(folder) as store:
            store.put(150, numbers(150), {"name": "step150"})
            store.put("previous-150", numbers(7), {})
            store.put(50, numbers(51), {"name": "again"})

    count = 0
    for count in deaths(work, prepare):  # noqa: B007
        reader = StoreReader(folder)  # while nothing has been cleaned up yet
        again = reader.entry(50)["name"] == "again"
        assert same(reader.arrays(50), numbers(51 if again else 50))
        for key, wanted in ((150, 150), ("previous-150", 7)):
            assert key not in reader or same(reader.arrays(key), numbers(wanted))
        with opened(folder) as store:  # the lock died with its holder
            assert not list(folder.rglob("*.part"))
            store.put(150, numbers(150), {"name": "step150"})
        assert same(StoreReader(folder).arrays(150), numbers(150))
    assert count >= 12


def test_a_kill_while_the_store_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        with opened(folder) as store:
            store.put(50, numbers(50), {})

    count = 0
    for count in deaths(work, lambda: shutil.rmtree(folder, ignore_errors=True)):  # noqa: B007
        with opened(folder) as store:
            store.put(50, numbers(50), {})
        assert same(StoreReader(folder).arrays(50), numbers(50))
        assert not list(folder.rglob("*.part"))
    assert count >= 8


# --- damage ---------------------------------------------------------------------------------------------------------


def test_any_flipped_bit_and_any_cut_of_a_part_is_found(tmp_path: Path) -> None:
    file = tmp_path / "part"
    write_part(file, "x", {"a": torch.arange(3.0), "b": torch.tensor(7, dtype=torch.int8)}, {"n": [1, "ü"]}, of="s")
    whole = file.read_bytes()
    assert read_part(file, "x", of="s")[0] == {"n": [1, "ü"]}
    for at in range(len(whole)):
        for changed in (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]):
            file.write_bytes(changed)
            with pytest.raises(DamagedFile, match=f"expected {file} as it was written, got .*; pass a whole copy, or"):
                read_part(file, "x", of="s")


def test_any_flipped_bit_of_the_settings_is_found_or_changes_nothing(tmp_path: Path) -> None:
    opened(tmp_path).close()
    file = tmp_path / "store.json"
    whole = file.read_bytes()
    found = 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            settings = StoreReader(tmp_path).settings
        except ValueError:
            found += 1
        else:
            assert settings == SETTINGS
    assert found > 0.9 * len(whole)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "empty", "another's", "link", "folder"])
def test_a_damaged_part_is_named_and_made_anew(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path) as store:
        for step in (50, 150):
            store.put(step, numbers(step), {"step": step})
    file, content = part(tmp_path, "step-50"), part(tmp_path, "step-50").read_bytes()
    file.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        file.mkdir()
    elif damage != "gone":
        changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        other = part(tmp_path, "step-150").read_bytes()
        file.write_bytes({"cut": content[:-1], "changed": changed, "empty": b"", "another's": other}[damage])
    reader = StoreReader(tmp_path)
    with pytest.raises(DamagedFile, match=r"expected .*step-50\.safetensors as it was written, got "):
        reader.arrays(50)
    assert same(reader.arrays(150), numbers(150))
    if damage in ("gone", "folder"):
        return
    with pytest.warns(
        UserWarning, match=r"expected .*step-50\.safetensors as it was written.*removed and counts as mi"
    ):
        healed = open_store(tmp_path, "trajectory", SETTINGS, {})
    with healed as store:
        assert store.steps == [150]
        store.put(50, numbers(50), {"step": 50})
    assert same(StoreReader(tmp_path).arrays(50), numbers(50))
    if damage == "link":
        assert (tmp_path / "elsewhere").read_bytes() == content


def test_a_part_of_another_store_is_found(tmp_path: Path) -> None:
    for seed in (0, 1):
        with opened(tmp_path / str(seed), seed=seed) as store:
            store.put(50, numbers(seed), {})
    shutil.copy(part(tmp_path / "0", "step-50"), part(tmp_path / "1", "step-50"))
    for read in (StoreReader(tmp_path / "1").arrays, StoreReader(tmp_path / "1").entry):
        with pytest.raises(DamagedFile, match="got the part 'step-50' of another store or name"):
            read(50)


# --- who may write --------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        child = os.fork()
        if child == 0:
            code = 9
            with contextlib.suppress(BaseException):
                try:
                    opened(tmp_path)
                except ValueError as error:
                    code = 3 if "no other process writes to" in str(error) else 4
            os._exit(code)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 3
        store.put(50, numbers(50), {})
        assert same(StoreReader(tmp_path).arrays(50), numbers(50))  # readers are welcome
    opened(tmp_path).close()


def test_a_store_of_this_process_is_taken_over(tmp_path: Path) -> None:
    """As by a notebook's cell that is run again while its first run's objects are still alive."""
    first = opened(tmp_path)
    first.put(50, numbers(50), {})
    second = opened(tmp_path / "." / ".." / tmp_path.name)
    with pytest.raises(ValueError, match="got .*, which was closed, was taken over by a later run of this process, or"):
        first.put(150, numbers(150), {})
    assert first.steps == [50]
    first.close()
    second.put(150, numbers(150), {})
    assert second.steps == [50, 150]
    del second  # nor does one that nobody closed stand in the way
    gc.collect()
    opened(tmp_path).close()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path).close()
    for over, words in (
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"ranks": [1]}, r"ranks \(\[1, 4\] there, \[1\] here\)"),
        ({"more": True}, r"more \(none there, true here\)"),
        ({"recipe": {"lr": 0.2}}, r"recipe\.betas \(\[0\.9, 0\.98\] there, none here\), recipe\.lr \(0\.1 there, 0"),
        ({"ranks": list(range(99))}, r"ranks \(\[1, 4\] there, \[0, 1, 2, .*…"),
    ):
        with pytest.raises(ValueError, match=f"was begun with, got others: {words}.*; pass the same"):
            opened(tmp_path, **over)
    with pytest.raises(ValueError, match="expected a store of a sweep, got one of a trajectory"):
        PartStore(tmp_path, "sweep", SETTINGS, {})
    opened(tmp_path).close()  # a refusal lets go of the lock
    opened(tmp_path / "nan", seed=float("nan")).close()
    opened(tmp_path / "nan", seed=float("nan")).close()


def test_a_finished_store_on_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        store.put(50, numbers(50), {})
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: mode != os.W_OK and real(path, mode, **more))
    monkeypatch.setattr("filelock.FileLock", lambda path: pytest.fail("nothing may be written"))
    with open_store(tmp_path, "trajectory", SETTINGS, {}) as store:
        assert same(store.arrays(50), numbers(50))
        with pytest.raises(ValueError, match="or cannot be written; run again, or pass another folder"):
            store.put(150, numbers(150), {})
    part(tmp_path, "step-50").write_bytes(b"")
    with pytest.raises(DamagedFile, match="as it was written"):
        open_store(tmp_path, "trajectory", SETTINGS, {})


# --- where ----------------------------------------------------------------------------------------------------------


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with store\.json, got '.*nothing'; pass the store of"):
        StoreReader(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name, words in (
        ("file", "got the file '.*file'; pass another path"),
        ("file/below", r"which cannot be made \(Not a directory\); pass another path"),
        ("link", "'.*link', a link to nothing; pass another path"),
    ):
        with pytest.raises(ValueError, match=f"expected a folder, .*{words}"):
            opened(tmp_path / name)
    assert (tmp_path / "file").read_text() == "x"
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"expected an empty folder or a store, got '.*full' with 'thesis\.tex' in it"):
        opened(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_settings_of_another_version_or_no_settings(tmp_path: Path) -> None:
    opened(tmp_path).close()
    document = tmp_path / "store.json"
    content = json.loads(document.read_text(encoding="utf-8"))
    document.write_text(json.dumps(content | {"schema": 9}))
    with pytest.raises(ValueError, match="expected a store of schema 2, got schema 9 in .*; pass it to the"):
        opened(tmp_path)
    for damaged in ("{", "[]", "{}", "null", "[" * 100_000, '{"schema": 2}'):
        document.write_text(damaged)
        for read in (StoreReader, opened):
            with pytest.raises(DamagedFile, match=r"expected .*store\.json as it was written"):
                read(tmp_path)


def test_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("x")
    with opened(tmp_path / "run") as store:
        for name in ("../out", "a/b", "", ".hidden", "..", "x\n", "a" * 121, "/etc/passwd"):
            for refused in (store.arrays, store.entry, store.drop, lambda name: store.put(name, {}, {})):
                with pytest.raises(ValueError, match="expected a name of at most 120 letters"):
                    refused(name)
        part(tmp_path / "run", "step-50").symlink_to(thesis)
        store.put(50, numbers(50), {})  # in the place of the link, not through it
        assert same(store.arrays(50), numbers(50))
    for own in ("store.json", "lock", "parts"):
        folder = tmp_path / f"with-{own}"
        folder.mkdir()
        (folder / own).symlink_to(thesis)
        with pytest.raises(DamagedFile, match=f"expected no links in a store, got .*{own}; remove it"):
            opened(folder)
    assert thesis.read_text() == "x"
    (tmp_path / "scratch").symlink_to(tmp_path / "run")  # the folder itself may be reached by a link
    assert StoreReader(tmp_path / "scratch").steps == [50]
    opened(tmp_path / "scratch").close()


@pytest.mark.parametrize("written", [0, 10, None])
@pytest.mark.parametrize("target", ["part", "settings"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, written: int | None) -> None:
    folder = tmp_path / "run"
    if target != "settings":
        with opened(folder) as store:
            store.put(50, numbers(50), {})
    state = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    real = os.write

    def full(fd: int, content: Any) -> int:
        if written is not None:
            real(fd, bytes(content)[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(OSError, match=r"expected room for .*, got a full disk .*: make room and run again") as raised,
        opened(folder) as store,
    ):
        store.put(50, numbers(51), {})
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.undo()
    for path, content in state.items():
        assert path.read_bytes() == content
    assert not list(folder.rglob("*.part"))
    with opened(folder) as store:
        assert store.steps == ([] if target == "settings" else [50])
        store.put(150, numbers(150), {})
    assert same(StoreReader(folder).arrays(150), numbers(150))
