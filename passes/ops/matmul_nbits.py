"""com.microsoft MatMulNBits: `Y = X Wᵀ + b`, the weight as integers of a few bits in blocks."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.graph.tensors import constant_array
from iobs_onnx.passes.ops.use import Handler, Read, Use, operand, optional
from iobs_onnx.site import Rows
from iobs_onnx.site.grid import Packed


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read the packed weight as `(N, K)`; it must be stored as `(N, blocks, bytes)`."""
    outputs, inputs = integer(node, "N", 0), integer(node, "K", 0)
    bits, block = integer(node, "bits", 4), integer(node, "block_size", 0)
    if bits not in (2, 4, 8) or block <= 0 or outputs <= 0 or inputs <= 0:
        return f"packed as {bits} bits in blocks of {block}: only 2, 4 and 8 bits are read"
    if optional(node, 4) is not None:
        return "its inputs are in another order (g_idx)"
    blocks = -(-inputs // block)
    if layout != Layout.of((outputs, blocks, block * bits // 8)):
        return "packed in another form than (N, blocks, bytes)"
    scales = constant_array(operand(node, 2))
    zeros = optional(node, 3)
    zero_point = None if zeros is None else constant_array(zeros)
    if scales is None or scales.size != outputs * blocks or (zeros is None) != (zero_point is None):
        return "its scales or zero points are not constant"
    grid = Packed.of(bits, block, inputs, scales.reshape(outputs, blocks), zero_point)
    if grid is None:
        return "its zero points are no integers of the grid, or scales are not finite"
    matrix = Layout.of((outputs, inputs)).join((), (0,), (1,))
    return Use((Read(operand(node, 0), Rows(-1)),), matrix, quantized=grid)


MATMUL_NBITS = Handler(
    operands=(1,),
    describe=describe,
    packed=True,
    no_kernel="{op_type} multiplies by integers that it unpacks: no 2:4 kernel does",
)
