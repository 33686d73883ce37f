"""Walks over a protobuf: its graphs, functions and bodies, alone or beside onnx_ir's form."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

Scope = onnx.GraphProto | onnx.FunctionProto


def scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """Yield the main graph, the functions, and all bodies in them."""
    yield from nested(proto.graph)
    for function in proto.functions:
        yield from nested(function)


def nested(scope: Scope) -> Iterator[Scope]:
    """Yield a graph or function and all bodies in it."""
    pending = [scope]
    while pending:
        scope = pending.pop()
        yield scope
        for node in scope.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g)
                else:
                    pending.extend(attribute.graphs)


def paired(proto: onnx.GraphProto, graph: ir.Graph) -> Iterator[tuple[onnx.GraphProto, ir.Graph]]:
    """Yield each graph of a model with the protobuf it was read from or written to."""
    pending = [(proto, graph)]
    while pending:
        proto, graph = pending.pop()
        yield proto, graph
        for node_proto, node in zip(proto.node, graph, strict=True):
            for attribute in node_proto.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append((attribute.g, node.attributes[attribute.name].as_graph()))
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    graphs = node.attributes[attribute.name].as_graphs()
                    pending.extend(zip(attribute.graphs, graphs, strict=True))


def called(node: onnx.NodeProto) -> str:
    """Return what an error calls a node."""
    return node.name or next((name for name in node.output if name), node.op_type)
