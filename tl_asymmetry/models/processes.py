"""One analysis in several processes: sequences and layers are shared out, sums added up, results the same everywhere.

Uses torch.distributed as the caller (or torchrun) has set it up; there is no scheduler of our own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tl_asymmetry.geometry.moments import StreamingMoments

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Processes:
    """This process among those that work on one analysis."""

    rank: int = 0
    """Its number."""
    count: int = 1
    """How many there are."""

    @property
    def on_this_machine(self) -> int:
        """How many of them share this machine's memory; all of them where the launcher does not say."""
        return 1 if self.count == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items that fall to this process: every `count`-th."""
        return list(items[self.rank :: self.count])

    def gathered(self, own: list[Item]) -> list[Item]:
        """All processes' items in the order in which they were shared out, on every process."""
        if self.count == 1:
            return own
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, own)
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def by_first(self, work: Callable[[], Answer]) -> Answer:
        """What `work` returns on the first process, which alone does it, on every process.

        Raises:
            ValueError, OSError: on every process, what it raised on the first.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        answer: Answer = outcome[0]
        return answer

    def least(self, number: int) -> int:
        """The smallest of the numbers that the processes have."""
        if self.count == 1:
            return number
        numbers: list[Any] = [None] * self.count
        dist.all_gather_object(numbers, number)
        return min(numbers)

    def summed(self, moments: StreamingMoments) -> StreamingMoments:
        """Moments of the rows that all processes saw, the same on every process; on CPU."""
        if self.count == 1:
            return moments
        count = self._sum(torch.tensor(moments.count, dtype=torch.float64))
        mean = moments.mean.cpu() if moments.count else torch.zeros(moments.d, dtype=torch.float64)
        # All must add up sums about one and the same point; one that float32 holds, as elsewhere.
        shift = (self._sum(mean * moments.count) / count.clamp(min=1)).float().double()
        state = moments.about(shift).state_dict()
        return StreamingMoments.from_state({n: t if n == "shift" else self._sum(t) for n, t in state.items()})

    def agree(self, what: Mapping[str, Any]) -> None:
        """Refuse to go on when the processes were given different things.

        Raises:
            ValueError: on every process, naming what differs.
        """
        if self.count == 1:
            return
        mine = {name: _fingerprint(value) for name, value in what.items()}
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine)
        for name in what:
            if len({theirs[name] for theirs in everyone}) > 1:
                raise ValueError(
                    f"expected the same {name} in all {self.count} processes, got different ones; pass every process "
                    "the same arguments (the sequences are shared out here), or distributed=False"
                )

    def _sum(self, x: Tensor) -> Tensor:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
        total = x.to(device, copy=True)
        dist.all_reduce(total)
        return total.cpu()


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)


ALONE = Processes()
"""One process by itself."""


def present_processes() -> Processes:
    """The processes of torch.distributed's default group; one process by itself where none was set up."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def started_processes() -> Iterator[Processes]:
    """What torchrun has started, joined for as long as the context lasts; else one process by itself."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield present_processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # gloo for what lies on the CPU, which is where moments are summed
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield present_processes()
    finally:
        dist.destroy_process_group()
