"""Grokking on modular arithmetic, after arXiv:2604.25143: the task, the model, the training run, the interventions."""

from tl_asymmetry.grokking.analysis import PUBLISHED_ARMS, GrokRun, arms, run_of, train
from tl_asymmetry.grokking.loop import Recipe
from tl_asymmetry.grokking.model import GrokShape, GrokTransformer, bridge_model, hooked_model
from tl_asymmetry.grokking.modular import ModularArithmetic
from tl_asymmetry.training.projection import ARMS, GradientProjection

__all__ = [
    "ARMS",
    "PUBLISHED_ARMS",
    "GradientProjection",
    "GrokRun",
    "GrokShape",
    "GrokTransformer",
    "ModularArithmetic",
    "Recipe",
    "arms",
    "bridge_model",
    "hooked_model",
    "run_of",
    "train",
]
