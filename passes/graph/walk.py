"""Walks over a graph: bodies of control flow, what nodes read in them, what is constant."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


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
