"""MatMul with a two-dimensional weight on either side."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.ops.use import Handler, Use, operand
from iobs_onnx.site import Rows


def describe(node: ir.Node, weight: int, shape: tuple[int, ...]) -> Use | str:
    """Read `Y = X B` (weight 1) or `Y = A X` (weight 0)."""
    if len(shape) < 2:
        return "1-D weight: a single output has nothing to share a Hessian with"
    if len(shape) > 2:
        return f"batched {len(shape)}-D weight: not supported by this operator's handler"
    activation = operand(node, 1 - weight)
    if weight == 1:
        return Use(activation, Rows(-1), perm=(1, 0), axis=0)
    # A vector is its own column; of any other right operand the columns are along axis -2.
    vector = activation.shape is not None and len(activation.shape) == 1
    return Use(activation, Rows(-1 if vector else -2), perm=(0, 1), axis=1)


MATMUL = Handler(operands=(1, 0), describe=describe)
