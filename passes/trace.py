"""Where a weight operand is stored, and who else reads the stored tensor.

Weights are followed through Transpose, Identity and Cast (float to float): these move or
round values but neither mix nor scale them, so a zero stored is a zero multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from iobs_onnx.passes.tensors import stored_slot

# Operators that read a tensor's shape and never its values.
_SHAPE_READERS = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Reading:
    """One final reader of a stored tensor, past any Transpose, Identity and Cast.

    `perm` gives the operand in stored axes: `operand = stored.transpose(perm)`.
    A `node` of None is the graph itself, which returns the tensor as an output.
    """

    node: ir.Node | None
    index: int
    perm: tuple[int, ...]
    value: ir.Value


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node's `value`, else None."""
    slot = stored_slot(value)
    return None if slot is None else slot.tensor


def stored_source(value: ir.Value) -> ir.Value:
    """Walk back from an operand through followed operators; return where that ends."""
    while (node := value.producer()) is not None and _follows(node):
        source = node.inputs[0]
        if source is None:
            break
        value = source
    return value


def readings(stored: ir.Value, rank: int) -> Iterator[Reading]:
    """Yield every final reader of a stored tensor of `rank` axes, in order of discovery."""
    pending = [(stored, tuple(range(rank)))]
    while pending:
        value, perm = pending.pop(0)
        if value.is_graph_output():
            yield Reading(None, 0, perm, value)
        for node, index in value.uses():
            if node.domain == "" and node.op_type in _SHAPE_READERS:
                continue
            moved = _moved(node, perm) if node.graph is stored.graph else None
            if moved is None:
                yield Reading(node, index, perm, value)
            else:
                pending.append((node.outputs[0], moved))


def constant_values(graph: ir.Graph | ir.Function) -> set[ir.Value]:
    """Return the node outputs computed from stored tensors alone, subgraphs included.

    Nodes with a subgraph, and generators such as RandomNormal, count as computed at run time.
    """
    constant: set[ir.Value] = set()
    for node in graph.all_nodes():
        if node.op_type == "Constant" or (
            node.inputs
            and all(v is None or v.is_initializer() or v in constant for v in node.inputs)
            and not any(True for _ in subgraphs(node))
        ):
            constant.update(node.outputs)
    return constant


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the bodies of a control-flow node."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _follows(node: ir.Node) -> bool:
    if node.domain != "" or not node.inputs:
        return False
    if node.op_type == "Cast":
        target = node.attributes.get("to")
        if target is None or target.is_ref():
            return False
        return ir.DataType(target.as_int()).is_floating_point()
    return node.op_type in ("Transpose", "Identity")


def _moved(node: ir.Node, perm: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the stored axes of a node's output given those of its input, None if not followed."""
    if not _follows(node):
        return None
    if node.op_type != "Transpose":
        return perm
    order = node.attributes.get_ints("perm") or range(len(perm) - 1, -1, -1)
    # A Transpose that does not fit its operand is left to the checker of the model.
    return tuple(perm[axis] for axis in order) if len(set(order)) == len(perm) else None
