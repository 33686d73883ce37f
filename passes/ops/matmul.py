"""MatMul and its kin of com.microsoft: `Y = alpha A' B'`, with the weight on either side.

FusedMatMul and its older names take transA and transB, which swap an operand's last two axes, and
transBatchA and transBatchB, which store the first of those two before the batch axes.
GemmFastGelu is MatMul with the weight on the right, a bias and an activation.
"""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.ops.use import Handler, Product, Read, Use, operand
from iobs_onnx.site import RowForm, Rows, Stacked


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read `Y = X B` (weight 1) or `Y = A X` (weight 0), with batches of either."""
    rank = len(layout.axes)
    if rank < 2:
        return "1-D weight: a single output has nothing to share a Hessian with"
    activation = operand(node, 1 - weight)
    reduction = (-1, -2)  # of A, of B
    inputs = _stored(node, weight, reduction[weight]) % rank
    outputs = _stored(node, weight, -3 - reduction[weight]) % rank
    places = {batch: _stored(node, weight, batch) % rank for batch in range(-rank, -2)}
    # All matrices meet the same rows where the activation has no such axis: more outputs.
    wide = [
        axis
        for batch, axis in places.items()
        if layout.shape[axis] == 1 or _broadcast(node, 1 - weight, batch)
    ]
    groups = {batch: axis for batch, axis in places.items() if axis not in wide}
    matrices = layout.join([*groups.values()], [*wide, outputs], [inputs])
    features = _stored(node, 1 - weight, reduction[1 - weight])
    # A vector is its own row and column.
    if activation.shape is not None and len(activation.shape) == 1:
        features = -1
    form: RowForm = Rows(features)
    if groups:
        batches = tuple(_stored(node, 1 - weight, batch) for batch in groups)
        form = Stacked((features,), batches, tuple(layout.shape[a] for a in groups.values()))
    return Use((Read(activation, form),), matrices)


def _stored(node: ir.Node, operand_index: int, axis: int) -> int:
    """Return where operand A or B keeps an axis `(..., rows, columns)` of the product's A' or B'.

    `axis` is negative; so is the result, but for the axis that transBatch puts first.
    """
    name = "AB"[operand_index]
    if integer(node, f"trans{name}", 0) and axis >= -2:
        axis = -3 - axis
    if integer(node, f"transBatch{name}", 0) and axis <= -2:
        return 0 if axis == -2 else axis + 1
    return axis


def _broadcast(node: ir.Node, operand_index: int, batch: int) -> bool:
    """Whether an operand is known to have no batch axis `batch`, or one of length 1."""
    shape = operand(node, operand_index).shape
    if shape is None:
        return False
    return len(shape) < -batch or shape[_stored(node, operand_index, batch)] == 1


def product(node: ir.Node, rank: int) -> Product:
    """Read the channels of `Y = X B`; they are last in both, and the bias is another node's."""
    return Product(channels=-1, made=-1, read=-2, rank=2, stacks=True)


MATMUL = Handler(operands=(1, 0), describe=describe, product=product)
# These may scale, transpose or activate: not plain products.
FUSED_MATMUL = Handler(operands=(1, 0), describe=describe)
GEMM_FAST_GELU = Handler(operands=(1,), describe=describe)
