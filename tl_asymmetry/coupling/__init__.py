"""How strongly directions of training move linear centroids."""

from typing import TYPE_CHECKING

from tl_asymmetry._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from tl_asymmetry.coupling.analysis import coupling_sensitivity, direction_coupling
    from tl_asymmetry.coupling.response import centroid_response
    from tl_asymmetry.coupling.trajectories import BlockTrajectory, GrokTrajectory

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "coupling.analysis": ["coupling_sensitivity", "direction_coupling"],
        "coupling.response": ["centroid_response"],
        "coupling.trajectories": ["BlockTrajectory", "GrokTrajectory"],
    },
)
