"""What a model stores that is no candidate: named, so that all its numbers are accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import slots
from iobs_onnx.passes.sites import readers
from iobs_onnx.passes.sites.candidates import PRUNABLE_DTYPES
from iobs_onnx.passes.sites.value_preserving import INTEGERS
from iobs_onnx.site import Candidates, Other, Site

# Where the scales and zero points of these begin among their inputs.
_GRIDS = {"DequantizeLinear": 1, "GatherBlockQuantized": 2, "MatMulNBits": 2, "QuantizeLinear": 1}


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


def count_parameters(model: ir.Model, sites: Iterable[Site]) -> int:
    """Return how many numbers a model stores in its tensors; of sites, those that are packed."""
    stored = sum(math.prod(slot.tensor.shape.numpy()) for slot in slots(model))
    return stored + sum(
        site.groups * site.out_features * site.in_features - math.prod(site.shape) for site in sites
    )


def _other(value: ir.Value, tensor: ir.TensorProtocol) -> Other:
    shape = tuple(tensor.shape.numpy())
    matrix = sum(size > 1 for size in shape) > 1
    found = list(readers.readings(value, tensor)) if matrix else []
    if not matrix:
        reason = "not a matrix"
    elif found and all(_is_grid(reading) for reading in found):
        reason, matrix = "scales or zero points", False
    elif tensor.dtype not in PRUNABLE_DTYPES | INTEGERS:
        reason = f"dtype {tensor.dtype.name}: not a weight"
        matrix = False
    else:
        operators = sorted(
            {
                "the graph's output" if reading.node is None else reading.node.op_type
                for reading in found
            }
        )
        read = f"read by {', '.join(operators)}" if operators else "nothing reads it"
        reason = f"{read}: no product is known to multiply by it"
    return Other(value.name or "", shape, reason, matrix)


def _is_grid(reading: readers.Reading) -> bool:
    """Whether a reader takes a tensor for scales or zero points."""
    node = reading.node
    return node is not None and reading.index >= _GRIDS.get(node.op_type, math.inf)
