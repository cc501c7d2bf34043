"""Where pretraining and alignment left their marks in a transformer's weights, and whether that is more than chance.

    >>> from tl_asymmetry import analyze_pair
    >>> from tl_asymmetry.demo import demo_pair, demo_texts
    >>> result = analyze_pair(*demo_pair(), demo_texts(10, seed=0), groups=1, ranks=[4], progress=False)
    >>> result.table["matrix"].unique().tolist()
    ['W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out']

Neither TransformerLens nor plotly is imported until it is needed.
"""

from tl_asymmetry import grokking
from tl_asymmetry.centroids import centroids, local_centroids
from tl_asymmetry.coupling import coupling_sensitivity, direction_coupling
from tl_asymmetry.coupling_result import CouplingStudy
from tl_asymmetry.estimate import PairEstimate, estimate_pair
from tl_asymmetry.explore import explorer
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
from tl_asymmetry.jacobian_result import LayerJacobians
from tl_asymmetry.jacobians import jacobian_sketch, layer_jacobians
from tl_asymmetry.models.capture import capture_moments
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair import analyze_pair
from tl_asymmetry.pair_result import PairAnalysis
from tl_asymmetry.pullback import prediction_pullback
from tl_asymmetry.pullback_result import PredictionPullback

# The function takes the place of the module it stands in: `from tl_asymmetry.report import …` still finds the module.
from tl_asymmetry.report import report, write_images
from tl_asymmetry.response import centroid_response
from tl_asymmetry.trajectories import BlockTrajectory, GrokTrajectory

__version__ = "0.1.0"

__all__ = [
    "BlockTrajectory",
    "CouplingStudy",
    "GrokTrajectory",
    "LayerJacobians",
    "ModelView",
    "PairAnalysis",
    "PairEstimate",
    "PredictionPullback",
    "RollingSVD",
    "RollingSVDs",
    "StreamingMoments",
    "Subspace",
    "adjusted_p",
    "analyze_pair",
    "capture_moments",
    "centroid_response",
    "centroids",
    "coupling_sensitivity",
    "direction_coupling",
    "effective_rank",
    "energy_profile",
    "estimate_pair",
    "explorer",
    "grokking",
    "isoscore",
    "isotropic_null",
    "jacobian_sketch",
    "layer_jacobians",
    "local_centroids",
    "marchenko_pastur_edge",
    "participation_ratio",
    "prediction_pullback",
    "prediction_subspace",
    "principal_subspace",
    "random_subspace",
    "report",
    "rounding_share",
    "stable_rank",
    "storage_dtype",
    "subspace_fraction",
    "write_images",
]
