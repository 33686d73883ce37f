"""What onnx_ir (1.1) cannot hold: set aside on the way in, put back on the way out.

Sparse tensors become dense in memory and go back into the file as they were, unless they were
exchanged. Types of maps and of opaque values, and training information, are kept as they are, as is
the order of `value_info` and of the model's metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.files.proto_walk import Scope, called, nested, paired, scopes
from iobs_onnx.passes.files.validate import require_sparse
from iobs_onnx.passes.graph.tensors import Slot

_SPARSE = "iobs_onnx.sparse"
_TRAINING = "iobs_onnx.training_info"
_TYPES = "iobs_onnx.types"
_INFOS = "iobs_onnx.value_info"
_KEYS = "iobs_onnx.metadata_keys"
_SPARSE_TYPES = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)


@dataclass(frozen=True)
class _Sparse:
    """A tensor that the file stores sparsely, and the dense one that stands for it."""

    dense: ir.TensorProtocol
    proto: onnx.SparseTensorProto


def set_aside(proto: onnx.ModelProto, label: str) -> onnx.ModelProto:
    """Return a model that onnx_ir can hold: `proto` itself, or a copy where it has to differ.

    The copy has a dense tensor without data in the place of every sparse one.

    Raises:
        ModelError: a sparse tensor is malformed, too large, or neither an initializer nor a
            Constant of a graph.
    """
    if not any(_holds_foreign(scope) for scope in scopes(proto)):
        return proto
    for function in proto.functions:
        if any(_holds_foreign(scope) for scope in nested(function)):
            raise ModelError(
                f"{label}: model-local function {function.name!r} holds a sparse tensor, which "
                "would be lost; inline the functions first (onnx.inliner)"
            )
    own = onnx.ModelProto()
    own.CopyFrom(proto)
    for graph in nested(own.graph):
        assert isinstance(graph, onnx.GraphProto), "bodies of a graph are graphs"
        for info in _foreign_values(graph):
            info.ClearField("type")
        for sparse in graph.sparse_initializer:
            require_sparse(sparse, label)
            graph.initializer.append(_without_data(sparse))
        del graph.sparse_initializer[:]
        for node, attribute in _sparse_attributes(graph):
            _require_constant(node, attribute, label)
            require_sparse(attribute.sparse_tensor, label)
            dense = onnx.helper.make_attribute("value", _without_data(attribute.sparse_tensor))
            attribute.CopyFrom(dense)
    return own


def attach(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Tie to the model what :func:`set_aside` left out of `proto`; it goes along with clones."""
    for graph_proto, graph in paired(proto.graph, model.graph):
        ends = (*graph_proto.input, *graph_proto.output)
        odd = [info for info in ends if info.HasField("type") and not _is_plain(info.type)]
        graph.meta[_TYPES] = {info.name: info for info in odd}
        named = {info.name for info in ends} | _stored_names(graph_proto)
        # Each with whether it describes anything.
        graph.meta[_INFOS] = [(info, info.name in named) for info in graph_proto.value_info]
        for slot, sparse in _sparse_slots(graph_proto, graph):
            dense = _densified(sparse)
            slot.put(dense)
            slot.value.meta[_SPARSE] = _Sparse(dense, sparse)
    if proto.training_info:
        model.graph.meta[_TRAINING] = tuple(proto.training_info)
    model.graph.meta[_KEYS] = [entry.key for entry in proto.metadata_props]


def put_back(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Complete the protobuf that onnx_ir made of a model."""
    proto.training_info.extend(model.graph.meta.get(_TRAINING, ()))
    keys = model.graph.meta.get(_KEYS, [])
    metadata = [(entry.key, entry.value) for entry in proto.metadata_props]
    # Sorting keeps the order of equals: new keys go last.
    metadata.sort(key=lambda item: keys.index(item[0]) if item[0] in keys else len(keys))
    del proto.metadata_props[:]
    for key, value in metadata:
        proto.metadata_props.add(key=key, value=value)
    for graph_proto, graph in paired(proto.graph, model.graph):
        odd = graph.meta.get(_TYPES, {})
        ends = (*graph_proto.input, *graph_proto.output)
        for info in ends:
            if info.name in odd:
                info.CopyFrom(odd[info.name])
        named = {info.name for info in ends} | _stored_names(graph_proto)
        infos = {info.name: info for info in graph_proto.value_info}
        first = [
            infos.pop(info.name, info)
            for info, described in graph.meta.get(_INFOS, ())
            if info.name in named or not described
        ]
        ordered = [*first, *infos.values()]
        del graph_proto.value_info[:]
        graph_proto.value_info.extend(ordered)
        _restore_sparse(graph_proto, graph)


def stays_sparse(slot: Slot) -> bool:
    """Whether the file will hold this tensor in the sparse form that it came in."""
    sparse = slot.value.meta.get(_SPARSE)
    return isinstance(sparse, _Sparse) and sparse.dense is slot.tensor


def keep_sparse(slot: Slot, proto: onnx.SparseTensorProto) -> None:
    """Have the file hold this tensor as `proto`, which stands for the same values."""
    slot.value.meta[_SPARSE] = _Sparse(slot.tensor, proto)


def _holds_foreign(scope: Scope) -> bool:
    if isinstance(scope, onnx.GraphProto) and (scope.sparse_initializer or _foreign_values(scope)):
        return True
    return any(True for _ in _sparse_attributes(scope))


def _foreign_values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    infos = (*graph.input, *graph.output, *graph.value_info)
    return [info for info in infos if _is_foreign(info.type)]


def _stored_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names of what a graph stores and computes."""
    stored = {tensor.name for tensor in graph.initializer}
    stored.update(tensor.values.name for tensor in graph.sparse_initializer)
    return stored.union(*(node.output for node in graph.node))


def _is_plain(kind: onnx.TypeProto) -> bool:
    """Whether onnx_ir holds a type; it takes one of nothing for none."""
    return kind.WhichOneof("value") is not None and not _is_foreign(kind)


def _is_foreign(kind: onnx.TypeProto) -> bool:
    while (which := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
        kind = getattr(kind, which).elem_type
    return which in ("map_type", "opaque_type")


def _sparse_attributes(scope: Scope) -> Iterator[tuple[onnx.NodeProto, onnx.AttributeProto]]:
    for node in scope.node:
        for attribute in node.attribute:
            if attribute.type in _SPARSE_TYPES:
                yield node, attribute


def _require_constant(node: onnx.NodeProto, attribute: onnx.AttributeProto, label: str) -> None:
    is_constant = (node.domain, node.op_type) in (("", "Constant"), ("ai.onnx", "Constant"))
    alone = len(node.attribute) == len(node.output) == 1 and not attribute.ref_attr_name
    if not (is_constant and alone and attribute.type == onnx.AttributeProto.SPARSE_TENSOR):
        raise ModelError(
            f"{label}: node {called(node)!r} holds a sparse tensor, which would be lost; "
            "store it densely first"
        )


def _without_data(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values = sparse.values
    return onnx.TensorProto(name=values.name, data_type=values.data_type, dims=sparse.dims)


def _sparse_slots(
    proto: onnx.GraphProto, graph: ir.Graph
) -> Iterable[tuple[Slot, onnx.SparseTensorProto]]:
    for sparse in proto.sparse_initializer:
        yield Slot(graph.initializers[sparse.values.name]), sparse
    for node_proto, node in zip(proto.node, graph, strict=True):
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                yield Slot(node.outputs[0], "value"), attribute.sparse_tensor


def _densified(sparse: onnx.SparseTensorProto) -> ir.LazyTensor:
    def fill() -> ir.TensorProtocol:
        values = numpy_helper.to_array(sparse.values)
        indices = numpy_helper.to_array(sparse.indices)
        array = np.zeros(tuple(sparse.dims), values.dtype)
        if indices.ndim == 1:
            array.reshape(-1)[indices] = values
        else:
            array[tuple(indices.T)] = values
        return ir.Tensor(array, dtype=dtype)

    dtype = ir.DataType(sparse.values.data_type)
    return ir.LazyTensor(fill, dtype, ir.Shape(sparse.dims), name=sparse.values.name)


def _restore_sparse(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    kept = {
        value.name: value.meta[_SPARSE].proto
        for value in graph.initializers.values()
        if stays_sparse(Slot(value))
    }
    dense = [tensor for tensor in proto.initializer if tensor.name not in kept]
    if kept:
        del proto.initializer[:]
        proto.initializer.extend(dense)
    proto.sparse_initializer.extend(kept.values())
    for node_proto, node in zip(proto.node, graph, strict=True):
        held = node.outputs[0].meta.get(_SPARSE) if node.outputs else None
        if held is not None and stays_sparse(Slot(node.outputs[0], "value")):
            sparse = onnx.helper.make_attribute("sparse_value", held.proto)
            node_proto.attribute[0].CopyFrom(sparse)
