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


def find_positions(model: ir.Model) -> int | None:
    """Return the number of positions in the smallest stored table of them; None without one.

    Such a table is a matrix whose rows are looked up by numbers that count: `position_ids`, a
    Range or CumSum, or stored numbers up to its last row.
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
        if node.op_type != "Gather" or _counts(node.inputs[1], rows):
            found.append(rows)
    return min(found, default=None)


def _counts(ids: ir.Value | None, rows: int) -> bool:
    """Whether numbers count positions, as far as their making tells."""
    made, waiting, counting = set(), [ids], False
    while waiting:
        value = waiting.pop()
        if value is None or value in made:
            continue
        made.add(value)
        node = value.producer()
        if node is None or node.op_type == "Constant":
            counting = counting or value.name == "position_ids" or _reaches(value, rows)
        elif node.op_type in _BUCKETS:
            return False
        elif node.op_type in _COUNTING:
            counting = True
        elif node.op_type != "Shape":
            waiting += node.inputs
    return counting


def _reaches(value: ir.Value, rows: int) -> bool:
    tensor = stored_tensor(value)
    if tensor is None or not tensor.dtype.is_integer() or tensor.size < rows:
        return False
    array = constant_array(value)
    return array is not None and int(np.max(array)) == rows - 1
