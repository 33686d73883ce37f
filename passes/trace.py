"""Where a weight operand is stored, and who else reads the stored tensor.

Weights are followed through operators that move, round or scale values but never mix them
(:mod:`iobs_onnx.passes.follow`), so a zero stored is a zero multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from iobs_onnx.passes.follow import Path, follow, followed_input
from iobs_onnx.passes.regroup import regrouped
from iobs_onnx.passes.tensors import stored_slot

# Operators that read a tensor's shape and never its values.
_SHAPE_READERS = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Reading:
    """One final reader of a stored tensor, past any operator that is followed.

    `path` says how the operand comes from the stored tensor; text instead of a path is why
    `node`, which would be followed, cannot be. A `node` of None is the graph itself, which
    returns the tensor as an output.
    """

    node: ir.Node | None
    index: int
    path: Path | str
    value: ir.Value


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node's `value`, else None."""
    slot = stored_slot(value)
    return None if slot is None else slot.tensor


def stored_source(value: ir.Value) -> ir.Value:
    """Walk back from an operand through followed operators; return where that ends."""
    while (node := value.producer()) is not None:
        if (source := followed_input(node)) is None:
            if (turned := regrouped(node)) is None:
                break
            source, _ = turned
        value = source
    return value


def readings(stored: ir.Value, tensor: ir.TensorProtocol) -> Iterator[Reading]:
    """Yield every final reader of the stored tensor `tensor`, in order of discovery."""
    pending = [(stored, Path.of(tensor))]
    joined: set[ir.Node] = set()
    while pending:
        value, path = pending.pop(0)
        if value.is_graph_output():
            yield Reading(None, 0, path, value)
        for node, index in value.uses():
            if node.domain == "" and node.op_type in _SHAPE_READERS:
                continue
            if (found := _joins(value, node)) is not None and not (path.integer or path.grid):
                concat, axis = found
                if concat not in joined:
                    joined.add(concat)
                    turned = replace(path, regrouped=path.layout.axes[axis])
                    pending.append((concat.outputs[0], turned))
                continue
            moved = follow(node, index, path)
            if isinstance(moved, Path):
                pending.append((node.outputs[0], moved))
            else:
                yield Reading(node, index, path if moved is None else moved, value)


def _joins(value: ir.Value, part: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the Concat that puts a value together of `part` and others, and the axis."""
    if part.op_type != "Slice":
        return None
    for concat, _ in part.outputs[0].uses():
        if (turned := regrouped(concat)) is not None and turned[0] is value:
            return concat, turned[1]
    return None


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
    yield from (body for _, body in named_subgraphs(node))


def named_subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the bodies of a control-flow node, each with the name of its attribute."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((name, body) for body in attribute.as_graphs())


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs of a node and of all nodes in its bodies, at any depth."""
    yield from (value for value in node.inputs if value is not None)
    for body in subgraphs(node):
        for inner in body.all_nodes():
            yield from (value for value in inner.inputs if value is not None)
