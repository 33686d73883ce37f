"""Biases and residual streams around a site, token inputs, and how a bias is rewritten."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from iobs_onnx.passes import (
    find_sites,
    find_surroundings,
    find_token_input,
    load_model,
    rewrite_biases,
)
from iobs_onnx.site import Patches, Rows, Tap

W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
B = np.arange(8, dtype=np.float32)


@pytest.fixture
def block(make):
    """`y = (x w + b) + x`, `z = gemm(y)`, both with the one bias that an exporter merged."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "M"),
        helper.make_node("Add", ["b", "m"], ["a"], "A"),
        helper.make_node("Add", ["a", "x"], ["y"], "R"),
        helper.make_node("Gemm", ["y", "v", "b"], ["z"], "G", transB=1),
    ]
    return make(nodes, {"x": ["n", 8]}, {"w": W, "b": B, "v": W[::-1].copy()}, ["z"])


def test_bias_and_residual(block):
    model = load_model(block)
    first, second = find_sites(model).sites
    found = find_surroundings(model, (first, second))
    assert found[first].bias == found[second].bias == "b"
    assert found[first].residual == Tap("x", Rows(-1), 8)
    assert found[second].residual is None


@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
@pytest.mark.parametrize("first", [True, False])
def test_a_stream_that_is_added_within_a_normalisation(make, kind: str, first: bool):
    """As ONNX Runtime GenAI's builder and ONNX Runtime's optimiser write it."""
    inputs = ["m", "x", "b"] if first else ["x", "m", "b"]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "M"),
        helper.make_node(kind, inputs, ["n"], "N", domain="com.microsoft"),
        helper.make_node("MatMul", ["n", "v"], ["k"], "K"),
        helper.make_node(kind, ["n", "n", "k"], ["y"], "L", domain="com.microsoft"),
    ]
    model = load_model(make(nodes, {"x": ["n", 8]}, {"w": W, "b": B, "v": W + 1}, ["y"]))
    site, scale = find_sites(model).sites
    found = find_surroundings(model, (site, scale))
    assert found[site].residual == Tap("x", Rows(-1), 8)
    assert found[site].bias is None  # `b` is the scale
    assert found[scale].residual is None  # scales, and is not added


def test_a_shared_bias_is_parted_and_an_own_one_exchanged(block, run):
    model = load_model(block)
    first, second = find_sites(model).sites
    rewrite_biases(model, {first: B + 1})
    x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    y = x @ W + (B + 1) + x
    expected = y @ W[::-1].T + B
    np.testing.assert_allclose(run(model, {"x": x})["z"], expected, rtol=1e-4, atol=1e-4)
    names = set(model.graph.initializers)
    rewrite_biases(model, {second: B + 2})  # nobody else reads it any more
    assert set(model.graph.initializers) == names
    np.testing.assert_allclose(run(model, {"x": x})["z"], expected + 2, rtol=1e-4, atol=1e-4)


def test_an_addition_that_lacks_an_input_adds_nothing(make):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "M"),
        helper.make_node("Add", ["m"], ["y"], "A"),
    ]
    model = load_model(make(nodes, {"x": ["n", 8]}, {"w": W}, ["y"]))
    sites = find_sites(model).sites
    [around] = find_surroundings(model, sites).values()
    assert (around.bias, around.residual) == (None, None)


def test_products_that_are_more_than_the_weight_times_the_rows(make):
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["a"], "scaled", alpha=2.0),
        helper.make_node("MatMul", ["v", "a"], ["c"], "left"),
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    model = load_model(make(nodes, {"x": [8, 8]}, {"w": W, "v": W + 1, "b": B}, ["y"]))
    sites = find_sites(model).sites
    assert len(sites) == 2
    assert find_surroundings(model, sites) == {}


def test_convolution_in_a_residual_block(make):
    kernel = np.random.default_rng(2).standard_normal((4, 4, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], "C", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    model = load_model(make(nodes, {"x": [1, 4, 6, 6]}, {"k": kernel, "b": B[:4]}, ["y"]))
    [site] = find_sites(model).sites
    around = find_surroundings(model, [site])[site]
    assert around.bias == "b"
    assert around.residual == Tap("x", Patches((1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), 4)


def test_token_input(make):
    def model(nodes, inputs):
        tables = {"words": np.ones((100, 8), np.float32), "types": np.ones((2, 8), np.float32)}
        return load_model(make(nodes, inputs, tables, ["y"], dtype=TensorProto.INT64))

    nodes = [
        helper.make_node("Cast", ["ids"], ["ids32"], to=TensorProto.INT32),
        helper.make_node("Gather", ["words", "ids32"], ["w"]),
        helper.make_node("Gather", ["types", "kinds"], ["t"]),
        helper.make_node("Add", ["w", "t"], ["y"]),
    ]
    assert find_token_input(model(nodes, {"kinds": ["n"], "ids": ["n"]})) == ("ids", 100)
    computed = [
        helper.make_node("Add", ["ids", "ids"], ["twice"]),
        helper.make_node("Gather", ["words", "twice"], ["y"]),
    ]
    assert find_token_input(model(computed, {"ids": ["n"]})) is None
    tied = [
        helper.make_node("Transpose", ["words"], ["table"], perm=[1, 0]),
        helper.make_node("Gather", ["table", "ids"], ["y"]),
    ]
    assert find_token_input(model(tied, {"ids": ["n"]})) == ("ids", 8)
    packed = helper.make_node(
        "GatherBlockQuantized", ["words", "ids", "types"], ["y"], domain="com.microsoft"
    )
    assert find_token_input(model([packed], {"ids": ["n"]})) == ("ids", 100)
