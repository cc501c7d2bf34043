"""Subspaces, moments, spectra, nulls: tensors in, tensors out. What a user of the pieces imports.

>>> import torch
>>> from tl_asymmetry.geometry import random_subspace, subspace_fraction
>>> round(subspace_fraction(torch.eye(8), random_subspace(8, 2, seed=0).basis).item(), 6)
0.25
"""

from typing import TYPE_CHECKING

from tl_asymmetry._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers; the same names as below
    from tl_asymmetry.geometry.fraction import energy_profile, subspace_fraction
    from tl_asymmetry.geometry.moments import StreamingMoments
    from tl_asymmetry.geometry.nonnegative import SemiNMF, semi_nmf
    from tl_asymmetry.geometry.nulls import adjusted_p, isotropic_null
    from tl_asymmetry.geometry.rolling_svd import RollingSVD, RollingSVDs
    from tl_asymmetry.geometry.rounding import rounding_noise, storage_dtype
    from tl_asymmetry.geometry.spectrum import (
        effective_rank,
        isoscore,
        marchenko_pastur_edge,
        participation_ratio,
        stable_rank,
    )
    from tl_asymmetry.geometry.subspace import Subspace, as_subspace, principal_subspace, random_subspace
    from tl_asymmetry.models.capture import capture_moments
    from tl_asymmetry.models.named_subspaces import (
        difference_of_means,
        embedding_subspace,
        massive_coordinates,
        suppressed_subspace,
        weak_readout_subspace,
        written_not_read_subspaces,
    )
    from tl_asymmetry.models.prediction import prediction_subspace

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        # subspaces and what lies in them
        "geometry.subspace": ["Subspace", "as_subspace", "principal_subspace", "random_subspace"],
        "geometry.fraction": ["energy_profile", "subspace_fraction"],
        "geometry.nonnegative": ["SemiNMF", "semi_nmf"],
        "geometry.rolling_svd": ["RollingSVD", "RollingSVDs"],
        # spectra
        "geometry.spectrum": [
            "effective_rank", "isoscore", "marchenko_pastur_edge", "participation_ratio", "stable_rank",
        ],
        # chance and rounding
        "geometry.nulls": ["adjusted_p", "isotropic_null"],
        "geometry.rounding": ["rounding_noise", "storage_dtype"],
        # moments, and subspaces of a model
        "geometry.moments": ["StreamingMoments"],
        "models.capture": ["capture_moments"],
        "models.prediction": ["prediction_subspace"],
        "models.named_subspaces": [
            "difference_of_means", "embedding_subspace", "massive_coordinates", "suppressed_subspace",
            "weak_readout_subspace", "written_not_read_subspaces",
        ],
    },
)  # fmt: skip
