"""Processes that die of SIGKILL at a chosen point, for tests of what survives."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

POINTS = ("write", "fsync", "replace", "ftruncate", "truncate")
"""Functions of `os` through which everything durable passes."""


class Fatal:
    """Counts calls of `os.write`, `os.replace` …, and at the chosen one writes half and dies."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0
        self.real = {name: getattr(os, name) for name in POINTS}

    def install(self) -> None:
        """Take the place of the functions; in a process that is to die only."""
        for name in POINTS:
            setattr(os, name, self._counting(name))

    def _counting(self, name: str) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                if name == "write":
                    self.real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return self.real[name](*args, **kwargs)

        return counting


def dies(work: Callable[[], Any], at: int) -> bool:
    """Run `work` in a forked process that is killed at its `at`-th durable call; False if it ended before that."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            Fatal(at).install()
            work()
            code = 0
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return False


def deaths(work: Callable[[], Any], prepare: Callable[[], Any], most: int = 200) -> Iterator[int]:
    """Prepare, run `work` to each of its durable calls in turn, killed there; ends after the run that survives."""
    for at in range(1, most):
        prepare()
        if not dies(work, at):
            return
        yield at
    raise AssertionError(f"no end after {most} kills")
