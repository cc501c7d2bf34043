"""The graded contrastive control: the same training under objectives from sharp to soft (`study.py`)."""
