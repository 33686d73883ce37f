"""Tensors that are cut into parts and put together again in another order.

PyTorch orders the gates of an LSTM in one way, ONNX in another: an export that folds no constants
turns the weights round with Slice and Concat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer, integers
from iobs_onnx.passes.graph.tensors import constant_array, stored_slot
from iobs_onnx.passes.ops.use import optional


def regrouped(concat: ir.Node) -> tuple[ir.Value, int] | None:
    """Return the value whose parts a Concat puts together, each once, and the axis.

    Its shape has to be known.
    """
    parts = [value.producer() for value in concat.inputs if value is not None]
    if (concat.domain, concat.op_type) != ("", "Concat") or len(parts) < len(concat.inputs):
        return None
    sources = {node.inputs[0] for node in parts if node is not None and _is_part(node)}
    source = next(iter(sources), None)
    if len(sources) != 1 or source is None or (shape := _shape(source)) is None:
        return None
    axis = integer(concat, "axis", 0)
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    places = [place for node in parts for place in _places(node, axis, shape)]
    return (source, axis) if sorted(places) == list(range(shape[axis])) else None


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    slot = stored_slot(value)
    if slot is not None:
        return tuple(slot.tensor.shape.numpy())
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else None


def _is_part(node: ir.Node) -> bool:
    """Whether a node is a Slice that one node alone reads."""
    if (node.domain, node.op_type) != ("", "Slice") or not node.inputs:
        return False
    return len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()


def _places(node: ir.Node | None, axis: int, shape: Sequence[int]) -> Sequence[int]:
    """Return which places along an axis a Slice takes; none where that is not known."""
    if node is None or not _is_part(node):
        return ()
    starts, ends, axes, steps = (_numbers(node, *place) for place in enumerate(_OPERANDS, start=1))
    found = [len(item) for item in (starts, ends, axes, steps)]
    if found[:2] != [1, 1] or max(found) > 1 or (axes or [0])[0] % len(shape) != axis:
        return ()
    return range(shape[axis])[starts[0] : ends[0] : (steps or [1])[0] or None]


_OPERANDS = ("starts", "ends", "axes", "steps")


def _numbers(node: ir.Node, place: int, name: str) -> list[int]:
    """Return an operand of Slice, an attribute before opset 10."""
    if name in node.attributes:
        return list(integers(node, name, []))
    array = constant_array(optional(node, place))
    return [] if array is None else [int(entry) for entry in np.ravel(array).astype(np.int64)]
