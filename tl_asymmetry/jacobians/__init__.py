"""Jacobians of layers (`layers.py`), the prediction subspace pulled back through them, and linear centroids."""
