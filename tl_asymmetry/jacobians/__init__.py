"""Jacobians of layers, the prediction subspace pulled back through them, and centroids."""

from typing import TYPE_CHECKING

from tl_asymmetry._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from tl_asymmetry.jacobians.centroids import centroids, local_centroids
    from tl_asymmetry.jacobians.layers import jacobian_sketch, layer_jacobians
    from tl_asymmetry.jacobians.pullback import prediction_pullback

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "jacobians.layers": ["jacobian_sketch", "layer_jacobians"],
        "jacobians.pullback": ["prediction_pullback"],
        "jacobians.centroids": ["centroids", "local_centroids"],
    },
)
