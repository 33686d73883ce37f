"""Products and chains that are not sites, each with its reason; and what sites look like."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import find_sites, load_model
from iobs_onnx.site import Rows, Stacked

MS = "com.microsoft"


def make(nodes, weight, x=("a", "b", "c"), **tensors) -> onnx.ModelProto:
    """Nodes of (op_type, inputs, output, attributes) on `x` and the initializer `w`."""
    arrays = {"w": np.ones(weight, np.float32) if isinstance(weight, tuple) else weight, **tensors}
    graph = helper.make_graph(
        [
            helper.make_node(
                op, inputs, [output], domain=MS if op.startswith("Fused") else "", **rest
            )
            for op, inputs, output, rest in nodes
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


def einsum(equation: str, *inputs: str):
    return [("Einsum", list(inputs) or ["x", "w"], "y", {"equation": equation})]


def product(**attributes):
    return [("MatMul", ["x", "w"], "y", attributes)]


def site_of(proto):
    [site] = find_sites(load_model(proto)).sites
    return site


@pytest.mark.parametrize(
    ("nodes", "weight", "reason"),
    [
        (einsum("bi,bi->b"), (3, 4), "is not a matrix product"),
        (einsum("bi,bj->bij"), (3, 4), "is not a matrix product"),
        (einsum("bi,i->b"), (4,), "is not a matrix product"),
        (einsum("bi,ii->bi"), (4, 4), "reads a diagonal"),
        (einsum("bii,ij->bj"), (4, 5), "reads a diagonal"),
        (einsum("bi,ijk->bj"), (4, 5, 6), "sums an axis of the weight alone"),
        (einsum("bti,ij->bj"), (4, 5), "sums an axis of the activation alone"),
        (einsum("...i,ij->j"), (4, 5), "sums an axis of the activation alone"),
        (einsum("bi,...ij->...bj"), (2, 4, 5), "axes without a label"),
        (einsum("bi,ij->bj"), (2, 4, 5), "axes without a label"),
        (einsum("bi,ij->bj"), (1, 5), "repeats a weight axis of length 1"),
        (einsum("bi,ij,jk->bk", "x", "w", "w"), (4, 4), "3 operands: only products of two"),
        (einsum("bi->b", "x", "w"), (4, 4), "does not name two operands"),
        (product(), (5,), "1-D weight"),
        ([("LSTM", ["x", "w", "r"], "y", {})], (4, 5), "2-D weight where LSTM takes three axes"),
        ([("ConvTranspose", ["x", "w"], "y", {"group": 4})], (4, 2, 3), "one input channel"),
        ([("ConvTranspose", ["x", "w"], "y", {"group": 3})], (4, 2, 3), "4 input channels"),
        ([("ConvTranspose", ["x", "w"], "y", {})], (4, 2), "2-D weight: only 1-D, 2-D and 3-D"),
    ],
)
def test_no_product_that_can_be_pruned(nodes, weight, reason):
    proto = make(nodes, weight, r=np.ones((1, 4, 1), np.float32))
    [declined] = [d for d in find_sites(load_model(proto)).declined if d.initializer == "w"]
    assert reason in declined.reason


@pytest.mark.parametrize(
    ("equation", "operands", "weight", "form", "groups"),
    [
        ("bti,ij->btj", "xw", (4, 5), Rows(-1), 1),
        ("bti,ij", "xw", (4, 5), Rows(-1), 1),
        ("ji, bti -> btj", "wx", (5, 4), Rows(-1), 1),
        ("bit,ij->btj", "xw", (4, 5), Rows(-2), 1),
        ("ib...,ij->b...j", "xw", (4, 5), Rows(0), 1),
        ("...i,ij->...j", "xw", (4, 5), Rows(-1), 1),
        ("bhti,hij->bhtj", "xw", (3, 4, 5), Stacked((-1,), (-3,), (3,)), 3),
        ("ebi,eij->ebj", "xw", (3, 4, 5), Stacked((-1,), (-3,), (3,)), 3),
        ("bthd,hde->bte", "xw", (2, 4, 5), Stacked((-2, -1)), 1),
    ],
)
def test_einsum(equation, operands, weight, form, groups):
    site = site_of(make(einsum(equation, *operands), weight))
    assert site.taps[0].form == form
    assert (site.groups, site.out_features) == (groups, 5)


@pytest.mark.parametrize(
    ("x", "groups", "form"),
    [
        (("b", 3, "t", 16), 3, Stacked((-1,), (-3,), (3,))),
        (("b", "e", "t", 16), 3, Stacked((-1,), (-3,), (3,))),
        (None, 3, Stacked((-1,), (-3,), (3,))),
        (("b", 1, "t", 16), 1, Rows(-1)),
        (("t", 16), 1, Rows(-1)),
        ((16,), 1, Rows(-1)),
    ],
)
def test_matrices_that_meet_one_activation_share_its_hessian(x, groups, form):
    site = site_of(make(product(), (3, 16, 6), x))
    assert (site.groups, site.groups * site.out_features, site.in_features) == (groups, 18, 16)
    assert site.taps[0].form == form


def test_a_vector_on_the_right_of_batched_matrices():
    site = site_of(make([("MatMul", ["w", "x"], "y", {})], (3, 6, 16), (16,)))
    assert (site.groups, site.taps[0].form) == (1, Rows(-1))


REACHED = {
    "reshape": ([("Reshape", ["w", "s"], "v", {})], (2, 8, 6), {"s": np.array([16, 6])}),
    "reshape, rest": ([("Reshape", ["w", "s"], "v", {})], (2, 8, 6), {"s": np.array([-1, 6])}),
    "reshape, same": ([("Reshape", ["w", "s"], "v", {})], (16, 2, 3), {"s": np.array([0, -1])}),
    "flatten": ([("Flatten", ["w"], "v", {})], (16, 2, 3), {}),
    "flatten, last": ([("Flatten", ["w"], "v", {"axis": -1})], (4, 4, 6), {}),
    "squeeze all": ([("Squeeze", ["w"], "v", {})], (1, 16, 1, 6), {}),
    "transpose, then fold": (
        [("Transpose", ["w"], "t", {"perm": [1, 0, 2]}), ("Reshape", ["t", "s"], "v", {})],
        (8, 2, 6),
        {"s": np.array([16, 6])},
    ),
}


@pytest.mark.parametrize("case", REACHED)
def test_reached_behind_a_chain(case):
    chain, weight, tensors = REACHED[case]
    nodes = [*chain, ("MatMul", ["x", "v"], "y", {})]
    array = np.arange(np.prod(weight), dtype=np.float32).reshape(weight)
    site = site_of(make(nodes, array, **tensors))
    operand = array.transpose(1, 0, 2) if "transpose" in case else array
    np.testing.assert_array_equal(site.to_matrices(array)[0], operand.reshape(16, 6).T)
    np.testing.assert_array_equal(site.to_stored(site.to_matrices(array), array.dtype), array)


def test_the_part_of_an_axis_that_is_grouped():
    chain = [("Reshape", ["w", "s"], "v", {}), *einsum("bthd,hde->bte", "x", "v")]
    site = site_of(make(chain, (8, 6), s=np.array([2, 4, 6])))
    assert (site.axis, site.run, site.in_features) == (0, 4, 8)


@pytest.mark.parametrize(
    ("chain", "tensors", "reason"),
    [
        (
            [("Transpose", ["w"], "t", {}), ("Reshape", ["t", "s"], "v", {})],
            {"s": np.array([16, 6])},
            "behind Reshape, which mixes transposed axes",
        ),
        ([("Reshape", ["w", "s"], "v", {})], {"s": np.array([5, 5])}, "mixes"),
        ([("Reshape", ["w", "s"], "v", {})], {"s": np.array([-1, -1, -1, 6])}, "does not fit"),
        ([("Reshape", ["w", "s"], "v", {})], {"s": np.array([-2, -8, 6])}, "does not fit"),
        ([("Reshape", ["w", "s"], "v", {})], {"s": np.array(["a", "b"])}, "not constant"),
        ([("Squeeze", ["w", "s"], "v", {})], {"s": np.array([7])}, "mixes"),
        ([("Reshape", ["w", "s"], "v", {})], {"s": np.array([16, 6, 1, 0])}, "does not fit"),
        (
            [("Shape", ["x"], "s", {}), ("Reshape", ["w", "s"], "v", {})],
            {},
            "behind Reshape, whose shape is not constant",
        ),
        ([("Unsqueeze", ["w", "x"], "v", {})], {}, "behind Unsqueeze, whose shape is not const"),
        ([("Slice", ["w", "s", "s"], "v", {})], {"s": np.array([0, 0])}, "behind Slice"),
    ],
)
def test_declined_behind_a_chain(chain, tensors, reason):
    proto = make([*chain, ("MatMul", ["x", "v"], "y", {})], (8, 12), **tensors)
    [declined] = find_sites(load_model(proto)).declined
    assert reason in declined.reason


def test_one_node_that_reads_a_weight_twice():
    """An LSTM whose W and R are one tensor: both activations meet it."""
    proto = make([("LSTM", ["x", "w", "w"], "y", {"hidden_size": 4})], (1, 16, 4))
    site = site_of(proto)
    assert [tap.value for tap in site.taps] == ["x", "y"]
    assert site.nodes == ("y",)


def test_shared_through_a_reshape_is_one_orientation():
    nodes = [
        ("Reshape", ["w", "s"], "v", {}),
        ("MatMul", ["x", "v"], "a", {}),
        ("MatMul", ["x", "w"], "b", {}),
        ("Add", ["a", "b"], "y", {}),
    ]
    assert len(site_of(make(nodes, (16, 6), s=np.array([16, 6]))).nodes) == 2


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.float16, "FLOAT16"), (ml_dtypes.bfloat16, "BFLOAT16"), (np.float64, "DOUBLE")],
)
def test_a_dtype_is_kept_and_zeros_stay(dtype, name):
    dtype = np.dtype(dtype)
    array = np.random.default_rng(0).standard_normal((8, 6)).astype(dtype)
    site = site_of(make(product(), array))
    matrices = site.to_matrices(array)
    assert matrices.dtype == np.float32
    stored = site.to_stored(np.where(np.arange(8) % 4 < 2, matrices, 0), dtype)
    assert (site.dtype, stored.dtype) == (name, dtype)
    np.testing.assert_array_equal(stored[[0, 1, 4, 5]], array[[0, 1, 4, 5]].astype(np.float32))
    assert not stored[[2, 3, 6, 7]].any()


@pytest.mark.parametrize(
    ("op_type", "attributes", "message"),
    [
        ("FusedConv", {"group": "a"}, "'group' of FusedConv is STRING where it takes INT"),
        ("FusedConv", {"strides": 1}, "'strides' of FusedConv is INT where it takes INTS"),
        ("FusedConv", {"auto_pad": 1.0}, "'auto_pad' of FusedConv is FLOAT where it takes STRING"),
    ],
)
def test_attribute_of_another_type(op_type, attributes, message):
    """Loading refuses it of ONNX's own operators, of which it knows the types."""
    with pytest.raises(ModelError, match=message):
        find_sites(load_model(make([(op_type, ["x", "w"], "y", attributes)], (4, 4, 3))))


def test_groups_below_one():
    proto = make([("FusedConv", ["x", "w"], "y", {"group": 0})], (6, 2, 3))
    [declined] = find_sites(load_model(proto)).declined
    assert "6 output channels are not a multiple of 0 groups" in declined.reason
