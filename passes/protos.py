"""Between protobuf and onnx_ir without losing or adding anything."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from iobs_onnx.errors import ModelError

_NO_VALUE_INFO = "iobs_onnx.no_value_info"
_SPARSE = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)


def from_proto(proto: onnx.ModelProto, label: str) -> ir.Model:
    """Return the model in onnx_ir's form; its tensors are those of `proto`.

    Args:
        proto: unchanged by this call.
        label: what an error calls the model.

    Raises:
        ModelError: the model is empty, invalid, or holds what onnx_ir would drop.
    """
    if not proto.graph.node:
        raise ModelError(f"{label}: empty, its graph has no node; export it again")
    _require_lossless(proto, label)
    try:
        model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        # The outer messages hold whole protobufs; the innermost names the fault.
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        fault = " ".join(str(cause).split())[:200]
        raise ModelError(f"{label}: not a valid ONNX model: {fault}") from error
    for graph_proto, graph in _paired(proto.graph, model.graph):
        described = {info.name for info in graph_proto.value_info}
        for name, value in graph.initializers.items():
            if name not in described:
                value.meta[_NO_VALUE_INFO] = True
    return model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return the protobuf of a model, as it was loaded.

    Undone are two habits of onnx_ir (1.1): it writes a `value_info` for each initializer,
    though the original had none, and the metadata of an initializer's tensor twice.
    """
    proto = ir.to_proto(model)
    for graph_proto, graph in _paired(proto.graph, model.graph):
        bare = {v.name for v in graph.initializers.values() if v.meta.get(_NO_VALUE_INFO)}
        kept = [info for info in graph_proto.value_info if info.name not in bare]
        if len(kept) < len(graph_proto.value_info):
            del graph_proto.value_info[:]
            graph_proto.value_info.extend(kept)
    for scope in _scopes(proto):
        if isinstance(scope, onnx.GraphProto):
            for tensor in scope.initializer:
                _drop_doubles(tensor)
        for node in scope.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    _drop_doubles(attribute.t)
    return proto


def _drop_doubles(tensor: onnx.TensorProto) -> None:
    metadata = {entry.key: entry.value for entry in tensor.metadata_props}
    if len(metadata) < len(tensor.metadata_props):
        del tensor.metadata_props[:]
        for key, value in metadata.items():
            tensor.metadata_props.add(key=key, value=value)


def _require_lossless(proto: onnx.ModelProto, label: str) -> None:
    if proto.training_info:
        raise ModelError(f"{label}: holds training_info, which would be lost; remove it first")
    for scope in _scopes(proto):
        if isinstance(scope, onnx.GraphProto) and scope.sparse_initializer:
            name = scope.sparse_initializer[0].values.name
            raise ModelError(
                f"{label}: sparse_initializer {name!r} would be lost; store it densely first"
            )
        for node in scope.node:
            if any(attribute.type in _SPARSE for attribute in node.attribute):
                raise ModelError(
                    f"{label}: node {node.name or node.output[0]!r} holds a sparse tensor, "
                    "which would be lost; store it densely first"
                )


def _scopes(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """Yield the main graph, the functions, and all bodies in them."""
    pending: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while pending:
        scope = pending.pop()
        yield scope
        for node in scope.node:
            for attribute in node.attribute:
                pending.extend(_bodies(attribute))


def _paired(proto: onnx.GraphProto, graph: ir.Graph) -> Iterator[tuple[onnx.GraphProto, ir.Graph]]:
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


def _bodies(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    if attribute.type == onnx.AttributeProto.GRAPH:
        return [attribute.g]
    return list(attribute.graphs)
