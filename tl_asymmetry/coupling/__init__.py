"""How strongly directions of training move linear centroids (`study.py`); the response itself is in `response.py`."""
