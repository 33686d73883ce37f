"""Weights of MatMulNBits: read as ONNX Runtime reads them, pruned on their own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.passes import find_sites, load_model
from iobs_onnx.runtime import open_session

ROOT = Path(__file__).resolve().parents[1]
OUT, BLOCK = 6, 16
BLOCKS = 3
# Bits, inputs (the last block may not be full), and how zero points are given.
CASES = [(4, 48, None), (4, 40, "packed"), (4, 48, "floats"), (8, 48, None), (8, 40, "packed")]


def packed(bits: int, inputs: int, zeros: str | None) -> onnx.ModelProto:
    rng = np.random.default_rng(bits + inputs)
    arrays = {
        "w": rng.integers(0, 256, (OUT, BLOCKS, BLOCK * bits // 8), np.uint8),
        "scales": rng.uniform(0.05, 0.2, (OUT, BLOCKS)).astype(np.float32),
    }
    if zeros == "packed":
        arrays["zeros"] = rng.integers(0, 256, (OUT, -(-BLOCKS * bits // 8)), np.uint8)
    elif zeros == "floats":
        points = rng.integers(0, 1 << bits, (OUT, BLOCKS))
        arrays["zeros"] = points.astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", N=OUT, K=inputs
    )
    node.attribute.extend(
        [helper.make_attribute("bits", bits), helper.make_attribute("block_size", BLOCK)]
    )
    graph = helper.make_graph(
        [node],
        "packed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUT])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def product(model: onnx.ModelProto, inputs: int) -> np.ndarray:
    """What ONNX Runtime multiplies by, `(out, in)`."""
    (y,) = open_session(load_model(model), "cpu").run(None, {"x": np.eye(inputs, dtype=np.float32)})
    return y.T


@pytest.mark.parametrize(("bits", "inputs", "zeros"), CASES)
def test_it_stands_for_what_onnx_runtime_multiplies_by(
    bits: int, inputs: int, zeros: str | None
) -> None:
    model = packed(bits, inputs, zeros)
    (site,) = find_sites(load_model(model)).sites
    stored = numpy_helper.to_array(model.graph.initializer[0])
    (matrix,) = site.to_matrices(stored)
    np.testing.assert_allclose(matrix, product(model, inputs), rtol=1e-5, atol=1e-5)
    again = site.to_stored(matrix[None], stored.dtype)
    assert again.shape == stored.shape
    np.testing.assert_array_equal(site.to_matrices(again)[0], matrix)


@pytest.mark.parametrize(("bits", "inputs", "zeros"), CASES)
def test_it_is_pruned_on_its_own_grid(
    bits: int, inputs: int, zeros: str | None, tmp_path: Path
) -> None:
    model = packed(bits, inputs, zeros)
    x = np.random.default_rng(0).normal(size=(256, inputs)) @ (np.eye(inputs) + 0.1)
    rows = x.astype(np.float32)
    output = tmp_path / "sparse.onnx"
    result = iobs_onnx.prune(model, calibration=[{"x": rows}], sparsity="2:4", output=output)
    assert iobs_onnx.verify(output, sparsity="2:4").ok
    sparse = onnx.load(output)
    for before, after in zip(
        model.graph.initializer[1:], sparse.graph.initializer[1:], strict=True
    ):
        assert before.raw_data == after.raw_data
    dense, kept = product(model, inputs), product(sparse, inputs)
    # Sums in float32 leave what is below this where a weight is zero.
    assert ((np.abs(kept) > 1e-5).reshape(OUT, -1, 4).sum(-1) <= 2).all()
    lost, energy = (np.square(rows @ m.T).sum() for m in (kept - dense, dense))
    (site,) = result.report.sites
    assert site.layer_error == pytest.approx(lost / energy, rel=0.02)
    # The two largest of four, kept as they are, are the floor.
    order = np.abs(dense).reshape(OUT, -1, 4).argsort(-1).argsort(-1)
    largest = np.where(order.reshape(dense.shape) >= 2, dense, 0)
    assert lost < np.square(rows @ (largest - dense).T).sum()
    assert result.report.totals["weights"] == OUT * inputs


def test_other_orders_of_the_inputs_are_declined() -> None:
    model = packed(4, 48, "packed")
    model.graph.node[0].input.append("order")
    order = numpy_helper.from_array(np.zeros(48, np.int32), "order")
    model.graph.initializer.append(order)
    (declined,) = find_sites(load_model(model)).declined
    assert "g_idx" in declined.reason


def test_a_model_that_the_builder_of_onnx_runtime_genai_packed(tmp_path: Path) -> None:
    path = ROOT / "data" / "genai-int4" / "model.onnx"
    ids = np.random.default_rng(1).integers(0, 258, (16, 12))
    past = np.zeros((16, 1, 0, 16), np.float32)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed |= {f"past_key_values.0.{kind}": past for kind in ("key", "value")}
    result = iobs_onnx.prune(
        path, calibration=[feed], sparsity="2:4", preset="fast", output=tmp_path / "sparse.onnx"
    )
    assert len(result.report.sites) == 5
    assert all(0.5 <= site.sparsity < 0.6 for site in result.report.sites)
    assert all(site.layer_error < 0.25 for site in result.report.sites)
    assert "GatherBlockQuantized" in result.report.declined[0]["reason"]
    assert iobs_onnx.verify(tmp_path / "sparse.onnx", sparsity="2:4").ok
