"""Rank-1 edits designed (`design.py`), run and compared with matched controls (`study.py`)."""
