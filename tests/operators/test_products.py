"""What handlers say of plain products, against what ONNX's reference computes.

Channels that are read are put in another order together with the weight's axis that reads them:
nothing may change. The weight's axis that makes channels, and the bias, are put in another order:
the output's channels must follow. To 1e-5 of the largest output: sums are reordered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from iobs_onnx.passes import load_model
from iobs_onnx.passes.ops import OP_HANDLERS, Product, product_of

Array = NDArray[np.float32]

# Operator, attributes, shapes of the activation, the weight and the bias.
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[int, ...]]]] = {
    "MatMul": ("MatMul", {}, [(3, 5, 8), (8, 6)]),
    "Gemm": ("Gemm", {}, [(5, 8), (8, 6), (6,)]),
    "Gemm transB": ("Gemm", {"transB": 1}, [(5, 8), (6, 8), (6,)]),
    "Gemm scaled": ("Gemm", {"alpha": 0.5, "beta": 2.0}, [(5, 8), (8, 6), (6,)]),
    "Conv 1-D": ("Conv", {"kernel_shape": [3]}, [(2, 8, 7), (6, 8, 3), (6,)]),
    "Conv 2-D": ("Conv", {"kernel_shape": [3, 2]}, [(2, 8, 7, 6), (6, 8, 3, 2), (6,)]),
    "Conv 3-D": ("Conv", {"kernel_shape": [2] * 3}, [(1, 4, 5, 4, 3), (6, 4, 2, 2, 2)]),
    "depthwise": ("Conv", {"kernel_shape": [3], "group": 8}, [(2, 8, 7), (8, 1, 3), (8,)]),
}


def node_of(case: str) -> tuple[list[Array], Product, ReferenceEvaluator]:
    op_type, attributes, shapes = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    names = ["x", "w", "b"][: len(arrays)]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, 1, array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    [found] = load_model(proto).graph
    product = product_of(found, arrays[1].ndim)
    assert product is not None
    return arrays, product, ReferenceEvaluator(proto)


def run(judge: ReferenceEvaluator, arrays: list[Array]) -> Array:
    return judge.run(None, dict(zip(("x", "w", "b"), arrays, strict=False)))[0]


def test_every_product_has_a_case() -> None:
    known = {op_type for (domain, op_type), handler in OP_HANDLERS.items() if handler.product}
    assert known == {op_type for op_type, _, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_channels_follow_the_axes_that_are_named(case: str) -> None:
    arrays, product, judge = node_of(case)
    before = run(judge, arrays)
    rng = np.random.default_rng(1)
    x, w, *bias = arrays
    assert w.ndim == product.rank
    made = rng.permutation(w.shape[product.made])
    read = made if product.apart else rng.permutation(w.shape[product.read])
    x = np.take(x, read, product.channels)
    if not product.apart:
        w = np.take(w, read, product.read)
    w = np.take(w, made, product.made)
    if bias:
        assert product.bias == 2
        bias = [bias[0][made]]
    after = run(judge, [x, w, *bias])
    wanted = np.take(before, made, product.channels)
    np.testing.assert_allclose(after, wanted, atol=1e-5 * np.abs(before).max())
    assert not np.allclose(before, wanted)


def test_what_keeps_a_product_from_being_plain() -> None:
    assert node_of("Gemm scaled")[1].scaled
    assert not node_of("Gemm")[1].scaled
    assert node_of("depthwise")[1].apart
    assert node_of("depthwise")[1].groups == 8
    assert not node_of("Conv 2-D")[1].apart
