"""Jacobians of layers, the prediction subspace pulled back through them, and centroids: what does not stand on top."""

from typing import TYPE_CHECKING

from tl_asymmetry._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from tl_asymmetry.jacobians.centroids import local_centroids
    from tl_asymmetry.jacobians.layers import jacobian_sketch

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "jacobians.layers": ["jacobian_sketch"],
        "jacobians.centroids": ["local_centroids"],
    },
)
