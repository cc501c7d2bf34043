"""Several analyses of one base, side by side: `compare.py` makes what `result.py` holds."""
