"""Refuse a protobuf that lies about itself, before anything is allocated on its word."""

from __future__ import annotations

import functools
import graphlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.files.proto_walk import Scope, called, nested, scopes

# A sparse tensor of a few bytes may declare any size; what is used in calculations is dense.
MAX_DENSE_BYTES = 2**31
# Functions that call functions twice each double at every level once ONNX Runtime inlines them.
_MAX_INLINED_NODES = 1_000_000

_RAW = "raw_data"
_TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
# The field that holds each type where it is not raw, and its entries for each element.
_TYPED = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}
# Values that ONNX's checker does not look at, and that finding weights depends on.
_ALLOWED: dict[tuple[str, str], Callable[[onnx.AttributeProto], bool]] = {
    ("Transpose", "perm"): lambda perm: sorted(perm.ints) == list(range(len(perm.ints))),
    ("Cast", "to"): lambda to: to.i in onnx.TensorProto.DataType.values(),
    ("Conv", "group"): lambda group: group.i > 0,
    ("ConvTranspose", "group"): lambda group: group.i > 0,
}


def require_sound(proto: onnx.ModelProto, label: str) -> None:
    """Check what onnx_ir takes on trust: sizes, double names, functions that call themselves.

    Time is linear in the number of nodes and tensors; no tensor is decoded.

    Args:
        proto: unchanged by this call.
        label: what an error calls the model.

    Raises:
        ModelError: there is no graph; a tensor's data do not fit its shape and type; a name that
            must be unique is not; model-local functions are recursive or unfold without bound.
    """
    if not proto.HasField("graph"):
        raise ModelError(f"{label}: empty, it holds no graph; export it again")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{label}: IR version {proto.ir_version} is newer than the installed onnx knows "
            f"({onnx.IR_VERSION}); upgrade onnx"
        )
    _require_text((proto.producer_name, proto.producer_version, proto.domain), label)
    _require_text(_texts(proto), label)
    for scope in scopes(proto):
        _require_text(_strings(scope), label)
        if isinstance(scope, onnx.GraphProto):
            where = f"{label}: graph {scope.name!r}"
            _require_unique((info.name for info in scope.input), f"{where}: input")
            sparse = (tensor.values.name for tensor in scope.sparse_initializer)
            stored = [*(tensor.name for tensor in scope.initializer), *sparse]
            if "" in stored:
                raise ModelError(f"{where}: an initializer has no name; mend the model")
            _require_unique(stored, f"{where}: initializer")
        for node in scope.node:
            names = (attribute.name for attribute in node.attribute)
            _require_unique(names, f"{label}: attribute of node {called(node)!r}")
            if not all(held.configuration_id for held in node.device_configurations):
                raise ModelError(
                    f"{label}: a device configuration of node {called(node)!r} has no name; mend it"
                )
            if not node.output and any(_held(attribute) for attribute in node.attribute):
                raise ModelError(
                    f"{label}: {node.op_type} node {node.name!r} holds a tensor and has no "
                    "output, which is not supported; remove it first"
                )
        for tensor in _tensors(scope):
            _require_storage(tensor, label)
    _require_attributes(proto.graph, _opsets(proto, label), label)
    for function in proto.functions:
        _require_attributes(function, _opsets(function, label), label)
    _require_finite_calls(proto, label)


def require_sparse(sparse: onnx.SparseTensorProto, label: str) -> None:
    """Check that a sparse tensor can be made dense.

    Raises:
        ModelError: data do not fit their shape, an index is out of bounds, the data are external,
            or the dense form would exceed 2 GB.
    """
    what = f"{label}: sparse tensor {sparse.values.name!r}"
    for part in (sparse.values, sparse.indices):
        _require_storage(part, label)
        if part.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"{what} has external data, which is not supported; store it inline")
    try:
        onnx.checker.check_sparse_tensor(sparse)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{what}: {str(error).splitlines()[0]}") from error
    dtype = ir.DataType(sparse.values.data_type)
    nbytes = math.prod(sparse.dims) * dtype.bitwidth // 8 if dtype != ir.DataType.STRING else None
    if nbytes is None or nbytes > MAX_DENSE_BYTES:
        size = "strings" if nbytes is None else f"{nbytes} bytes once dense"
        raise ModelError(f"{what} holds {size}, which is not supported; remove it first")


def _strings(scope: Scope) -> Iterator[str]:
    yield scope.name
    yield from _texts(scope)
    if isinstance(scope, onnx.GraphProto):
        for info in (*scope.input, *scope.output, *scope.value_info):
            yield info.name
            yield from _texts(info)
        yield from (tensor.name for tensor in scope.initializer)
        yield from (annotation.tensor_name for annotation in scope.quantization_annotation)
    else:
        yield from (scope.domain, scope.overload, *scope.input, *scope.output, *scope.attribute)
    for node in scope.node:
        yield from (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        yield from _texts(node)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name, attribute.doc_string)


def _texts(owner: Any) -> Iterator[str]:
    yield owner.doc_string
    for entry in owner.metadata_props:
        yield from (entry.key, entry.value)


def _require_text(strings: Iterable[str], label: str) -> None:
    # protobuf hands out bytes where a string is not UTF-8.
    if (broken := next((text for text in strings if not isinstance(text, str)), None)) is not None:
        raise ModelError(f"{label}: the text {broken!r:.200} is not UTF-8; mend the model")


def _tensors(scope: Scope) -> Iterator[onnx.TensorProto]:
    if isinstance(scope, onnx.GraphProto):
        yield from scope.initializer
    for node in scope.node:
        for attribute in node.attribute:
            yield from _held(attribute)


def _held(attribute: onnx.AttributeProto) -> Iterable[onnx.TensorProto]:
    if attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name:
        return [attribute.t]
    return attribute.tensors


def _require_storage(tensor: onnx.TensorProto, label: str) -> None:
    """Hold the bytes of a tensor against its shape and type."""
    what = f"{label}: tensor {tensor.name!r}"
    _require_text(_texts(tensor), what)
    _require_text((text for e in tensor.external_data for text in (e.key, e.value)), what)
    if tensor.HasField("segment"):
        raise ModelError(f"{what} is a segment of another, which is not supported; join them")
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise ModelError(f"{what} has the unknown type {tensor.data_type}; mend it") from error
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{what} has no type; mend the model")
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{what} has the negative shape {list(tensor.dims)}; mend the model")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise ModelError(f"{what}: strings cannot be external data; store them inline")
        return
    count = math.prod(tensor.dims)
    held = [name for name in _TYPED_FIELDS if len(getattr(tensor, name))]
    held += [_RAW] if tensor.HasField(_RAW) else []
    if len(held) > 1:
        raise ModelError(f"{what} holds both {held[0]} and {held[1]}; mend the model")
    if held == [_RAW]:
        if dtype == ir.DataType.STRING:
            raise ModelError(f"{what}: strings cannot be raw data; mend the model")
        field, found, wanted = _RAW, len(tensor.raw_data), -(-count * dtype.bitwidth // 8)
    else:
        field, entries = _TYPED.get(dtype, ("int32_data", 1))
        # Types below 8 bits are packed into bytes, each in an entry of its own.
        packed = min(8, dtype.bitwidth) if field == "int32_data" and dtype.bitwidth < 6 else 8
        found, wanted = len(getattr(tensor, field)), -(-count * entries * packed // 8)
        if held not in ([], [field]):
            raise ModelError(f"{what} is {dtype.name}, yet holds {held[0]}; mend the model")
    if found != wanted:
        raise ModelError(
            f"{what}, {dtype.name} of shape {list(tensor.dims)}, needs {wanted} of {field} and "
            f"holds {found}; mend or export it again"
        )


def _opsets(owner: onnx.ModelProto | onnx.FunctionProto, label: str) -> dict[str, int]:
    """Return the version of each domain."""
    _require_text((opset.domain for opset in owner.opset_import), label)
    _require_unique((opset.domain for opset in owner.opset_import), f"{label}: opset domain")
    for opset in owner.opset_import:
        if not 0 < opset.version < 2**31:
            raise ModelError(
                f"{label}: opset {opset.domain!r} has no version {opset.version}; mend it"
            )
    return {opset.domain: opset.version for opset in owner.opset_import}


def _require_attributes(scope: Scope, opsets: dict[str, int], label: str) -> None:
    """Hold the attributes of standard operators against their declared types."""
    for part in nested(scope):
        for node in part.node:
            types = _attribute_types(node.op_type, node.domain, opsets.get(node.domain, 1))
            for attribute in node.attribute:
                what = f"{label}: attribute {attribute.name!r} of {node.op_type} {called(node)!r}"
                if attribute.type == onnx.AttributeProto.UNDEFINED:
                    raise ModelError(f"{what} has no type; mend the model")
                wanted = types.get(attribute.name, attribute.type)
                if attribute.type != wanted:
                    kind = onnx.AttributeProto.AttributeType.Name
                    raise ModelError(f"{what} is not {kind(wanted)}; mend the model")
                allowed = _ALLOWED.get((node.op_type, attribute.name))
                if attribute.ref_attr_name:
                    if isinstance(scope, onnx.GraphProto):
                        raise ModelError(f"{what} refers to a function outside one; mend it")
                elif types and allowed and not allowed(attribute):
                    raise ModelError(f"{what} has a value out of range; mend the model")


@functools.lru_cache(maxsize=4096)
def _attribute_types(op_type: str, domain: str, version: int) -> dict[str, int]:
    """Return each attribute's type, nothing for an operator that the installed onnx lacks."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return {}
    # An IntEnum, though its stub does not say so.
    return {name: int(held.type) for name, held in schema.attributes.items()}  # type: ignore[call-overload]


def _require_unique(names: Iterable[str], what: str) -> None:
    double = next((name for name, count in Counter(names).items() if count > 1), None)
    if double is not None:
        raise ModelError(f"{what} {double!r} is declared twice; mend the model")


def _require_finite_calls(proto: onnx.ModelProto, label: str) -> None:
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    if len(functions) < len(proto.functions):
        names = (f"{f.domain}::{f.name}" for f in proto.functions)
        _require_unique(names, f"{label}: model-local function")

    def nodes(scope: Scope) -> Iterator[tuple[str, str, str]]:
        return ((n.domain, n.op_type, n.overload) for part in nested(scope) for n in part.node)

    calls = {key: set(nodes(function)) & functions.keys() for key, function in functions.items()}
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        name = error.args[1][0][1]
        raise ModelError(
            f"{label}: model-local function {name!r} calls itself, which ONNX forbids; mend it"
        ) from error
    size: dict[tuple[str, str, str], int] = {}
    for key in order:
        size[key] = sum(size.get(node, 1) for node in nodes(functions[key]))
    total = sum(size.get(node, 1) for node in nodes(proto.graph))
    if functions and total > _MAX_INLINED_NODES:
        raise ModelError(
            f"{label}: its functions call one another until they make {total} nodes, more than "
            f"{_MAX_INLINED_NODES}; simplify the model"
        )
