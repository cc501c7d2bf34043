"""Checkpoint sweeps (`analysis.py`) and the recorder of a training loop (`recorder.py`), on one append-only store."""
