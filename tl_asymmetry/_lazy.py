"""What is imported when it is first asked for: names of a package, and libraries that take long to start."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Late(ModuleType):
    """A module that is imported when something in it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:  # for editors and type checkers; the same modules as below
    import pandas as pd
    from scipy import special
    from scipy.linalg import lapack
else:  # 0.8 s, which only those wait for who need a table or a test
    pd, special, lapack = _Late("pandas"), _Late("scipy.special"), _Late("scipy.linalg.lapack")

__all__ = ["attach", "lapack", "pd", "special"]


def attach(
    package: str, rooms: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """What a package needs as `__getattr__`, `__dir__` and `__all__` (PEP 562).

    Args:
        package: its `__name__`.
        rooms: from modules of `tl_asymmetry` to the names that come from them.
        submodules: of the package, offered as attributes without being imported.
    """
    origin = {name: room for room, names in rooms.items() for name in names}

    def get(name: str) -> Any:
        if name in submodules:
            return import_module(f"{package}.{name}")
        if name not in origin:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"tl_asymmetry.{origin[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    exported = sorted([*origin, *submodules])
    return get, lambda: [*exported, *vars(sys.modules[package])], exported
