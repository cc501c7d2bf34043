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
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tl_asymmetry.geometry.moments import StreamingMoments

P = ParamSpec("P")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class StoppedElsewhere(ValueError):
    """Another process has stopped; the message gives its number and its reason."""


class LostProcess(ConnectionError):
    """Another process does not answer any more: it was killed, or the network between them is gone."""


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
        parts = self._exchange(own)
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def by_first(self, work: Callable[[], Answer]) -> Answer:
        """What `work` returns on the first process, which alone does it, on every process.

        Raises:
            ValueError, OSError: on every process, what it raised on the first.
        """
        outcome: tuple[Any, Exception | None] = None, None
        if self.is_first:
            try:
                outcome = work(), None
            except (ValueError, OSError) as error:
                outcome = None, error
        answer, failure = self._exchange(outcome)[0]
        if failure is not None:
            raise failure
        return answer

    def least(self, number: int) -> int:
        """The smallest of the numbers that the processes have."""
        return min(self._exchange(number))

    def summed(self, moments: StreamingMoments) -> StreamingMoments:
        """Moments of the rows that all processes saw, the same on every process; on CPU."""
        if self.count == 1:
            return moments
        self._exchange(None)  # a process that has stopped says so here, and not by a sum that never comes
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
        everyone = self._exchange({name: _fingerprint(value) for name, value in what.items()})
        for name in what:
            if len({theirs[name] for theirs in everyone}) > 1:
                raise ValueError(
                    f"expected the same {name} in all {self.count} processes, got different ones; pass every process "
                    "the same arguments (the sequences are shared out here), or distributed=False"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What ends one process inside ends all of them at their next exchange, with its reason: nobody waits in vain.

        Raises:
            StoppedElsewhere: in the processes that did not stop by themselves.
            LostProcess: one of them does not answer any more.
        """
        try:
            yield
            self._exchange(None)
        except (StoppedElsewhere, LostProcess):
            raise
        except Exception as error:
            self._exchange(None, stopped=f"{type(error).__name__}: {error}")
            raise

    def _exchange(self, mine: Any, *, stopped: str | None = None) -> list[Any]:
        """What every process gives, by its number. All that is ever said between processes, sums aside, goes here."""
        if self.count == 1:
            return [mine]
        everyone: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(everyone, (mine, stopped))
        except RuntimeError as error:  # gloo's and nccl's own words
            raise LostProcess(
                f"expected all {self.count} processes to answer, got none from one of them, which has ended or lies "
                "behind a broken connection; see its own output, and run again (with a store, it goes on)"
            ) from error
        for rank, (_, reason) in enumerate(everyone):
            if stopped is None and reason is not None:
                raise StoppedElsewhere(
                    f"expected all {self.count} processes to go on, got process {rank} stopped by {reason}"
                )
        return [theirs for theirs, _ in everyone]

    def _sum(self, x: Tensor) -> Tensor:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else x.device
        total = x.to(device, copy=True)
        dist.all_reduce(total)
        return total.cpu()


def together(function: Callable[P, Answer]) -> Callable[P, Answer]:
    """A function with the keyword `distributed`, under `Processes.together`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Answer:
        with (present_processes() if kwargs.get("distributed", True) else ALONE).together():
            return function(*args, **kwargs)

    return call


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
