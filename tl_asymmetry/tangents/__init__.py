"""Tangent proxies held against true gradients (`analysis.py`), also while a model trains (`probe.py`)."""
