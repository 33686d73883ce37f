"""The residual of a site is left out where making up for it is no correction."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx

TOKENS, WIDTH = 8, 32
IMAGES = np.random.default_rng(1).standard_normal((256, TOKENS, WIDTH)).astype(np.float32)


def vision(size):
    """Return embedding, uniform attention and class token: only that leaves the model.

    The class token of the stream is always 0, hence exact, and every token is given the same mean
    times `v`, whose entries have the standard deviation `size / √WIDTH`.
    """
    rng = np.random.default_rng(0)
    w, v = rng.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    stored = {
        "w": w,
        "v": size * v,
        "b": np.zeros(WIDTH, np.float32),
        "patches": (np.arange(TOKENS) > 0).astype(np.float32)[:, None],
        "tokens": np.array([1]),
        "first": np.array(0),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["e"], "embed"),
        helper.make_node("Mul", ["e", "patches"], ["stream"]),
        helper.make_node("ReduceMean", ["stream", "tokens"], ["mean"]),
        helper.make_node("Shape", ["stream"], ["shape"]),
        helper.make_node("Expand", ["mean", "shape"], ["attended"]),
        helper.make_node("MatMul", ["attended", "v"], ["o"], "project"),
        helper.make_node("Add", ["o", "b"], ["biased"]),
        helper.make_node("Add", ["biased", "stream"], ["out"]),
        helper.make_node("Gather", ["out", "first"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", TOKENS, WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "vision", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def pruned(model, tmp_path, **options):
    """Return the report, and the output's relative error."""
    report = iobs_onnx.prune(
        model, calibration={"x": IMAGES}, sparsity="60%", output=tmp_path / "o.onnx", **options
    ).report
    return report, report.verification[0].relative_error


def test_a_class_token_is_not_spoiled_for_the_others(tmp_path):
    report, error = pruned(vision(0.05), tmp_path)
    _, plain = pruned(vision(0.05), tmp_path, residual=False)
    assert error == pytest.approx(plain, rel=1e-5)
    assert {site.name: site.residual_left_out for site in report.sites} == {
        "w": False,
        "v": True,
    }
    [note] = [note for note in report.calibration.notes if "stream" in note]
    assert "'v'" in note


def test_a_small_correction_is_made(tmp_path):
    report, error = pruned(vision(1.0), tmp_path)
    _, plain = pruned(vision(1.0), tmp_path, residual=False)
    assert not any(site.residual_left_out for site in report.sites)
    assert not any("stream" in note for note in report.calibration.notes)
    assert error != pytest.approx(plain, rel=1e-3)
