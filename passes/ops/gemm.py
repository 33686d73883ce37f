"""Gemm, `Y = alpha A' B' + beta C`, with the weight on either side; FusedGemm activates `Y`.

`alpha` scales the whole product, so it changes neither the best support nor the best weights;
`beta C` does not depend on the weight at all.
"""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.ops.use import Handler, Product, Read, Use, operand
from iobs_onnx.site import Rows


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read transA and transB: where each operand keeps its reduction axis."""
    if len(layout.axes) != 2:
        return f"{len(layout.axes)}-D weight where Gemm takes a matrix"
    reduction = (
        0 if integer(node, "transA", 0) else 1,
        1 if integer(node, "transB", 0) else 0,
    )
    axis = reduction[weight]
    # Counted from the end, as MatMul counts, so that both share a tap on the same activation.
    form = Rows(reduction[1 - weight] - 2)
    return Use((Read(operand(node, 1 - weight), form),), layout.join((), (1 - axis,), (axis,)))


def product(node: ir.Node, rank: int) -> Product:
    """Read the channels of `Y = X B' + C`, and whether alpha or beta scale them."""
    made, read = (-2, -1) if integer(node, "transB", 0) else (-1, -2)
    return Product(
        channels=-1,
        made=made,
        read=read,
        rank=2,
        bias=2,
        transposed=bool(integer(node, "transA", 0)),
        scaled=any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")),
    )


GEMM = Handler(operands=(1, 0), describe=describe, product=product)
# It activates the output: not a plain product.
FUSED_GEMM = Handler(operands=(1, 0), describe=describe)
