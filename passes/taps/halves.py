"""Float32 in place of float16 and bfloat16, for where ONNX Runtime computes these in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import all_nodes, slots

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_WIDE = ir.DataType.FLOAT
# Attributes that name the type of an output.
_TYPES = ("to", "dtype", "output_dtype")


def widen(model: ir.Model) -> list[str]:
    """Let a model compute in float32 what it computes in float16 and bfloat16, in place.

    ONNX Runtime does so on a CPU. It has no kernels for bfloat16, and few for float16: around all
    other nodes it converts to float32 and back, and where two such nodes meet, nothing is rounded
    in between. An output is rounded, though, and beyond 65,504 it is infinite. A part of a model
    whose outputs are halves would therefore compute what the whole does not. In float32 it computes
    the same but for roundings that the whole makes at nodes that it has kernels for.

    Call it on a copy that is run, never on a model that is written.

    Returns:
        The names of the types that were widened.
    """
    found: set[ir.DataType] = set()
    for slot in slots(model):
        tensor = slot.tensor
        if tensor.dtype in HALVES:
            found.add(tensor.dtype)
            slot.put(ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name))
    values: list[ir.Value] = []
    for graph in model.graphs():
        values += (*graph.inputs, *graph.initializers.values())
    for node in all_nodes(model):
        values += node.outputs
        for name in _TYPES:
            attribute = node.attributes.get(name)
            if attribute is not None and not attribute.is_ref() and attribute.value in HALVES:
                found.add(ir.DataType(attribute.value))
                node.attributes[name] = ir.AttrInt64(name, _WIDE)
    for value in values:
        if value.dtype in HALVES:
            found.add(value.dtype)
            value.type = _widened(value.type)
    return sorted(kind.name.lower() for kind in found)


def _widened(kind: ir.TypeProtocol | None) -> ir.TypeProtocol:
    """Return a type of its own: models that were cloned share theirs."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_widened(kind.elem_type))
    return type(kind)(_WIDE) if isinstance(kind, ir.SparseTensorType) else ir.TensorType(_WIDE)
