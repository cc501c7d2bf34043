"""Gradient covariances: `covariance.py` measures both sides of Σ a δᵀ, `result.py` is what comes back."""
