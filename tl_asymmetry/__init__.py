"""Where pretraining and alignment left their marks in a transformer's weights, and whether that is more than chance.

    >>> from tl_asymmetry import analyze_pair
    >>> from tl_asymmetry.demo import demo_pair, demo_texts
    >>> result = analyze_pair(*demo_pair(), demo_texts(10, seed=0), groups=1, ranks=[4], progress=False)
    >>> result.table["matrix"].unique().tolist()
    ['W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out']

Neither TransformerLens nor plotly is imported until it is needed.
"""

from tl_asymmetry import grokking
from tl_asymmetry.coupling import coupling_sensitivity, direction_coupling
from tl_asymmetry.coupling_result import CouplingStudy
from tl_asymmetry.estimate import PairEstimate, estimate_pair
from tl_asymmetry.geometry.fraction import energy_profile, subspace_fraction
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nulls import adjusted_p, isotropic_null
from tl_asymmetry.geometry.rolling_svd import RollingSVD, RollingSVDs
from tl_asymmetry.geometry.rounding import rounding_share, storage_dtype
from tl_asymmetry.geometry.spectrum import (
    effective_rank,
    isoscore,
    marchenko_pastur_edge,
    participation_ratio,
    stable_rank,
)
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace, random_subspace
from tl_asymmetry.models.capture import capture_moments
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair import analyze_pair
from tl_asymmetry.pair_result import PairAnalysis
from tl_asymmetry.response import centroid_response
from tl_asymmetry.trajectories import BlockTrajectory, GrokTrajectory

__version__ = "0.1.0"

__all__ = [
    "BlockTrajectory",
    "CouplingStudy",
    "GrokTrajectory",
    "RollingSVD",
    "RollingSVDs",
    "centroid_response",
    "coupling_sensitivity",
    "direction_coupling",
    "grokking",
    "ModelView",
    "PairAnalysis",
    "PairEstimate",
    "StreamingMoments",
    "Subspace",
    "adjusted_p",
    "analyze_pair",
    "capture_moments",
    "effective_rank",
    "energy_profile",
    "estimate_pair",
    "isoscore",
    "isotropic_null",
    "marchenko_pastur_edge",
    "participation_ratio",
    "prediction_subspace",
    "principal_subspace",
    "random_subspace",
    "rounding_share",
    "stable_rank",
    "storage_dtype",
    "subspace_fraction",
]
