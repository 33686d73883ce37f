"""Operators that ONNX Runtime does not know are kept; what depends on them is not run."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.errors import ModelError
from iobs_onnx.passes import outputs_out_of_reach, stored_slots

X = np.random.default_rng(1).standard_normal((4, 16, 8)).astype(np.float32)
FEEDS = [{"x": x} for x in X]
WHY = "behind mine::Thing, an operator that ONNX Runtime does not know"


def thing(name: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Thing", [name], [output], f"thing {output}", domain="mine")


def product(name: str, weight: str, output: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [name, weight], [output])


def model(nodes: list[onnx.NodeProto], outputs: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    read = {name for node in nodes for name in node.input}
    weights = [
        numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), name)
        for name in "wv"
        if name in read
    ]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in names]
        for names in ("x", outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


def test_what_comes_after_need_not_run():
    plain = iobs_onnx.prune(model([product("x", "w", "h")], "h"), calibration=FEEDS, sparsity="2:4")
    proto = model([product("x", "w", "h"), thing("h", "y")], "hy")
    result = iobs_onnx.prune(proto, calibration=FEEDS, sparsity="2:4")
    weights = [stored_slots(r.model)["w"].tensor.numpy() for r in (plain, result)]
    np.testing.assert_array_equal(*weights)
    assert [output.name for output in result.report.verification] == ["h"]
    note = "output 'y' was not compared: ONNX Runtime does not know mine::Thing"
    assert note in result.report.deployment["warnings"]


def test_no_output_can_be_compared():
    proto = model([product("x", "w", "h"), thing("h", "y")], "y")
    result = iobs_onnx.prune(proto, calibration=FEEDS, sparsity="2:4")
    assert len(result.report.sites) == 1
    assert result.report.verification == []


def test_what_comes_before_is_needed():
    proto = model([product("x", "w", "h"), thing("h", "t"), product("t", "v", "y")], "y")
    result = iobs_onnx.prune(proto, calibration=FEEDS, sparsity="2:4")
    assert [site.initializer for site in result.report.sites] == ["w"]
    [declined] = result.report.declined
    assert (declined["initializer"], declined["reason"]) == ("v", WHY)
    with pytest.raises(ModelError, match=WHY):
        iobs_onnx.prune(
            model([thing("x", "t"), product("t", "v", "y")], "y"),
            calibration=FEEDS,
            sparsity="2:4",
        )


def test_in_bodies_and_functions():
    out = [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)]
    body = helper.make_graph([thing("x", "s"), product("s", "w", "o")], "body", [], out)
    flag = helper.make_node("Constant", [], ["c"], value_ints=[1])
    cast = helper.make_node("Cast", ["c"], ["d"], to=TensorProto.BOOL)
    branch = helper.make_node("If", ["d"], ["y"], then_branch=body, else_branch=body)
    proto = model([flag, cast, branch, product("y", "w", "z")], "z")
    found = iobs_onnx.inspect(proto)
    assert [item.reason for item in found.declined] == [
        f"shared, and at MatMul 'o': {WHY}",
    ]
    proto = model([helper.make_node("Outer", ["x"], ["y"], domain="local")], "y")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    function = helper.make_function("local", "Outer", ["a"], ["b"], [thing("a", "b")], opsets)
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    assert outputs_out_of_reach(iobs_onnx.passes.load_model(proto)) == {"y": "mine::Thing"}
