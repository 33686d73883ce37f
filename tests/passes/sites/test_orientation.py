"""Each operator form against ONNX Runtime: W times the tap's rows is the node's output."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper

from iobs_onnx.passes import find_sites, instrument, load_model
from iobs_onnx.site import Patches, Site

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def rows_of(activation: np.ndarray, site: Site) -> np.ndarray:
    """Rows of the regression, (groups, n, in), written with loops: no code shared with ours."""
    [tap] = site.taps
    form = tap.form
    if not isinstance(form, Patches):
        moved = np.moveaxis(activation, form.axis, -1)
        return moved.reshape(1, -1, moved.shape[-1])
    space = len(form.kernel)
    extent = [(k - 1) * d + 1 for k, d in zip(form.kernel, form.dilations, strict=True)]
    begin, end = list(form.pads[:space]), list(form.pads[space:])
    if form.auto_pad.startswith("SAME"):
        for axis, size in enumerate(activation.shape[2:]):
            out = -(-size // form.strides[axis])
            total = max(0, (out - 1) * form.strides[axis] + extent[axis] - size)
            small, large = total // 2, total - total // 2
            upper = form.auto_pad == "SAME_UPPER"
            begin[axis], end[axis] = (small, large) if upper else (large, small)
    padded = np.pad(activation, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    counts = [
        (size - extent[axis]) // form.strides[axis] + 1
        for axis, size in enumerate(padded.shape[2:])
    ]
    channels = activation.shape[1] // form.groups
    result = []
    for group in range(form.groups):
        part = padded[:, group * channels : (group + 1) * channels]
        rows = []
        for batch in range(len(part)):
            for place in itertools.product(*map(range, counts)):
                patch = []
                for offset in itertools.product(*map(range, form.kernel)):
                    at = tuple(
                        p * s + o * d
                        for p, s, o, d in zip(
                            place, form.strides, offset, form.dilations, strict=True
                        )
                    )
                    patch.append(part[(batch, slice(None), *at)])
                rows.append(np.concatenate(patch))
        result.append(rows)
    return np.array(result)


def outputs_of(result: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """The node's output as (groups, n, out)."""
    moved = np.moveaxis(result, axis, -1).reshape(-1, groups, result.shape[axis] // groups)
    return moved.transpose(1, 0, 2)


def assert_orientation(proto, run, feeds, stored, *, out_axis, scale=1.0) -> Site:
    model = load_model(proto)
    found = find_sites(model)
    assert found.declined == ()
    [site] = found.sites
    [tap] = site.taps
    results = run(instrument(model, [tap.value, "y"]), feeds)
    weights = site.to_matrices(stored)
    rows = rows_of(results[tap.value].astype(np.float32), site)
    assert weights.shape == (site.groups, site.out_features, site.in_features)
    assert rows.shape[::2] == (tap.groups, tap.features)
    product = np.einsum("gni,goi->gno", rows, weights) * scale
    expected = outputs_of(results["y"], out_axis, site.groups)
    # float32 sums of at most 100 terms of order one; 16-bit cases compare rounded weights.
    tolerance = 2e-2 if stored.dtype == np.float16 else 2e-5
    np.testing.assert_allclose(product, expected, rtol=tolerance, atol=tolerance)
    assert np.array_equal(site.to_stored(weights, stored.dtype), stored)
    # The last axis of W's columns is the one that hardware groups.
    assert site.run == stored.shape[site.axis]
    return site


@pytest.mark.parametrize("x_shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6), (6,)])
def test_matmul_weight_right(make, run, x_shape):
    weight = normal(6, 4)
    proto = make(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": list(x_shape)}, {"w": weight}, ["y"]
    )
    site = assert_orientation(proto, run, {"x": normal(*x_shape)}, weight, out_axis=-1)
    assert (site.axis, site.in_features, site.out_features) == (0, 6, 4)


@pytest.mark.parametrize("x_shape", [(6, 5), (2, 6, 5), (2, 3, 6, 5), (6,)])
def test_matmul_weight_left(make, run, x_shape):
    weight = normal(4, 6)
    proto = make(
        [helper.make_node("MatMul", ["w", "x"], ["y"])], {"x": list(x_shape)}, {"w": weight}, ["y"]
    )
    axis = -2 if len(x_shape) > 1 else -1
    site = assert_orientation(proto, run, {"x": normal(*x_shape)}, weight, out_axis=axis)
    assert site.axis == 1


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("weight_on", ["left", "right"])
def test_gemm(make, run, weight_on, transposed, alpha):
    trans_a, trans_b = transposed
    # A' is (5, 6), B' is (6, 4).
    a = normal(*((6, 5) if trans_a else (5, 6)))
    b = normal(*((4, 6) if trans_b else (6, 4)))
    names = ["w", "x"] if weight_on == "left" else ["x", "w"]
    weight, x = (a, b) if weight_on == "left" else (b, a)
    node = helper.make_node(
        "Gemm", [*names, "c"], ["y"], transA=trans_a, transB=trans_b, alpha=alpha, beta=0.0
    )
    proto = make([node], {"x": list(x.shape)}, {"w": weight, "c": normal(4)}, ["y"])
    site = assert_orientation(
        proto, run, {"x": x}, weight, out_axis=0 if weight_on == "left" else -1, scale=alpha
    )
    assert site.shape[site.axis] == 6


CONVS = {
    "1d": ((7, 4, 3), 1, {}),
    "1d-grouped-strided": ((6, 2, 3), 3, {"strides": [2], "pads": [2, 1]}),
    "2d": ((5, 4, 3, 2), 1, {}),
    "2d-pointwise": ((5, 4, 1, 1), 1, {"strides": [2, 1]}),
    "2d-pads": ((5, 4, 3, 2), 1, {"pads": [1, 0, 2, 1]}),
    "2d-dilated-strided": ((5, 4, 3, 2), 1, {"dilations": [2, 3], "strides": [1, 2]}),
    "2d-groups": ((6, 4, 3, 3), 2, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "2d-valid": ((5, 4, 3, 2), 1, {"auto_pad": "VALID", "strides": [2, 1]}),
    "2d-same-upper": ((5, 4, 3, 2), 1, {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "2d-same-lower": ((4, 2, 4, 2), 2, {"auto_pad": "SAME_LOWER", "strides": [1, 3]}),
    "3d": ((4, 3, 2, 3, 2), 1, {"strides": [1, 2, 1], "pads": [0, 1, 1, 1, 0, 0]}),
    "3d-groups": ((4, 2, 2, 1, 2), 2, {"dilations": [1, 1, 2]}),
}


@pytest.mark.parametrize("case", CONVS, ids=CONVS.keys())
def test_conv(make, run, case):
    shape, groups, attributes = CONVS[case]
    weight = normal(*shape)
    x = normal(2, shape[1] * groups, *(7, 8, 5)[: len(shape) - 2])
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=groups, **attributes)
    proto = make([node], {"x": list(x.shape)}, {"w": weight}, ["y"])
    site = assert_orientation(proto, run, {"x": x}, weight, out_axis=1)
    assert (site.axis, site.groups, site.run) == (1, groups, shape[1])


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))


@pytest.mark.parametrize("as_constant", [False, True], ids=["initializer", "Constant"])
@pytest.mark.parametrize(
    ("chain", "stored_shape"),
    [
        ([("Identity", {})], (6, 4)),
        ([("Transpose", {})], (4, 6)),
        ([("Transpose", {"perm": [1, 0]}), ("Identity", {}), ("Transpose", {})], (6, 4)),
        ([("Cast", {"to": 10}), ("Transpose", {}), ("Cast", {"to": 1})], (4, 6)),
        ([("Identity", {}), ("Transpose", {"perm": [0, 1]})], (6, 4)),
    ],
    ids=["identity", "transpose", "twice", "cast", "noop"],
)
def test_matmul_behind_a_chain(make, run, chain, stored_shape, as_constant):
    # Values that float16 holds exactly, so that a Cast on the way changes nothing.
    weight = RNG.integers(-8, 9, stored_shape).astype(np.float32) / 8
    nodes = [constant("w0", weight)] if as_constant else []
    for step, (op_type, attributes) in enumerate(chain):
        nodes.append(helper.make_node(op_type, [f"w{step}"], [f"w{step + 1}"], **attributes))
    nodes.append(helper.make_node("MatMul", ["x", f"w{len(chain)}"], ["y"]))
    proto = make(nodes, {"x": [2, 5, 6]}, {} if as_constant else {"w0": weight}, ["y"])
    site = assert_orientation(proto, run, {"x": normal(2, 5, 6)}, weight, out_axis=-1)
    assert site.initializer == "w0"
    assert site.shape[site.axis] == 6


def test_conv_behind_transposes(make, run):
    # Stored as TensorFlow does, (kH, kW, in, out), and turned in two steps.
    weight = normal(3, 2, 4, 5)
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[2, 0, 3, 1]),
        helper.make_node("Transpose", ["t"], ["u"], perm=[2, 0, 1, 3]),
        helper.make_node("Conv", ["x", "u"], ["y"]),
    ]
    proto = make(nodes, {"x": [2, 4, 7, 8]}, {"w": weight}, ["y"])
    site = assert_orientation(proto, run, {"x": normal(2, 4, 7, 8)}, weight, out_axis=1)
    assert site.axis == 2
    assert site.perm == (3, 0, 1, 2)


@pytest.mark.parametrize("op_type", ["MatMul", "Conv"])
def test_float16_is_kept(make, run, op_type):
    weight = normal(*((8, 4) if op_type == "MatMul" else (4, 8, 3))).astype(np.float16)
    x = normal(*((5, 8) if op_type == "MatMul" else (2, 8, 9))).astype(np.float16)
    node = helper.make_node(op_type, ["x", "w"], ["y"])
    proto = make([node], {"x": list(x.shape)}, {"w": weight}, ["y"], onnx.TensorProto.FLOAT16)
    site = assert_orientation(
        proto, run, {"x": x}, weight, out_axis=-1 if op_type == "MatMul" else 1
    )
    assert site.dtype == "FLOAT16"


def test_gemm_and_matmul_share_a_tap(make):
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["a"]),
        helper.make_node("Gemm", ["x", "w"], ["b"], transB=1),
    ]
    proto = make(nodes, {"x": [5, 6]}, {"v": normal(6, 4), "w": normal(3, 6)}, ["a", "b"])
    first, second = find_sites(load_model(proto)).sites
    assert first.taps == second.taps
