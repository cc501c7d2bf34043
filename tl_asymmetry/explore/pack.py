"""Numbers for a page: one binary block of a JSON header and arrays, laid out so that gzip finds what repeats."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

_KINDS = {"f4": "<f4", "f8": "<f8", "u1": "|u1", "u2": "<u2", "u4": "<u4"}
_SMALLEST = 1e-300
"""Below it a double has fewer digits than are shown."""


class Pack:
    """Collects arrays, each different one once; what stands for one in the header is `{"array": number}`."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, bytes], int] = {}

    def numbers(self, values: Any) -> dict[str, int]:
        """Floats in single precision, with a double's exponents where one needs them; NaN stays."""
        array = np.asarray(values, dtype=np.float64)
        with np.errstate(over="ignore", under="ignore"):
            short = array.astype(np.float32)
        size = np.abs(array)
        small = (size > 0) & (size < np.finfo(np.float32).tiny)
        if not small.any() and bool((np.isfinite(short) == np.isfinite(array)).all()):
            return self._add("f4", short)
        mantissa, exponent = np.frexp(array)
        return self._add("f8", np.ldexp(mantissa.astype(np.float32).astype(np.float64), exponent))

    def shown(self, values: Any, digits: int = 3) -> dict[str, int]:
        """Floats of which a reader sees so many decimal digits and nothing else comes: as they are printed; NaN stays.

        Held as places among NaN, 0 and all such numbers between the powers of ten around the smallest and the largest,
        the negative ones last.
        """
        array = np.asarray(values, dtype=np.float64).ravel()
        size = np.abs(array)
        if np.isinf(array).any() or ((size > 0) & (size < _SMALLEST)).any():
            return self.numbers(array)
        first = 10 ** (digits - 1)
        known = size > 0
        printed = np.array([float(f"{v:.{digits - 1}e}") for v in size[known].tolist()])
        # No number of so few digits is that near the next power of ten.
        exponent = np.floor(np.log10(printed) + 1e-9).astype(int)
        mantissa = np.rint(printed / 10.0**exponent * first).astype(int)
        lowest = int(exponent.min(initial=0))
        positive = 9 * first * (int(exponent.max(initial=0)) - lowest + 1)
        places = np.where(np.isnan(array), 0, 1)
        places[known] = 2 + 9 * first * (exponent - lowest) + mantissa - first + positive * (array[known] < 0)
        return {**self.indexes(places), "first": first, "power": lowest - digits + 1, "positive": positive}

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
        """Everything in one block: [header length u4][header][arrays].

        Of an array all first bytes come before all second ones, so that those of exponents, which repeat, do not stand
        among those of mantissas, which do not.
        """
        layout = [{"kind": kind, "length": len(content) // int(kind[1])} for kind, content in self._arrays]
        head = json.dumps({**header, "arrays": layout}, separators=(",", ":"), allow_nan=False).encode()
        body = bytearray(len(head).to_bytes(4, "little") + head)
        for kind, content in self._arrays:
            body += np.frombuffer(content, np.uint8).reshape(-1, int(kind[1])).T.tobytes()
        return bytes(body)

    def _add(self, kind: str, array: np.ndarray) -> dict[str, int]:
        key = kind, array.astype(_KINDS[kind]).tobytes()
        return {"array": self._arrays.setdefault(key, len(self._arrays))}
