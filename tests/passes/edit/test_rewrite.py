"""Instrument and rewrite: what changes, and that nothing else does."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.errors import CheckError, ModelError
from iobs_onnx.passes import find_sites, instrument, load_model, rewrite

W = np.arange(1, 25, dtype=np.float32).reshape(6, 4)
X = np.arange(30, dtype=np.float32).reshape(5, 6) - 15


@pytest.fixture
def chain(make) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    initializers = {"w": W, "b": np.ones(4, np.float32), "v": W.T.copy()}
    return make(nodes, {"x": [5, 6], "spare": [1]}, initializers, ["y"])


def test_outputs_are_exactly_the_values_in_order_without_doubles(chain, run):
    model = load_model(chain)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    tapped = instrument(model, ["m", "x", "r", "m"])
    results = run(tapped, {"x": X})
    relu = np.maximum(X, 0)
    assert list(results) == ["m", "x", "r"]
    assert np.array_equal(results["x"], X)
    assert np.array_equal(results["r"], relu)
    assert np.array_equal(results["m"], relu @ W)
    assert [node.op_type for node in tapped.graph] == ["Relu", "MatMul"]
    assert list(tapped.graph.initializers) == ["w"]
    assert [value.name for value in tapped.graph.inputs] == ["x"]
    # Tensors are shared, the original is untouched and shares no node.
    shared = tapped.graph.initializers["w"].const_value
    assert shared is model.graph.initializers["w"].const_value
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert not set(tapped.graph) & set(model.graph)


def test_a_value_that_is_an_output_already(chain, run):
    results = run(instrument(load_model(chain), ["y", "a"]), {"x": X})
    assert list(results) == ["y", "a"]


def test_given_values_become_inputs(chain, run):
    """The graph is cut where values are given; what made them is left out."""
    part = instrument(load_model(chain), ["y"], {"m": (1, 2), "x": (1, 2)})
    assert [(v.name, v.dtype, v.shape.rank()) for v in part.graph.inputs] == [
        ("m", ir.DataType.FLOAT, 2)
    ]
    assert [node.op_type for node in part.graph] == ["Add", "MatMul"]
    m = np.maximum(X, 0) @ W
    assert np.array_equal(run(part, {"m": m})["y"], (m + 1) @ W.T)


def test_unknown_value(chain):
    with pytest.raises(ModelError, match="activation 'lost'"):
        instrument(load_model(chain), ["y"], {"lost": (1, 2)})
    with pytest.raises(ModelError, match="activation 'nope'"):
        instrument(load_model(chain), ["nope"])


def test_overridable_initializers_go_when_not_needed(chain):
    for name, array in (("w", W), ("v", W.T)):
        chain.graph.input.append(helper.make_tensor_value_info(name, 1, array.shape))
    tapped = instrument(load_model(chain), ["m"])
    assert [value.name for value in tapped.graph.inputs] == ["x", "w"]


def test_bodies_keep_what_they_capture(make, run):
    """One value is captured by a body, one by a body of that body."""
    out, last = (helper.make_tensor_value_info(name, 1, None) for name in "op")
    inner = helper.make_graph([helper.make_node("Add", ["r", "w"], ["o"])], "in", [], [out])
    nested = helper.make_graph(
        [helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner)],
        "nested",
        [],
        [out],
    )
    other = helper.make_graph([helper.make_node("Abs", ["n"], ["p"])], "other", [], [last])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Abs", ["x"], ["unneeded"]),
        helper.make_node("If", ["c"], ["i"], then_branch=nested, else_branch=other),
        helper.make_node("Neg", ["i"], ["y"]),
    ]
    initializers = {"c": np.array(True), "w": W}
    proto = make(nodes, {"x": [6, 4]}, initializers, ["y", "unneeded"])
    tapped = instrument(load_model(proto), ["i"])
    assert [node.op_type for node in tapped.graph] == ["Relu", "Neg", "If"]
    assert np.array_equal(run(tapped, {"x": W})["i"], W + W)


def test_taps_of_a_real_model_agree_with_the_whole_model(magika, run):
    model = load_model(magika)
    taps = dict.fromkeys(tap.value for site in find_sites(model).sites for tap in site.taps)
    outputs = [value.name for value in model.graph.outputs]
    [data] = [value for value in model.graph.inputs]
    feeds = {data.name: np.random.default_rng(0).integers(0, 257, (2, 2048)).astype(np.int32)}
    tapped = run(instrument(model, taps), feeds)
    everything = run(instrument(model, [*taps, *outputs]), feeds)
    assert list(tapped) == list(taps)
    for name, array in tapped.items():
        assert np.array_equal(array, everything[name])
    assert np.array_equal(everything[outputs[0]], run(onnx.load(magika), feeds)[outputs[0]])


# ---- rewrite


def test_rewrite_keeps_name_doc_and_metadata(chain):
    chain.graph.initializer[0].doc_string = "doc"
    chain.graph.initializer[0].metadata_props.add(key="k", value="v")
    model = load_model(chain)
    rewrite(model, {"w": W * 0})
    tensor = model.graph.initializers["w"].const_value
    assert (tensor.name, tensor.doc_string, dict(tensor.metadata_props)) == ("w", "doc", {"k": "v"})
    assert not tensor.numpy().any()
    assert tensor.dtype == ir.DataType.FLOAT


def test_rewrite_of_a_constant_node(make, run):
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(W, "name"))
    constant.attribute[0].doc_string = "doc"
    proto = make(
        [constant, helper.make_node("MatMul", ["x", "k"], ["y"])], {"x": [5, 6]}, {}, ["y"]
    )
    model = load_model(proto)
    rewrite(model, {"k": -W})
    assert np.array_equal(run(model, {"x": X})["y"], -(X @ W))
    attribute = ir.to_proto(model).graph.node[0].attribute[0]
    assert (attribute.doc_string, attribute.t.name) == ("doc", "name")


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_rewrite_keeps_the_stored_dtype(make, dtype):
    numpy_dtype = ir.DataType[{"float64": "DOUBLE"}.get(dtype, dtype.upper())].numpy()
    stored = (W / 64).astype(numpy_dtype)
    proto = make(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": [5, 6]},
        {"w": stored},
        ["y"],
        helper.np_dtype_to_tensor_dtype(numpy_dtype),
    )
    model = load_model(proto)
    [site] = find_sites(model).sites
    new = site.to_stored(-site.to_matrices(stored), numpy_dtype)
    rewrite(model, {"w": new})
    [written] = ir.to_proto(model).graph.initializer
    assert written.data_type == proto.graph.initializer[0].data_type
    assert np.array_equal(numpy_helper.to_array(written), -stored)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"w": W.T.copy()}, "expected float32"),
        ({"w": W.astype(np.float16)}, "got float16"),
        ({"nope": W}, "stores no such tensor"),
        ({"x": W}, "stores no such tensor"),
    ],
)
def test_rewrite_refuses_what_does_not_fit_and_then_changes_nothing(chain, weights, message):
    model = load_model(chain)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(CheckError, match=message):
        rewrite(model, {"v": W.T * 2, **weights})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
