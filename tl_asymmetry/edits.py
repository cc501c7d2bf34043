"""Edits of a model's weights, and the controls they are held against: what a user of single edits imports.

>>> import torch
>>> from tl_asymmetry.edits import apply_edits, closed_form_edit
>>> edit = closed_form_edit(0, "W_Q", 1, torch.randn(64), torch.randn(16))
>>> with apply_edits(model, edit):
...     edited = model(torch.tensor([[1, 2, 3]]))
"""

from tl_asymmetry.interventions.analysis import rank_one_study
from tl_asymmetry.interventions.design import (
    MatchedControls,
    closed_form_edit,
    head_delta,
    input_at,
    insertion_edit,
    matched_controls,
    removal_edit,
)
from tl_asymmetry.interventions.planner import EditPlanner
from tl_asymmetry.interventions.result import RankOneStudy
from tl_asymmetry.models.edits import MatrixEdit, RankOneEdit, Rewind, apply_edits, commit_edits

__all__ = [
    "EditPlanner",
    "MatchedControls",
    "MatrixEdit",
    "RankOneEdit",
    "RankOneStudy",
    "Rewind",
    "apply_edits",
    "closed_form_edit",
    "commit_edits",
    "head_delta",
    "input_at",
    "insertion_edit",
    "matched_controls",
    "rank_one_study",
    "removal_edit",
]
