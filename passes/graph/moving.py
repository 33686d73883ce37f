"""Which activations have a length that follows from the numbers in given tensors.

Text to speech predicts how long each token lasts, a detector what it keeps: with other weights such
an activation has other rows, or more of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from iobs_onnx.passes.graph.walk import read_values

# The inputs whose values decide how long the outputs are.
_DECIDE: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "If": (0,),
    "Loop": (0, 1),
    "NonMaxSuppression": (0, 1, 2, 3, 4),
    "NonZero": (0,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unique": (0,),
    "Upsample": (1,),
}
# These are as long as their first input, whatever the others are.
_LIKE_FIRST = ("CumSum", "Scatter", "ScatterElements", "ScatterND")
_ASK_LENGTH = ("Shape", "Size")


def moving_lengths(model: ir.Model, tensors: Collection[str]) -> set[str]:
    """Return the values of the main graph whose length may change with the numbers in tensors.

    A value whose declared axes are all fixed or named like an input's is as long as they say. Where
    a node's rule is not known, its outputs move with any of its inputs.

    Args:
        model: the model.
        tensors: names of stored tensors.
    """
    axes = {axis for value in model.graph.inputs for axis in _axes(value)}
    numbers = set[ir.Value]()  # values that follow from the tensors
    lengths = set[ir.Value]()
    for node in model.graph:
        read = list(read_values(node))
        follows = any(value.name in tensors or value in numbers for value in read)
        moves = _moves(node, read, numbers, lengths)
        for output in node.outputs:
            if moves and not _settled(output, axes):
                lengths.add(output)
            if node.op_type in _ASK_LENGTH:
                follows = any(value in lengths for value in read)
            if follows:
                numbers.add(output)
    return {value.name or "" for value in lengths}


def _moves(
    node: ir.Node, read: list[ir.Value], numbers: set[ir.Value], lengths: set[ir.Value]
) -> bool:
    if node.op_type in _ASK_LENGTH:
        return False
    shaping = read[:1] if node.op_type in _LIKE_FIRST else read
    decided = [node.inputs[i] for i in _DECIDE.get(node.op_type, ()) if i < len(node.inputs)]
    return any(value in lengths for value in shaping) or any(v in numbers for v in decided)


def _axes(value: ir.Value) -> Iterator[str]:
    for axis in value.shape or ():
        if isinstance(axis, ir.SymbolicDim) and axis.value is not None:
            yield axis.value


def _settled(value: ir.Value, axes: Collection[str]) -> bool:
    """Whether all axes of a value are numbers, or names of axes of inputs."""
    return value.shape is not None and all(
        isinstance(axis, int) or axis.value in axes for axis in value.shape
    )
