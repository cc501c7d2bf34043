"""One store for whatever is finished part by part: killed at any moment, it keeps what was finished and nothing else.

    FOLDER/store.json                   kind, schema, the settings that all parts share, what the first writer said
    FOLDER/parts/step-50.safetensors    a part: its arrays, and in its metadata its entry and the digests of both
    FOLDER/lock                         held by the one process that may write

A part is made real by the rename of its one file, so that there is never half of one, nor an entry beside another's
arrays. Its digests also name the part and the settings of its store: a file that was cut, changed, renamed or carried
here from another store is found out. They tell accidents, not forgery. A saved result is one such file by itself.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import filelock
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tl_asymmetry.disk import PART, make_folder, replace_file, room_for
from tl_asymmetry.models.processes import ALONE, Processes
from tl_asymmetry.notes import warn

SCHEMA = 2
_SETTINGS, _PARTS, _LOCK, _ENDING = "store.json", "parts", "lock", ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,119}")
_STEP = re.compile(r"step-(\d+)")
_FIELD = "part"
_LONGEST = 40_000_000  # safetensors reads no header of more than 100 MB, where a quote takes two
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, FileNotFoundError)

PartsT = TypeVar("PartsT", bound="Parts")


class DamagedFile(ValueError):
    """A file is not as it was written; the message names it."""


class Parts(ABC):
    """Finished parts by name: `arrays` are a part's tensors, `entry` is what was said of it, as JSON has it.

    A key is a name (letters, digits and `._=-`) or a number of steps, which stands for the name `step-N`.
    """

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the finished parts, sorted."""

    @abstractmethod
    def entry(self, key: str | int) -> dict[str, Any]:
        """What was said of a part when it was finished.

        Raises:
            DamagedFile: there is none, or it is not as it was written.
        """

    @abstractmethod
    def arrays(self, key: str | int) -> dict[str, Tensor]:
        """A part's tensors, in the order in which they were given.

        Raises:
            DamagedFile: there are none, or they are not as they were written.
        """

    @abstractmethod
    def put(self, key: str | int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Finish a part, in the place of an earlier one of that name: once this returns no kill can take it away.

        Raises:
            OSError: no room (errno ENOSPC) or another failure of the disk; what was finished before is untouched.
        """

    @abstractmethod
    def drop(self, key: str | int) -> None:
        """Remove a part, if it is there."""

    def close(self) -> None:
        """Let others write. What was finished can still be read."""
        return

    @property
    def steps(self) -> list[int]:
        """Numbers of the parts named `step-N`, ascending."""
        return sorted(int(found[1]) for name in self.names if (found := _STEP.fullmatch(name)))

    def __contains__(self, key: str | int) -> bool:
        return _name(key) in self.names

    def __enter__(self: PartsT) -> PartsT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StoreReader(Parts):
    """A store as it stands, for reading; another process may go on writing to it.

    Args:
        folder: the store.

    Raises:
        ValueError: no store there, or one of another version.
        DamagedFile: its `store.json` is not as it was written.
    """

    folder: Path
    """Where it is."""
    kind: str
    """What its parts are."""
    settings: dict[str, Any]
    """What all its parts share; a writer with other settings is refused."""
    about: dict[str, Any]
    """What its first writer said besides: names, versions, arguments."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        document = _document(self.folder)
        if document["schema"] != SCHEMA:
            raise ValueError(
                f"expected a store of schema {SCHEMA}, got schema {document['schema']} in {str(folder)!r}; pass it to "
                "the tl_asymmetry that wrote it, or pass another folder"
            )
        self.kind, self.settings, self.about = document["kind"], document["settings"], document["about"]
        self._of = xxhash.xxh3_128_hexdigest(_canonical([self.kind, self.settings]))
        self._entries: dict[str, dict[str, Any]] = {}

    @property
    def names(self) -> list[str]:
        """As `Parts.names`."""
        return sorted(path.name[: -len(_ENDING)] for path in (self.folder / _PARTS).glob(f"*{_ENDING}"))

    def entry(self, key: str | int) -> dict[str, Any]:
        """As `Parts.entry`; the arrays are not read for it."""
        name = _name(key)
        if name not in self._entries:
            self._entries[name] = read_entry(self._file(name), name, of=self._of)
        return dict(self._entries[name])

    def arrays(self, key: str | int) -> dict[str, Tensor]:
        """As `Parts.arrays`."""
        name = _name(key)
        self._entries[name], arrays = read_part(self._file(name), name, of=self._of)
        return arrays

    def put(self, key: str | int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """Refused."""
        raise ValueError(f"expected a store opened for writing, got {str(self.folder)!r} for reading; use PartStore")

    def drop(self, key: str | int) -> None:
        """Refused."""
        self.put(key, {}, {})

    def _file(self, name: str) -> Path:
        return self.folder / _PARTS / f"{name}{_ENDING}"


class PartStore(StoreReader):
    """A store opened for writing, by one process at a time; use it as a context, or `close` it.

    A store that this process itself still holds, as a notebook's cell that is run again does, is taken over: who held
    it before can write no more. A finished store on a disk that cannot be written opens for reading.

    Args:
        folder: made if need be.
        kind: what the parts are.
        settings: what all parts share, JSON-ready; those of a store that exists must be equal.
        about: names, versions and the like, kept from the first writer.

    Raises:
        ValueError: another process writes to it, its settings are others, the folder is none or holds something else.
        DamagedFile: see `StoreReader`.

    Example:
        >>> import torch
        >>> with PartStore("run", "trajectory", {"ranks": [1, 4]}, {}) as store:
        ...     store.put(50, {"energy": torch.ones(2)}, {"name": "step50"})
        >>> StoreReader("run").arrays(50)["energy"].tolist()
        [1.0, 1.0]
    """

    def __init__(self, folder: str | Path, kind: str, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        path = Path(folder).expanduser()
        self._lock: filelock.BaseFileLock | None = None
        _check_place(path)
        if (path / _SETTINGS).exists():
            super().__init__(path)
            self._require(kind, settings)
            if os.access(path, os.W_OK):
                self._hold(path)
            return
        self._hold(path)
        try:
            if not (path / _SETTINGS).exists():  # nor did anyone write it before this one held the lock
                words = {"kind": kind, "schema": SCHEMA, "settings": dict(settings), "about": dict(about)}
                sealed = {**words, "xxh3": xxhash.xxh3_128_hexdigest(_canonical(words))}
                replace_file(path / _SETTINGS, json.dumps(sealed, indent=1).encode())
            super().__init__(path)
            self._require(kind, settings)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """As `Parts.close`."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def put(self, key: str | int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """As `Parts.put`."""
        name = _name(key)
        self._check_held()
        self._entries.pop(name, None)
        write_part(self._file(name), name, arrays, entry, of=self._of)

    def drop(self, key: str | int) -> None:
        """As `Parts.drop`."""
        name = _name(key)
        self._check_held()
        self._entries.pop(name, None)
        self._file(name).unlink(missing_ok=True)

    def heal(self) -> None:
        """Remove what is not as it was written, with a warning, so that it is made anew.

        Raises:
            DamagedFile: the store cannot be written.
        """
        for name in self.names:
            try:
                self.arrays(name)
            except DamagedFile as error:
                if self._lock is None:
                    raise
                self.drop(name)
                # No line of any result: made anew, it is the same.
                warn(f"{error} (it was removed and counts as missing)")

    def _hold(self, path: Path) -> None:
        """Become the one writer, and remove what a killed one left half-written."""
        held = os.getpid(), path.resolve()
        if (earlier := _held.get(held)) is not None:
            earlier.close()
        make_folder(path)
        make_folder(path / _PARTS)
        with room_for(f"the store {str(path)!r}", path):
            self._lock = filelock.FileLock(path / _LOCK)
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout as error:
                raise ValueError(
                    f"expected a store that no other process writes to, got {str(path)!r}, which one does; wait for "
                    "it, end it, or pass another folder"
                ) from error
        _held[held] = self
        for left in (*path.glob(f".*{PART}"), *(path / _PARTS).glob(f".*{PART}")):
            left.unlink()

    def _check_held(self) -> None:
        if self._lock is None:
            raise ValueError(
                f"expected a store that is open for writing, got {str(self.folder)!r}, which was closed, was taken "
                "over by a later run of this process, or cannot be written; run again, or pass another folder"
            )

    def _require(self, kind: str, settings: Mapping[str, Any]) -> None:
        if self.kind != kind:
            raise ValueError(f"expected a store of a {kind}, got one of a {self.kind}; pass another folder")
        theirs, ours = dict(_leaves(self.settings)), dict(_leaves(json.loads(_canonical(settings))))
        differences = [
            f"{name} ({theirs.get(name, 'none')} there, {ours.get(name, 'none')} here)"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if differences:
            raise ValueError(
                f"expected the models and settings that the store {str(self.folder)!r} was begun with, got others: "
                f"{', '.join(differences)}; pass the same ones or another folder"
            )


class MemoryStore(Parts):
    """What a `PartStore` does, for a run that keeps nothing on disk."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}

    @property
    def names(self) -> list[str]:
        """As `Parts.names`."""
        return sorted(self._parts)

    def entry(self, key: str | int) -> dict[str, Any]:
        """As `Parts.entry`."""
        return dict(self._parts[_name(key)][0])

    def arrays(self, key: str | int) -> dict[str, Tensor]:
        """As `Parts.arrays`."""
        return dict(self._parts[_name(key)][1])

    def put(self, key: str | int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """As `Parts.put`."""
        self._parts[_name(key)] = dict(entry), {name: array.detach().cpu() for name, array in arrays.items()}

    def drop(self, key: str | int) -> None:
        """As `Parts.drop`."""
        self._parts.pop(_name(key), None)


class SharedStore(Parts):
    """A store of several processes: the first holds it, every process makes every call, all get the same answer.

    Args:
        processes: the processes.
        make: opens the store; called by the first process only.

    Raises:
        ValueError, OSError: on every process, what opening it raised on the first.
    """

    def __init__(self, processes: Processes, make: Callable[[], Parts]) -> None:
        self._processes = processes
        self._store: Parts = MemoryStore()

        def opened() -> None:
            self._store = make()

        processes.by_first(opened)

    @property
    def names(self) -> list[str]:
        """As `Parts.names`."""
        return self._processes.by_first(lambda: self._store.names)

    def entry(self, key: str | int) -> dict[str, Any]:
        """As `Parts.entry`."""
        return self._processes.by_first(lambda: self._store.entry(key))

    def arrays(self, key: str | int) -> dict[str, Tensor]:
        """As `Parts.arrays`."""
        return self._processes.by_first(lambda: self._store.arrays(key))

    def put(self, key: str | int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """As `Parts.put`; what the first process is given counts."""
        self._processes.by_first(lambda: self._store.put(key, arrays, entry))

    def drop(self, key: str | int) -> None:
        """As `Parts.drop`."""
        self._processes.by_first(lambda: self._store.drop(key))

    def close(self) -> None:
        """As `Parts.close`. Not collective."""
        self._store.close()


def open_store(
    folder: str | Path | None,
    kind: str,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    processes: Processes = ALONE,
) -> Parts:
    """A healed `PartStore`, a `MemoryStore` without a folder, a `SharedStore` around it where there are processes.

    Raises:
        ValueError, OSError: see `PartStore`.
    """

    def make() -> Parts:
        if folder is None:
            return MemoryStore()
        store = PartStore(folder, kind, settings, about)
        store.heal()
        return store

    return make() if processes.count == 1 else SharedStore(processes, make)


# -- one part, one file ----------------------------------------------------------------------------------------------


def write_part(path: Path, name: str, arrays: Mapping[str, Tensor], entry: Mapping[str, Any], *, of: str = "") -> None:
    """Write a part's file in one step.

    Args:
        path: the file.
        name: of the part, sealed in: a file under another name is refused.
        arrays: tensors, of any device.
        entry: JSON-ready.
        of: what it is a part of, sealed in as well.

    Raises:
        ValueError: an entry too long for a header.
        OSError: as `disk.replace_file`.
    """
    plain = _plain(arrays)
    words = {"part": name, "of": of, "arrays": list(plain), "arrays_xxh3": _digest(plain), "entry": dict(entry)}
    text = json.dumps(words)
    if len(text) > _LONGEST:
        raise ValueError(
            f"expected an entry of {name!r} of at most {_LONGEST} characters, got {len(text)}; pass fewer sites, texts "
            "or settings at a time"
        )
    # one field, since safetensors writes several in no order: the same part is the same file, byte for byte
    replace_file(path, save(plain, {_FIELD: f"{xxhash.xxh3_128_hexdigest(text.encode())} {text}"}))


def read_part(path: Path, name: str, *, of: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Entry and arrays of a part's file, whole.

    Raises:
        DamagedFile: it is gone, cut short, changed, another part's or no plain file.
    """
    try:
        with _opened(path) as file:
            words = _words(file, name, of)
            file.seek(0)
            arrays = load(file.read())
        arrays = {each: arrays[each] for each in words["arrays"]}
        if _digest(arrays) != words["arrays_xxh3"]:
            raise ValueError("changed numbers")
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return words["entry"], arrays


def read_entry(path: Path, name: str, *, of: str = "") -> dict[str, Any]:
    """The entry of a part's file; its arrays are not read.

    Raises:
        DamagedFile: as `read_part`, of what is read.
    """
    try:
        with _opened(path) as file:
            entry: dict[str, Any] = _words(file, name, of)["entry"]
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return entry


def _words(file: BinaryIO, name: str, of: str) -> dict[str, Any]:
    """A safetensors file's metadata: 8 bytes for the header's length, the header as JSON, then the numbers."""
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if length > size - 8:
        raise ValueError("one cut short")
    seal, _, text = json.loads(file.read(length))["__metadata__"][_FIELD].partition(" ")
    if seal != xxhash.xxh3_128_hexdigest(text.encode()):
        raise ValueError("changed words")
    words: dict[str, Any] = json.loads(text)
    if (words["part"], words["of"]) != (name, of):
        raise ValueError(f"the part {words['part']!r} of another store or name")
    return words


def _opened(path: Path) -> BinaryIO:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError("a link or no file at all")
    return path.open("rb")


def _damaged(path: Path, error: Exception) -> DamagedFile:
    if isinstance(error, FileNotFoundError):
        found = "none"
    elif isinstance(error, KeyError | TypeError | AttributeError):
        found = "a file that is no part of a store"
    else:
        found = str(error)
    return DamagedFile(
        f"expected {path} as it was written, got {found}; pass a whole copy, or remove it and make it anew"
    )


def _digest(arrays: Mapping[str, Tensor]) -> str:
    """XXH3 (128 bit) of the tensors' names, dtypes, shapes and bytes."""
    digest = xxhash.xxh3_128()
    for name, array in arrays.items():
        digest.update(f"{name}\n{array.dtype} {tuple(array.shape)}\n".encode())
        flat = array.as_strided((array.numel(),), (1,))  # also of one number, whose strides may be anything
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


# -- the folder --------------------------------------------------------------------------------------------------------

_held: weakref.WeakValueDictionary[tuple[int, Path], PartStore] = weakref.WeakValueDictionary()
"""Stores that this process writes to; by process too, since a forked one inherits the list but not the right."""


def _check_place(path: Path) -> None:
    """Refuse links, which would lead out of a store, and a folder of something else."""
    for own in (_SETTINGS, _LOCK, _PARTS):
        if (path / own).is_symlink():
            raise DamagedFile(f"expected no links in a store, got {path / own}; remove it, or pass another folder")
    if path.is_dir() and not (path / _SETTINGS).exists():
        # A writer killed before it was a store left no more than these.
        left = (each.name for each in path.iterdir() if not re.fullmatch(rf"{_PARTS}|{_LOCK}|\..*{PART}", each.name))
        if (foreign := min(left, default=None)) is not None:
            raise ValueError(
                f"expected an empty folder or a store, got {str(path)!r} with {foreign!r} in it; pass another folder"
            )


def _document(folder: Path) -> dict[str, Any]:
    """A store's settings; sealed since schema 2."""
    path = folder / _SETTINGS
    if path.is_symlink():
        raise DamagedFile(f"expected no links in a store, got {path}; remove it, or pass another folder")
    if not path.is_file():
        raise ValueError(f"expected a folder with {_SETTINGS}, got {str(folder)!r}; pass the store of an earlier run")
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        if document["schema"] == SCHEMA and document.pop("xxh3") != xxhash.xxh3_128_hexdigest(_canonical(document)):
            raise ValueError("a changed one")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"expected {path} as it was written, got {error}; pass another folder") from error
    return document


def _name(key: str | int) -> str:
    name = f"step-{key:d}" if isinstance(key, int) else key
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected a name of at most 120 letters, digits and '._=-', got {name!r}; pass such a name")
    return name


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Settings by dotted name, as JSON and no longer than a message can take."""
    if isinstance(value, dict) and value:
        for key, held in value.items():
            yield from _leaves(held, f"{name}.{key}" if name else str(key))
        return
    text = json.dumps(value)
    yield name, text if len(text) <= 60 else f"{text[:40]}… (xxh3 {xxhash.xxh3_64_hexdigest(text.encode())})"
