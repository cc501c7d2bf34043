"""The store: what is finished stays, what is half-written is never read, nobody else writes, nothing leads out."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killing import deaths
from tl_asymmetry.results.store import CheckpointStore, DamagedStore, MemoryStore, StoreReader

SETTINGS: dict[str, Any] = {"ranks": [1, 4], "seed": 0, "subspaces_from": "base"}


def opened(folder: Path, **over: Any) -> CheckpointStore:
    return CheckpointStore(folder, "trajectory", SETTINGS | over, {"name": "naïve <b>"})


def numbers(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "a/b": torch.randn(3, 4, dtype=torch.float64, generator=generator),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "count": torch.tensor(step),
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(x: torch.Tensor) -> bytes:
        return x.numpy().tobytes()

    return a.keys() == b.keys() and all(x.dtype == b[n].dtype and raw(x) == raw(b[n]) for n, x in a.items())


def test_what_was_appended_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "run") as store:
        for step in (400, 50):
            store.append(step, numbers(step), {"name": f"step{step}", "previous": [0, "x"]})
        assert store.steps == [50, 400]
        assert same(store.arrays(50), numbers(50))
    reader = StoreReader(tmp_path / "a" / "run")
    assert reader.steps == [50, 400]
    assert (reader.kind, reader.settings, reader.about) == ("trajectory", SETTINGS, {"name": "naïve <b>"})
    assert same(reader.arrays(400), numbers(400))
    assert reader.entry(50) == {"name": "step50", "previous": [0, "x"]}
    memory = MemoryStore()
    memory.append(50, numbers(50), {"name": "step50"})
    assert memory.steps == [50]
    assert same(memory.arrays(50), numbers(50))
    # append-only: the same step again supersedes, nothing else moves
    with opened(tmp_path / "a" / "run") as store:
        before = (store.folder / "checkpoints.jsonl").read_bytes()
        store.append(50, numbers(51), {"name": "again"})
        assert (store.folder / "checkpoints.jsonl").read_bytes().startswith(before)
    reader = StoreReader(tmp_path / "a" / "run")
    assert same(reader.arrays(50), numbers(51))
    assert reader.entry(50) == {"name": "again"}
    assert reader.steps == [50, 400]


def test_a_kill_at_any_durable_call_loses_nothing_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with opened(folder) as store:
            store.append(50, numbers(50), {"name": "step50"})

    def work() -> None:
        with opened(folder) as store:
            store.append(150, numbers(150), {"name": "step150"})
            store.put("previous-150", numbers(7))
            store.append(50, numbers(50), {"name": "step50"})

    count = 0
    for count in deaths(work, prepare):  # noqa: B007
        reader = StoreReader(folder)  # while nothing has been cleaned up yet
        assert same(reader.arrays(50), numbers(50))
        if 150 in reader.steps:
            assert same(reader.arrays(150), numbers(150))
        blob = reader.blob("previous-150")
        assert blob is None or same(blob, numbers(7))
        with opened(folder) as store:  # the lock died with its holder
            assert not list(folder.rglob("*.part"))
            store.append(150, numbers(150), {"name": "step150"})
        reader = StoreReader(folder)
        assert same(reader.arrays(150), numbers(150))
        assert same(reader.arrays(50), numbers(50))
        lines = (folder / "checkpoints.jsonl").read_text(encoding="utf-8").splitlines()
        assert all(json.loads(line) for line in lines)
    assert count >= 12


def test_a_kill_while_the_store_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        with opened(folder) as store:
            store.append(50, numbers(50), {})

    count = 0
    for count in deaths(work, lambda: shutil.rmtree(folder, ignore_errors=True)):  # noqa: B007
        with opened(folder) as store:
            store.append(50, numbers(50), {})
        assert same(StoreReader(folder).arrays(50), numbers(50))
    assert count >= 8


def test_half_a_line_is_no_line(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.append(50, numbers(50), {})
        store.append(150, numbers(150), {})
    lines = tmp_path / "checkpoints.jsonl"
    whole = lines.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        lines.write_bytes(whole[:end])
        assert StoreReader(tmp_path).steps == [50]
    with opened(tmp_path) as store:
        assert store.steps == [50]
    assert lines.read_bytes() == whole[:first]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for step in (50, 150, 400):
            store.append(step, numbers(step), {"name": "x"})
    lines = tmp_path / "checkpoints.jsonl"
    rows = lines.read_bytes().splitlines(keepends=True)
    for damaged in (rows[1].replace(b"150", b"151"), b"{}\n", b"[1]\n", b"\xff\xfe\n", b"\n", rows[1][:40] + b"\n"):
        lines.write_bytes(rows[0] + damaged + rows[2])
        with pytest.raises(DamagedStore, match=r"expected line 2 of .*checkpoints\.jsonl as it was written, got a dam"):
            StoreReader(tmp_path)
        with pytest.raises(DamagedStore, match="line 2"):
            opened(tmp_path)
    lines.write_bytes(rows[0] + rows[2])  # what the message advises
    with opened(tmp_path) as store:
        assert store.steps == [50, 400]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    with opened(tmp_path) as store:
        store.append(50, numbers(50), {})
        store.append(150, numbers(150), {})
    file = tmp_path / "checkpoints" / "step-50.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        changed = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        file.write_bytes({"cut": content[:-1], "changed": changed, "empty": b""}[damage])
    reader = StoreReader(tmp_path)
    with pytest.raises(DamagedStore, match=rf"expected .*step-50\.safetensors with the {len(content)} bytes"):
        reader.arrays(50)
    assert same(reader.arrays(150), numbers(150))
    with opened(tmp_path) as store:
        store.append(50, numbers(50), {})
    assert same(StoreReader(tmp_path).arrays(50), numbers(50))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(ValueError, match="expected a store that no other process writes to, got .*; wait for it"):
            opened(tmp_path)
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
        store.append(50, numbers(50), {})
        assert same(StoreReader(tmp_path).arrays(50), numbers(50))  # readers are welcome
    opened(tmp_path).close()


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    opened(tmp_path).close()
    for over, words in (
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"ranks": [1]}, r"ranks \(\[1, 4\] there, \[1\] here\)"),
        ({"more": True}, r"more \(null there, true here\)"),
    ):
        with pytest.raises(ValueError, match=f"was begun with, got others: {words}; pass the same"):
            opened(tmp_path, **over)
    with pytest.raises(ValueError, match="expected a store of a sweep, got one of a trajectory"):
        CheckpointStore(tmp_path, "sweep", SETTINGS, {})
    opened(tmp_path).close()  # a refusal lets go of the lock


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with store\.json, got '.*nothing'; pass the store of"):
        StoreReader(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a folder for the store, got the file"):
        opened(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"expected an empty folder or a store, got '.*full' with 'thesis\.tex' in it"):
        opened(tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    opened(tmp_path / "run").close()
    document = tmp_path / "run" / "store.json"
    content = json.loads(document.read_text(encoding="utf-8"))
    document.write_text(json.dumps(content | {"schema": 9}))
    with pytest.raises(ValueError, match="expected schema 1 or older, got 9; pass it to a newer tl_asymmetry"):
        opened(tmp_path / "run")
    document.write_text("{")
    with pytest.raises(DamagedStore, match=r"expected .*store\.json as it was written"):
        StoreReader(tmp_path / "run")


@pytest.mark.parametrize("written", [0, 10, None])
@pytest.mark.parametrize("target", ["file", "line", "settings"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, written: int | None) -> None:
    folder = tmp_path / "run"
    if target != "settings":
        with opened(folder) as store:
            store.append(50, numbers(50), {})
    state = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    real, calls = os.write, []

    def full(fd: int, content: Any) -> int:
        calls.append(len(content))
        if len(calls) == (2 if target == "line" else 1):
            if written is not None:
                real(fd, bytes(content)[:written])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, content)

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(OSError, match=r"expected room in the store .* for .*, got a full disk .*: make room and run ag"),
        opened(folder) as store,
    ):
        store.append(150, numbers(150), {})
    monkeypatch.undo()
    for path, content in state.items():
        assert path.read_bytes() == content
    assert not list(folder.rglob("*.part"))
    with opened(folder) as store:
        assert store.steps == ([] if target == "settings" else [50])
        store.append(150, numbers(150), {})
    assert same(StoreReader(folder).arrays(150), numbers(150))


def test_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as store:
        store.append(50, numbers(50), {})
        for name in ("../out", "a/b", "", "A", "..", "x.y"):
            with pytest.raises(ValueError, match="expected a name of small letters"):
                store.put(name, numbers(1))
            with pytest.raises(ValueError, match="expected a name of small letters"):
                store.blob(name)
    assert not (tmp_path / "out.safetensors").exists()
    elsewhere = tmp_path / "elsewhere"
    file = tmp_path / "run" / "checkpoints" / "step-50.safetensors"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(DamagedStore, match="expected files inside .*run, got .*, which leads out of it"):
        StoreReader(tmp_path / "run").arrays(50)
