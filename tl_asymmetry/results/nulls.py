"""The registry of nulls: what a delta's concentration is held against, in the words that every page uses.

`PairAnalysis.nulls` holds the numbers, one row for each row of the table and null. Menus, hovers, the report, the
explorer and the page of definitions list what is there in these words: a null that the inputs alone make is added by
its kernel in `geometry` and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.references import sign_limit
from tl_asymmetry.results.sections import Definition

ISOTROPIC = "isotropic"
"""The null that every row has, and that `relative` is the excess over."""

NULL_COLUMNS = {
    "layer": "as in the table",
    "head": "as in the table",
    "expert": "as in the table",
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
    "q": "p corrected over families (matrix, subspace, rank), layers in them and heads in these",
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
    covariance: Callable[[Tensor], Tensor] | None = None
    """Of a null that the input alone makes: the left covariance of ΔW under it, from the input's second moment. Its
    fractions are expected of every read row, in-sample times what cross-fitting makes of Adam's."""

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
                "one-sided (at least this concentrated), p_method says how it was computed; q corrects it over "
                "families (matrix, subspace, rank), the layers in those found and the heads in these. It cannot tell "
                "alignment from any other training, since any gradient reads.",
            ),
        ),
        Null(
            "adam", "Adam on these inputs", "1 = what Adam makes of gradients that say nothing of these inputs.",
            "read matrices",
            Definition(
                "Input-matched reference, Adam", "[ours]",
                "What the fraction would be if the update were a sum of this matrix's own inputs times upstream "
                "gradients that are mean-zero, uncorrelated over tokens and independent of the input, put through "
                "Adam, which divides every entry by its own size: the input's correlation matrix instead of its second "
                "moment. Fitted on other groups of texts than it is held against. W_K and W_V take all positions; W_K "
                "about each sequence's mean where softmax ignores what all keys share. p and q (for the optimizer that "
                "was asked for) are those of a test by rotation, made with and without the mean input, the larger p "
                "standing.",
            ),
        ),
        Null(
            "sgd", "SGD on these inputs", "1 = what a plain sum of such gradients would hold.", "read matrices",
            Definition(
                "Input-matched reference, SGD", "[ours]",
                "The same with a plain sum: the input's second moment. In a model with massive coordinates (attention "
                "sinks) it calls a head trained by Adam half as strong as chance.",
            ),
        ),
        Null(
            "sign", "one step of signs", "1 = what the signs of such gradients would hold.", "read matrices",
            Definition(
                "Input-matched reference, sign limit", "[ours]",
                "The other end of what Adam can do: (2/π) arcsin of the correlation matrix, exact for one step, the "
                "limit of gradients that persist (few steps, full batches, Lion). It has no test of its own.",
            ),
            sign_limit,
        ),
        Null(
            "muon", "Muon on these inputs", "1 = what orthogonalised updates of such gradients would hold.",
            "read matrices",
            Definition(
                "Input-matched reference, Muon", "[ours]",
                "tr(QᵀΣ(Σ + cI)⁻¹Q)/m for m columns, c such that the whole has trace m; a matrix with as many columns "
                "as rows keeps nothing of its input, and the reference is k/d.",
            ),
        ),
        Null(
            "weighted", "these inputs weighted by gradients",
            "1 = what the optimizer makes of gradients of the measured sizes that say nothing else of these inputs.",
            "read matrices, with gradients",
            Definition(
                "Input-matched reference, weighted by gradients", "[ours]",
                "As for the chosen optimizer, every input weighted by the squared norm of the gradient that a named "
                "objective gives the head's own outputs there: tokens with large gradients count for more, whatever "
                "else their gradients say. Without it, gradients whose size grows with the input's look like more than "
                "training gives. It replaces the unweighted reference in excess and its test; the heads pooled, and "
                "heads whose own weights were not kept (gradient_covariance's head_weights), are held against inputs "
                "weighted by the gradients of all heads of the matrix together. Not cross-fitted, so rather too high "
                "on the texts that it was measured on, and nothing is said to be below it. W_K keeps the unweighted "
                "reference where softmax ignores what all keys share.",
            ),
        ),
        Null(
            "lora", "this adapter on these inputs", "1 = what this adapter's A makes of such gradients.",
            "read matrices changed by a LoRA adapter that is given as one",
            Definition(
                "Input-matched reference, LoRA", "[ours]",
                "An adapter's change lies in what its A reads, whatever its gradients say: the reference is that of "
                "A's own update under the optimizer. From merged weights A is unknown, and the others are too high.",
            ),
        ),
        Null(
            "gradient", "gradient-matched reference", "1 = what the named objective's gradients would hold.",
            "write matrices, with gradients",
            Definition(
                "Gradient-matched reference", "[ours]",
                "On write matrices, with the gradients of a named objective: what the chosen optimizer makes of the "
                "output gradients' own second moment, their correlation under Adam. It has no test of its own.",
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

OF_INPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    key: null.covariance for key, null in NULLS.items() if null.covariance is not None
}
"""The covariances of nulls that the input alone makes."""


_WORDS = ("label", "over", "meaning", "applies")


def described(nulls: pd.DataFrame) -> pd.DataFrame:
    """Rows of `PairAnalysis.nulls` with the words a figure says of each: columns `label`, `over`, `meaning`, `applies`.

    Raises:
        ValueError: a null that has no entry in `NULLS`.
    """
    codes, keys = pd.factorize(nulls["null"])
    unknown = sorted(set(keys) - set(NULLS))
    if unknown:
        raise ValueError(
            f"expected nulls among {', '.join(NULLS)}, got {', '.join(unknown)}; pass what analyze_pair returned"
        )
    place = np.array([list(NULLS).index(key) for key in keys], dtype=int)[codes]
    order = np.argsort(place, kind="stable")
    words = {word: np.array([getattr(null, word) for null in NULLS.values()])[place[order]] for word in _WORDS}
    return nulls.iloc[order].assign(**words)
