"""What a gradient is of: losses of language models and encoders, the batches they read, how a control trains.

>>> import torch
>>> from tl_asymmetry.objectives import CrossEntropy, TokenBatch
>>> tokens = torch.arange(4, 24).view(2, 10)
>>> bool(CrossEntropy()(model, TokenBatch(tokens, tokens > 0)) > 0)
True
"""

from tl_asymmetry.training.batches import PreferenceBatch, TokenBatch
from tl_asymmetry.training.objectives import DPO, ORPO, CrossEntropy, InfoNCE, Mix, Objective
from tl_asymmetry.training.runs import Optimizer

__all__ = [
    "DPO",
    "ORPO",
    "CrossEntropy",
    "InfoNCE",
    "Mix",
    "Objective",
    "Optimizer",
    "PreferenceBatch",
    "TokenBatch",
]
