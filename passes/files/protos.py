"""Between protobuf and onnx_ir without losing or adding anything."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from iobs_onnx.errors import ModelError, silenced
from iobs_onnx.passes.files import preserve
from iobs_onnx.passes.files.proto_walk import paired, scopes
from iobs_onnx.passes.files.validate import require_sound

_NO_VALUE_INFO = "iobs_onnx.no_value_info"


def from_proto(proto: onnx.ModelProto, label: str) -> ir.Model:
    """Return the model in onnx_ir's form; its tensors are those of `proto`.

    Args:
        proto: unchanged by this call.
        label: what an error calls the model.

    Raises:
        ModelError: the model is empty, invalid, or holds what would be lost.
    """
    try:
        require_sound(proto, label)
        held = preserve.set_aside(proto, label)
        with silenced(ir.serde.__name__):
            model = ir.from_proto(held)
    except (ir.serde.SerdeError, UnicodeDecodeError) as error:
        # The outer messages hold whole protobufs; the innermost names the fault.
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        fault = " ".join(str(cause).split())[:200]
        raise ModelError(f"{label}: not a valid ONNX model: {fault}") from error
    for graph_proto, graph in paired(proto.graph, model.graph):
        described = {info.name for info in graph_proto.value_info}
        for name, value in graph.initializers.items():
            if name not in described:
                value.meta[_NO_VALUE_INFO] = True
    preserve.attach(proto, model)
    return model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return the protobuf of a model, as it was loaded.

    Undone are two habits of onnx_ir (1.1): it writes a `value_info` for each initializer,
    though the original had none, and the metadata of an initializer's tensor twice.
    """
    proto = ir.to_proto(model)
    for graph_proto, graph in paired(proto.graph, model.graph):
        bare = {v.name for v in graph.initializers.values() if v.meta.get(_NO_VALUE_INFO)}
        kept = [info for info in graph_proto.value_info if info.name not in bare]
        if len(kept) < len(graph_proto.value_info):
            del graph_proto.value_info[:]
            graph_proto.value_info.extend(kept)
    preserve.put_back(proto, model)
    for scope in scopes(proto):
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
