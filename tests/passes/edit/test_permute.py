"""Channels whose order is free, and models that compute the same in another order."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from iobs_onnx.passes import find_chains, find_sites, load_model, permute_channels

RNG = np.random.default_rng(2)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, *names: str, domain: str = "", **attributes: object):
    *inputs, output = names
    return helper.make_node(op, inputs, [output], output.upper(), domain=domain, **attributes)


MLP = [node("MatMul", "x", "w", "h"), node("MatMul", "r", "v", "y")]
CONV = [node("Conv", "x", "w", "wb", "h"), node("Conv", "r", "v", "y")]
IMAGE = {"x": ["n", 4, 6, 6]}
KERNELS = {"w": array(8, 4, 3, 3), "wb": array(8), "v": array(4, 8, 3, 3)}
VECTORS = {"w": array(4, 8), "v": array(8, 4)}

# What stands between two products; the nodes read h and give r.
FREE = {
    "bias and gelu": ([node("Add", "b", "h", "a"), node("Gelu", "a", "r")], {"b": array(8)}),
    "equal biases that others share": (
        [node("Add", "h", "b", "a"), node("Mul", "a", "b", "r")],
        {"b": np.ones(8, np.float32)},
    ),
    "decomposed silu": ([node("Sigmoid", "h", "s"), node("Mul", "h", "s", "r")], {}),
    "a second branch": (
        [node("MatMul", "x", "u", "g"), node("Relu", "g", "k"), node("Mul", "h", "k", "r")],
        {"u": array(4, 8)},
    ),
    "clip, power and a scalar": (
        [node("Clip", "h", "low", "", "c"), node("Pow", "c", "two", "r")],
        {"low": np.float32(-1), "two": np.float32(2)},
    ),
    "gemm": (
        [
            node("Relu", "h", "k"),
            node("Gemm", "k", "u", "c", "m", transB=1),
            node("Relu", "m", "r"),
        ],
        {"u": array(8, 8), "c": array(8)},
    ),
}
FREE_CONV = {
    "batch norm and relu": (
        [node("BatchNormalization", "h", "s", "t", "m", "q", "n"), node("Relu", "n", "r")],
        {"s": array(8), "t": array(8), "m": array(8), "q": np.abs(array(8))},
    ),
    "depthwise and pool": (
        [
            node("Conv", "h", "d", "db", "e", group=8),
            node("PRelu", "e", "slope", "p"),
            node("MaxPool", "p", "r", kernel_shape=[1, 1]),
        ],
        {"d": array(8, 1, 1, 1), "db": array(8), "slope": array(8, 1, 1)},
    ),
    "another convolution added": (
        [node("Conv", "x", "u", "g"), node("Add", "g", "h", "r")],
        {"u": array(8, 4, 3, 3)},
    ),
}


def build(make, between, constants, conv):
    first, last = CONV if conv else MLP
    model = make(
        [first, *between, last],
        IMAGE if conv else {"x": ["n", 4]},
        {**(KERNELS if conv else VECTORS), **constants},
        ["y"],
    )
    model.opset_import[0].version = 20
    model.ir_version = 9
    return load_model(model)


@pytest.mark.parametrize("name", [*FREE, *FREE_CONV])
def test_another_order_computes_the_same(make, run, name):
    conv = name in FREE_CONV
    model = build(make, *{**FREE, **FREE_CONV}[name], conv)
    x = {"x": array(3, 4, 6, 6) if conv else array(3, 4)}
    expected = run(model, x)["y"]
    stored = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    chains, _ = find_chains(model, find_sites(model).sites)
    chain = next(chain for chain in chains if ("v", 1 if conv else 0) in chain.slices)
    assert chain.channels == 8
    assert "v" in {site.initializer for site in chain.sites}
    order = RNG.permutation(8)
    permute_channels(model, chain, order)
    # Sums of some 100 terms of order one in another order.
    np.testing.assert_allclose(run(model, x)["y"], expected, rtol=1e-4, atol=1e-4)
    axis = dict(chain.slices)["v"]
    now = model.graph.initializers["v"].const_value.numpy()
    assert np.array_equal(now, stored["v"].take(order, axis))
    followers = {tensor for tensor, _ in chain.slices}
    for tensor in stored.keys() - followers:
        assert np.array_equal(model.graph.initializers[tensor].const_value.numpy(), stored[tensor])


MIXED = {
    "mixes or moves": ([node("Softmax", "h", "r")], {}),
    "Reshape 'R' mixes": ([node("Reshape", "h", "s", "r")], {"s": np.array([-1, 8])}),
    "'b' is read in several places": (
        [node("Add", "h", "b", "a"), node("Mul", "a", "b", "r")],
        {"b": array(8)},
    ),
    "'x' comes from outside": ([node("Relu", "x", "k"), node("Concat", "k", "x", "r", axis=1)], {}),
    "Transpose": ([node("Transpose", "h", "r")], {}),
    "has no single scale": (
        [
            node("QuantizeLinear", "h", "s", "z", "q", axis=1),
            node("DequantizeLinear", "q", "s", "z", "r", axis=1),
        ],
        {"s": np.abs(array(8)) + 1, "z": np.zeros(8, np.int8)},
    ),
}


@pytest.mark.parametrize("reason", MIXED)
def test_orders_that_are_fixed(make, reason):
    model = build(make, *MIXED[reason], conv=False)
    sites = find_sites(model).sites
    chains, reasons = find_chains(model, sites)
    assert chains == ()
    told = {site.initializer: text for site, text in reasons.items()}
    assert told.keys() == {"w", "v"}
    if reason != "'x' comes from outside":
        assert reason in told["v"]
    assert told["w"] == "'x' comes from outside"


def test_outputs_inputs_and_groups_are_fixed(make):
    shown = make(
        [node("MatMul", "x", "w", "h"), node("MatMul", "h", "v", "y")],
        {"x": ["n", 4]},
        VECTORS,
        ["y", "h"],
    )
    model = load_model(shown)
    _, reasons = find_chains(model, find_sites(model).sites)
    assert "'h' is an output of the model" in reasons.values()
    grouped = make(
        [node("Conv", "x", "w", "h"), node("Conv", "h", "v", "y", group=2)],
        IMAGE,
        {"w": array(8, 4, 1, 1), "v": array(4, 4, 1, 1)},
        ["y"],
    )
    model = load_model(grouped)
    chains, reasons = find_chains(model, find_sites(model).sites)
    assert chains == ()
    assert "is not one plain product" in " ".join(reasons.values())


def test_a_constant_that_can_be_overridden_is_fixed(make):
    model = make(
        [node("MatMul", "x", "w", "h"), node("MatMul", "h", "v", "y")],
        {"x": ["n", 4], "w": [4, 8]},
        VECTORS,
        ["y"],
    )
    loaded = load_model(model)
    assert isinstance(loaded, ir.Model)
    chains, _ = find_chains(loaded, find_sites(loaded).sites)
    assert chains == ()
