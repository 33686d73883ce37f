"""Small models in two versions, dense and 2:4 by magnitude."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

Arrays = dict[str, np.ndarray]


def build(
    nodes: list[onnx.NodeProto],
    weights: Arrays,
    inputs: dict[str, tuple[int, list[object]]],
    outputs: dict[str, tuple[int, list[object]]],
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return ir.from_proto(model)


def two_of_four(weight: np.ndarray) -> np.ndarray:
    """Return which entries magnitude keeps, 2 of 4 along the first axis."""
    groups = np.abs(weight.astype(np.float32)).reshape(-1, 4, weight.shape[1])
    order = np.argsort(np.argsort(-groups, 1, kind="stable"), 1)
    return (order < 2).reshape(weight.shape)


def linear(weight: np.ndarray, dtype: type = np.float32, output: str = "y") -> ir.Model:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return build(
        [helper.make_node("MatMul", ["x", "w"], [output])],
        {"w": weight.astype(dtype)},
        {"x": (kind, ["n", weight.shape[0]])},
        {output: (kind, ["n", weight.shape[1]])},
    )


def encoder(prune: bool, seed: int = 0) -> tuple[ir.Model, Arrays]:
    """Embedding, a mean over valid tokens added to each, a hidden layer with bias, a norm."""
    random = np.random.default_rng(seed)
    weights: Arrays = {
        "table": random.normal(size=(50, 16)),
        "up": random.normal(size=(16, 32)) / 4,
        "bias": random.normal(size=32) / 10,
        "down": random.normal(size=(32, 16)) / 6,
        "scale": np.ones(16),
        "offset": np.zeros(16),
        "step": np.array([0.5]),
    }
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    masks = {name: two_of_four(weights[name]) for name in ("up", "down")}
    if prune:
        for name, mask in masks.items():
            weights[name] = weights[name] * mask
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("MatMul", ["e", "up"], ["u"]),
        helper.make_node("Add", ["u", "bias"], ["b"]),
        helper.make_node("Tanh", ["b"], ["t"]),
        helper.make_node("MatMul", ["t", "down"], ["d"]),
        helper.make_node("Mul", ["d", "step"], ["m"]),
        helper.make_node("Add", ["m", "e"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "scale", "offset"], ["last_hidden_state"]),
    ]
    ids = (TensorProto.INT64, ["n", "length"])
    inputs = {"input_ids": ids, "attention_mask": ids}
    # Nothing reads the mask: the model itself is blind to it, only the loss is not.
    out = {"last_hidden_state": (TensorProto.FLOAT, ["n", "length", 16])}
    return build(nodes, weights, inputs, out), masks


def token_feeds(count: int, seed: int = 0, padding: int = 3, filler: int = 0) -> list[Arrays]:
    random = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        ids = random.integers(1, 50, (4, 10))
        mask = np.ones((4, 10), np.int64)
        if padding:
            ids[:, -padding:], mask[:, -padding:] = filler, 0
        feeds.append({"input_ids": ids, "attention_mask": mask})
    return feeds
