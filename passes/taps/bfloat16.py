"""Float32 in place of bfloat16, for where ONNX Runtime cannot compute in it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import all_nodes, slots

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT
# Attributes that name the type of an output.
_TYPES = ("to", "dtype", "output_dtype")


def widen(model: ir.Model) -> bool:
    """Let a model compute in float32 what it computes in bfloat16, in place.

    Values keep their meaning; they are only rounded less. Call it on a copy that is run, never on
    a model that is written.

    Returns:
        Whether there was anything in bfloat16.
    """
    found = False
    for slot in slots(model):
        tensor = slot.tensor
        if tensor.dtype == _NARROW:
            found = True
            slot.put(ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name))
    values: list[ir.Value] = []
    for graph in model.graphs():
        values += (*graph.inputs, *graph.initializers.values())
    for node in all_nodes(model):
        values += node.outputs
        for name in _TYPES:
            attribute = node.attributes.get(name)
            if attribute is not None and not attribute.is_ref() and attribute.value == _NARROW:
                found = True
                node.attributes[name] = ir.AttrInt64(name, _WIDE)
    for value in values:
        if value.dtype == _NARROW:
            found = True
            value.dtype = _WIDE
    return found
