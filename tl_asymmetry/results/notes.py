"""Lines a result carries, and the warnings that go with them."""

from __future__ import annotations

import warnings


class Notes:
    """Collects what the reader of a result must know; what degrades the answer is a warning as well."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """A fact worth knowing: a line of the result."""
        self.lines.append(line)

    def warn(self, line: str, *, level: int = 4) -> None:
        """What degrades the answer: a line and a `UserWarning`, shown at the caller `level` frames up."""
        self.lines.append(line)
        warnings.warn(line, UserWarning, stacklevel=level)
