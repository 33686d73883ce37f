"""Small valid models that between them hold everything the reader of files has to understand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import exports
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Feeds = dict[str, np.ndarray]

_RNG = np.random.default_rng(7)


def _weight(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, np.ndarray],
    outputs: Sequence[str] = ("y",),
    *,
    shape: Sequence[int | str] = ("rows", "columns"),
    functions: Sequence[onnx.FunctionProto] = (),
    ir_version: int = 8,
    opset: int = 17,
    **graph_fields: object,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        **graph_fields,
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid("local", 1)] if functions else []
    return helper.make_model(
        graph, ir_version=ir_version, opset_imports=opsets, functions=functions
    )


def mlp() -> onnx.ModelProto:
    """MatMul, Add, Relu, Gemm with metadata, shapes and names."""
    model = _model(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
            helper.make_node("Add", ["h", "b1"], ["a"], "bias"),
            helper.make_node("Relu", ["a"], ["r"], "relu"),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], "second", transB=1),
        ],
        {"x": ["n", 8]},
        {"w1": _weight(8, 8), "b1": _weight(8), "w2": _weight(4, 8), "b2": _weight(4)},
        value_info=[helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 8])],
    )
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['m', 'm.f']")
    model.metadata_props.add(key="k", value="v")
    return model


def convolution() -> onnx.ModelProto:
    """Conv with all attributes, a grouped Conv, pooling."""
    return _model(
        [
            helper.make_node(
                "Conv",
                ["x", "w1", "b1"],
                ["c"],
                "conv",
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                strides=[2, 2],
                dilations=[1, 1],
            ),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "w2"], ["g"], "grouped", group=2),
            helper.make_node("GlobalAveragePool", ["g"], ["y"]),
        ],
        {"x": [1, 4, 6, 6]},
        {"w1": _weight(8, 4, 3, 3), "b1": _weight(8), "w2": _weight(8, 4, 1, 1)},
        shape=[1, 8, 1, 1],
    )


def behind() -> onnx.ModelProto:
    """Weights in Constants, behind Transpose, Cast and Identity, one used twice."""
    return _model(
        [
            helper.make_node(
                "Constant", [], ["k"], "K", value=numpy_helper.from_array(_weight(8, 8), "k")
            ),
            helper.make_node("Transpose", ["k"], ["t"], "T", perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["a"], "A"),
            helper.make_node("Cast", ["h"], ["f"], "C", to=TensorProto.FLOAT),
            helper.make_node("Identity", ["f"], ["i"], "I"),
            helper.make_node("MatMul", ["a", "i"], ["b"], "B"),
            helper.make_node("MatMul", ["b", "i"], ["y"], "Y"),
        ],
        {"x": ["n", 8]},
        {"h": _weight(8, 8).astype(np.float16)},
    )


def control() -> onnx.ModelProto:
    """A weight inside a body of If, one captured from outside, one beside it."""

    def body(name: str, node: onnx.NodeProto, weights: Mapping[str, np.ndarray]) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["r", 4])
        tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
        return helper.make_graph([node], name, [], [out], tensors)

    inner = helper.make_node("MatMul", ["a", "wi"], ["p"], "inner")
    captured = helper.make_node("MatMul", ["a", "wo"], ["q"], "captured")
    return _model(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "outer"),
            helper.make_node("ReduceSum", ["a"], ["s"], keepdims=0),
            helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
            helper.make_node(
                "If",
                ["c"],
                ["y"],
                "if",
                then_branch=body("then", inner, {"wi": _weight(8, 4)}),
                else_branch=body("else", captured, {}),
            ),
        ],
        {"x": ["n", 8]},
        {"w": _weight(8, 8), "wo": _weight(8, 4)},
    )


def function() -> onnx.ModelProto:
    """A model-local function, called with a weight."""
    linear = helper.make_function(
        "local",
        "Linear",
        ["a", "w"],
        ["y"],
        [
            helper.make_node("MatMul", ["a", "w"], ["h"], "inside"),
            helper.make_node("Relu", ["h"], ["y"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    return _model(
        [
            helper.make_node("Linear", ["x", "w"], ["a"], "call", domain="local"),
            helper.make_node("MatMul", ["a", "v"], ["y"], "after"),
        ],
        {"x": ["n", 8]},
        {"w": _weight(8, 8), "v": _weight(8, 4)},
        functions=[linear],
    )


def sparse() -> onnx.ModelProto:
    """A sparse initializer and a Constant with a sparse value."""
    values = helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0, 2.0, -3.0, 4.0])
    linear = helper.make_tensor("wi", TensorProto.INT64, [4], [0, 9, 20, 31])
    pairs = helper.make_tensor("ki", TensorProto.INT64, [2, 2], [0, 1, 7, 7])
    constant = helper.make_sparse_tensor(
        helper.make_tensor("k", TensorProto.FLOAT, [2], [1.0, 2.0]), pairs, [8, 8]
    )
    return _model(
        [
            helper.make_node("Constant", [], ["k"], "K", sparse_value=constant),
            helper.make_node("Add", ["x", "x"], ["d"]),
            helper.make_node("MatMul", ["d", "k"], ["h"]),
            helper.make_node("MatMul", ["h", "v"], ["g"]),
            helper.make_node("MatMul", ["g", "w"], ["y"]),
        ],
        {"x": ["n", 8]},
        {"v": _weight(8, 8)},
        sparse_initializer=[helper.make_sparse_tensor(values, linear, [8, 4])],
    )


def old() -> onnx.ModelProto:
    """IR version 3, opset 7: every weight is also a graph input."""
    weights = {"w": _weight(8, 4), "b": _weight(4)}
    return _model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "m"),
            helper.make_node("Add", ["h", "b"], ["y"], "a"),
        ],
        {"x": [2, 8], **{name: array.shape for name, array in weights.items()}},
        weights,
        ir_version=3,
        opset=7,
    )


def exported(name: str) -> Callable[[], onnx.ModelProto]:
    """Return what reads a language model, with its data inside."""

    def load() -> onnx.ModelProto:
        model = onnx.load(exports.LANGUAGE[name])
        for tensor in model.graph.initializer:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        return model

    return load


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "convolution": convolution,
    "behind": behind,
    "control": control,
    "function": function,
    "sparse": sparse,
    "old": old,
    **{name: exported(name) for name in exports.LANGUAGE},
}


def feeds(model: onnx.ModelProto, rows: int = 8) -> Feeds:
    """Return one array for each input without a default; free dimensions get `rows`."""
    stored = {tensor.name for tensor in model.graph.initializer}
    rng = np.random.default_rng(11)
    arrays = exports.language_feed(model, rows)
    if arrays:
        return arrays
    for info in model.graph.input:
        if info.name not in stored:
            dims = info.type.tensor_type.shape.dim
            shape = [dim.dim_value or rows for dim in dims]
            arrays[info.name] = rng.standard_normal(shape).astype(np.float32)
    return arrays
