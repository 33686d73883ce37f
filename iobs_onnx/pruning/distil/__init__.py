"""Distillation of a whole model: what is kept is trained towards the dense model's outputs.

`F(W) = D(outputs of the dense model, outputs of the sparse one)` on unlabelled feeds, with the
masks fixed. Not to be confused with `iobs_onnx.recovery`, which holds sparse-recovery algorithms.
"""

from iobs_onnx.pruning.distil.feeds import endless, mirrored, varied, written
from iobs_onnx.pruning.distil.model import distil
from iobs_onnx.pruning.distil.settings import Distilled, DistilSettings, Loss
from iobs_onnx.pruning.distil.trained import kept_masks

__all__ = [
    "DistilSettings",
    "Distilled",
    "Loss",
    "distil",
    "endless",
    "kept_masks",
    "mirrored",
    "varied",
    "written",
]
