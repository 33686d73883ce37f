"""Forms in which pruned weights are written: sparse tensors and masks."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import zstandard
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

import iobs_onnx
from iobs_onnx.errors import OptionError
from iobs_onnx.passes import (
    find_sites,
    load_model,
    mask_file,
    masks_of,
    model_sizes,
    save_model,
    sparse_bytes,
    store_sparsely,
    stored_slots,
)
from iobs_onnx.passes.edit import sparse_form

RNG = np.random.default_rng(3)
FEEDS = [{"x": RNG.standard_normal((6, 16)).astype(np.float32)} for _ in range(4)]


def two_layers(ir_version: int = 10, constant: bool = False) -> onnx.ModelProto:
    """`y = relu(x W) V`, the second weight in a Constant where that is asked for."""
    first, second = (RNG.standard_normal((16, 16)).astype(np.float32) for _ in range(2))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"])]
    stored = [numpy_helper.from_array(first, "w")]
    if constant:
        value = numpy_helper.from_array(second, "held")
        nodes.insert(0, helper.make_node("Constant", [], ["v"], value=value))
    else:
        stored.append(numpy_helper.from_array(second, "v"))
    nodes.append(helper.make_node("MatMul", ["r", "v"], ["y"]))
    x, y = (helper.make_tensor_value_info(n, 1, ["batch", 16]) for n in "xy")
    graph = helper.make_graph(nodes, "two", [x], [y], stored)
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[opset])


def outputs(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, FEEDS[0])[0]


@pytest.mark.parametrize("constant", [False, True])
def test_sparse_initializers(tmp_path: Path, constant: bool) -> None:
    model = two_layers(constant=constant)
    written = {}
    for form in ("dense", "sparse-initializer"):
        path = tmp_path / f"{form}.onnx"
        result = iobs_onnx.prune(
            model, calibration=FEEDS, sparsity=0.75, output=path, emit=form, provider="cpu"
        )
        written[form] = result.report.output
    assert written["sparse-initializer"]["refused"] is None
    assert written["sparse-initializer"]["left_dense"] == {}
    sparse = onnx.load(tmp_path / "sparse-initializer.onnx")
    onnx.checker.check_model(sparse)
    assert len(sparse.graph.sparse_initializer) == 2 - constant
    assert len(sparse.graph.initializer) == 0
    held = sparse.graph.sparse_initializer[0]
    assert held.values.name == "w"
    assert len(held.values.raw_data) == 64 * 4
    assert len(held.indices.raw_data) == 64 * 8
    # The same numbers, to the bit, in ONNX Runtime and when read back.
    paths = [tmp_path / f"{form}.onnx" for form in written]
    assert np.array_equal(*map(outputs, paths))
    dense, again = (load_model(path) for path in paths)
    for site in find_sites(dense).sites:
        arrays = [stored_slots(m)[site.initializer].tensor.numpy() for m in (dense, again)]
        assert np.array_equal(*arrays)
    sizes = sparse_bytes(dense, find_sites(dense).sites)
    assert sizes == {"dense": 2 * 256 * 4, "sparse-initializer": 2 * 64 * 12}


def test_what_has_no_sparse_form_stays_dense_and_is_told(tmp_path: Path) -> None:
    old = load_model(two_layers(ir_version=4))
    assert set(store_sparsely(old, find_sites(old).sites)) == {"w", "v"}
    early = two_layers(constant=True)
    early.opset_import[0].version = 10
    model = load_model(early)
    left = store_sparsely(model, find_sites(model).sites)
    assert left == {"v": "Constant of opset 10 holds no sparse tensors"}
    save_model(model, tmp_path / "early.onnx")
    written = onnx.load(tmp_path / "early.onnx")
    assert [item.values.name for item in written.graph.sparse_initializer] == ["w"]


def quantized(zero: int, dtype: type[np.generic] = np.int8) -> onnx.ModelProto:
    stored = RNG.integers(-8, 8, (16, 8)).astype(np.int8) + np.int8(zero)
    weight = numpy_helper.from_array(stored, "w")
    if dtype is not np.int8:
        weight = helper.make_tensor("w", onnx.TensorProto.INT4, (16, 8), stored.reshape(-1))
    stored_zero = helper.make_tensor("z", weight.data_type, (), [zero])
    scale = numpy_helper.from_array(np.float32(0.1), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", 1, ["batch", 16])
    y = helper.make_tensor_value_info("y", 1, ["batch", 8])
    graph = helper.make_graph(nodes, "q", [x], [y], [weight, scale, stored_zero])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (quantized(0), None),
        (quantized(2), "zero point other than 0"),
        (quantized(0, np.bool_), "INT4 is packed"),
    ],
)
def test_quantized_weights(model: onnx.ModelProto, reason: str | None) -> None:
    loaded = load_model(model)
    sites = find_sites(loaded).sites
    left = store_sparsely(loaded, sites)
    assert (left == {}) if reason is None else (reason in left["w"])
    real = sites[0].quantized.dequantize(stored_slots(loaded)["w"].tensor.numpy())
    assert np.array_equal(masks_of(loaded, sites)["w"], real != 0)


def test_too_large_for_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_form, "_MAX_SPARSE_BYTES", 1000)
    model = load_model(two_layers())
    with pytest.raises(OptionError, match="use --emit mask or dense"):
        store_sparsely(model, find_sites(model).sites)


def test_masks_lie_beside_the_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    result = iobs_onnx.prune(
        two_layers(), calibration=FEEDS, sparsity="2:4", output=path, emit="mask", provider="cpu"
    )
    masks = load_file(result.report.output["masks"])
    assert str(mask_file(path)) == result.report.output["masks"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert {name: mask.dtype for name, mask in masks.items()} == {"w": np.bool_, "v": np.bool_}
    for name, mask in masks.items():
        assert np.array_equal(mask, stored[name] != 0)
        assert (mask.reshape(4, 4, 16).sum(1) == 2).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", mask_file(path).name]
    with pytest.raises(OptionError, match="emit mask: the masks go beside the model"):
        iobs_onnx.prune(two_layers(), calibration=FEEDS, sparsity="2:4", emit="mask")


def test_sizes(tmp_path: Path) -> None:
    """Against zstandard's one-shot interface; external data count, and are compressed apart."""
    path = tmp_path / "m.onnx"
    onnx.save(two_layers(), path)
    whole = path.read_bytes()
    assert model_sizes(path).bytes == len(whole)
    squeezed = len(zstandard.ZstdCompressor(level=3).compress(whole))
    assert abs(model_sizes(path).zstd_bytes - squeezed) <= 16  # the frame may lack the size
    onnx.save(
        two_layers(),
        tmp_path / "e.onnx",
        save_as_external_data=True,
        location="e.bin",
        size_threshold=16,
    )
    files = [tmp_path / "e.onnx", tmp_path / "e.bin"]
    sizes = model_sizes(files[0])
    assert sizes.bytes == sum(file.stat().st_size for file in files)
    assert sizes.zstd_bytes > 1500  # random floats do not compress by half
