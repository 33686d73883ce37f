"""What a model stores that is no candidate: named, so that all its numbers are accounted for."""

from __future__ import annotations

import math

import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import slots
from iobs_onnx.passes.sites import readers
from iobs_onnx.passes.sites.candidates import PRUNABLE_DTYPES
from iobs_onnx.passes.sites.value_preserving import INTEGERS
from iobs_onnx.site import Candidates, Other


def find_others(model: ir.Model, found: Candidates) -> tuple[Other, ...]:
    """Return every stored tensor that is neither a site's nor a declined candidate's.

    Args:
        model: unchanged by this call.
        found: from :func:`iobs_onnx.passes.sites.find_sites` of this model.
    """
    named = {site.initializer for site in found.sites}
    named |= {item.initializer for item in found.declined}
    return tuple(
        _other(slot.value, slot.tensor) for slot in slots(model) if slot.value.name not in named
    )


def count_parameters(model: ir.Model) -> int:
    """Return how many numbers a model stores in its tensors."""
    return sum(math.prod(slot.tensor.shape.numpy()) for slot in slots(model))


def _other(value: ir.Value, tensor: ir.TensorProtocol) -> Other:
    shape = tuple(tensor.shape.numpy())
    matrix = sum(size > 1 for size in shape) > 1
    if not matrix:
        reason = "not a matrix"
    elif tensor.dtype not in PRUNABLE_DTYPES | INTEGERS:
        reason = f"dtype {tensor.dtype.name}: not a weight"
        matrix = False
    else:
        operators = sorted(
            {
                "the graph's output" if reading.node is None else reading.node.op_type
                for reading in readers.readings(value, tensor)
            }
        )
        read = f"read by {', '.join(operators)}" if operators else "nothing reads it"
        reason = f"{read}: no product is known to multiply by it"
    return Other(value.name or "", shape, reason, matrix)
