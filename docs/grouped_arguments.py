"""Arguments that docstrings describe together (`layer, matrix, head: as in …`), one entry each for the reference.

The code says once what holds for several arguments; a reader of the reference, and an editor, look for one by its name.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_GROUP = re.compile(
    r"^(?P<indent> {4,})(?P<names>\w+(?:,\s+\w+)+):(?P<text>[^\n]*\n(?:(?P=indent) +[^\n]*\n|\n(?=(?P=indent) ))*)",
    re.MULTILINE,
)
_ARGUMENTS = re.compile(r"^(?P<indent> *)Args:\n(?P<body>(?:(?P=indent) +[^\n]*\n?|\n)*)", re.MULTILINE)


def one_by_one(docstring: str) -> str:
    """The docstring with every group in its sections of arguments taken apart; the rest as it is."""
    return _ARGUMENTS.sub(lambda section: _GROUP.sub(_entries, section[0]), docstring)


def _entries(group: re.Match[str]) -> str:
    names = re.split(r",\s+", group["names"])
    return "".join(f"{group['indent']}{name}:{group['text']}" for name in names)


class GroupedArguments(griffe.Extension):
    """Takes groups apart before the docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_by_one(obj.docstring.value + "\n").rstrip("\n")
