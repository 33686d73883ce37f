"""ONNX graphs evaluated by torch, node by node, so that gradients flow through them.

Made for distillation: what is kept of a pruned model is trained towards the dense model's
activations. Nothing here is faster or more exact than ONNX Runtime, which :func:`agreement`
holds the evaluation against.
"""

from iobs_onnx.runtime.differentiable.agreement import Agreement, Difference, agreement
from iobs_onnx.runtime.differentiable.dtypes import Precision
from iobs_onnx.runtime.differentiable.evaluator import Evaluator, unsupported
from iobs_onnx.runtime.differentiable.operators import OPERATORS
from iobs_onnx.runtime.differentiable.products import bfloat16_factors, multiplies_bfloat16

__all__ = [
    "OPERATORS",
    "Agreement",
    "Difference",
    "Evaluator",
    "Precision",
    "agreement",
    "bfloat16_factors",
    "multiplies_bfloat16",
    "unsupported",
]
