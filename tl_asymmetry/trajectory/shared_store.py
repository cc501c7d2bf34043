"""One store for several processes: the first of them holds it, what it says reaches all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tl_asymmetry.models.processes import Processes
from tl_asymmetry.results.store import CheckpointStore, MemoryStore


class SharedStore:
    """A store that the first process has opened. Every process makes every call, and all get the same answer.

    Args:
        processes: the processes.
        make: opens the store; called by the first process only.

    Raises:
        ValueError: on every process, what opening it raised on the first.
    """

    def __init__(self, processes: Processes, make: Callable[[], CheckpointStore | MemoryStore]) -> None:
        self._processes = processes
        self._held: list[CheckpointStore | MemoryStore] = []

        def opened() -> None:
            self._held.append(make())

        processes.by_first(opened)

    @property
    def steps(self) -> list[int]:
        """As `StoreReader.steps`."""
        return self._processes.by_first(lambda: self._held[0].steps)

    def entry(self, step: int) -> dict[str, Any]:
        """As `StoreReader.entry`."""
        return self._processes.by_first(lambda: self._held[0].entry(step))

    def arrays(self, step: int) -> dict[str, Tensor]:
        """As `StoreReader.arrays`."""
        return self._processes.by_first(lambda: self._held[0].arrays(step))

    def append(self, step: int, arrays: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
        """As `CheckpointStore.append`; what the first process is given counts."""
        self._processes.by_first(lambda: self._held[0].append(step, arrays, entry))

    def close(self) -> None:
        """Let go of it; a call of its own, which no other process waits for."""
        for store in self._held:
            if isinstance(store, CheckpointStore):
                store.close()
