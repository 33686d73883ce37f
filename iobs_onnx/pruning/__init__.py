"""From a model and data to a sparse model and its report; `pipeline.py` tells the whole story."""
