"""A small model with data that its layers correlate on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

RNG = np.random.default_rng(7)
WIDTH = 16


@pytest.fixture(scope="session")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four linears with ReLU between them, and correlated inputs beside it."""
    weights = {f"w{i}": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(4)}
    nodes, value = [], "x"
    for name in weights:
        nodes += [
            helper.make_node("MatMul", [value, name], [f"{name}.out"], name=name),
            helper.make_node("Relu", [f"{name}.out"], [f"{name}.relu"]),
        ]
        value = f"{name}.relu"
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", kind, ["n", WIDTH])],
        [helper.make_tensor_value_info(value, kind, ["n", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    folder = tmp_path_factory.mktemp("mlp")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "mlp.onnx")
    mixing = RNG.normal(size=(WIDTH, WIDTH))
    for part in ("a", "b", "c"):
        rows = RNG.normal(size=(256, WIDTH)) @ mixing
        np.savez(folder / f"{part}.npz", x=rows.astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def residual(mlp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks `x + relu(x U + a) V + b`; the data of the other model beside it."""
    draw = np.random.default_rng(3)
    nodes, tensors, value = [], {}, "x"
    for i in range(3):
        for name, scale in (("u", 1.0), ("v", 0.3)):
            tensors[f"{name}{i}"] = scale * draw.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
            tensors[f"{name}{i}.bias"] = 0.1 * draw.normal(size=WIDTH)
        nodes += [
            helper.make_node("MatMul", [value, f"u{i}"], [f"u{i}.product"], name=f"u{i}"),
            helper.make_node("Add", [f"u{i}.product", f"u{i}.bias"], [f"u{i}.out"]),
            helper.make_node("Relu", [f"u{i}.out"], [f"u{i}.relu"]),
            helper.make_node("MatMul", [f"u{i}.relu", f"v{i}"], [f"v{i}.product"], name=f"v{i}"),
            helper.make_node("Add", [f"v{i}.product", f"v{i}.bias"], [f"v{i}.out"]),
            helper.make_node("Add", [f"v{i}.out", value], [f"block{i}"]),
        ]
        value = f"block{i}"
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", kind, ["n", WIDTH])],
        [helper.make_tensor_value_info(value, kind, ["n", WIDTH])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in tensors.items()],
    )
    folder = tmp_path_factory.mktemp("residual")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "mlp.onnx")
    for part in ("a", "b", "c"):
        (folder / f"{part}.npz").write_bytes((mlp / f"{part}.npz").read_bytes())
    return folder
