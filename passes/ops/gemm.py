"""Gemm, `Y = alpha A' B' + beta C`, with the weight on either side.

`alpha` scales the whole product, so it changes neither the best support nor the best weights;
`beta C` does not depend on the weight at all.
"""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.ops.use import Handler, Use, operand
from iobs_onnx.site import Rows


def describe(node: ir.Node, weight: int, shape: tuple[int, ...]) -> Use | str:
    """Read transA and transB: where each operand keeps its reduction axis."""
    if len(shape) != 2:
        return f"{len(shape)}-D weight where Gemm takes a matrix"
    reduction = (
        0 if node.attributes.get_int("transA", 0) else 1,
        1 if node.attributes.get_int("transB", 0) else 0,
    )
    axis = reduction[weight]
    # Counted from the end, as MatMul counts, so that both share a tap on the same activation.
    form = Rows(reduction[1 - weight] - 2)
    return Use(operand(node, 1 - weight), form, perm=(1 - axis, axis), axis=axis)


GEMM = Handler(operands=(1, 0), describe=describe)
