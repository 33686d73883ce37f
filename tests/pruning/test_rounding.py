"""Sparsity and int8 together: the integers, what reads them, and what it cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.errors import CheckError, ModelError, OptionError
from iobs_onnx.passes import Codes, channel_axis, find_sites, store_as_integers


def network(opset: int = 17, dtype: type = np.float32) -> onnx.ModelProto:
    """MatMul, Gemm (transB) and a grouped Conv; the Conv's weight is a Constant."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.normal(size=(16, 16)),
        "g": rng.normal(size=(16, 16)),
        "k": rng.normal(size=(8, 8, 3)),
    }
    weights = {name: a.astype(dtype) for name, a in arrays.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="up"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Gemm", ["r", "g"], ["b"], name="down", transB=1),
        helper.make_node("Reshape", ["b", "shape"], ["c"]),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(weights.pop("k"))),
        helper.make_node("Conv", ["c", "k"], ["y"], name="conv", group=1, pads=[1, 1]),
    ]
    shape = numpy_helper.from_array(np.array([-1, 8, 2]), "shape")
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", kind, ["n", 16])],
        [helper.make_tensor_value_info("y", kind, ["n", 8, 2])],
        [shape, *(numpy_helper.from_array(array, name) for name, array in weights.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def feeds(dtype: type = np.float32) -> dict[str, np.ndarray]:
    mix = np.random.default_rng(1).normal(size=(16, 16))
    return {"x": (np.random.default_rng(2).normal(size=(400, 16)) @ mix).astype(dtype)}


def prune(model: onnx.ModelProto, dtype: type = np.float32, **options):
    return iobs_onnx.prune(
        model, calibration=feeds(dtype), sparsity="2:4", quantize="int8", **options
    )


def test_the_integers_are_2_4_and_the_model_reads_them(tmp_path: Path) -> None:
    result = prune(network(), output=tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(model, full_check=True)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {name for name, array in stored.items() if array.dtype == np.int8} == {
        *("w_quantized", "g_quantized", "k_quantized")
    }
    # Along the axis of reduction at most two of four integers are not zero.
    for name, axis in (("w", 0), ("g", 1), ("k", 1)):
        codes = np.moveaxis(stored[f"{name}_quantized"], axis, -1)
        assert (np.count_nonzero(codes.reshape(-1, 4), axis=1) <= 2).all()
        assert np.abs(codes).max() == 127
    scales = {name: array.shape for name, array in stored.items() if name.endswith("_scale")}
    assert scales == {"w_scale": (16,), "g_scale": (16,), "k_scale": (8,)}
    # An independent reading of the file: our numbers are those that ONNX Runtime computes with.
    x = feeds()["x"][:32]
    w = stored["w_quantized"] * stored["w_scale"]
    g = stored["g_quantized"] * stored["g_scale"][:, None]
    c = (np.maximum(x @ w, 0) @ g.T).reshape(-1, 8, 2)
    k = stored["k_quantized"] * stored["k_scale"][:, None, None]
    padded = np.pad(c, ((0, 0), (0, 0), (1, 1)))
    expected = sum(np.einsum("nct,oc->not", padded[..., i : i + 2], k[..., i]) for i in range(3))
    (found,) = ort.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x})
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert result.report.verification[0].relative_error < 0.5
    verified = iobs_onnx.verify(tmp_path / "out.onnx", sparsity="2:4")
    assert verified.ok


def test_the_error_is_below_that_of_rounding_afterwards() -> None:
    report = prune(network()).report
    assert all(site.quantized == "int8" for site in report.sites)
    for site in report.sites:
        assert site.layer_error < site.nearest_error
    assert report.totals["layer_error_geomean"] < report.totals["nearest_error_geomean"]
    plain = iobs_onnx.prune(network(), calibration=feeds(), sparsity="2:4").report
    assert plain.totals["nearest_error_geomean"] is None
    # 127 steps cost next to nothing beside half of the weights.
    ratio = report.totals["layer_error_geomean"] / plain.totals["layer_error_geomean"]
    assert ratio == pytest.approx(1, abs=0.02)


def test_half_precision_scales_are_those_that_are_stored(tmp_path: Path) -> None:
    prune(network(19, np.float16), np.float16, output=tmp_path / "out.onnx")
    model = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["w_scale"] == TensorProto.FLOAT16
    (found,) = ort.InferenceSession(tmp_path / "out.onnx").run(None, feeds(np.float16))
    assert np.isfinite(found.astype(np.float32)).all()


def test_an_opset_that_is_too_old_is_an_error_before_anything_runs() -> None:
    with pytest.raises(ModelError, match=r"weight 'w' \(FLOAT\) needs opset 13, the model has 11"):
        prune(network(11))
    with pytest.raises(ModelError, match=r"\(FLOAT16\) needs opset 19, the model has 17"):
        prune(network(17, np.float16), np.float16)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(OptionError, match="emit dense"):
        prune(network(), emit="sparse-initializer")
    with pytest.raises(OptionError, match="quantize 'int5'"):
        iobs_onnx.prune(network(), calibration=feeds(), sparsity="2:4", quantize="int5")


def test_channel_axes() -> None:
    sites = {site.op_type: site for site in find_sites(ir.from_proto(network())).sites}
    assert channel_axis(sites["MatMul"])[0] == 1
    assert channel_axis(sites["Gemm"])[0] == 0
    axis, outputs = channel_axis(sites["Conv"])
    assert (axis, outputs.tolist()) == (0, list(range(8)))


def test_only_what_is_named_changes_and_a_misfit_is_refused() -> None:
    before, after = ir.from_proto(network()), ir.from_proto(network())
    codes = Codes(np.ones((16, 16), np.int8), np.full(16, 0.5, np.float32), 1)
    assert store_as_integers(after, {"w": codes}) == {"w": "w_quantized"}
    assert "w" not in after.graph.initializers
    first, *rest = (node.op_type for node in after.graph)
    assert first == "DequantizeLinear"
    assert rest == [node.op_type for node in before.graph]
    for name in ("g", "shape"):
        old, new = (m.graph.initializers[name].const_value.numpy() for m in (before, after))
        assert old.tobytes() == new.tobytes()
    with pytest.raises(CheckError, match="'g': no stored tensor of shape"):
        store_as_integers(after, {"g": Codes(np.ones((3, 3), np.int8), np.ones(3), 0)})
