"""Weights whose gates stand in PyTorch's order, turned round with Slice and Concat."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.passes import find_chains, find_sites, load_model, stored_slots

SIZE, HIDDEN = 12, 8
FEEDS = [{"x": np.random.default_rng(9).standard_normal((7, 4, SIZE)).astype(np.float32)}] * 2
# Input, output, forget, cell of ONNX among PyTorch's input, forget, cell, output.
PARTS = ((0, 1), (3, 4), (1, 3))
ORDER = [0, 3, 1, 2]
TURNED = "behind Concat, which puts its parts in another order"


def turned(name: str, parts=PARTS, *, axis: int = 0, unit: int = HIDDEN, old: bool = False):
    """Nodes that put parts of a tensor together as `<name>_turned`."""
    nodes, tensors = [], {}
    for number, (start, stop) in enumerate(parts):
        cut = f"{name}_{number}"
        end = stop * unit if stop < 4 else 2**31
        ends = {"starts": [start * unit], "ends": [end], "axes": [axis]}
        names = [] if old else [f"{cut}_{key}" for key in ends]
        tensors |= {key: np.array(value) for key, value in zip(names, ends.values(), strict=False)}
        nodes.append(helper.make_node("Slice", [name, *names], [cut], **(ends if old else {})))
    cuts = [node.output[0] for node in nodes]
    nodes.append(helper.make_node("Concat", cuts, [f"{name}_turned"], axis=axis))
    return nodes, tensors


def model(nodes, tensors, opset: int = 12) -> onnx.ModelProto:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["t", 4, SIZE]), ("y", None))
    ]
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    return helper.make_model(graph, ir_version=7, opset_imports=[helper.make_opsetid("", opset)])


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"W": (4 * HIDDEN, SIZE), "R": (4 * HIDDEN, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def in_onnx_order(array: np.ndarray) -> np.ndarray:
    return array.reshape(4, HIDDEN, -1)[ORDER].reshape(array.shape)


@pytest.mark.parametrize("old", [False, True])
def test_gates_in_another_order_are_pruned_as_those_of_onnx(old):
    stored = weights()
    nodes, tensors = [], {**stored, "front": np.array([0])}
    for name in "WR":
        more, constants = turned(name, old=old)
        operands, axes = ([], {"axes": [0]}) if old else (["front"], {})
        unsqueeze = helper.make_node(
            "Unsqueeze", [f"{name}_turned", *operands], [f"{name}_3d"], **axes
        )
        nodes += [*more, unsqueeze]
        tensors |= constants
    lstm = helper.make_node("LSTM", ["x", "W_3d", "R_3d"], ["y"], "lstm", hidden_size=HIDDEN)
    plain = helper.make_node("LSTM", ["x", "W", "R"], ["y"], "lstm", hidden_size=HIDDEN)
    ordered = {name: in_onnx_order(array)[None] for name, array in stored.items()}
    found = {}
    for kind, proto in {
        "turned": model([*nodes, lstm], tensors, 9 if old else 13),
        "plain": model([plain], ordered, 13),
    }.items():
        result = iobs_onnx.prune(proto, calibration=FEEDS, sparsity="2:4", provider="cpu")
        assert [site.initializer for site in result.report.sites] == ["W", "R"]
        slots = stored_slots(result.model)
        found[kind] = {name: slots[name].tensor.numpy() for name in "WR"}
        found[kind]["error"] = [site.layer_error for site in result.report.sites]
        if not old:
            quantized = iobs_onnx.prune(
                proto, calibration=FEEDS, sparsity="2:4", quantize="int8", provider="cpu"
            )
            found[kind]["int8"] = [site.layer_error for site in quantized.report.sites]
            assert all(site.quantized is not None for site in find_sites(quantized.model).sites)
    if not old:
        # One scale a gate's output, wherever it stands.
        np.testing.assert_allclose(found["turned"]["int8"], found["plain"]["int8"], rtol=1e-3)
    np.testing.assert_allclose(found["turned"]["error"], found["plain"]["error"], rtol=1e-4)
    for name in "WR":
        mine, theirs = in_onnx_order(found["turned"][name]), found["plain"][name][0]
        np.testing.assert_array_equal(mine == 0, theirs == 0)
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        ((0, 1), (1, 3)),  # a part is missing
        ((0, 2), (1, 4)),  # one is there twice
    ],
)
def test_parts_that_are_not_the_whole_are_declined(parts):
    nodes, tensors = turned("W", parts)
    unsqueeze = helper.make_node("Unsqueeze", ["W_turned"], ["W_3d"], axes=[0])
    tensors |= weights() | {"R": weights()["R"][None]}
    lstm = helper.make_node("LSTM", ["x", "W_3d", "R"], ["y"], "lstm", hidden_size=HIDDEN)
    found = find_sites(load_model(model([*nodes, unsqueeze, lstm], tensors)))
    assert [site.initializer for site in found.sites] == ["R"]
    assert [item.reason for item in found.declined] == ["behind Concat"]


def test_a_part_that_others_read_too():
    nodes, tensors = turned("W")
    unsqueeze = helper.make_node("Unsqueeze", ["W_turned"], ["W_3d"], axes=[0])
    tensors |= weights() | {"R": weights()["R"][None]}
    lstm = helper.make_node("LSTM", ["x", "W_3d", "R"], ["h"], "lstm", hidden_size=HIDDEN)
    add = helper.make_node("Add", ["h", "W_0"], ["y"])
    found = find_sites(load_model(model([*nodes, unsqueeze, lstm, add], tensors)))
    assert [item.reason for item in found.declined] == ["behind Concat"]


def test_inputs_in_another_order_are_declined():
    """Which of R's states meet which of its columns would change."""
    nodes, tensors = turned("R", axis=1, unit=2)
    unsqueeze = helper.make_node("Unsqueeze", ["R_turned"], ["R_3d"], axes=[0])
    tensors |= weights() | {"W": weights()["W"][None]}
    lstm = helper.make_node("LSTM", ["x", "W", "R_3d"], ["y"], "lstm", hidden_size=HIDDEN)
    found = find_sites(load_model(model([*nodes, unsqueeze, lstm], tensors)))
    assert [site.initializer for site in found.sites] == ["W"]
    assert [item.reason for item in found.declined] == [TURNED]


@pytest.mark.parametrize("axis", [0, 1])
def test_products_whose_biases_would_have_to_follow_are_declined(axis):
    nodes, tensors = turned("w", axis=axis, unit=3)
    tensors["w"] = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32)
    tensors["v"] = tensors["w"].copy()
    products = [
        helper.make_node("MatMul", ["x", "w_turned"], ["h"], "M"),
        helper.make_node("MatMul", ["h", "v"], ["y"], "N"),
    ]
    loaded = load_model(model([*nodes, *products], tensors))
    found = find_sites(loaded)
    [declined] = found.declined
    assert declined.reason == TURNED
    chains, reasons = find_chains(loaded, found.sites)
    assert chains == ()
    assert list(reasons.values()) == ["'w' is put together in another order"]
