"""What the rows of a table are held against: rows of `PairAnalysis.nulls`, or columns of the table, aligned with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from tl_asymmetry.names import SIGNIFICANT
from tl_asymmetry.plots import rows as pick

ISOTROPIC = "isotropic"
NUMBERS = ("expected", "excess", "low", "high", "p", "q")
OF_NULLS = (*pick.KEYS, "null", "label", "over", "meaning", "applies", *NUMBERS)
"""Columns of `PairAnalysis.nulls` with the words of the registry (`results.nulls.described`)."""
OWN = (
    (
        ISOTROPIC, "isotropic null", "1 = chance: what a random subspace of the same rank holds.", "every row",
        {"excess": "relative", "low": "ci_low", "high": "ci_high", "p": "isotropic_p", "q": "isotropic_q"},
    ),
    (
        "excess", "activation-matched reference", "1 = what gradients on these inputs would give.", "read matrices",
        {"expected": "activation_matched", "excess": "excess", "low": "excess_low", "high": "excess_high",
         "p": "excess_p", "q": "excess_q"},
    ),
    (
        "gradient_excess", "gradient-matched reference", "1 = what the named objective's gradients would give.",
        "write matrices, with gradients", {"expected": "gradient_matched", "excess": "gradient_excess"},
    ),
)  # fmt: skip
"""What a table holds of its nulls by itself: key, label, meaning, where it applies, and its columns."""
RELATION = {"above": 1.0, "below": -1.0}
"""Columns `vs_chance` and `vs_reference` of a table as numbers; anything else is 0."""


@dataclass(frozen=True)
class Held:
    """One null beside the rows of a table."""

    key: str
    """Of the registry, or the table's column of its excess."""
    label: str
    """In menus, legends and hovers."""
    over: str
    """After "excess over", "above" or "below"."""
    meaning: str
    """What an excess of 1 stands for, one sentence."""
    applies: str
    """To which rows it applies."""
    numbers: pd.DataFrame
    """The columns of `NUMBERS`, on the table's index; NaN where it does not apply. `expected` is a fraction."""
    relation: pd.Series
    """1 where a row is told to lie above it, −1 below, else 0; on the table's index."""

    def of(self, rows: pd.DataFrame) -> Held:
        """The same for some of the table's rows."""
        return replace(self, numbers=self.numbers.loc[rows.index], relation=self.relation.loc[rows.index])

    @property
    def there(self) -> bool:
        """Whether it applies to any of the rows."""
        return any(bool(self.numbers[name].notna().any()) for name in ("expected", "excess", "low"))


def held_against(table: pd.DataFrame, nulls: pd.DataFrame | None) -> list[Held]:
    """The nulls of a table's rows, in the order of `nulls`; without these, those that stand in its own columns.

    Args:
        table: `PairAnalysis.table`.
        nulls: its `nulls`, described by `results.nulls.described`.

    Raises:
        ValueError: `nulls` without a column that is needed.
    """
    if nulls is None:
        found = [
            (key, label, f"the {label}", meaning, applies, _from_columns(table, columns))
            for key, label, meaning, applies, columns in OWN
        ]
    else:
        pick.require(nulls, OF_NULLS, "results.nulls.described(PairAnalysis.nulls)")
        at, of = _places(table, nulls)
        values = nulls[list(NUMBERS)].to_numpy(float, na_value=np.nan)
        keys, names = pd.factorize(nulls["null"])
        found = []
        for n, key in enumerate(names):
            own = np.flatnonzero(keys == n)
            label, over, meaning, applies = (
                str(nulls[w].iloc[own[0]]) for w in ("label", "over", "meaning", "applies")
            )
            where = pd.Index(of[own]).get_indexer(at)  # -1 where this null has no such row
            numbers = np.where(where[:, None] < 0, np.nan, values[own[where]])
            found.append((str(key), label, over, meaning, applies, pd.DataFrame(numbers, table.index, list(NUMBERS))))
    return [
        Held(key, label, over, meaning, applies, numbers, _relation(table, key, numbers))
        for key, label, over, meaning, applies, numbers in found
    ]


def repeats(table: pd.DataFrame, numbers: pd.DataFrame, column: str) -> bool:
    """Whether a column of the table holds a null's excess, wherever the null has one."""
    theirs = numbers["excess"].to_numpy(float)
    known = np.isfinite(theirs)
    return bool(known.any()) and np.allclose(theirs[known], table[column].to_numpy(float, na_value=np.nan)[known])


def _relation(table: pd.DataFrame, key: str, numbers: pd.DataFrame) -> pd.Series:
    """Where the table tells rows apart from a null: by its own columns, else by q of a one-sided test."""
    column = "vs_chance" if key == ISOTROPIC else "vs_reference"
    if column in table.columns and (key == ISOTROPIC or repeats(table, numbers, "excess")):
        return table[column].map(RELATION).fillna(0.0)
    return (numbers["q"] <= SIGNIFICANT).astype(float)


def _from_columns(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    def of(name: str) -> np.ndarray:
        column = columns.get(name)
        there = column is not None and column in table.columns
        return table[column].to_numpy(float, na_value=np.nan) if there else np.full(len(table), np.nan)

    return pd.DataFrame({name: of(name) for name in NUMBERS}, index=table.index)


def _places(*tables: pd.DataFrame) -> list[np.ndarray]:
    """Layer, head or expert (if any), matrix, subspace and rank of each row as one number, the same in all tables."""
    both = pd.concat([table[list(pick.KEYS)].assign(head=pick.units(table)) for table in tables])
    places = np.zeros(len(both), dtype=np.int64)
    for name in pick.KEYS:
        codes, distinct = pd.factorize(both[name], use_na_sentinel=False)
        places = places * len(distinct) + codes
    return np.split(places, np.cumsum([len(table) for table in tables])[:-1])
