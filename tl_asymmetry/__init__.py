"""Where pretraining and alignment left their marks in a transformer's weights, and whether that is more than chance.

    >>> from tl_asymmetry import analyze_pair
    >>> from tl_asymmetry.demo import demo_pair, demo_texts
    >>> result = analyze_pair(*demo_pair(), demo_texts(10, seed=0), groups=1, ranks=[4], progress=False)
    >>> result.table["matrix"].unique().tolist()
    ['W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out']

The pieces stand in `tl_asymmetry.geometry`, `.edits`, `.objectives` and `.grokking`. A name is imported when it is
first used: neither pandas nor TransformerLens nor plotly before it is needed.
"""

import sys
from typing import TYPE_CHECKING

from tl_asymmetry._lazy import attach

__version__ = "0.1.0"

if "ipykernel" in sys.modules:  # a notebook
    from tl_asymmetry import _bars

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from tl_asymmetry import edits, geometry, grokking, objectives
    from tl_asymmetry.comparison.analysis import compare
    from tl_asymmetry.comparison.deltas import compare_deltas
    from tl_asymmetry.comparison.deltas_result import DeltaComparison
    from tl_asymmetry.comparison.result import Comparison
    from tl_asymmetry.control.analysis import contrastive_control
    from tl_asymmetry.control.result import ControlStudy
    from tl_asymmetry.coupling.analysis import direction_coupling
    from tl_asymmetry.coupling.result import CouplingStudy
    from tl_asymmetry.explore.page import explorer
    from tl_asymmetry.geometry.subspace import Subspace
    from tl_asymmetry.gradients.analysis import gradient_covariance
    from tl_asymmetry.gradients.result import GradientCovariance
    from tl_asymmetry.interventions.analysis import rank_one_study
    from tl_asymmetry.interventions.result import RankOneStudy
    from tl_asymmetry.jacobians.centroids import centroids
    from tl_asymmetry.jacobians.layers import layer_jacobians
    from tl_asymmetry.jacobians.pullback import prediction_pullback
    from tl_asymmetry.jacobians.pullback_result import PredictionPullback
    from tl_asymmetry.jacobians.result import LayerJacobians
    from tl_asymmetry.models.edits import RankOneEdit, apply_edits
    from tl_asymmetry.models.view import ModelView
    from tl_asymmetry.models.weights import WeightSource, weights_from
    from tl_asymmetry.pair.analysis import analyze_pair
    from tl_asymmetry.pair.estimate import PairEstimate, estimate_pair
    from tl_asymmetry.pair.result import PairAnalysis
    from tl_asymmetry.pair.saved_moments import save_moments
    from tl_asymmetry.power.analysis import detection_power
    from tl_asymmetry.power.result import PowerAnalysis
    from tl_asymmetry.results.report import report
    from tl_asymmetry.results.result import load
    from tl_asymmetry.rewinding.analysis import rewind_study
    from tl_asymmetry.rewinding.result import RewindStudy
    from tl_asymmetry.shift.analysis import activation_shift
    from tl_asymmetry.shift.result import ActivationShift
    from tl_asymmetry.spectra.analysis import analyze_spectra
    from tl_asymmetry.spectra.result import SpectralAnalysis
    from tl_asymmetry.stages.analysis import analyze_stages
    from tl_asymmetry.stages.result import StageAnalysis
    from tl_asymmetry.tangents.analysis import analyze_tangents
    from tl_asymmetry.tangents.probe import TangentProbe
    from tl_asymmetry.tangents.result import TangentAnalysis
    from tl_asymmetry.trajectory.analysis import analyze_trajectory
    from tl_asymmetry.trajectory.pythia import pythia_checkpoints
    from tl_asymmetry.trajectory.recorder import TrajectoryRecorder
    from tl_asymmetry.trajectory.result import TrajectoryAnalysis

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        # one pair, several pairs
        "pair.analysis": ["analyze_pair"],
        "pair.estimate": ["PairEstimate", "estimate_pair"],
        "pair.result": ["PairAnalysis"],
        "pair.saved_moments": ["save_moments"],
        "power.analysis": ["detection_power"],
        "power.result": ["PowerAnalysis"],
        "spectra.analysis": ["analyze_spectra"],
        "spectra.result": ["SpectralAnalysis"],
        "comparison.analysis": ["compare"],
        "comparison.deltas": ["compare_deltas"],
        "comparison.deltas_result": ["DeltaComparison"],
        "comparison.result": ["Comparison"],
        # a training run
        "trajectory.analysis": ["analyze_trajectory"],
        "trajectory.pythia": ["pythia_checkpoints"],
        "trajectory.recorder": ["TrajectoryRecorder"],
        "trajectory.result": ["TrajectoryAnalysis"],
        # gradients, and training under other objectives
        "gradients.analysis": ["gradient_covariance"],
        "gradients.result": ["GradientCovariance"],
        "control.analysis": ["contrastive_control"],
        "control.result": ["ControlStudy"],
        # Jacobians and centroids
        "jacobians.layers": ["layer_jacobians"],
        "jacobians.pullback": ["prediction_pullback"],
        "jacobians.centroids": ["centroids"],
        "jacobians.result": ["LayerJacobians"],
        "jacobians.pullback_result": ["PredictionPullback"],
        # interventions
        "interventions.analysis": ["rank_one_study"],
        "interventions.result": ["RankOneStudy"],
        "models.edits": ["RankOneEdit", "apply_edits"],
        "rewinding.analysis": ["rewind_study"],
        "rewinding.result": ["RewindStudy"],
        # stages of training, and what the weights explain
        "stages.analysis": ["analyze_stages"],
        "stages.result": ["StageAnalysis"],
        "shift.analysis": ["activation_shift"],
        "shift.result": ["ActivationShift"],
        # the geometry of learning
        "tangents.analysis": ["analyze_tangents"],
        "tangents.probe": ["TangentProbe"],
        "tangents.result": ["TangentAnalysis"],
        "coupling.analysis": ["direction_coupling"],
        "coupling.result": ["CouplingStudy"],
        # models, weights, subspaces
        "models.view": ["ModelView"],
        "models.weights": ["WeightSource", "weights_from"],
        "geometry.subspace": ["Subspace"],
        # saved results and pages
        "results.result": ["load"],
        "results.report": ["report"],
        "explore.page": ["explorer"],
    },
    # the pieces, by name
    submodules=["edits", "geometry", "grokking", "objectives"],
)
