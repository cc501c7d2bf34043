"""Numbers for a page: one binary block of a JSON header and arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

_KINDS = {"f4": "<f4", "f8": "<f8", "u1": "|u1", "u2": "<u2", "u4": "<u4"}
_ALIGN = 8


class Pack:
    """Collects arrays; what stands for one in the header is `{"array": number}`."""

    def __init__(self) -> None:
        self._arrays: list[tuple[str, np.ndarray]] = []

    def numbers(self, values: Any) -> dict[str, int]:
        """Floats, seven digits (sixteen where a float32 would lose small ones to zero); NaN stays."""
        array = np.asarray(values, dtype=np.float64)
        with np.errstate(over="ignore", under="ignore"):
            short = array.astype(np.float32)
        size = np.abs(array)
        small = (size > 0) & (size < np.finfo(np.float32).tiny)
        fits = not small.any() and bool((np.isfinite(short) == np.isfinite(array)).all())
        return self._add("f4" if fits else "f8", array)

    def indexes(self, values: Any) -> dict[str, int]:
        """Integers from 0."""
        array = np.asarray(values)
        kind = "u1" if array.max(initial=0) < 2**8 else "u2" if array.max(initial=0) < 2**16 else "u4"
        return self._add(kind, array)

    def words(self, values: Any) -> dict[str, Any]:
        """Strings, each different one once."""
        found = {str(v): None for v in values}
        at = {word: i for i, word in enumerate(found)}
        return {"words": list(found), **self.indexes([at[str(v)] for v in values])}

    def block(self, header: dict[str, Any]) -> bytes:
        """Everything in one block: [header length u4][header][arrays, each aligned]."""
        offset, layout = 0, []
        for kind, array in self._arrays:
            layout.append({"kind": kind, "at": offset, "length": array.size})
            offset += -(-array.size * int(kind[1]) // _ALIGN) * _ALIGN
        head = json.dumps({**header, "arrays": layout}, separators=(",", ":"), allow_nan=False).encode()
        head += b" " * (-(len(head) + 4) % _ALIGN)
        body = bytearray(len(head).to_bytes(4, "little") + head)
        for kind, array in self._arrays:
            content = array.astype(_KINDS[kind]).tobytes()
            body += content + b"\0" * (-len(content) % _ALIGN)
        return bytes(body)

    def _add(self, kind: str, array: np.ndarray) -> dict[str, int]:
        self._arrays.append((kind, array.ravel()))
        return {"array": len(self._arrays) - 1}
