"""Shapes of a model's values, as far as ONNX Runtime's symbolic shape inference tells them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import onnx
import onnx_ir as ir

from iobs_onnx.errors import silenced

# An axis is as long as a number says, or as a name or an expression of names.
Shape: TypeAlias = list[int | str]

DECODER = "decoder_"
# Larger tensors decide no shape.
_MOST_BYTES = 1024


def value_shapes(model: ir.Model) -> dict[str, Shape]:
    """Return the shapes of inputs and values of the main graph, as far as they can be told.

    A length that is not known has a name of its own.
    """
    found = infer_shapes(skeleton_of(model), apart=False)
    return {
        name: [size or f"{name}.{axis}?" for axis, size in enumerate(shape)]
        for name, shape in found.items()
    }


def skeleton_of(model: ir.Model) -> onnx.ModelProto:
    """Return a copy without large weights, which become inputs, and without inferred shapes."""
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _MOST_BYTES:
            value.shape = ir.Shape(tensor.shape.numpy())
            value.type = ir.TensorType(tensor.dtype)
            value.const_value = None
            del copy.graph.initializers[name]
            if not value.is_graph_input():
                copy.graph.inputs.append(value)
    for node in copy.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    return ir.to_proto(copy)


def infer_shapes(skeleton: onnx.ModelProto, *, apart: bool) -> dict[str, Shape]:
    """Return the shapes of inputs and values of the main graph, as far as they can be told.

    Args:
        skeleton: unchanged by this call.
        apart: give every length of every input a name of its own; else only those of a decoder,
            and leave the exporter's.
    """
    from onnxruntime.tools.symbolic_shape_infer import (  # noqa: PLC0415 - imports sympy
        SymbolicShapeInference,
    )

    proto = onnx.ModelProto()
    proto.CopyFrom(skeleton)
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            own = apart or not size.dim_param or value.name.startswith(DECODER)
            if size.dim_value <= 0 and own:
                size.dim_param = f"{value.name}.{axis}" if axis else "batch"
    # Not `infer_shapes`, which leaves a file in the working directory where it does not reach the
    # end of the graph. What it cannot follow is unknown, and keeps its rows.
    walker = SymbolicShapeInference(2**31 - 1, True, False, 0)
    with silenced("onnxruntime.tools.symbolic_shape_infer"), _unknown_beyond():
        walker._preprocess(proto)
        while walker.run_:
            walker._infer_impl()
    return {
        name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for name, value in walker.known_vi_.items()
    }


@contextmanager
def _unknown_beyond() -> Iterator[None]:
    """Stop where inference stumbles: on an operator that it does not know it raises whatever."""
    try:
        yield
    except Exception:
        logging.getLogger(__name__).debug("symbolic shape inference stopped", exc_info=True)
