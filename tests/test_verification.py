"""Verification of models that onnx.checker cannot judge."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.errors import CheckError

WEIGHT = np.eye(4, dtype=np.float32)


def model(norm: str, weight: np.ndarray) -> onnx.ModelProto:
    nodes = [
        helper.make_node(norm, ["x", "scale"], ["h"], axis=-1, epsilon=1e-6),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    arrays = {"scale": np.ones(4, np.float32), "w": weight}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_an_operator_of_onnx_runtime_is_noted_and_the_pattern_is_checked() -> None:
    norm = "SimplifiedLayerNormalization"
    data = {"x": np.ones((2, 4), np.float32)}
    good = iobs_onnx.verify(model(norm, WEIGHT), sparsity="2:4", data=data)
    assert good.ok
    assert good.as_dict()["notes"] == [f"onnx.checker was not asked: it does not know {norm}"]
    bad = iobs_onnx.verify(model(norm, WEIGHT + 1), sparsity="2:4")
    assert not bad.ok
    assert bad.sites[0].violations == 4


def test_an_operator_that_nobody_knows_is_refused() -> None:
    with pytest.raises(CheckError, match="No Op registered for SimplifiedNormalization"):
        iobs_onnx.verify(model("SimplifiedNormalization", WEIGHT), sparsity="2:4")
