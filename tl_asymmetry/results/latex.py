"""Tables as LaTeX, for a paper."""

from __future__ import annotations

import numbers
from typing import Any

from tl_asymmetry._lazy import pd

_ESCAPED = str.maketrans(
    {
        **{mark: rf"\{mark}" for mark in "&%$#_{}"},
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": "$|$", "<": "$<$",
        ">": "$>$", "–": "--", "—": "---", "…": r"\dots{}", "−": "$-$", "·": r"$\cdot$", "×": r"$\times$",
        "≤": r"$\le$", "≥": r"$\ge$", "→": r"$\to$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "‖": r"$\Vert$",
        "⟨": r"$\langle$", "⟩": r"$\rangle$", "ᵀ": r"$^\top$", "²": "$^2$", "√": r"$\surd$", "∂": r"$\partial$",
        "±": r"$\pm$",
        "Δ": r"$\Delta$", "δ": r"$\delta$", "λ": r"$\lambda$", "μ": r"$\mu$", "ρ": r"$\rho$", "σ": r"$\sigma$",
        "Σ": r"$\Sigma$",
    }
)  # fmt: skip
"""What LaTeX reads otherwise, or knows in mathematics only."""


def latex_table(table: pd.DataFrame, *, caption: str | None = None, label: str | None = None) -> str:
    """A table in the style of the package booktabs, three significant digits to a number.

    Args:
        table: its index is not shown.
        caption: in words, escaped.
        label: for references.

    Returns:
        A `tabular`; with a caption or label in a `table`.

    Example:
        >>> print(latex_table(pd.DataFrame({"matrix": ["W_Q"], "|ΔW|": [0.000012345]})))
        \\begin{tabular}{lr}
        \\toprule
        matrix & $|$$\\Delta$W$|$ \\\\
        \\midrule
        W\\_Q & $1.23 \\times 10^{-5}$ \\\\
        \\bottomrule
        \\end{tabular}
    """
    sides = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in table.dtypes)
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", _row(table.columns), r"\midrule"]
    lines += [_row(row) for row in table.itertuples(index=False, name=None)]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if caption is not None or label is not None:
        said = [] if caption is None else [rf"\caption{{{caption.translate(_ESCAPED)}}}"]
        said += [] if label is None else [rf"\label{{{label}}}"]
        lines = [r"\begin{table}", r"\centering", *said, *lines, r"\end{table}"]
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return " & ".join(_cell(cell) for cell in cells) + r" \\"


def _cell(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "--"
    if not isinstance(value, numbers.Real) or isinstance(value, numbers.Integral):
        return str(value).translate(_ESCAPED)
    digits, _, exponent = f"{float(value):.3g}".partition("e")
    return rf"${digits} \times 10^{{{int(exponent)}}}$" if exponent else digits.replace("-", "$-$")
