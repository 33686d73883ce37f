"""Models that travel: what is shared stays shared, external data stay where they are."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import load_model, pack, rewrite, stored_slots, unpack


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    names, nodes = ["a", "b", "c"], []
    for i, name in enumerate(names):
        nodes.append(helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]))
    weights = [numpy_helper.from_array(rng.random((32, 32), np.float32), name) for name in names]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 32]) for n in ("x0", "x3")]
    small = numpy_helper.from_array(np.float32([1.0]), "small")
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], [*weights, small])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.data",
        size_threshold=1024,
    )
    return tmp_path / "model.onnx"


def tensors(model: object) -> dict[str, np.ndarray]:
    return {name: slot.tensor.numpy() for name, slot in stored_slots(model).items()}


def test_only_what_differs_travels(file: Path) -> None:
    dense = load_model(file)
    sparse = load_model(dense)
    rewrite(sparse, {"b": tensors(dense)["b"] * 2})
    shipment = pack([dense, sparse])
    assert [array.shape for array in shipment.arrays.values()] == [(32, 32)]
    assert len(pickle.dumps(shipment)) < 10_000
    unpacked = unpack(pickle.loads(pickle.dumps(shipment)))
    for model, found in zip((dense, sparse), unpacked, strict=True):
        for name, array in tensors(model).items():
            np.testing.assert_array_equal(tensors(found)[name], array)
    # Solved weights that lie on disk travel too: the other side may not see that folder.
    (other,) = file.parent.glob("model.onnx")
    again = load_model(other)
    assert len(pack([dense, again]).arrays) == 3


def test_models_in_memory_share_their_tensors(file: Path) -> None:
    dense = load_model(onnx.load(file))
    shipment = pack([dense, load_model(dense)])
    assert len(shipment.arrays) == 3
    one, other = unpack(shipment)
    assert tensors(one)["a"] is tensors(other)["a"]


def test_external_data_that_are_not_there_are_named(file: Path) -> None:
    shipment = pack([load_model(file)])
    (file.parent / "model.data").unlink()
    with pytest.raises(ModelError, match=r"^model data .*model\.data: no such file here; put the"):
        unpack(shipment)
