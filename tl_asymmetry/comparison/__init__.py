"""Several analyses, or several deltas, of one base side by side: `analysis.py` and `deltas.py`."""
