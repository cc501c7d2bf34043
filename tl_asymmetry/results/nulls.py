"""The registry of nulls: what a delta's concentration is held against, in the words that every page uses.

`PairAnalysis.nulls` holds the numbers, one row for each row of the table and null. Menus, hovers, the report, the
explorer and the page of definitions list what is there in these words: a null is added by its kernel in
`geometry.nulls`, an entry here, and the rows that `pair.tables` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from tl_asymmetry.results.sections import Definition

ISOTROPIC = "isotropic"
"""The null that every row has, and that `relative` is the excess over."""

NULL_COLUMNS = {
    "layer": "as in the table",
    "head": "as in the table",
    "matrix": "as in the table",
    "pathway": "as in the table",
    "subspace": "as in the table",
    "rank": "as in the table",
    "null": "a key of `results.nulls.NULLS`",
    "expected": "fraction expected under it, 0 to 1",
    "excess": "fraction / expected",
    "low": "lower end of the 95 % interval of excess; over texts, or, where the null is drawn, over its draws",
    "high": "upper end",
    "p": "one-sided probability of a fraction this large under it; NaN where it has no test",
    "q": "Benjamini–Hochberg over all layers and heads of this matrix, subspace and rank",
}
"""Columns of `PairAnalysis.nulls`, in this order, and what they mean."""


@dataclass(frozen=True)
class Null:
    """One null, as it is spoken of."""

    key: str
    """In the column `null` of `PairAnalysis.nulls`."""
    label: str
    """In menus, legends and hovers."""
    meaning: str
    """One sentence under a map's title: what an excess of 1 stands for."""
    applies: str
    """To which rows it applies, in a few words."""
    definition: Definition
    """What it is and whose."""

    @property
    def over(self) -> str:
        """Its label after "excess over", "above" or "below"."""
        return f"the {self.label}" if self.label.endswith(("null", "reference")) else self.label


NULLS: Mapping[str, Null] = {
    null.key: null
    for null in (
        Null(
            ISOTROPIC, "isotropic null", "1 = chance: what a random subspace of the same rank holds.", "every row",
            Definition(
                "Isotropic null (z, p, q)", "[ours]",
                "The same delta against a random subspace of the same rank. z counts its standard deviations; p is "
                "one-sided (at least this concentrated), p_method says how it was computed; q corrects it over all "
                "layers and heads of one matrix, subspace and rank. It cannot tell alignment from any other training, "
                "since any gradient reads.",
            ),
        ),
        Null(
            "sgd", "activation-matched reference", "1 = what a plain sum of gradients on these inputs would hold.",
            "read matrices",
            Definition(
                "Activation-matched reference", "[ours]",
                "What the fraction would be if the update were a plain sum of outer products of this matrix's own "
                "inputs with independent upstream gradients. A reference, not an expectation: it has no p-value. For "
                "W_K in a model without rotary positions it uses inputs centred within each sequence. It is undefined "
                "on write matrices, whose residual side is their output; there the gradient-matched reference takes "
                "its place when gradients were captured.",
            ),
        ),
        Null(
            "gradient", "gradient-matched reference", "1 = what the named objective's gradients would hold.",
            "write matrices, with gradients",
            Definition(
                "Gradient-matched reference", "[ours]",
                "On write matrices, with the gradients of a named objective: the share of the output gradients' own "
                "second moment in the subspace.",
            ),
        ),
        Null(
            "permutation", "permuted gradients",
            "1 = what the named objective's gradients hold once δ is permuted over tokens.",
            "read matrices, with permuted gradients",
            Definition(
                "Permuted gradients", "[ours]",
                "On read matrices, with permuted gradients of a named objective: the range that the fraction of the "
                "objective's own gradient has once every δ is given to another token of its sequence. An excess whose "
                "interval lies above 1 needs which token got which gradient, not just the two second moments.",
            ),
        ),
    )
}  # fmt: skip
"""Every null, in the order in which menus and hovers list them."""


_WORDS = ("label", "over", "meaning", "applies")


def described(nulls: pd.DataFrame) -> pd.DataFrame:
    """Rows of `PairAnalysis.nulls` with the words a figure says of each: columns `label`, `over`, `meaning`, `applies`.

    Raises:
        ValueError: a null that has no entry in `NULLS`.
    """
    unknown = sorted(set(nulls["null"]) - set(NULLS))
    if unknown:
        raise ValueError(
            f"expected nulls among {', '.join(NULLS)}, got {', '.join(unknown)}; pass what analyze_pair returned"
        )
    ordered = nulls.sort_values("null", key=lambda keys: keys.map(list(NULLS).index), kind="stable")
    words = {word: [getattr(NULLS[key], word) for key in ordered["null"]] for word in _WORDS}
    return ordered.assign(**words)
