"""Which graph input holds token ids, and how many there are to choose from."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import stored_tensor
from iobs_onnx.passes.sites import readers
from iobs_onnx.passes.sites.value_preserving import Path


def find_token_input(model: ir.Model) -> tuple[str, int] | None:
    """Return the input that looks up rows of the largest stored table, and their number.

    Inputs are followed through Cast, Reshape and the like to a lookup along axis 0 of a stored
    matrix, which may be the transposed weight of the head, or packed. None for a model without
    such a lookup.
    """
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        along = _LOOKUPS.get((node.domain, node.op_type))
        if along is None or node.attributes.get_int(along, 0) != 0:
            continue
        rows = _rows(node)
        source = None if node.inputs[1] is None else _source(node.inputs[1])
        if rows is None or source is None:
            continue
        if source.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            found[source] = max(rows, found.get(source, 0))
    if not found:
        return None
    tokens = max(found, key=found.__getitem__)
    return tokens.name or "", found[tokens]


def _rows(lookup: ir.Node) -> int | None:
    """Return the number of rows of the stored matrix that is looked up; None for other tables."""
    table = lookup.inputs[0]
    source = None if table is None else readers.stored_source(table)
    tensor = None if source is None else stored_tensor(source)
    if source is None or tensor is None:
        return None
    for reading in readers.readings(source, tensor):
        if reading.node is lookup and reading.index == 0 and isinstance(reading.path, Path):
            shape = reading.path.layout.shape
            return shape[0] if len(shape) == 2 else None
    return None


def _source(ids: ir.Value) -> ir.Value | None:
    """Follow ids back to a graph input; None where something computes them."""
    while not ids.is_graph_input():
        node = ids.producer()
        if node is None or node.op_type not in _SAME_IDS or node.inputs[0] is None:
            return None
        ids = node.inputs[0]
    return ids


# Operators that look up rows, each with its attribute for the axis.
_LOOKUPS = {("", "Gather"): "axis", ("com.microsoft", "GatherBlockQuantized"): "gather_axis"}
_SAME_IDS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
