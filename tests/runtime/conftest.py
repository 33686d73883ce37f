"""Small models made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Build = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="session")
def build() -> Build:
    """Return a function that makes a model from nodes, value infos and initializers.

    `inputs` and `outputs` map a name to (element type, shape).
    """

    def make(
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, tuple[int, Sequence[object] | None]],
        outputs: Mapping[str, tuple[int, Sequence[object] | None]],
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
            [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    return make


@pytest.fixture
def linear(build: Build) -> onnx.ModelProto:
    """`y = x @ w`, with `h = relu(x)` an output as an instrumented model has it."""
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    return build(
        [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 6])},
        {"h": (TensorProto.FLOAT, ["n", 6]), "y": (TensorProto.FLOAT, ["n", 4])},
        {"w": weight},
    )
