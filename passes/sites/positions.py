"""How long a text may be: how many positions a language model has room for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import constant_array, stored_tensor

# Operators of com.microsoft that read a table of rotations, by position, and at which input.
_ROTATED = {"RotaryEmbedding": 2, "GroupQueryAttention": 7}
# Distances between positions, in buckets: their table bounds no length.
_BUCKETS = frozenset({"Abs", "Log"})
_COUNTING = frozenset({"CumSum", "Range"})
# Operators that only move or repeat the numbers of their first input.
_MOVING = frozenset(
    {"Cast", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)


def find_positions(model: ir.Model) -> int | None:
    """Return the number of tokens that the smallest stored table of positions has room for.

    Such a table is a matrix whose rows are looked up by numbers that count: `position_ids`, a
    Range or CumSum, or stored numbers up to its last row. Where they do not begin at 0 (RoBERTa and
    BART begin at 2), rows before the first are of no use. None without a table.
    """
    found = []
    for node in model.graph:
        table: ir.Value | None = None
        if node.op_type in _ROTATED and node.domain == "com.microsoft":
            place = _ROTATED[node.op_type]
            table = node.inputs[place] if len(node.inputs) > place else None
        elif node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            table = node.inputs[0]
        tensor = None if table is None else stored_tensor(table)
        if tensor is None or len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
            continue
        rows = int(tensor.shape.numpy()[0])
        first = _first(node.inputs[1], rows) if node.op_type == "Gather" else 0
        if first is not None:
            found.append(rows - first)
    return min(found, default=None)


def _first(ids: ir.Value | None, rows: int) -> int | None:
    """Return the number that the first token gets, as far as its making tells; None if none counts.

    Walks from the looked-up numbers to what counts, adding up the constants on the way.
    """
    made, waiting = set(), [(ids, 0)]
    first: int | None = None
    while waiting:
        value, added = waiting.pop()
        if value is None or value in made:
            continue
        made.add(value)
        node = value.producer()
        if node is None or node.op_type == "Constant":
            start = 0 if value.name == "position_ids" else _stored_start(value, rows - added)
        elif node.op_type in _BUCKETS:
            return None
        elif node.op_type in _COUNTING:
            start = _start(node)
        else:
            waiting += [(source, added + step) for source, step in _steps(node)]
            continue
        if start is not None:
            first = max(first or 0, added + start)
    return first


def _steps(node: ir.Node) -> list[tuple[ir.Value | None, int]]:
    """Return the inputs that an output's numbers come from, and what is added to each."""
    if node.op_type == "Shape":
        return []
    if node.op_type in _MOVING:
        return [(node.inputs[0], 0)]
    if node.op_type == "Sub":
        return [(node.inputs[0], -_scalar(node.inputs[1])), (node.inputs[1], 0)]
    if node.op_type == "Add":
        one, other = node.inputs
        return [(one, _scalar(other)), (other, _scalar(one))]
    return [(value, 0) for value in node.inputs]


def _start(node: ir.Node) -> int:
    """Return the first number of a Range, or of the CumSum of a mask."""
    if node.op_type == "Range":
        return _scalar(node.inputs[0])
    return 1 - node.attributes.get_int("exclusive", 0)


def _scalar(value: ir.Value | None) -> int:
    """Return a stored integer; 0 for what is not stored, or more than one."""
    tensor = None if value is None else stored_tensor(value)
    if tensor is None or not tensor.dtype.is_integer() or tensor.size != 1:
        return 0
    array = constant_array(value)
    return 0 if array is None else int(array.item())


def _stored_start(value: ir.Value, rows: int) -> int | None:
    """Return the smallest of stored numbers that go up to the last row; None for any other."""
    tensor = stored_tensor(value)
    if tensor is None or not tensor.dtype.is_integer() or tensor.size < 2:
        return None
    array = constant_array(value)
    if array is None or int(np.max(array)) != rows - 1:
        return None
    start = int(np.min(array))
    return start if tensor.size >= rows - start else None
