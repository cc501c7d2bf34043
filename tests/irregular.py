"""Pairs whose layers differ or have experts, for tests in several rooms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks.architectures import changed
from tests.models.test_sites import VOCABULARY, adapter_of
from tl_asymmetry import PairAnalysis, analyze_pair
from tl_asymmetry.models.huggingface import HuggingFaceAdapter


def tokens(batch: int = 8, pos: int = 12) -> torch.Tensor:
    """Random ids, always the same."""
    return torch.randint(3, VOCABULARY, (batch, pos), generator=torch.Generator().manual_seed(2))


def analyses(**options: Any) -> Callable[[str], tuple[HuggingFaceAdapter, HuggingFaceAdapter, PairAnalysis]]:
    """A function from a name to the base's adapter, the aligned model's, and the analysis; each is made once."""

    @cache
    def of(name: str) -> tuple[HuggingFaceAdapter, HuggingFaceAdapter, PairAnalysis]:
        base = adapter_of(name)
        aligned = changed(base.inner)
        return base, type(base)(aligned), analyze_pair(base.inner, aligned, **options)

    return of
