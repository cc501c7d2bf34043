"""The main job. `analysis.py` reads from top to bottom: plan, capture, bases, deltas, projections, tables, result."""
