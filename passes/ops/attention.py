"""com.microsoft Attention: `X W + b` makes queries, keys and values; `W` is `(in, 3 hidden)`."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.ops.use import Handler, Read, Use, operand
from iobs_onnx.site import Rows


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read the packed projection as one product."""
    if len(layout.axes) != 2:
        return f"{len(layout.axes)}-D weight where {node.op_type} takes a matrix"
    return Use((Read(operand(node, 0), Rows(-1)),), layout.join((), (1,), (0,)))


ATTENTION = Handler(operands=(1,), describe=describe)
