"""Bounds on the change of values: each rule against what models really do, and what has no rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.passes import bound_changes, find_sites
from iobs_onnx.passes.checks.changes import (
    RULES,
    convolution_norm,
    spectral_norm,
    window_overlap,
)
from iobs_onnx.runtime import value_shapes

RNG = np.random.default_rng(0)
SHAPE = [6, 4, 4, 4]
WIDTH = 64


def model_of(
    nodes: Sequence[onnx.NodeProto],
    tensors: Mapping[str, Any] = {},
    weight: np.ndarray | None = None,
    outputs: Iterable[str] = ("y",),
    *,
    opset: int = 20,
) -> onnx.ModelProto:
    """`h = x w` is pruned, `v` is `h` as `(6, 4, 4, 4)`, and `nodes` make `y` of it."""
    weight = RNG.normal(size=(WIDTH, WIDTH)) if weight is None else weight
    stored = {"w": weight.astype(np.float32), "space": np.array(SHAPE, np.int64), **tensors}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("Reshape", ["h", "space"], ["v"]),
            *nodes,
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [SHAPE[0], WIDTH])],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def found(model: onnx.ModelProto, own: float = 1.0) -> dict[str, Any]:
    loaded = ir.from_proto(model)
    # Of the plain model: a weight that is read otherwise, too, is no site.
    plain = ir.from_proto(model_of(node("Relu")))
    sites = [
        s for s in (*find_sites(loaded).sites, *find_sites(plain).sites) if s.initializer == "w"
    ]
    sites = sites[:1]
    return bound_changes(loaded, dict.fromkeys(sites, own), value_shapes(loaded))


def node(op_type: str, *more: str, **attributes: Any) -> list[onnx.NodeProto]:
    return [helper.make_node(op_type, ["v", *more], ["y"], "op", **attributes)]


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


ints = np.array
RELU = helper.make_node("Relu", ["v"], ["r"])
# Every rule, in each form that it tells apart: nodes and stored tensors.
CASES: list[tuple[list[onnx.NodeProto], dict[str, Any]]] = [
    *(
        (node(name), {})
        for name in (
            *("Abs", "Atan", "Cos", "Elu", "Erf", "Flatten", "Gelu", "GlobalAveragePool"),
            *("GlobalMaxPool", "HardSwish", "Identity", "LeakyRelu", "Neg", "Relu", "Sigmoid"),
            *("Sin", "Softmax", "Softplus", "Softsign", "Tanh", "Transpose", "ReduceMax"),
            *("ReduceMean", "ReduceMin"),
        )
    ),
    (node("Elu", alpha=3.0), {}),
    (node("LeakyRelu", alpha=-1.5), {}),
    (node("Clip", "low"), {"low": np.float32(-0.5)}),
    (node("ReduceMean", "axes"), {"axes": ints([1])}),
    (node("Reshape", "to"), {"to": ints([6, -1])}),
    (node("Slice", "from", "to"), {"from": ints([1]), "to": ints([5])}),
    (node("Unsqueeze", "axes"), {"axes": ints([0])}),
    (node("Pad", "pads"), {"pads": ints([0, 0, 1, 1, 0, 0, 2, 0])}),
    (node("DepthToSpace", blocksize=2), {}),
    (node("SpaceToDepth", blocksize=2), {}),
    (node("Dropout"), {}),
    (node("Cast", to=TensorProto.DOUBLE), {}),
    ([helper.make_node("Split", ["v"], ["y", "z"], axis=1, num_outputs=2)], {}),
    (
        [
            helper.make_node("Unsqueeze", ["v", "axes"], ["u"]),
            helper.make_node("Squeeze", ["u", "axes"], ["y"]),
        ],
        {"axes": ints([2])},
    ),
    *(([helper.make_node(name, ["v", "v"], ["y"])], {}) for name in ("Add", "Max", "Min")),
    *(([RELU, helper.make_node(name, ["v", "r"], ["y"])], {}) for name in ("Sub", "Max")),
    ([RELU, helper.make_node("Sum", ["v", "r", "v"], ["y"])], {}),
    ([RELU, helper.make_node("Concat", ["v", "r"], ["y"], axis=1)], {}),
    (node("Add", "b"), {"b": numbers(4, 1, 1)}),
    (node("Mul", "b"), {"b": numbers(4, 1, 1)}),
    ([helper.make_node("Mul", ["b", "v"], ["y"])], {"b": np.float32(-3)}),
    (node("Div", "b"), {"b": numbers(1, 4, 1, 1)}),
    (
        node("BatchNormalization", "g", "b", "m", "s"),
        {"g": numbers(4), "b": numbers(4), "m": numbers(4), "s": numbers(4) ** 2},
    ),
    (node("MatMul", "k"), {"k": numbers(4, 9)}),
    (node("Conv", "k", pads=[1, 1, 1, 1]), {"k": numbers(5, 4, 3, 3)}),
    (node("Conv", "k", strides=[2, 2], group=2), {"k": numbers(6, 2, 3, 3)}),
    (
        [
            helper.make_node("Gemm", ["h", "k", "c"], ["y"], transB=1, alpha=-2.0, beta=3.0),
        ],
        {"k": numbers(5, WIDTH), "c": numbers(5)},
    ),
    (node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), {}),
    (node("AveragePool", kernel_shape=[2, 2], strides=[2, 2]), {}),
    (node("AveragePool", kernel_shape=[3, 3], pads=[2, 2, 2, 2]), {}),
    (node("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1), {}),
    (
        [
            helper.make_node("Shape", ["v"], ["n"]),
            helper.make_node("Size", ["v"], ["e"]),
            helper.make_node("Cast", ["e"], ["f"], to=TensorProto.INT64),
            helper.make_node("Reshape", ["r", "n"], ["y"]),
        ],
        {"r": numbers(6 * 64)},
    ),
]


def test_every_rule_has_a_case() -> None:
    assert {(n.domain, n.op_type) for nodes, _ in CASES for n in nodes} == RULES.keys()


@pytest.mark.parametrize(
    ("nodes", "tensors"),
    CASES,
    ids=[f"{i}-{nodes[-1].op_type}" for i, (nodes, _) in enumerate(CASES)],
)
def test_values_change_by_no_more_than_their_bound(
    nodes: list[onnx.NodeProto], tensors: dict[str, Any]
) -> None:
    x = numbers(SHAPE[0], WIDTH)
    dense = numbers(WIDTH, WIDTH) / 4
    model = model_of(nodes, tensors, dense)
    if nodes[-1].op_type == "Cast":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    y = run(model, x)
    # Changes of many sizes, spread out and within one column, so that slopes and windows are met.
    for size, columns in itertools.product((0.01, 1.0, 30.0), (1, 3, WIDTH)):
        change = np.zeros_like(dense)
        change[:, RNG.choice(WIDTH, columns, replace=False)] = size * numbers(WIDTH, columns)
        pruned = model_of(nodes, tensors, dense + change)
        pruned.graph.output[0].CopyFrom(model.graph.output[0])
        own = float(np.linalg.norm(x.astype(np.float64) @ change))
        bound = found(pruned, own)["y"]
        assert isinstance(bound, float), bound
        assert np.linalg.norm(y - run(pruned, x)) <= bound * (1 + 1e-5) + 1e-5


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0].astype(np.float64)


@pytest.mark.parametrize("seed", range(24))
def test_the_norm_of_a_convolution_is_not_above_its_bound(seed: int) -> None:
    """The matrix of the convolution is written out, on an input of a few elements."""
    rng = np.random.default_rng(seed)
    space = int(rng.integers(1, 3))
    groups, out, channels = (int(n) for n in rng.integers(1, 4, size=3))
    kernel, strides, dilations, pads = (
        tuple(int(n) for n in rng.integers(low, high, size=space))
        for low, high in ((1, 5), (1, 4), (1, 3), (0, 4))
    )
    weight = rng.normal(size=(groups, out, channels, *kernel))
    if seed % 2:  # one sign: a constant input is the worst, and the bounds are nearly met
        weight = np.abs(weight)
    size = (groups * channels, *(d * (k - 1) + 7 for k, d in zip(kernel, dilations, strict=True)))
    inputs = torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, *size)
    convolve = torch.nn.functional.conv1d if space == 1 else torch.nn.functional.conv2d
    flat = torch.from_numpy(weight.reshape(-1, *weight.shape[2:]))
    rows = convolve(
        inputs, flat, stride=strides, padding=pads, dilation=dilations, groups=groups
    ).flatten(1)
    true = float(torch.linalg.matrix_norm(rows, 2))
    bound = convolution_norm(weight, strides, dilations)
    assert true <= bound * (1 + 1e-9)
    assert bound <= 2.5 * true
    # How many windows each element of a long input lies in, counted by a gradient.
    ones = torch.zeros(1, 1, *(length + 40 for length in size[1:]), dtype=torch.float64)
    ones.requires_grad_(True)
    convolve(
        ones, torch.ones(1, 1, *kernel, dtype=torch.float64), stride=strides, dilation=dilations
    ).sum().backward()
    assert ones.grad is not None
    assert int(ones.grad.max()) == window_overlap(kernel, strides, dilations)


def test_spectral_norm_of_either_shape() -> None:
    for shape in ((3, 50), (50, 3), (1, 1), (7, 7)):
        matrix = RNG.normal(size=shape)
        assert spectral_norm(matrix) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-9)
    wide = np.eye(1300)  # as large as this the Frobenius norm has to do
    assert spectral_norm(wide) == pytest.approx(math.sqrt(1300))


NO_BOUND: list[tuple[list[onnx.NodeProto], dict[str, Any], str]] = [
    (
        node("LayerNormalization", "g", axis=-1),
        {"g": numbers(4)},
        "LayerNormalization 'op': there is no rule for this operator",
    ),
    ([RELU, helper.make_node("Mul", ["v", "r"], ["y"], "op")], {}, "Mul 'op': input 1 changes"),
    ([helper.make_node("Div", ["b", "v"], ["y"], "op")], {"b": np.float32(1)}, "input 1 changes"),
    (node("Div", "b"), {"b": np.zeros(4, np.float32)}, "divides by zero"),
    (node("Add", "b"), {"b": numbers(3, 1, 1, 1, 1)}, "shape [6, 4, 4, 4] may be broadcast"),
    (node("Cast", to=TensorProto.FLOAT16), {}, "rounds 'y' to FLOAT16"),
    (
        node("Pad", "pads", mode="reflect"),
        {"pads": ints([0, 0, 1, 1, 0, 0, 1, 1])},
        "mode reflect copies elements",
    ),
    (node("MatMul", "k"), {"k": numbers(6, 4, 4, 4)}, "its weight has 4 axes"),
    ([helper.make_node("MatMul", ["k", "v"], ["y"], "op")], {"k": numbers(4, 4)}, "input 1"),
    ([helper.make_node("Mul", ["v", "w"], ["y"], "op")], {}, "'w', a pruned weight"),
    (
        [helper.make_node("Identity", ["w"], ["u"]), helper.make_node("Add", ["u", "h"], ["y"])],
        {},
        "Identity 'u': it reads 'w', a pruned weight",
    ),
    (
        [
            helper.make_node("Relu", ["v"], ["u"]),
            helper.make_node("RandomNormalLike", ["x"], ["y"]),
        ],
        {},
        "RandomNormalLike 'y' draws random numbers",
    ),
    (
        node("Dropout", "r", "t"),
        {"r": np.float32(0.5), "t": np.array(True)},
        "draws random numbers",
    ),
    (
        [
            helper.make_node("MaxPool", ["v"], ["p", "i"], "op", kernel_shape=[2, 2]),
            helper.make_node("Identity", ["i"], ["y"]),
        ],
        {},
        "its second output, places, is read",
    ),
    (
        [helper.make_node("Conv", ["v", "k"], ["u"], "op"), helper.make_node("Relu", ["u"], ["y"])],
        {"k": None},
        "Conv 'op': input 1 is not a stored tensor",
    ),
]


@pytest.mark.parametrize(("nodes", "tensors", "reason"), NO_BOUND)
def test_there_is_no_bound_without_a_rule_and_the_reason_names_the_node(
    nodes: list[onnx.NodeProto], tensors: dict[str, Any], reason: str
) -> None:
    stored = {name: array for name, array in tensors.items() if array is not None}
    model = model_of(nodes, stored)
    if "k" in tensors and tensors["k"] is None:
        model.graph.input.append(
            helper.make_tensor_value_info("k", TensorProto.FLOAT, [3, 4, 1, 1])
        )
    change = found(model)["y"]
    assert isinstance(change, str)
    assert reason in change


def test_what_no_pruned_weight_reaches_does_not_change() -> None:
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g"], ["y"], axis=-1),  # no rule is needed
        helper.make_node("Softplus", ["h"], ["z"]),
    ]
    changes = found(model_of(nodes, {"g": numbers(WIDTH)}, outputs=("y", "z")), own=3.0)
    assert (changes["y"], changes["h"], changes["z"]) == (0.0, 3.0, 3.0)


def test_lengths_that_may_be_one_are_no_copies_only_where_they_are_told_apart() -> None:
    """A batch of unknown length may be 1, and be repeated along another unknown length."""

    def change(own: list[Any], other: list[Any]) -> Any:
        graph = helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "w"], ["h"]),
                helper.make_node("Add", ["h", "o"], ["y"]),
            ],
            "toy",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, own),
                helper.make_tensor_value_info("o", TensorProto.FLOAT, other),
            ],
            [helper.make_empty_tensor_value_info("y")],
            [numpy_helper.from_array(numbers(8, 8), "w")],
        )
        loaded = ir.from_proto(helper.make_model(graph))
        shapes = {"h": [*own[:-1], 8], "o": other}
        return bound_changes(loaded, {find_sites(loaded).sites[0]: 1.0}, shapes)["y"]

    assert change(["n", 8], ["n", 8]) == change(["n", 8], [1, 8]) == change(["n", 8], [8]) == 1.0
    assert change([4, 8], ["n", 8]) == 1.0  # n is 1 or 4
    for own, other in ((["n", 8], ["m", 8]), (["n", 8], [4, 8]), ([1, 8], ["n", 8])):
        assert "may be broadcast" in change(own, other)
    assert "may be broadcast" in change(["n", 8], ["t", "n", 8])


def test_sites_that_several_nodes_multiply_by_or_that_round_have_no_bound() -> None:
    twice = [helper.make_node("MatMul", ["h", "w"], ["y"])]
    assert found(model_of(twice))["y"] == "several nodes multiply by 'w'"
    turned = [helper.make_node("Gemm", ["h", "k"], ["y"], "op", transA=1)]
    model = ir.from_proto(model_of(turned, {"k": numbers(6, 8)}))
    sites = dict.fromkeys(find_sites(model).sites, 1.0)
    assert "Gemm 'op': it multiplies by 'k' in a way" in bound_changes(model, sites, {})["y"]
