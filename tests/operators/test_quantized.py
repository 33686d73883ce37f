"""Weights stored as integers: dequantised, pruned, and stored so that zeros stay exact zeros."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.passes import check_pattern, find_sites, load_model, rewrite, stored_slots
from iobs_onnx.site.grid import Quantized
from iobs_onnx.sparsity import NM

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 8)).astype(np.float32)


def model(nodes, tensors, opset=21) -> onnx.ModelProto:
    """The nodes make `y` of `x`, (5, 8), and initializers."""
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **rest) for op, inputs, output, rest in nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            a if isinstance(a, onnx.TensorProto) else numpy_helper.from_array(np.asarray(a), n)
            for n, a in tensors.items()
        ],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def dequantized(grid=("s", "z"), **attributes):
    return [
        ("DequantizeLinear", ["q", *grid], "w", attributes),
        ("MatMul", ["x", "w"], "y", {}),
    ]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("zero", [0, 3])
def test_dequantized_as_the_runtime_does(run, dtype, by_channel, zero):
    info = np.iinfo(dtype)
    stored = RNG.integers(max(info.min, -128), min(info.max, 255), (8, 6)).astype(dtype)
    scale = RNG.uniform(0.01, 0.1, 6 if by_channel else ()).astype(np.float32)
    tensors = {"q": stored, "s": scale, "z": np.full(scale.shape, zero, dtype)}
    proto = model(dequantized(axis=1), tensors)
    [site] = find_sites(load_model(proto)).sites
    assert (site.initializer, site.axis, site.dtype) == ("q", 0, np.dtype(dtype).name.upper())
    matrices = site.to_matrices(stored)
    np.testing.assert_allclose(X @ matrices[0].T, run(proto, {"x": X})["y"], atol=1e-4)
    np.testing.assert_array_equal(site.to_stored(matrices, stored.dtype), stored)


def test_pruned_places_store_the_zero_point(run):
    stored = RNG.integers(0, 255, (8, 6)).astype(np.uint8)
    zero = np.array([0, 255, 128, 7, 1, 90], np.uint8)
    scale = RNG.uniform(0.01, 0.1, 6).astype(np.float32)
    proto = model(dequantized(), {"q": stored, "s": scale, "z": zero})
    loaded = load_model(proto)
    [site] = find_sites(loaded).sites
    matrices = site.to_matrices(stored)
    mask = np.tile([True, False, False, True], 12).reshape(matrices.shape)
    sparse = matrices * mask
    rewrite(loaded, {"q": site.to_stored(sparse, stored.dtype)})
    assert check_pattern(loaded, [site], {site.name: NM(2, 4)}) == []
    new = stored_slots(loaded)["q"].tensor.numpy()
    # (1, out, in) -> (in, out)
    np.testing.assert_array_equal(new, np.where(mask[0].T, stored, zero))
    np.testing.assert_allclose(run(loaded, {"x": X})["y"], X @ sparse[0].T, atol=1e-4)


def test_values_are_rounded_to_the_grid_and_saturate():
    grid = Quantized((0.5,), (-3,))
    real = np.array([0.0, 0.24, 0.26, -0.26, 1e6, -1e6, np.float32(1e-30)], np.float32)
    stored = grid.quantize(real, np.dtype(np.int8))
    assert stored.tolist() == [-3, -3, -2, -4, 127, -128, -3]
    assert grid.dequantize(stored)[:4].tolist() == [0.0, 0.0, 0.5, -0.5]


def test_a_channel_of_scale_zero():
    grid = Quantized((0.0, 2.0), (5, 0), axis=1)
    stored = grid.quantize(np.array([[0.0, 4.0], [0.0, -2.0]], np.float32), np.dtype(np.uint8))
    assert stored.tolist() == [[5, 2], [5, 0]]


def test_four_bits():
    tensors = {
        "q": helper.make_tensor("q", TensorProto.INT4, [8, 6], [1, -2, 7] * 16),
        "s": np.float32(0.1),
    }
    loaded = load_model(model(dequantized(("s",)), tensors))
    [site] = find_sites(loaded).sites
    assert site.dtype == "INT4"
    stored = stored_slots(loaded)["q"].tensor.numpy()
    matrices = site.to_matrices(stored)
    np.testing.assert_allclose(matrices[0, 0], np.full(8, 0.1), atol=1e-7)
    rewrite(loaded, {"q": site.to_stored(matrices * 0, stored.dtype)})
    assert not stored_slots(loaded)["q"].tensor.numpy().any()


INTS = np.ones((8, 6), np.int8)
DECLINED = {
    "blocks": (
        dequantized(("s",), block_size=4, axis=0),
        {"q": INTS, "s": np.ones((2, 6), np.float32)},
        "whose scales vary along blocks",
    ),
    "scales of another axis": (
        dequantized(("s",), axis=5),
        {"q": INTS, "s": np.ones(6, np.float32)},
        "whose scales do not follow one stored axis",
    ),
    "zero points that do not fit": (
        dequantized(),
        {"q": INTS, "s": np.ones(6, np.float32), "z": np.zeros(4, np.int8)},
        "does not fit its zero point",
    ),
    "a scale that is not a number": (
        dequantized(("s",)),
        {"q": INTS, "s": np.float32(np.nan)},
        "whose scale is not finite",
    ),
    "computed scale": (
        [("ReduceMax", ["x"], "s", {"keepdims": 0}), *dequantized(("s",))],
        {"q": INTS},
        "scale or zero point is not constant",
    ),
    "two readers, two scales": (
        [
            ("DequantizeLinear", ["q", "s"], "a", {}),
            ("DequantizeLinear", ["q", "t"], "b", {}),
            ("MatMul", ["x", "a"], "u", {}),
            ("MatMul", ["x", "b"], "v", {}),
            ("Add", ["u", "v"], "y", {}),
        ],
        {"q": INTS, "s": np.float32(1), "t": np.float32(2)},
        "dequantized in two ways",
    ),
    "integer operator": (
        [("Cast", ["x"], "x8", {"to": TensorProto.INT8}), ("MatMulInteger", ["x8", "q"], "y", {})],
        {"q": INTS},
        "multiplies integers",
    ),
    "integer product": (
        [("MatMul", ["x", "q"], "y", {})],
        {"q": INTS},
        "an integer at the node that multiplies by it",
    ),
    "other dtype": ([("MatMul", ["x", "q"], "y", {})], {"q": INTS.astype(np.int64)}, "dtype INT64"),
    "two scales": (
        [
            ("Cast", ["q"], "f", {"to": TensorProto.FLOAT}),
            ("Mul", ["f", "s"], "w", {}),
            ("MatMul", ["x", "w"], "y", {}),
        ],
        {"q": INTS, "s": np.ones((8, 6), np.float32)},
        "behind Mul by more than a scale along one axis",
    ),
    "scaled by the activation": (
        [
            ("Cast", ["q"], "f", {"to": TensorProto.FLOAT}),
            ("ReduceMax", ["x"], "s", {"keepdims": 0}),
            ("Mul", ["f", "s"], "w", {}),
            ("MatMul", ["x", "w"], "y", {}),
        ],
        {"q": INTS},
        "behind Mul, whose other operand is not a constant scale",
    ),
    "two grids": (
        [
            ("QuantizeLinear", ["q", "s"], "r", {}),
            ("DequantizeLinear", ["r", "t"], "w", {}),
            ("MatMul", ["x", "w"], "y", {}),
        ],
        {"q": INTS.astype(np.float32), "s": np.float32(1), "t": np.float32(2)},
        "behind a second quantization",
    ),
    "another use of the integers": (
        [*dequantized(("s",)), ("Cast", ["q"], "seen", {"to": 1}), ("Relu", ["seen"], "out", {})],
        {"q": INTS, "s": np.float32(1)},
        "also read by Relu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    nodes, tensors, reason = DECLINED[case]
    found = find_sites(load_model(model(nodes, tensors)))
    assert found.sites == ()
    [declined] = found.declined
    assert reason in declined.reason
    assert declined.initializer == "q"


class Feeds:
    """What quantize_static reads."""

    def __init__(self) -> None:
        self._feeds = [{"x": RNG.standard_normal((5, 8)).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self._feeds.pop() if self._feeds else None


@pytest.fixture
def network(tmp_path):
    """MatMul, Gemm and Conv on floats."""
    nodes = [
        ("MatMul", ["x", "a"], "u", {}),
        ("Relu", ["u"], "r", {}),
        ("Gemm", ["r", "b", "c"], "v", {"transB": 1}),
        ("Reshape", ["v", "shape"], "p", {}),
        ("Conv", ["p", "k"], "y", {}),
    ]
    tensors = {
        "a": RNG.standard_normal((8, 16)).astype(np.float32),
        "b": RNG.standard_normal((24, 16)).astype(np.float32),
        "c": RNG.standard_normal(24).astype(np.float32),
        "shape": np.array([5, 4, 6]),
        "k": RNG.standard_normal((8, 4, 3)).astype(np.float32),
    }
    path = tmp_path / "float.onnx"
    onnx.save(model(nodes, tensors, opset=17), path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weights_stay_float", [False, True])
def test_what_quantize_static_writes(network, run, per_channel, weights_stay_float):
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    path = network.with_name("qdq.onnx")
    quantize_static(
        network,
        path,
        Feeds(),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"AddQDQPairToWeight": weights_stay_float},
    )
    loaded = load_model(path)
    found = find_sites(loaded)
    assert found.declined == ()
    assert {site.op_type for site in found.sites} == {"MatMul", "Gemm", "Conv"}
    slots = stored_slots(loaded)
    new = {}
    for site in found.sites:
        stored = slots[site.initializer].tensor.numpy()
        assert stored.dtype == (np.float32 if weights_stay_float else np.int8)
        matrices = site.to_matrices(stored).copy()
        matrices.reshape(*matrices.shape[:2], -1, 4)[..., :2] = 0
        new[site.initializer] = site.to_stored(matrices, stored.dtype)
    rewrite(loaded, new)
    patterns = {site.name: NM(2, 4) for site in found.sites}
    assert check_pattern(loaded, found.sites, patterns) == []
    # Dequantised, the first two of four inputs are nothing: what they read is ignored.
    first = next(site for site in found.sites if site.op_type == "MatMul")
    assert first.taps[0].value != "x", "the node reads what was quantized and dequantized"
    masks = np.ones(8, np.float32), np.tile(np.float32([0, 0, 1, 1]), 2)
    outputs = [run(loaded, {"x": X * mask})["y"] for mask in masks]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.filterwarnings("ignore")
def test_what_quantize_dynamic_writes_is_declined(network):
    from onnxruntime.quantization import quantize_dynamic

    path = network.with_name("dynamic.onnx")
    quantize_dynamic(network, path)
    found = find_sites(load_model(path))
    assert found.sites == ()
    assert all("multiplies integers" in d.reason for d in found.declined)
    assert len(found.declined) == 3
