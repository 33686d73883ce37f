"""Which graph input holds token ids, and how many there are to choose from."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import stored_tensor


def find_token_input(model: ir.Model) -> tuple[str, int] | None:
    """Return the input that looks up rows of the largest stored table, and their number.

    Inputs are followed through Cast, Reshape and the like to a `Gather` along axis 0 of a stored
    matrix. None for a model without such a lookup.
    """
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
            continue
        table, ids = node.inputs[:2]
        tensor = None if table is None else stored_tensor(table)
        source = None if ids is None else _source(ids)
        if tensor is None or source is None or len(tensor.shape) != 2:
            continue
        if source.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            found[source] = max(int(tensor.shape.numpy()[0]), found.get(source, 0))
    if not found:
        return None
    tokens = max(found, key=found.__getitem__)
    return tokens.name or "", found[tokens]


def _source(ids: ir.Value) -> ir.Value | None:
    """Follow ids back to a graph input; None where something computes them."""
    while not ids.is_graph_input():
        node = ids.producer()
        if node is None or node.op_type not in _SAME_IDS or node.inputs[0] is None:
            return None
        ids = node.inputs[0]
    return ids


_SAME_IDS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
