"""docs/calibration.md from the JSON of `benchmarks.calibration`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LOOSE = 1.3
"""A test keeps its size where it rejects at most this many times as often as it says."""
COVERAGE = 0.9
"""An interval that says 0.95 holds where it covers this often, wherever it is not flagged."""

Entry = Mapping[str, Any]

SECTIONS = {
    "isotropic": (
        "Against a random subspace",
        "`isotropic_p` and the test of its other side, on changes in Haar-random directions. d 64 and 16 columns "
        "unless named.",
    ),
    "reference": (
        "Against what training gives on these inputs",
        "`excess_p` and the test of its other side, on updates whose upstream gradients δ say nothing of their "
        "inputs. The texts are others than those trained on, 1,024 tokens unless named; SGD trains on 2,048 "
        "tokens, Adam on batches of 32. *As it is* is the test without the second one that leaves the mean input "
        "out: the table's p is the larger of both. *Excess* is the median of fraction over its reference. Where inputs "
        "are weighted by gradients, the package says of nothing that it is below, and *heads pooled* are held against "
        "inputs weighted by all heads' gradients together.",
    ),
    "decay and storage": (
        "Weight decay and 16-bit storage",
        "What the package counts as found under changes that are chance but for decay, or for rounding to bf16. "
        "*ρ* is the median `rounding_share`.",
    ),
    "power": (
        "What would be found",
        "Shares of heads with p at most 0.05 where a part of the change's energy is planted in the four leading "
        "directions: one head's own p, before any correction. No bound.",
    ),
    "corrected": (
        "After correction",
        "Four families of four layers of eight heads through the package's own hierarchy at q 0.05. The planted "
        "head has 0.8 of its energy in the leading directions.",
    ),
    "intervals": (
        "Intervals over texts",
        "How often a 95 % interval holds what infinitely many texts would give. The bound is on rows that no flag "
        "warns of.",
    ),
    "other analyses": (
        "Other analyses",
        "`on_principal_p` of `analyze_spectra`; `seed_p` of `compare` between arms of several runs; and p of "
        "`rank_one_study` against 19 `undo_matched` controls, for outcomes that are quadratic in what the edit "
        "displaces or undoes.",
    ),
    "whole tool": (
        "The whole tool",
        "`analyze_pair` on the embedded base model and a copy whose read matrices learned from δ drawn by chance, "
        "on texts that it was not trained on; 52 read heads and matrices in each run, W_O and W_out changed "
        "isotropically.",
    ),
}

INTRODUCTION = f"""# How we know

<!-- written by `python -m benchmarks.calibration --page`: change the benchmark, not this page -->

How often the tests and intervals of a pair's table err, measured where the truth is known: on many changes made by
chance, and on a few with something planted in them. A test at 0.05 should reject 5 % of the first kind. The bounds: it
rejects **at most {LOOSE:g} times as often as it says** (rejecting less often is allowed), and an interval that says
95 % covers **at least {100 * COVERAGE:.0f} %** wherever no flag warns. Every share is shown with its standard error;
*within error* says that the bound is passed by less than two of these.
"""

RERUN = """## Run it again

```bash
python -m benchmarks.calibration          # what benchmarks/results/calibration.json lacks; one core
python -m benchmarks.calibration --quick  # a fiftieth of the draws of each cell, into another file
python -m benchmarks.calibration --only Adam --again
python -m benchmarks.calibration --page   # this page
```

Each cell has a seed of its own and is written when it is done. Not in the table: the p of `analyze_tangents`
(`control="haar"` is exact, the other kind prints its own size), overlaps of two changes, widths above 256.
"""


def page(document: Mapping[str, Any], promised: Sequence[str]) -> str:
    """The page, from what was measured of the cells that the benchmark promises, in that order."""
    done = {key: document["cells"][key] for key in promised if key in document["cells"]}
    missing = [key for key in promised if key not in done]
    parts = [INTRODUCTION, *_exceptions(done.values())]
    if missing:
        lacking = f"**Not measured yet, and so not known:** {len(missing)} of {len(promised)} cells. "
        parts.append(lacking + "; ".join(missing) + ".\n")
    for section, (title, text) in SECTIONS.items():
        entries = [entry for entry in done.values() if entry["section"] == section]
        if entries:
            parts += [f"## {title}\n", f"{text}\n", "\n".join(_table(entries)) + "\n"]
    return "\n".join([*parts, RERUN])


def broken(entry: Entry) -> list[str]:
    """What of a cell breaks its bound by more than two standard errors."""
    return [name for name, state in _states(entry) if state == "broken"]


def _exceptions(entries: Iterator[Entry] | Any) -> Iterator[str]:
    named = [(entry, broken(entry)) for entry in entries]
    yield "## Where a bound is broken\n"
    lines = [
        f"* **{entry['section']}: {entry['name']}** ({', '.join(names)}): {entry['exception'] or 'not explained yet'}."
        for entry, names in named
        if names
    ]
    yield ("\n".join(lines) if lines else "Nowhere.") + "\n"


def _states(entry: Entry) -> Iterator[tuple[str, str]]:
    """Every number with a bound: "held", "within error", "broken" or "no draws"."""
    kind, found = entry["kind"], entry["found"]
    if kind == "size":
        for name in [name for name in found if name in _BOUNDED_SIZES]:
            for level, one in found[name].items():
                yield f"{name} at {level}", _state(one, LOOSE * float(level), -1)
    elif kind == "coverage":
        for name in [name for name in found if name != "unflagged" and not name.endswith("flagged too")]:
            yield name, _state(found[name], COVERAGE, 1)
    elif kind in ("at most", "at least"):
        names = list(found) if entry["section"] == "corrected" and kind == "at most" else [next(iter(found))]
        for name in [name for name in names if name != "plants found"]:
            yield name, _state(found[name], entry["bound"], -1 if kind == "at most" else 1)


_BOUNDED_SIZES = ("above", "below", "first head above", "heads pooled above", "displacement", "undone", "told apart")


def _state(one: Entry, bound: float, sign: int) -> str:
    """`sign` 1: at least the bound; −1: at most."""
    if one["share"] is None:
        return "no draws"
    beyond = sign * (bound - one["share"])
    if beyond <= 0:
        return "held"
    return "within error" if beyond <= 2 * one["error"] else "broken"


def _table(entries: Sequence[Entry]) -> Iterator[str]:
    """Sizes and powers have one row each, with a column for each level; other cells a row for each number."""
    if entries[0]["kind"] in ("size", "power"):
        names = list(dict.fromkeys(name for entry in entries for name in entry["found"]))
        columns = [
            (name, level)
            for name in names
            for level in _levels(entries, name, all_of_them=name in _BOUNDED_SIZES and entries[0]["kind"] == "size")
        ]
        yield from _rows(["", "draws", *(_heading(name, level) for name, level in columns), "bound"])
        for entry in entries:
            cells = [_value(entry["found"].get(name), level) for name, level in columns]
            yield _row([entry["name"], f"{_draws(entry):,}", *cells, _worst(entry)])
    else:
        yield from _rows(["", "", "share", "of", "bound"])
        for entry in entries:
            states = dict(_states(entry))
            for i, (name, one) in enumerate(entry["found"].items()):
                shown = f"{one:.3f}" if isinstance(one, float) else _plus_minus(one)
                of = "" if isinstance(one, float) else f"{one['of']:,}"
                yield _row([entry["name"] if i == 0 else "", name, shown, of, states.get(name, "")])


def _levels(entries: Sequence[Entry], name: str, *, all_of_them: bool) -> list[str | None]:
    if name.startswith("median"):
        return [None]
    levels = dict.fromkeys(level for entry in entries for level in entry["found"].get(name, {}))
    return list(levels) if all_of_them else list(levels)[:1]


def _heading(name: str, level: str | None) -> str:
    shorter = {"median excess": "excess", "median rounding share": "ρ"}
    return shorter.get(name, name) if level is None else f"{name}, p ≤ {level}"


def _value(found: Any, level: str | None) -> str:
    if found is None or level is None:
        return "" if found is None else f"{found:.2f}"
    return _plus_minus(found[level]) if level in found else ""


def _plus_minus(one: Entry) -> str:
    if one["share"] is None:
        return ""
    if one["share"] < 5e-4 and one["of"] >= 5e4:
        return f"{1e4 * one['share']:.2f}e-4 ± {1e4 * one['error']:.2f}e-4"
    return f"{one['share']:.3f} ± {one['error']:.3f}"


def _draws(entry: Entry) -> int:
    first = next(iter(entry["found"].values()))
    return int(next(iter(first.values()))["of"])


def _worst(entry: Entry) -> str:
    states = [state for _, state in _states(entry)]
    return next((state for state in ("broken", "within error", "held", "no draws") if state in states), "")


def _rows(heading: Sequence[str]) -> Iterator[str]:
    yield _row(heading)
    yield _row(["---"] * len(heading))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
