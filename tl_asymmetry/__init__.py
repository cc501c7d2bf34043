"""Where pretraining and alignment left their marks in a transformer's weights, and whether that is more than chance.

    >>> from tl_asymmetry import analyze_pair
    >>> from tl_asymmetry.demo import demo_pair, demo_texts
    >>> result = analyze_pair(*demo_pair(), demo_texts(10, seed=0), groups=1, ranks=[4], progress=False)
    >>> result.table["matrix"].unique().tolist()
    ['W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out']

Neither TransformerLens nor plotly is imported until it is needed.
"""

from tl_asymmetry import grokking
from tl_asymmetry.comparison.analysis import compare
from tl_asymmetry.comparison.result import Comparison
from tl_asymmetry.control.analysis import contrastive_control
from tl_asymmetry.control.result import ControlStudy
from tl_asymmetry.coupling.analysis import coupling_sensitivity, direction_coupling
from tl_asymmetry.coupling.response import centroid_response
from tl_asymmetry.coupling.result import CouplingStudy
from tl_asymmetry.coupling.trajectories import BlockTrajectory, GrokTrajectory
from tl_asymmetry.explore import explorer
from tl_asymmetry.geometry.fraction import energy_profile, subspace_fraction
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nulls import adjusted_p, isotropic_null
from tl_asymmetry.geometry.rolling_svd import RollingSVD, RollingSVDs
from tl_asymmetry.geometry.rounding import rounding_noise, storage_dtype
from tl_asymmetry.geometry.semi_nmf import SemiNMF, semi_nmf
from tl_asymmetry.geometry.spectrum import (
    effective_rank,
    isoscore,
    marchenko_pastur_edge,
    participation_ratio,
    stable_rank,
)
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace, random_subspace
from tl_asymmetry.gradients.analysis import gradient_covariance
from tl_asymmetry.gradients.result import GradientCovariance
from tl_asymmetry.grokking import GradientProjection, GrokRun, ModularArithmetic
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
from tl_asymmetry.interventions.result import RankOneStudy
from tl_asymmetry.jacobians.centroids import centroids, local_centroids
from tl_asymmetry.jacobians.layers import jacobian_sketch, layer_jacobians
from tl_asymmetry.jacobians.pullback import prediction_pullback
from tl_asymmetry.jacobians.pullback_result import PredictionPullback
from tl_asymmetry.jacobians.result import LayerJacobians
from tl_asymmetry.models.capture import capture_moments
from tl_asymmetry.models.edits import RankOneEdit, apply_edits
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import WeightSource, weights_from
from tl_asymmetry.pair.analysis import analyze_pair
from tl_asymmetry.pair.estimate import PairEstimate, estimate_pair
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.results.report import report, write_images
from tl_asymmetry.tangents.analysis import analyze_tangents
from tl_asymmetry.tangents.probe import TangentProbe
from tl_asymmetry.tangents.result import TangentAnalysis
from tl_asymmetry.training import objectives
from tl_asymmetry.training.objectives import DPO, ORPO, CrossEntropy, InfoNCE, Mix, PreferenceBatch, TokenBatch
from tl_asymmetry.training.runs import Optimizer
from tl_asymmetry.trajectory.analysis import analyze_trajectory
from tl_asymmetry.trajectory.pythia import pythia_checkpoints
from tl_asymmetry.trajectory.recorder import TrajectoryRecorder
from tl_asymmetry.trajectory.result import TrajectoryAnalysis

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "ORPO",
    "BlockTrajectory",
    "Comparison",
    "ControlStudy",
    "CouplingStudy",
    "CrossEntropy",
    "GradientCovariance",
    "GradientProjection",
    "GrokRun",
    "GrokTrajectory",
    "InfoNCE",
    "LayerJacobians",
    "MatchedControls",
    "Mix",
    "ModelView",
    "ModularArithmetic",
    "Optimizer",
    "PairAnalysis",
    "PairEstimate",
    "PredictionPullback",
    "PreferenceBatch",
    "RankOneEdit",
    "RankOneStudy",
    "RollingSVD",
    "RollingSVDs",
    "SemiNMF",
    "StreamingMoments",
    "Subspace",
    "TangentAnalysis",
    "TangentProbe",
    "TokenBatch",
    "TrajectoryAnalysis",
    "TrajectoryRecorder",
    "WeightSource",
    "adjusted_p",
    "analyze_pair",
    "analyze_tangents",
    "analyze_trajectory",
    "apply_edits",
    "capture_moments",
    "centroid_response",
    "centroids",
    "closed_form_edit",
    "compare",
    "contrastive_control",
    "coupling_sensitivity",
    "direction_coupling",
    "effective_rank",
    "energy_profile",
    "estimate_pair",
    "explorer",
    "gradient_covariance",
    "grokking",
    "head_delta",
    "input_at",
    "insertion_edit",
    "isoscore",
    "isotropic_null",
    "jacobian_sketch",
    "layer_jacobians",
    "local_centroids",
    "marchenko_pastur_edge",
    "matched_controls",
    "objectives",
    "participation_ratio",
    "prediction_pullback",
    "prediction_subspace",
    "principal_subspace",
    "pythia_checkpoints",
    "random_subspace",
    "rank_one_study",
    "removal_edit",
    "report",
    "rounding_noise",
    "semi_nmf",
    "stable_rank",
    "storage_dtype",
    "subspace_fraction",
    "weights_from",
    "write_images",
]
