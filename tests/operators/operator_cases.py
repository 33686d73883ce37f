"""Operators, the forms in which their weights are stored, and patterns: a table that is tested.

`test_operators.py` runs every cell and holds `docs/operators.md` to this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from recurrent_reference import attention, gru, lstm, rnn

from iobs_onnx.passes.ops import UNSUPPORTED

Array = np.ndarray
MS = "com.microsoft"
PATTERNS = ("2:4", "4:8", "0.6")


@dataclass(frozen=True)
class Operator:
    """One operator in one of its shapes.

    Attributes:
        op_type, domain, attributes: the node.
        weight: shape of the weight operand; `index` is its place among the inputs.
        x: shape of the activation.
        reduce: axis of the operand along which hardware groups 2:4.
        channel: axis of the operand along which scales go.
        extra: further inputs, by place.
        forward: from inputs to output, where the output is not linear in the weight.
        runs_as: makes equal nodes of the same inputs, where no CPU kernel is to be had.
    """

    op_type: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    reduce: int
    channel: int
    domain: str = ""
    index: int = 1
    attributes: dict[str, object] = field(default_factory=dict)
    extra: dict[int, tuple[int, ...]] = field(default_factory=dict)
    forward: Callable[..., Array] | None = None
    runs_as: Callable[[list[str]], list[onnx.NodeProto]] | None = None


def node(op_type: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], **attributes)


def matmul(inputs: list[str]) -> list[onnx.NodeProto]:
    return [node("MatMul", inputs, "y")]


def channels_last(inputs: list[str]) -> list[onnx.NodeProto]:
    return [
        node("Transpose", ["x"], "x_first", perm=[0, 3, 1, 2]),
        node("Conv", ["x_first", "w"], "y_first"),
        node("Transpose", ["y_first"], "y", perm=[0, 2, 3, 1]),
    ]


def fused(op_type: str, weight, x, reduce, channel, **rest) -> Operator:
    return Operator(op_type, weight, x, reduce, channel, domain=MS, **rest)


BOTH = {"direction": "bidirectional", "hidden_size": 8}
IDENTITY = {"activation": "LeakyRelu", "activation_alpha": 1.0}

OPERATORS: dict[str, Operator] = {
    "MatMul, weight right": Operator("MatMul", (16, 6), (2, 20, 16), 0, 1),
    "MatMul, weight left": Operator("MatMul", (6, 16), (2, 16, 20), 1, 0, index=0),
    "MatMul, batched weight": Operator("MatMul", (3, 16, 6), (2, 3, 20, 16), 1, 2),
    "MatMul, batched weight left": Operator("MatMul", (3, 6, 16), (3, 16, 20), 2, 1, index=0),
    "MatMul, batched weight, one activation": Operator("MatMul", (3, 16, 6), (20, 16), 1, 2),
    "Gemm": Operator("Gemm", (16, 6), (20, 16), 0, 1, attributes={"alpha": 0.5}),
    "Gemm, transB": Operator("Gemm", (6, 16), (20, 16), 1, 0, attributes={"transB": 1}),
    "Gemm, weight left": Operator(
        "Gemm", (16, 6), (16, 20), 0, 1, index=0, attributes={"transA": 1}
    ),
    "Conv 1-D": Operator("Conv", (6, 8, 3), (2, 8, 20), 1, 0),
    "Conv 2-D": Operator("Conv", (6, 8, 2, 3), (2, 8, 7, 9), 1, 0, attributes={"strides": [2, 1]}),
    "Conv 3-D": Operator("Conv", (4, 8, 2, 1, 2), (1, 8, 4, 5, 6), 1, 0),
    "Conv, groups": Operator("Conv", (6, 8, 3, 1), (2, 16, 9, 5), 1, 0, attributes={"group": 2}),
    "ConvTranspose 1-D": Operator(
        "ConvTranspose", (8, 5, 3), (2, 8, 12), 0, 1, attributes={"strides": [2], "pads": [1, 0]}
    ),
    "ConvTranspose 2-D": Operator(
        "ConvTranspose",
        (8, 5, 2, 3),
        (2, 8, 5, 6),
        0,
        1,
        attributes={"strides": [2, 3], "output_padding": [1, 0], "dilations": [1, 2]},
    ),
    "ConvTranspose, groups": Operator(
        "ConvTranspose", (16, 3, 2, 2), (2, 16, 5, 4), 0, 1, attributes={"group": 2}
    ),
    "Einsum 'bik,kj->bij'": Operator(
        "Einsum", (16, 6), (2, 20, 16), 0, 1, attributes={"equation": "bik,kj->bij"}
    ),
    "Einsum '...k,jk->...j'": Operator(
        "Einsum", (6, 16), (2, 20, 16), 1, 0, attributes={"equation": "...k,jk->...j"}
    ),
    "Einsum 'bthd,hde->bte'": Operator(
        "Einsum", (2, 8, 6), (2, 20, 2, 8), 1, 2, attributes={"equation": "bthd,hde->bte"}
    ),
    "Einsum 'hed,bhtd->bthe'": Operator(
        "Einsum", (3, 6, 16), (2, 3, 20, 16), 2, 1, index=0,
        attributes={"equation": "hed,bhtd->bthe"},
    ),
    "LSTM, W": Operator("LSTM", (2, 32, 16), (9, 3, 16), 2, 1, attributes=BOTH,
        extra={2: (2, 32, 8), 3: (2, 64)}, forward=lstm),
    "LSTM, R": Operator("LSTM", (2, 32, 8), (9, 3, 16), 2, 1, index=2, attributes=BOTH,
        extra={1: (2, 32, 16), 3: (2, 64)}, forward=lstm),
    "GRU, W": Operator("GRU", (2, 24, 16), (9, 3, 16), 2, 1, attributes=BOTH,
        extra={2: (2, 24, 8), 3: (2, 48)}, forward=gru),
    "GRU, R (linear_before_reset)": Operator("GRU", (2, 24, 8), (9, 3, 16), 2, 1, index=2,
        attributes={**BOTH, "linear_before_reset": 1},
        extra={1: (2, 24, 16), 3: (2, 48)}, forward=gru),
    "RNN, W": Operator("RNN", (2, 8, 16), (9, 3, 16), 2, 1, attributes=BOTH,
        extra={2: (2, 8, 8)}, forward=rnn),
    "RNN, R": Operator("RNN", (2, 8, 8), (9, 3, 16), 2, 1, index=2, attributes=BOTH,
        extra={1: (2, 8, 16)}, forward=rnn),
    "FusedMatMul": fused("FusedMatMul", (6, 16), (2, 16, 20), 1, 0,
        attributes={"transA": 1, "transB": 1, "alpha": 0.5}),
    "FusedMatMul, batched weight": fused("FusedMatMul", (16, 3, 6), (20, 3, 16), 0, 2,
        attributes={"transBatchA": 1, "transBatchB": 1}),
    "TransposeMatMul": fused("TransposeMatMul", (6, 16), (2, 20, 16), 1, 0,
        attributes={"transB": 1}),
    "FusedMatMulActivation": fused("FusedMatMulActivation", (16, 6), (2, 20, 16), 0, 1,
        attributes={"activation": "Relu"}, runs_as=matmul),
    "GemmFastGelu": fused("GemmFastGelu", (16, 6), (2, 20, 16), 0, 1, runs_as=matmul),
    "FusedGemm": fused("FusedGemm", (6, 16), (20, 16), 1, 0,
        attributes={"transB": 1, **IDENTITY}),
    "FusedConv": fused("FusedConv", (6, 8, 2, 3), (2, 8, 7, 9), 1, 0,
        attributes={"activation": "LeakyRelu", "activation_params": [1.0]}),
    "NhwcFusedConv": fused("NhwcFusedConv", (6, 8, 2, 3), (2, 7, 9, 8), 1, 0,
        runs_as=channels_last),
    "Attention": fused("Attention", (16, 24), (2, 10, 16), 0, 1, attributes={"num_heads": 1},
        extra={2: (24,)}, forward=attention),
    "PackedAttention": fused("PackedAttention", (16, 24), (20, 16), 0, 1,
        attributes={"num_heads": 1}, runs_as=matmul),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A weight as a model stores it: tensors, and the nodes that make the operand `w` of them."""

    tensors: dict[str, Array]
    nodes: list[onnx.NodeProto] = field(default_factory=list)


def as_constant(operand: Array, operator: Operator) -> Stored:
    return Stored({}, [node("Constant", [], "w", value=numpy_helper.from_array(operand))])


def transposed(operand: Array, operator: Operator) -> Stored:
    return Stored({"w0": operand.T.copy()}, [node("Transpose", ["w0"], "w")])


def cast(operand: Array, operator: Operator) -> Stored:
    return Stored(
        {"w0": operand.astype(np.float16)},
        [node("Identity", ["w0"], "w1"), node("Cast", ["w1"], "w", to=TensorProto.FLOAT)],
    )


def reshaped(operand: Array, operator: Operator) -> Stored:
    shape = np.array(operand.shape)
    return Stored(
        {"w0": operand.reshape((len(operand), -1) if operand.ndim > 2 else -1), "s": shape},
        [node("Reshape", ["w0", "s"], "w")],
    )


def unsqueezed(operand: Array, operator: Operator) -> Stored:
    """The last axis split by Reshape, then a fold, between an Unsqueeze and a Squeeze."""
    return Stored(
        {"w0": operand, "first": np.array([0])},
        [node("Unsqueeze", ["w0", "first"], "w1"), node("Squeeze", ["w1", "first"], "w")],
    )


def dequantized(operand: Array, operator: Operator) -> Stored:
    scale, zero = np.float32(2 / 255), np.uint8(117)
    stored = np.clip(np.rint(operand / scale) + 117, 0, 255).astype(np.uint8)
    return Stored(
        {"w0": stored, "s": np.array(scale), "z": np.array(zero)},
        [node("DequantizeLinear", ["w0", "s", "z"], "w")],
    )


def dequantized_by_channel(operand: Array, operator: Operator) -> Stored:
    axis = operator.channel
    others = tuple(a for a in range(operand.ndim) if a != axis)
    scale = (np.abs(operand).max(others) / 127).astype(np.float32)
    spread = scale.reshape([-1 if a == axis else 1 for a in range(operand.ndim)])
    stored = np.clip(np.rint(operand / spread), -127, 127).astype(np.int8)
    tensors = {"w0": stored, "s": scale, "z": np.zeros(scale.shape, np.int8)}
    return Stored(tensors, [node("DequantizeLinear", ["w0", "s", "z"], "w", axis=axis)])


def cast_and_scaled(operand: Array, operator: Operator) -> Stored:
    axis = operator.channel
    scale = np.abs(operand).max(tuple(a for a in range(operand.ndim) if a != axis), keepdims=True)
    scale = (scale / 127).astype(np.float32)
    stored = np.clip(np.rint(operand / scale), -127, 127).astype(np.int8)
    return Stored(
        {"w0": stored, "s": scale},
        [node("Cast", ["w0"], "w1", to=TensorProto.FLOAT), node("Mul", ["w1", "s"], "w")],
    )


def quantized_and_back(operand: Array, operator: Operator) -> Stored:
    tensors = {"w0": operand, "s": np.array(np.float32(2 / 255)), "z": np.array(np.int8(0))}
    grid = ["s", "z"]
    nodes = [
        node("QuantizeLinear", ["w0", *grid], "w1"),
        node("DequantizeLinear", ["w1", *grid], "w"),
    ]
    return Stored(tensors, nodes)


FORMS: dict[str, Callable[[Array, Operator], Stored]] = {
    "initializer": lambda operand, operator: Stored({"w": operand}),
    "Constant": as_constant,
    "Transpose": transposed,
    "Identity, Cast": cast,
    "Reshape": reshaped,
    "Unsqueeze, Squeeze": unsqueezed,
    "DequantizeLinear": dequantized,
    "by channel": dequantized_by_channel,
    "Cast, Mul": cast_and_scaled,
    "Quantize, Dequantize": quantized_and_back,
}


def weight_of(operator: Operator, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, operator.weight).astype(np.float32)


def feed_of(operator: Operator) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    # Inputs that depend on each other, so that pruning by a Hessian differs from magnitude.
    x = rng.standard_normal(operator.x) + rng.standard_normal(
        operator.x[:1] + (1,) * (len(operator.x) - 1)
    )
    return {"x": x.astype(np.float32)}


def extras_of(operator: Operator) -> dict[int, Array]:
    rng = np.random.default_rng(2)
    return {i: rng.uniform(-1, 1, s).astype(np.float32) for i, s in operator.extra.items()}


def model_of(operator: Operator, stored: Stored, *, runnable: bool = False) -> onnx.ModelProto:
    """A model of the one node; `runnable` puts an equal node where there is no CPU kernel."""
    extras = {f"e{place}": array for place, array in extras_of(operator).items()}
    inputs = {operator.index: "w", **{int(name[1:]): name for name in extras}}
    inputs[next(place for place in range(3) if place not in inputs)] = "x"
    ordered = [inputs.get(place, "") for place in range(max(inputs) + 1)]
    names = {"name": "N", "domain": operator.domain}
    main = [helper.make_node(operator.op_type, ordered, ["y"], **names, **operator.attributes)]
    if runnable and operator.runs_as:
        main = operator.runs_as(ordered)
    graph = helper.make_graph(
        [*stored.nodes, *main],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, operator.x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in {**stored.tensors, **extras}.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def table() -> str:
    """The table of `docs/operators.md`."""
    lines = [["operator", *FORMS], ["---", *[":-:"] * len(FORMS)]]
    lines += [[name, *["✓"] * len(FORMS)] for name in OPERATORS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def declined_table() -> str:
    """The operators that are declined, of `docs/operators.md`."""
    lines = ["| operator | reason: it |", "|---|---|"]
    for (domain, op_type), known in UNSUPPORTED.items():
        name = f"{op_type} ({domain})" if domain else op_type
        lines.append(f"| {name} | {known.reason} |")
    return "\n".join(lines)
