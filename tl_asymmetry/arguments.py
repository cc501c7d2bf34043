"""Wrong numbers, flags, names and paths, refused before any work: what annotations promise, checked in one place.

Annotations say what a plain argument has to be. `checked` reads them once and refuses everything else by the
argument's name; ranges, shapes, and what depends on a model, a function checks itself, and so it does what may come in
many forms (texts, lists, models).
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T", bound=Callable[..., Any])

_SHOWN = 60
_MOST_DRAWS = 100_000
_KNOWN = ("torch", "tl_asymmetry.geometry", "tl_asymmetry.grokking", "tl_asymmetry.models.edits")
"""Where the classes come from whose objects are asked for by name; of all others the functions speak themselves."""
_REAL = re.compile(r"float|int\d", re.IGNORECASE)
_MISSING = inspect.Parameter.empty


def checked(thing: T) -> T:
    """A function whose plain arguments are held against its annotations; or a class with its constructor and methods.

    Plain are whole numbers, numbers, flags, strings, paths, devices, tensors of numbers and objects of a few classes,
    each or None where the annotation has it; an argument with anything else in its annotation is left to the function.

    Raises:
        ValueError: at the call, naming the argument, what was expected, what was found and what to pass instead.

    Example:
        >>> @checked
        ... def double(count: int = 1) -> int:
        ...     return 2 * count
        >>> double(None)
        Traceback (most recent call last):
        ValueError: expected count as a whole number, got None; pass count=1, the default
    """
    if not inspect.isclass(thing):
        return _checked_function(thing)
    for name, member in list(vars(thing).items()):
        if (name == "__init__" or not name.startswith("_")) and inspect.isfunction(member):
            setattr(thing, name, _checked_function(member, thing))
        elif isinstance(member, classmethod) and not name.startswith("_"):
            setattr(thing, name, classmethod(_checked_function(member.__func__, thing)))
    return thing


def plain_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a checked function that are checked.

    Example:
        >>> @checked
        ... def ranked(table: object, rank: int, *, name: str | None = None) -> None: ...
        >>> plain_arguments(ranked)
        ['rank', 'name']
    """
    held = getattr(function, "_plain_arguments", None)
    return [] if held is None else list(held())


def listed(name: str, given: Any, kind: type[Any], *, instead: str) -> list[Any]:
    """One plain value, or several, as a list.

    Args:
        name: of the argument.
        given: what came for it: a value, or an iterable of values (a list, a range, a tensor, an iterator).
        kind: `int`, `float` or `str`.
        instead: what to pass.

    Raises:
        ValueError: anything else.

    Example:
        >>> listed("ranks", 4, int, instead="ranks=[4]"), listed("ranks", range(1, 3), int, instead="ranks=[4]")
        ([4], [1, 2])
    """
    plain = _PLAIN[kind]
    if plain.allows(given):
        return [given]
    several = None
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) and not hasattr(given, "columns"):
        several = given.tolist() if hasattr(given, "tolist") else list(given)
    if not isinstance(several, list) or not all(plain.allows(value) for value in several):
        raise ValueError(f"expected {name} as {plain.words}, or several, got {shown(given)}; pass {instead}")
    return several


def check_draws(draws: int, *, usual: int = 20) -> None:
    """Refuse a number of draws that is none, or more than anyone has memory for.

    Raises:
        ValueError: outside 1 to 100,000.
    """
    if not 1 <= draws <= _MOST_DRAWS:
        raise ValueError(f"expected draws from 1 to {_MOST_DRAWS:,}, got {draws}; pass draws={usual}")


def shown(value: object) -> str:
    """A value as a message shows it: whole if it is short, else its type; a tensor by dtype and shape.

    Example:
        >>> shown("WQ"), shown(list(range(1000)))
        ("'WQ'", 'a list of 1000')
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, str | int | float | list | tuple | dict | bytes | os.PathLike):
        whole = repr(value)
        if len(whole) <= _SHOWN:
            return whole
    article = "an" if type(value).__name__[:1] in "aeiouAEIOU" else "a"
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict | str | bytes) else ""
    return f"{article} {type(value).__name__}{size}"


@dataclass(frozen=True)
class _Kind:
    """One thing that an argument may be."""

    words: str
    allows: Callable[[Any], bool]
    example: str


@dataclass(frozen=True)
class _Argument:
    """An argument, and all the things that it may be."""

    name: str
    kinds: tuple[_Kind, ...]
    default: Any

    def check(self, value: Any) -> None:
        if any(kind.allows(value) for kind in self.kinds):
            return
        expected = " or ".join(dict.fromkeys(kind.words for kind in self.kinds))
        remedy = self.kinds[0].example
        if self.default is None:
            remedy = f"{remedy}, or leave it out"
        elif self.default is not _MISSING:
            remedy = f"{self.name}={self.default!r}, the default"
        raise ValueError(f"expected {self.name} as {expected}, got {shown(value)}; pass {remedy}")


def _checked_function(function: Any, owner: type | None = None) -> Any:
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    held: dict[str, _Argument] | None = None

    def arguments() -> dict[str, _Argument]:
        nonlocal held
        if held is None:  # only at the first call: annotations may name what is defined later
            held = _arguments(function, owner)
        return held

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        known = arguments()
        for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
            if name in known:
                known[name].check(value)
        return function(*args, **kwargs)

    call.__dict__["_plain_arguments"] = arguments
    return call


def _arguments(function: Any, owner: type | None) -> dict[str, _Argument]:
    """The arguments that can be checked."""
    module = inspect.unwrap(function).__module__ if owner is None else owner.__module__
    scope = vars(sys.modules[module])
    found: dict[str, _Argument] = {}
    for parameter in inspect.signature(function).parameters.values():
        annotation = parameter.annotation
        if annotation is _MISSING or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, dict(scope))
            except NameError:  # for type checkers only
                continue
        kinds = [_kind(part) for part in _parts(annotation)]
        for narrow in (_PATH, _DEVICE):  # either may be a string, but not every string is one
            if narrow in kinds:
                kinds = [narrow if kind is _PLAIN[str] else kind for kind in kinds]
        plain = [kind for kind in kinds if kind is not None]
        if plain and len(plain) == len(kinds):
            plain.sort(key=lambda kind: kind is _NONE)
            found[parameter.name] = _Argument(parameter.name, tuple(plain), parameter.default)
    return found


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _kind(annotation: Any) -> _Kind | None:
    """What a part of an annotation allows; None for what is not plain."""
    if get_origin(annotation) is not None or not isinstance(annotation, type):  # list[int] is a type on Python 3.10
        return None
    array = getattr(annotation, "array_type", None)  # of jaxtyping's classes
    if array is not None:
        if "float64" not in getattr(annotation, "dtypes", ()):
            return None
        return _of_numbers(array, getattr(annotation, "dim_str", ""))
    if annotation.__module__.startswith(_KNOWN) and annotation.__name__ not in ("Tensor", "Module"):
        return _DEVICE if annotation.__name__ == "device" else _of_class(annotation)
    return _PATH if annotation is not object and issubclass(annotation, os.PathLike) else _PLAIN.get(annotation)


def _of_class(wanted: type) -> _Kind:
    """An object of a class."""
    words = f"{'an' if wanted.__name__[0] in 'AEIOU' else 'a'} {wanted.__name__}"
    return _Kind(words, lambda value: isinstance(value, wanted), words)


def _of_numbers(array: type, axes: str) -> _Kind:
    """A tensor, or an array of numpy, of real numbers; of its shape so many axes at least as have a name of their own
    behind others, the rest a function checks itself."""
    named = axes.split()
    least = sum(not axis.startswith(("*", "...")) for axis in named) if "*" in axes else 0
    where = f" [{', '.join(['...', *(axis for axis in named if not axis.startswith('*'))])}]" if least else ""
    words, like = {
        "Tensor": ("a tensor of numbers", lambda value: isinstance(value, array)),
        "ndarray": ("a numpy array of numbers", lambda value: hasattr(value, "__array__")),  # or a column of pandas
    }[array.__name__]

    def allows(value: Any) -> bool:
        return like(value) and _is_real(getattr(value, "dtype", "")) and len(value.shape) >= least

    return _Kind(words + where, allows, words + where)


@cache  # numpy takes long to spell one out
def _is_real(dtype: Any) -> bool:
    return bool(_REAL.search(str(dtype)))


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    """A path, or a string that can be one: the empty one would be the current folder."""
    return isinstance(value, os.PathLike) or (isinstance(value, str) and bool(value.strip()) and "\0" not in value)


def is_device(value: Any) -> bool:
    """Whether models can be put there, as far as the name tells."""
    import torch

    try:
        return isinstance(value, str | torch.device) and torch.device(value).type != "meta"
    except RuntimeError:
        return False


_DEVICE = _Kind("a device", is_device, "'cpu'")
_NONE = _Kind("None", lambda value: value is None, "None")
_PATH = _Kind("a path", _is_path, "a path")
_PLAIN: Mapping[type, _Kind] = {
    type(None): _NONE,
    int: _Kind(
        "a whole number",
        lambda value: isinstance(value, Integral) and not isinstance(value, bool),
        "a number such as 1",
    ),
    float: _Kind("a number", lambda value: _is_number(value, Real), "a number such as 0.5"),
    bool: _Kind(
        "True or False", lambda value: isinstance(value, bool) or type(value).__name__ == "bool", "True or False"
    ),  # or numpy's own
    str: _Kind("a string", lambda value: isinstance(value, str), "a string"),
}
