"""Every constant operand of an operator that multiplies by weights, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from iobs_onnx.passes.graph.tensors import stored_tensor
from iobs_onnx.passes.ops import weight_operands
from iobs_onnx.passes.sites import readers

PRUNABLE_DTYPES = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)


@dataclass
class Candidate:
    """A stored tensor that is multiplied by, or the value where following it had to end.

    Attributes:
        source: an initializer, a Constant's output, or the output of an operator that is not
            followed but computes from constants alone.
        place: what puts its first node out of reach; empty outside model-local functions.
        nodes: the nodes that multiply by it, in graph order (a dict for its order).
    """

    source: ir.Value
    place: str
    nodes: dict[ir.Node, None] = field(default_factory=dict)


def find_candidates(model: ir.Model, constant: set[ir.Value]) -> list[Candidate]:
    """Return all candidates in graph order: main graph, bodies, then model-local functions.

    Args:
        model: unchanged by this call.
        constant: the values computed from stored tensors alone, of all scopes.
    """
    found: dict[ir.Value, Candidate] = {}
    for node, place in _placed_nodes(model):
        is_call = node.op_identifier() in model.functions
        # Calls are left only where functions cannot be unfolded.
        for index in range(len(node.inputs)) if is_call else weight_operands(node):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None:
                continue
            source = readers.stored_source(value)
            tensor = stored_tensor(source)
            if tensor is None and source not in constant:
                continue
            # A function's inputs say nothing of their roles; a matrix may be its weight.
            if is_call and (tensor is None or len(tensor.shape) < 2):
                continue
            found.setdefault(source, Candidate(source, place)).nodes[node] = None
    return list(found.values())


def _placed_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in model.graph.all_nodes():
        yield node, ""
    for function in model.functions.values():
        for node in function.all_nodes():
            yield node, f"inside the model-local function {function.name}"
