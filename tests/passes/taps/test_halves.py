"""A copy that computes in float32 what the model computes in float16 or bfloat16."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.passes import find_sites, load_model, partition, widen


@pytest.fixture
def halves() -> onnx.ModelProto:
    """Halves as input, initializer, attribute, Cast, sequence and in both branches of an If."""
    half, draw = TensorProto.FLOAT16, np.random.default_rng(0)
    tensors = {name: draw.normal(size=(8, 8)).astype(np.float16) for name in ("w", "v", "inner")}

    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, half, [f"rows of {name}", 8])

    def branch(name: str, node: onnx.NodeProto, *held: onnx.TensorProto) -> onnx.GraphProto:
        return helper.make_graph([node], name, [], [info(node.output[0])], held)

    node = helper.make_node
    inner = numpy_helper.from_array(tensors["inner"], "inner")
    nodes = [
        node("Constant", [], ["v"], value=numpy_helper.from_array(tensors["v"], "v")),
        node("MatMul", ["x", "w"], ["a"]),
        node("SequenceConstruct", ["a", "a"], ["pair"]),
        node("ConcatFromSequence", ["pair"], ["b"], axis=0),
        node("Cast", ["b"], ["single"], to=TensorProto.FLOAT),
        node("Cast", ["single"], ["c"], to=half),
        node("ReduceMax", ["c"], ["top"], keepdims=0),
        node("Cast", ["top"], ["flag"], to=TensorProto.BOOL),
        node(
            "If",
            ["flag"],
            ["d"],
            then_branch=branch("then", node("MatMul", ["c", "inner"], ["e"]), inner),
            else_branch=branch("else", node("Identity", ["c"], ["f"])),
        ),
        node("MatMul", ["d", "v"], ["y"]),
    ]
    stored = [numpy_helper.from_array(tensors["w"], "w")]
    graph = helper.make_graph(nodes, "halves", [info("x")], [info("y")], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def test_a_widened_copy_computes_the_same_and_leaves_the_model(halves: onnx.ModelProto) -> None:
    model = load_model(halves)
    before = ir.to_proto(model).SerializeToString()
    copy = model.clone()
    assert widen(copy) == ["float16"]
    assert ir.to_proto(model).SerializeToString() == before
    assert widen(copy) == []
    wide = ir.to_proto(copy)
    onnx.checker.check_model(wide, full_check=True)
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float16)
    found, expected = run(wide, x.astype(np.float32)), run(halves, x).astype(np.float32)
    assert found.dtype == np.float32
    # A product of three matrices, each rounded to one part in 2048.
    assert np.linalg.norm(found - expected) <= 4 * 3**0.5 * 2.0**-11 * np.linalg.norm(expected)


def test_the_budget_counts_halves_as_they_are_run(make) -> None:
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(2)]
    for dtype, size in ((np.float16, 2), (np.float32, 4)):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        weights = {f"w{i}": np.ones((8, 8), dtype) for i in range(2)}
        model = load_model(make(nodes, {"x0": ["n", 8]}, weights, ["x2"], kind))
        sites = find_sites(model).sites
        both = 2 * (4 * 64 + 8 * 4 * 64)  # two weights in float32, and the solver's matrices
        assert len(partition(model, sites, budget=both)) == 1
        assert len(partition(model, sites, budget=both - 1)) == 2
        (whole,) = partition(model, sites)
        assert whole.weight_bytes == 2 * size * 64  # as they are stored
