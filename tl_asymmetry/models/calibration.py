"""Texts for analyses that were given none: prose of many kinds, written for this package."""

from __future__ import annotations

from importlib.resources import files


def calibration_texts() -> list[str]:
    """Passages of English written for this package: stories, talk, instructions, code, lists, figures, letters.

    Returns:
        Texts of 300 to 1500 characters each, in the order of their names.

    Example:
        >>> texts = calibration_texts()
        >>> sum(map(len, texts)) > 32_000
        True
    """
    folder = files("tl_asymmetry.models") / "calibration_texts"
    passages = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda e: e.name)
    return [passage.read_text(encoding="utf-8").strip() for passage in passages]
