"""Lines a result carries, and the warnings that go with them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

import jaxtyping
import torch

_PACKAGE = str(Path(__file__).parent) + os.sep
_DECORATORS = tuple(str(Path(str(module.__file__)).parent) + os.sep for module in (torch, jaxtyping))


class Notes:
    """Collects what the reader of a result must know, each line once; what degrades the answer is a warning as well."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """A fact worth knowing: a line of the result."""
        if line not in self.lines:  # often true of both models
            self.lines.append(line)

    def warn(self, line: str) -> None:
        """What degrades the answer: a line and a `UserWarning` at the caller's own line."""
        self.add(line)
        warn(line)


def warn(line: str) -> None:
    """A `UserWarning` at the line that called this package, however deep in it this is said.

    Frames of torch and jaxtyping around a public function are their decorators'. Python 3.12 has `skip_file_prefixes`
    for all this.
    """
    files: list[str] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    public = max(i for i, file in enumerate(files) if file.startswith(_PACKAGE))
    outside = (i for i, file in enumerate(files) if i > public and not file.startswith(_DECORATORS))
    warnings.warn(line, UserWarning, stacklevel=1 + next(outside, public))
