"""What engines can do with a weight, the command that tries it, and what is warned of."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.passes import (
    deployment_warnings,
    engines_2_4,
    find_sites,
    is_2_4,
    load_model,
    trtexec_command,
)
from iobs_onnx.sparsity import parse_sparsity


def site_of(make, shape, dtype=np.float32, **conv):
    weight = np.ones(shape, dtype)
    op = "Conv" if len(shape) > 2 else "MatMul"
    nodes = [helper.make_node(op, ["x", "w"], ["y"], **conv)]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = make(nodes, {"x": ["n", shape[0]]}, {"w": weight}, ["y"], dtype=kind)
    return find_sites(load_model(model)).sites[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "tensorrt", "cusparselt"),
    [
        ((384, 1536), np.float32, (True, True, "likely"), (True, "multiples of 16")),
        ((384, 1536), np.float64, (False, False, "float64"), (False, "float64")),
        ((384, 200), np.float16, (True, False, "seldom"), (False, "wants multiples of 16")),
        ((512, 384, 3, 3), np.float32, (True, True, "likely"), (False, "unfolded")),
        ((512, 384, 1, 1), np.float32, (True, True, "likely"), (True, "multiples of 16")),
        ((512, 30, 1, 1), np.float32, (False, False, "not a multiple of 4"), (False, "wants")),
    ],
)
def test_engines(make, shape, dtype, tensorrt, cusparselt):
    first, second = engines_2_4(site_of(make, shape, dtype))
    assert (first.name, second.name) == ("TensorRT", "cuSPARSELt")
    assert (first.eligible, first.likely) == tensorrt[:2]
    assert re.search(tensorrt[2], first.rule)
    assert second.eligible is second.likely is cusparselt[0]
    assert re.search(cusparselt[1], second.rule)


@pytest.mark.parametrize(
    ("dtype", "zero", "eligible"), [(np.int8, 0, True), (np.int8, 3, False), (np.uint8, 0, False)]
)
def test_engines_take_symmetric_int8(make, dtype, zero, eligible):
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    stored = {"w": np.ones((512, 512), dtype), "s": np.float32(0.1), "z": dtype(zero)}
    stored = {name: np.asarray(array) for name, array in stored.items()}
    [site] = find_sites(load_model(make(nodes, {"x": ["n", 512]}, stored, ["y"]))).sites
    for engine in engines_2_4(site):
        assert engine.eligible is eligible
        assert eligible or "INT8 with zero point 0" in engine.rule


@pytest.mark.parametrize(
    ("pattern", "holds"),
    [("2:4", True), ("1:4", True), ("1:2", True), ("4:8", False), ("3:4", False), ("0.9", False)],
)
def test_what_holds_2_4(pattern, holds):
    assert is_2_4(parse_sparsity(pattern)) is holds


@pytest.fixture
def model():
    """Inputs of which one is static, one names its axes, and one has a default."""
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    inputs = [
        helper.make_tensor_value_info("x y", TensorProto.FLOAT, ["batch", "time", 8]),
        helper.make_tensor_value_info("s", TensorProto.FLOAT, [1, 8]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 8]),
    ]
    nodes = [helper.make_node("MatMul", ["x y", "w"], ["y"])]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "time", 8])
    graph = helper.make_graph(nodes, "g", inputs, [out], [weight])
    return load_model(helper.make_model(graph, ir_version=8))


def test_the_command_has_shapes_of_dynamic_inputs(model):
    sites = find_sites(model).sites
    plain = trtexec_command(model, "dir/m.onnx", sites)
    assert plain == (
        "trtexec --onnx=dir/m.onnx --saveEngine=dir/m.engine --sparsity=enable --fp16 "
        "'--minShapes=x y:1x1x8' '--optShapes=x y:8x128x8' '--maxShapes=x y:32x512x8'"
    )
    seen = {"x y": [(4, 9, 8), (4, 20, 8), (2, 20, 8)]}
    command = trtexec_command(model, "m.onnx", sites, seen)
    shapes = "'--minShapes=x y:1x9x8' '--optShapes=x y:4x20x8' '--maxShapes=x y:4x20x8'"
    assert command.endswith(shapes)


def test_an_axis_of_minus_one_is_dynamic(model):
    model.graph.inputs[0].shape = ir.Shape([-1, 5, 8])
    command = trtexec_command(model, "m.onnx", (), {"x y": [(4, 5, 8)]})
    shapes = "'--minShapes=x y:1x5x8' '--optShapes=x y:4x5x8' '--maxShapes=x y:4x5x8'"
    assert command.endswith(shapes)


def test_the_command_has_the_precision_of_the_weights(make):
    half = site_of(make, (8, 8), np.float16)
    plain = load_model(make([], {"x": [1, 8]}, {}, ["x"]))
    assert trtexec_command(plain, "m.onnx", [half]).endswith("--sparsity=enable --fp16")


def test_warnings(make):
    large, small = site_of(make, (512, 512)), site_of(make, (64, 64))
    cpu, gpu = ["CPUExecutionProvider"], ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    pattern = parse_sparsity("2:4")

    def warned(*arguments):
        return " | ".join(deployment_warnings(*arguments))

    assert warned([large], [pattern], cpu).startswith("no runtime installed here uses")
    assert warned([large], [pattern], gpu) == (
        "ONNX Runtime's TensorRT provider uses 2:4 with trt_sparsity_enable=1"
    )
    assert "likely keep its dense kernels" in warned([small], [pattern], cpu)
    assert "no pruned weight is eligible" in warned([site_of(make, (6, 64))], [pattern], cpu)
    loose = warned([large], [parse_sparsity("0.7"), parse_sparsity("4:8")], gpu)
    assert loose.startswith("0.7, 4:8: no engine has kernels")
    assert "trt_sparsity_enable" not in loose
    assert "--emit dense" in warned([large], [pattern], gpu, "sparse-initializer")
