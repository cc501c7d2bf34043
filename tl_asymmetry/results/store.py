"""An append-only store of finished checkpoints: killed at any moment, it keeps what was finished and nothing else.

    FOLDER/store.json                     kind, schema, the settings all records share
    FOLDER/checkpoints.jsonl              one line for each finished checkpoint, with a digest of itself and of its file
    FOLDER/checkpoints/step-50.safetensors
    FOLDER/lock                           held by the one process that may write

A file is written beside its place, flushed to the disk and renamed into it; its line follows, and only the line makes
it part of the store. A line without its end, all that a kill can leave, is cut off by the next writer. Names of files
come from step numbers, never from what stands in the store, so that no path leads out of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import xxhash
from safetensors.torch import load, save
from torch import Tensor

SCHEMA = 1
_SETTINGS, _LINES, _FILES, _LOCK, _PART = "store.json", "checkpoints.jsonl", "checkpoints", "lock", ".part"
_BLOB = re.compile(r"[a-z]+(-\d+)?")


class DamagedStore(ValueError):
    """A file or line of a store is not as it was written; the message names it."""


class StoreReader:
    """A store as it stands, for reading; another process may go on writing to it.

    Args:
        folder: the store.

    Raises:
        ValueError: no store there, or one of a newer version.
        DamagedStore: a line that is complete but not as it was written.
    """

    folder: Path
    """Where it is."""
    kind: str
    """What its records are."""
    settings: dict[str, Any]
    """What all its records share; a writer with other settings is refused."""
    about: dict[str, Any]
    """What its first writer said besides: names, versions, arguments."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        document = self._document()
        self.kind, self.settings, self.about = document["kind"], document["settings"], document["about"]
        self._entries, self._complete = self._read_lines()

    @property
    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return sorted(self._entries)

    def entry(self, step: int) -> dict[str, Any]:
        """What was said of a checkpoint when it was finished."""
        return dict(self._entries[step]["entry"])

    def arrays(self, step: int) -> dict[str, Tensor]:
        """The numbers of a finished checkpoint.

        Raises:
            DamagedStore: its file is gone, cut short or changed.
        """
        line, path = self._entries[step], self._file(step)
        content = self._bytes_inside(path)
        if content is None or len(content) != line["bytes"] or xxhash.xxh3_128_hexdigest(content) != line["xxh3"]:
            got = "none" if content is None else f"one of {len(content)}, cut short or changed"
            raise DamagedStore(
                f"expected {path} with the {line['bytes']} bytes that were written, got {got}; run the analysis "
                "with this store again to have that checkpoint measured anew"
            )
        return load(content)

    def blob(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that belong to no checkpoint, written by `put`; None if there are none of that name."""
        content = self._bytes_inside(self._blob(name))
        return None if content is None else load(content)

    def _document(self) -> dict[str, Any]:
        path = self.folder / _SETTINGS
        content = self._bytes_inside(path) if path.is_file() else None
        if content is None:
            raise ValueError(
                f"expected a folder with {_SETTINGS}, got {str(self.folder)!r}; pass the store of an earlier run"
            )
        try:
            document = json.loads(content)
            schema = document["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedStore(f"expected {path} as it was written, got {error}; pass another folder") from error
        if schema > SCHEMA:
            raise ValueError(f"expected schema {SCHEMA} or older, got {schema}; pass it to a newer tl_asymmetry")
        return document

    def _read_lines(self) -> tuple[dict[int, dict[str, Any]], int]:
        """Complete lines by step, later ones in the place of earlier ones, and the bytes they take."""
        path = self.folder / _LINES
        content = (self._bytes_inside(path) if path.is_file() else None) or b""
        complete = content.rfind(b"\n") + 1
        entries = {}
        for number, raw in enumerate(content[:complete].splitlines(), start=1):
            try:
                line = json.loads(raw)
                sound = line.pop("line") == _digest(line)
                step = int(line["step"])
            except (ValueError, KeyError, TypeError, AttributeError):
                sound = False
            if not sound:
                raise DamagedStore(
                    f"expected line {number} of {path} as it was written, got a damaged one; remove that line to have "
                    "its checkpoint measured anew"
                )
            entries[step] = line
        return entries, complete

    def _file(self, step: int) -> Path:
        return self.folder / _FILES / f"step-{int(step)}.safetensors"

    def _blob(self, name: str) -> Path:
        if not _BLOB.fullmatch(name):
            raise ValueError(f"expected a name of small letters and a number at most, got {name!r}; pass such a name")
        return self.folder / f"{name}.safetensors"

    def _bytes_inside(self, path: Path) -> bytes | None:
        """A file's bytes, None if there is no file; refuses a link that leads out of the store."""
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DamagedStore(f"expected files inside {self.folder}, got {path}, which leads out of it; remove it")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


class MemoryStore:
    """What a `CheckpointStore` does, for a run that keeps nothing on disk."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def steps(self) -> list[int]:
        """As `StoreReader.steps`."""
        return sorted(self._held)

    def entry(self, step: int) -> dict[str, Any]:
        """As `StoreReader.entry`."""
        return dict(self._held[step][1])

    def arrays(self, step: int) -> dict[str, Tensor]:
        """As `StoreReader.arrays`."""
        return dict(self._held[step][0])

    def append(self, step: int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """As `CheckpointStore.append`."""
        self._held[int(step)] = {name: array.detach().cpu() for name, array in arrays.items()}, dict(entry)


class CheckpointStore(StoreReader):
    """A store opened for writing, by one process at a time; use it as a context, or `close` it.

    Args:
        folder: made if need be.
        kind: what the records are.
        settings: what all records share, JSON-ready; those of a store that exists must be equal.
        about: names, versions and the like, kept from the first writer.

    Raises:
        ValueError: another process writes to it, its settings are others, the folder holds something else.
        DamagedStore: see `StoreReader`.

    Example:
        >>> import torch
        >>> with CheckpointStore("run", "trajectory", {"ranks": [1, 4]}, {}) as store:
        ...     store.append(50, {"energy": torch.ones(2)}, {"name": "step50"})
        >>> StoreReader("run").arrays(50)["energy"].tolist()
        [1.0, 1.0]
    """

    def __init__(self, folder: str | Path, kind: str, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise ValueError(f"expected a folder for the store, got the file {str(path)!r}; pass another path")
        new = not (path / _SETTINGS).is_file()
        if new and path.is_dir() and _foreign(path):
            raise ValueError(
                f"expected an empty folder or a store, got {str(path)!r} with {_foreign(path)[0]!r} in it; pass "
                "another folder"
            )
        (path / _FILES).mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ValueError(
                f"expected a store that no other process writes to, got {str(path)!r}, which one does; wait for it or "
                "pass another folder"
            ) from error
        try:
            if not (path / _SETTINGS).is_file():
                document = {"kind": kind, "schema": SCHEMA, "settings": dict(settings), "about": dict(about)}
                with _explained(path, "its settings"):
                    _replace(path / _SETTINGS, json.dumps(document, indent=1, ensure_ascii=False).encode())
            super().__init__(path)
            self._require(kind, settings)
            self._clean()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write."""
        self._lock.release()

    def append(self, step: int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Finish a checkpoint: from the moment this returns no kill can take it away. Supersedes one of that step.

        Raises:
            OSError: no room (errno ENOSPC) or another failure of the disk; what was finished before is untouched.
        """
        content = save(_plain(arrays))
        line = {
            "step": int(step),
            "bytes": len(content),
            "xxh3": xxhash.xxh3_128_hexdigest(content),
            "entry": dict(entry),
        }
        written = json.dumps({**line, "line": _digest(line)}, ensure_ascii=False).encode() + b"\n"
        with _explained(self.folder, f"step {step}"):
            _replace(self._file(step), content)
            self._append_line(written)
        self._entries[int(step)] = json.loads(json.dumps(line))  # as it will be read back
        self._complete += len(written)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that belong to no checkpoint, in the place of earlier ones of that name."""
        content = save(_plain(tensors))
        with _explained(self.folder, name):
            _replace(self._blob(name), content)

    def drop(self, name: str) -> None:
        """Remove what `put` wrote."""
        self._blob(name).unlink(missing_ok=True)

    def _append_line(self, line: bytes) -> None:
        fd = os.open(self.folder / _LINES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            try:
                _write(fd, line)
            except BaseException:
                os.ftruncate(fd, self._complete)  # half a line is no line
                raise
        finally:
            os.close(fd)

    def _clean(self) -> None:
        """Remove what a killed process left: files half-written, half a line."""
        for path in (*self.folder.glob(f"*{_PART}"), *(self.folder / _FILES).glob(f"*{_PART}")):
            path.unlink(missing_ok=True)
        lines = self.folder / _LINES
        if lines.is_file() and lines.stat().st_size > self._complete:
            os.truncate(lines, self._complete)

    def _require(self, kind: str, settings: Mapping[str, Any]) -> None:
        if self.kind != kind:
            raise ValueError(f"expected a store of a {kind}, got one of a {self.kind}; pass another folder")
        ours = json.loads(json.dumps(dict(settings)))
        differences = [
            f"{name} ({_short(self.settings.get(name))} there, {_short(ours.get(name))} here)"
            for name in sorted(ours.keys() | self.settings.keys())
            if ours.get(name) != self.settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"expected the models and settings that the store {str(self.folder)!r} was begun with, got others: "
                f"{', '.join(differences)}; pass the same ones or another folder"
            )


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on CPU, none of which shares memory with another, as safetensors asks for."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def _foreign(folder: Path) -> list[str]:
    """What lies in a folder that is no store yet and was not left by a writer killed before it was one."""
    ours = {_FILES, _LOCK, _SETTINGS + _PART}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)


def _replace(target: Path, content: bytes) -> None:
    """Write a file in one step: beside its place, to the disk, then renamed."""
    part = target.with_name(target.name + _PART)
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write(fd, content)
        finally:
            os.close(fd)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself outlives a power cut only when the folder is on the disk
        fd = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _write(fd: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]
    os.fsync(fd)


@contextmanager
def _explained(folder: Path, what: str) -> Iterator[None]:
    """Say of a full disk what it means here."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"expected room in the store {str(folder)!r} for {what}, got a full disk ({free} bytes free); what was "
            "finished is kept: make room and run again",
        ) from error


def _digest(line: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(line, sort_keys=True, ensure_ascii=False).encode())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
