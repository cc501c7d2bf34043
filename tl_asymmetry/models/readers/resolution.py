"""Names of stored tensors as training frameworks write them, and the parameters that they mean."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_ddp_module.")
"""What torch.compile, FSDP and activation checkpointing put into a name, at any depth."""

PREFIXES = (
    "module.",  # DistributedDataParallel, DeepSpeed
    "_forward_module.",  # Lightning Fabric
    "base_model.model.",  # PEFT
    "pretrained_model.",  # TRL's value-head models
    "language_model.",  # multimodal wrappers before transformers 5
    "text_model.",
    "model.",  # Lightning modules, reward-model classes
    "policy.",
    "actor.",
    "student.",
    "network.",
    "net.",
    "llm.",
    "lm.",
)
"""What stands before all names of a model that is a part of another, outermost first in any order."""

_INSIDE = (("model.language_model.", "model."), ("model.text_model.", "model."))
"""How multimodal wrappers of transformers 5 name their language model."""

_DEEPEST = 4


def candidates(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A stored name without ever more of its wrappers, and what was taken away: the name itself first."""
    plain, taken = name, []
    for wrapper in WRAPPERS:
        if wrapper in plain:
            plain = plain.replace(wrapper, "")
            taken.append(wrapper)
    queue = [(plain, tuple(taken))]
    for _ in range(_DEEPEST):
        yield from queue
        shorter = []
        for current, gone in queue:
            shorter += [
                (new + current.removeprefix(old), (*gone, old)) for old, new in _INSIDE if current.startswith(old)
            ]
            shorter += [(current.removeprefix(old), (*gone, old)) for old in PREFIXES if current.startswith(old)]
        queue = shorter


@dataclass
class Resolution:
    """Stored names by what they mean."""

    found: dict[str, str] = field(default_factory=dict)
    """Parameter → stored name."""
    converted: dict[str, list[str]] = field(default_factory=dict)
    """Parameter that transformers makes of several stored tensors (stacked experts) → their names."""
    left: list[str] = field(default_factory=list)
    """Stored names that mean no parameter, or one that another name means already."""
    taken: Counter[str] = field(default_factory=Counter)
    """Wrappers that were taken off names, and off how many."""


def resolve(names: Iterable[str], known: Callable[[str], tuple[str, bool] | None]) -> Resolution:
    """Sort stored names by the parameters that they mean.

    Args:
        names: as they are stored.
        known: the parameter that a name without wrappers is, and whether it is converted on reading; None for none.
    """
    result = Resolution()
    shortest_first = sorted(names, key=len)  # of two names for one parameter the less wrapped one counts
    for name in shortest_first:
        for candidate, gone in candidates(name):
            meaning = known(candidate)
            if meaning is None:
                continue
            parameter, converted = meaning
            if converted:
                result.converted.setdefault(parameter, []).append(name)
            elif parameter in result.found:
                result.left.append(name)
            else:
                result.found[parameter] = name
            result.taken.update(gone)
            break
        else:
            result.left.append(name)
    return result


def wrappers_note(name: str, taken: Mapping[str, int]) -> list[str]:
    """What was taken off names, in words; nothing where nothing was."""
    if not taken:
        return []
    listed = ", ".join(f"{wrapper!r} ({count})" for wrapper, count in sorted(taken.items()))
    return [f"names in {name!r} are read without the wrappers around them: {listed}"]


def leftovers_note(name: str, left: Iterable[str], n_layers: int) -> list[str]:
    """Stored tensors without a place in the architecture, in one line by their owners; nothing where there are none."""
    groups: Counter[str] = Counter()
    for stored in left:
        owner, dot, _ = stored.partition(".")
        inner = re.match(r"(.*?(?:layers|h|blocks)\.\d+)\.", stored)
        groups[inner[1] if inner else f"{owner}{dot}"] += 1
    if not groups:
        return []
    shown = [f"{group} ({count})" for group, count in sorted(groups.items())]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return [
        f"{sum(groups.values())} tensors of {name!r} have no place in a language model of {n_layers} layers by its "
        f"configuration and are left aside: {', '.join(shown[:6])}{more}"
    ]


def nearest(missing: str, stored: Iterable[str]) -> str:
    """The stored name most like a missing one, for a message; empty where there is none."""
    close = difflib.get_close_matches(missing, list(stored)[:4096], n=1, cutoff=0)
    return f" (the name most like it there is {close[0]})" if close else ""
