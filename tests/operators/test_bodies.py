"""Weights in bodies of If, Loop and Scan: they are pruned as those of the same nodes outside."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.passes import find_sites, load_model, prepare, stored_slots

BOOL, FLOAT, INT64 = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT64
STEPS = 3
# Without what only nodes of the main graph have: taps that see pruned inputs, biases to move.
ALIKE = {"sequential": "none", "target": "layer", "bias_compensation": 0, "solver": "sparsegpt"}

Arrays = dict[str, np.ndarray]


def array(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def info(name: str, kind: int = FLOAT, shape: Sequence[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **rest: object) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), list(outputs), f"{op} {outputs[0]}", **rest)


def body(nodes, outputs, weights: Arrays | None = None, inputs=()) -> onnx.GraphProto:
    stored = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    return helper.make_graph(nodes, "body", inputs, outputs, stored)


def model(nodes, inputs, outputs: str, weights: Arrays, opset: int = 17) -> onnx.ModelProto:
    named = [info(name, shape=[None]) for name in outputs]
    graph = body(nodes, named, weights, inputs)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", opset)])


# Layers from `a` to `b`: their nodes, their weights, and the shape of `a`.
CONSTANT = node("Constant", "", "w", value=numpy_helper.from_array(array(8, 6), "w"))
LAYERS = {
    "MatMul": ([node("MatMul", "aw", "b")], {"w": array(8, 6)}, (20, 8)),
    "Gemm": ([node("Gemm", "aw", "b", transB=1)], {"w": array(6, 8)}, (20, 8)),
    "Conv": ([node("Conv", "aw", "b", pads=[1, 0])], {"w": array(6, 8, 2)}, (4, 8, 9)),
    "ConvTranspose": ([node("ConvTranspose", "aw", "b")], {"w": array(8, 6, 2)}, (4, 8, 9)),
    "two": (
        [node("MatMul", "aw", "m"), node("Tanh", "m", "t"), node("MatMul", "tv", "b")],
        {"w": array(8, 12), "v": array(12, 4)},
        (20, 8),
    ),
    "batched": ([node("MatMul", "aw", "b")], {"w": array(3, 8, 6)}, (3, 20, 8)),
    "LSTM": (
        [node("LSTM", "awr", ("", "b"), hidden_size=8)],
        {"w": array(1, 32, 8), "r": array(1, 32, 8)},
        (9, 4, 8),
    ),
    "Transpose": (
        [node("Transpose", "w", "u"), node("MatMul", "au", "b")],
        {"w": array(6, 8)},
        (20, 8),
    ),
    "Constant": ([CONSTANT, node("MatMul", "aw", "b")], {}, (20, 8)),
}


def branching(layer: str, *, inside: bool, nested: bool = False) -> tuple[onnx.ModelProto, Arrays]:
    """The layer runs where `c` holds, and `d`, if it is nested."""
    nodes, weights, shape = LAYERS[layer]
    zero = body([node("Constant", "", "z", value_float=0.0)], [info("z")])
    start = node("Identity", "x", "a")
    run = body([start, *nodes], [info("b")], weights if inside else {})
    main = node("If", "c", "y", then_branch=run, else_branch=zero)
    if nested:
        inner = body([node("If", "d", "o", then_branch=zero, else_branch=run)], [info("o")])
        main = node("If", "c", "y", then_branch=inner, else_branch=zero)
    flags = [info(flag, BOOL, []) for flag in "cd"[: 1 + nested]]
    made = model([main], [info("x", shape=shape), *flags], "y", {} if inside else weights)
    return made, {"x": array(4, *shape)}


def scanning(layer: str, *, inside: bool, backwards: bool = False) -> onnx.ModelProto:
    """The layer runs for every step of `x`."""
    nodes, weights, shape = LAYERS[layer]
    run = body(nodes, [info("b")], weights if inside else {}, [info("a", shape=shape)])
    ways = {"scan_output_axes": [0], "scan_output_directions": [1]} if backwards else {}
    main = node("Scan", "x", "y", num_scan_inputs=1, body=run, **ways)
    stacked = info("x", shape=(STEPS, *shape))
    return model([main], [stacked], "y", {} if inside else weights)


def looping(layer: str, *, inside: bool) -> onnx.ModelProto:
    """The layer runs for every step of `x`; a second output counts the steps."""
    nodes, weights, shape = LAYERS[layer]
    count = [node("Identity", "g", "o"), node("Add", ("n", "one"), "s")]
    run = body(
        [node("Gather", "xi", "a"), *nodes, *count],
        [info("o", BOOL), info("s"), info("b")],
        weights if inside else {},
        [info("i", INT64, []), info("g", BOOL, []), info("n", shape=[])],
    )
    run.value_info.append(info("a", shape=shape))
    held = {"k": np.array(STEPS), "f": np.float32(0), "one": np.float32(1)}
    main = node("Loop", ("k", "", "f"), "ly", body=run)
    stored = {**held, **({} if inside else weights)}
    return model([main], [info("x", shape=(STEPS, *shape))], "yl", stored)


def pruned(proto: onnx.ModelProto, feeds: list[Arrays], **options: object):
    options = {**ALIKE, "sparsity": "2:4", **options}
    return iobs_onnx.prune(proto, calibration=feeds, holdout=feeds[:1], provider="cpu", **options)


def weights_of(result: iobs_onnx.PruneResult) -> Arrays:
    stored = stored_slots(result.model)
    return {name: stored[name].tensor.numpy() for name in "wvr" if name in stored}


def flat(layer: str, steps: np.ndarray) -> Arrays:
    """The pruned weights of the layer in a main graph that is fed each step by itself."""
    nodes, weights, shape = LAYERS[layer]
    proto = model(nodes, [info("a", shape=shape)], "b", weights)
    return weights_of(pruned(proto, [{"a": step} for step in steps]))


def assert_alike(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys() != set()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight == 0, expected[name] == 0)
        # The same sums in another order.
        np.testing.assert_allclose(weight, expected[name], atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_if_counts_only_what_its_branch_met(layer, inside):
    proto, data = branching(layer, inside=inside)
    taken = [True, False, True, False]
    feeds = [{"x": x, "c": np.array(c)} for x, c in zip(data["x"], taken, strict=True)]
    assert_alike(weights_of(pruned(proto, feeds)), flat(layer, data["x"][taken]))


@pytest.mark.parametrize("layer", ["MatMul", "LSTM"])
def test_if_in_if(layer):
    proto, data = branching(layer, inside=True, nested=True)
    flags = [(True, False), (True, True), (False, False), (True, False)]
    feeds = [
        {"x": x, "c": np.array(c), "d": np.array(d)}
        for x, (c, d) in zip(data["x"], flags, strict=True)
    ]
    assert_alike(weights_of(pruned(proto, feeds)), flat(layer, data["x"][[0, 3]]))


@pytest.mark.parametrize("make", [scanning, looping])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_steps_are_samples(layer, inside, make):
    proto = make(layer, inside=inside)
    x = array(2, STEPS, *LAYERS[layer][2], seed=5)
    found = weights_of(pruned(proto, [{"x": sample} for sample in x]))
    assert_alike(found, flat(layer, x.reshape(-1, *x.shape[2:])))


def test_scan_with_axes_and_directions_of_its_outputs():
    x = array(2, STEPS, 20, 8, seed=5)
    found = pruned(scanning("MatMul", inside=True, backwards=True), [{"x": s} for s in x])
    assert_alike(weights_of(found), flat("MatMul", x.reshape(-1, 20, 8)))


def test_states_of_a_loop_are_rows():
    """`s = tanh(s w)`, three times, is three nodes with one weight."""
    weight, x = array(8, 8), array(2, 20, 8, seed=3)
    step = [node("MatMul", "nw", "m"), node("Tanh", "m", "s"), node("Identity", "g", "o")]
    inputs = [info("i", INT64, []), info("g", BOOL, []), info("n")]
    run = body(step, [info("o", BOOL), info("s")], {}, inputs)
    loop = node("Loop", ("k", "", "x"), "y", body=run)
    proto = model([loop], [info("x", shape=[20, 8])], "y", {"w": weight, "k": np.array(3)})
    states = "xpqy"
    unrolled = [
        part
        for i in range(3)
        for part in (
            node("MatMul", (states[i], "w"), f"m{i}".split()),
            node("Tanh", f"m{i}".split(), states[i + 1]),
        )
    ]
    flat_proto = model(unrolled, [info("x", shape=[20, 8])], "y", {"w": weight})
    feeds = [{"x": sample} for sample in x]
    assert_alike(weights_of(pruned(proto, feeds)), weights_of(pruned(flat_proto, feeds)))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_defaults_write_a_model_that_runs_and_holds_the_pattern(tmp_path, quantize):
    proto, data = branching("two", inside=True)
    feeds = [{"x": x, "c": np.array(True)} for x in data["x"]]
    out = tmp_path / "out.onnx"
    defaults = {"sequential": "site", "target": "dense", "solver": "iobs"}
    result = pruned(proto, feeds, output=out, quantize=quantize, **defaults)
    assert len(result.report.sites) == 2
    verified = iobs_onnx.verify(out, sparsity="2:4", dense=proto, data=feeds)
    assert not verified.failures
    assert verified.outputs[0]["relative_error"] < 0.7
    # What made the activations visible is not in the file.
    written = onnx.load(out).graph.node[-1]
    assert [len(a.g.output) for a in written.attribute] == [1, 1]
    assert len(written.output) == 1


def test_a_branch_that_no_sample_takes_is_declined():
    nodes, weights, shape = LAYERS["MatMul"]
    start = node("Identity", "x", "a")
    then = body([start, *nodes], [info("b")], weights)
    other = body([node("MatMul", "xv", "o")], [info("o")], {"v": array(8, 6)})
    main = node("If", "c", "y", then_branch=then, else_branch=other)
    proto = model([main], [info("x", shape=shape), info("c", BOOL, [])], "y", {})
    feeds = [{"x": x, "c": np.array(True)} for x in array(3, *shape)]
    for more in (
        {},
        {"sparsity": 0.5, "allocate": "error"},
        {"rounds": 2, "forgetting_factor": 0.5},
    ):
        result = pruned(proto, feeds, **{**more, "target": "dense", "solver": "iobs"})
        assert [site.initializer for site in result.report.sites] == ["w"]
        [declined] = result.report.declined
        assert declined["initializer"] == "v"
        assert "no sample of it runs the body" in declined["reason"]
        assert np.array_equal(stored_slots(result.model)["v"].tensor.numpy(), array(8, 6))
    with pytest.raises(DataError, match="no sample of it runs the body"):
        pruned(proto, feeds, include=["v"])


def test_a_node_of_the_main_graph_with_the_same_name():
    proto, data = branching("MatMul", inside=True)
    proto.graph.node.insert(0, helper.make_node("Relu", ["x"], ["unread"], "MatMul b"))
    feeds = [{"x": x, "c": np.array(True)} for x in data["x"]]
    assert_alike(weights_of(pruned(proto, feeds, bias_compensation=1)), flat("MatMul", data["x"]))


def test_weights_passed_to_functions():
    """Two calls of one function, which calls another, are the nodes that they stand for."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    product = [node("MatMul", "ab", "m"), node("Tanh", "m", "t")]
    inner = helper.make_function("my", "Product", ["a", "b"], ["t"], product, opsets)
    call = helper.make_node("Product", ["a", "b"], ["p"], "in", domain="my")
    calls = [call, node("Add", "pc", "q")]
    outer = helper.make_function("my", "Layer", ["a", "b", "c"], ["q"], calls, opsets)
    weights = {"w": array(8, 8), "v": array(8, 8, seed=2), "c": array(8, seed=3)}
    layers = [
        helper.make_node("Layer", ["x", "w", "c"], ["h"], "first", domain="my"),
        helper.make_node("Layer", ["h", "v", "c"], ["y"], "second", domain="my"),
    ]
    folded = model(layers, [info("x", shape=[20, 8])], "y", weights)
    folded.functions.extend([inner, outer])
    folded.opset_import.append(opsets[1])
    nodes = [
        node("MatMul", "xw", "m"),
        node("Tanh", "m", "t"),
        node("Add", "tc", "h"),
        node("MatMul", "hv", "n"),
        node("Tanh", "n", "u"),
        node("Add", "uc", "y"),
    ]
    flat_proto = model(nodes, [info("x", shape=[20, 8])], "y", weights)
    feeds = [{"x": x} for x in array(3, 20, 8, seed=4)]
    options = {"sequential": "site", "target": "dense", "solver": "iobs"}
    found = pruned(folded, feeds, **options)
    assert [f.name for f in found.model.functions.values()] == ["Product", "Layer"]
    assert_alike(weights_of(found), weights_of(pruned(flat_proto, feeds, **options)))


def test_what_cannot_be_brought_out_is_declined():
    nodes, weights, shape = LAYERS["MatMul"]
    zero = body([node("Constant", "", "z", value_float=0.0)], [info("z")])
    inner = body(nodes, [info("b")], weights)
    choose = node("If", "c", "o", then_branch=inner, else_branch=zero)
    scan = node(
        "Scan", "x", "y", num_scan_inputs=1, body=body([choose], [info("o")], {}, [info("a")])
    )
    inputs = [info("x", shape=(STEPS, *shape)), info("c", BOOL, [])]
    [declined] = find_sites(load_model(model([scan], inputs, "y", {}))).declined
    assert declined.reason.startswith("inside a body of Scan 'Scan y': what a body in it computes")
    twice = body(nodes, [info("b")], {}, [info("a")])
    custom = helper.make_node("Twice", ["x"], ["y"], "T", domain="my", body=twice)
    proto = model([node("Identity", "x", "y")], inputs[:1], "y", weights)
    proto.opset_import.append(helper.make_opsetid("my", 1))
    proto.graph.node[0].CopyFrom(custom)
    [declined] = find_sites(load_model(proto)).declined
    assert declined.reason.startswith("inside a body of Twice 'T': only those of If, Loop and Scan")


def test_axes_that_a_stack_would_hide_are_declined():
    nodes = [node("Einsum", "aw", "b", equation="k...,kn->...n")]
    run = body(nodes, [info("b")], {"w": array(8, 6)}, [info("a")])
    scan = node("Scan", "x", "y", num_scan_inputs=1, body=run)
    [declined] = find_sites(load_model(model([scan], [info("x")], "y", {}))).declined
    assert declined.reason.endswith("the activation's axes cannot be told")


def test_a_name_that_is_taken_is_refused():
    proto, _ = branching("MatMul", inside=True)
    loaded = load_model(proto)
    sites = find_sites(loaded).sites
    taken = sites[0].taps[0].value
    proto.graph.node.append(node("Identity", "x", (taken,)))
    with pytest.raises(ModelError, match="the name is needed for a tap"):
        prepare(load_model(proto), sites)
