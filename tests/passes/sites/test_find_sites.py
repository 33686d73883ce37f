"""What is a site, what is declined and with which reason, and what it is called."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.errors import InputError, ModelError
from iobs_onnx.passes import find_sites, load_model
from iobs_onnx.site import Candidates, Rows

W = np.arange(1, 25, dtype=np.float32).reshape(6, 4)
SQUARE = np.arange(1, 37, dtype=np.float32).reshape(6, 6)


def node(op_type: str, *names: str, **attributes: object) -> onnx.NodeProto:
    """The last name is the output; the node is called as its output, in capitals."""
    *inputs, output = names
    return helper.make_node(op_type, inputs, [output], name=output.upper(), **attributes)


def found(proto: onnx.ModelProto | Path) -> Candidates:
    return find_sites(load_model(proto))


def reason(proto: onnx.ModelProto) -> str:
    result = found(proto)
    assert result.sites == ()
    [declined] = result.declined
    return declined.reason


# ---- shared weights


def test_one_weight_of_two_nodes_is_one_site_with_two_taps(make):
    nodes = [node("MatMul", "x", "w", "y"), node("Relu", "y", "r"), node("Gemm", "r", "w", "z")]
    [site] = found(make(nodes, {"x": [5, 6]}, {"w": SQUARE}, ["z"])).sites
    assert site.nodes == ("Y", "Z")
    assert site.op_type == "MatMul, Gemm"
    assert [tap.value for tap in site.taps] == ["x", "r"]


def test_weight_shared_through_different_chains(make):
    nodes = [
        node("Transpose", "w", "t"),
        node("Identity", "t", "i"),
        node("MatMul", "x", "i", "y"),
        node("Gemm", "x", "w", "z", transB=1),
        node("MatMul", "y", "i", "v"),
    ]
    [site] = found(make(nodes, {"x": [5, 6]}, {"w": SQUARE}, ["z", "v"])).sites
    assert site.nodes == ("Y", "Z", "V")
    assert (site.axis, site.perm) == (1, (0, 1))
    # The first two read the same activation in the same form: one Hessian.
    assert [(tap.value, tap.form) for tap in site.taps] == [("x", Rows(-1)), ("y", Rows(-1))]


def test_sites_that_read_one_activation_share_its_tap(make):
    nodes = [node("MatMul", "x", "q", "a"), node("MatMul", "x", "k", "b")]
    first, second = found(make(nodes, {"x": [5, 6]}, {"q": W, "k": W + 1}, ["a", "b"])).sites
    assert first.taps == second.taps


@pytest.mark.parametrize(
    ("nodes", "outputs", "expected"),
    [
        (
            [node("MatMul", "x", "w", "y"), node("Gemm", "x", "w", "z", transB=1)],
            ["y", "z"],
            "shared in two orientations, by MatMul 'Y' and Gemm 'Z'",
        ),
        (
            [
                node("Gather", "w", "ids", "e"),
                node("Transpose", "w", "t"),
                node("MatMul", "x", "t", "y"),
            ],
            ["e", "y"],
            "also read by Gather 'E'",
        ),
        ([node("MatMul", "x", "w", "y")], ["y", "w"], "also a graph output, 'w'"),
        (
            [node("Transpose", "w", "t"), node("MatMul", "x", "t", "y")],
            ["y", "t"],
            "also a graph output, 't'",
        ),
        (
            [node("MatMul", "x", "w", "y"), node("DeformConv", "x", "w", "z")],
            ["y", "z"],
            "shared, and at DeformConv 'Z': DeformConv is not supported: "
            "it samples its input where another input says",
        ),
        ([node("Gemm", "x", "w", "w", "y")], ["y"], "also read by Gemm 'Y'"),
    ],
    ids=["orientation", "tied-embedding", "output", "output-of-chain", "unsupported", "bias"],
)
def test_shared_weight_declined_with_the_other_use(make, nodes, outputs, expected):
    proto = make(nodes, {"x": [6, 6]}, {"w": SQUARE, "ids": np.array([0])}, outputs)
    assert reason(proto) == expected


def test_reading_the_shape_is_no_use(make):
    nodes = [node("Shape", "w", "s"), node("MatMul", "x", "w", "y")]
    assert len(found(make(nodes, {"x": [5, 6]}, {"w": W}, ["y", "s"])).sites) == 1


# ---- no site


@pytest.mark.parametrize(
    ("nodes", "weight", "expected"),
    [
        ([node("MatMul", "x", "w", "y")], np.ones(6, np.float32), "1-D weight"),
        ([node("MatMul", "x", "w", "y")], np.ones((6, 4), np.int32), "dtype INT32"),
        ([node("MatMul", "x", "w", "y")], np.ones((6, 0), np.float32), "empty tensor"),
        ([node("MatMul", "w", "w", "y")], SQUARE, "shared, and at MatMul 'Y': both operands"),
        (
            [node("Constant", "k", value_floats=[1.0] * 6), node("Conv", "k", "w", "y")],
            np.ones((4, 6, 3), np.float32),
            "both operands are constant",
        ),
        ([node("Mul", "w", "w", "s"), node("MatMul", "x", "s", "y")], W, "behind Mul"),
        (
            [
                node("Mul", "w", "w", "s"),
                node("Add", "s", "w", "r"),
                node("Transpose", "r", "t"),
                node("MatMul", "x", "t", "y"),
            ],
            W.T,
            "behind Add",
        ),
        ([node("Conv", "x", "w", "y", group=4)], np.ones((4, 1, 3), np.float32), "one input"),
        ([node("Conv", "x", "w", "y", group=4)], np.ones((6, 2, 3), np.float32), "6 output chan"),
        ([node("Conv", "x", "w", "y")], np.ones((2,) * 6, np.float32), "6-D weight"),
        (
            [node("DeformConv", "x", "w", "y")],
            np.ones((4, 2, 3, 3), np.float32),
            "DeformConv is not supp",
        ),
        (
            [helper.make_node("MatMulNBits", ["x", "w"], ["y"], domain="com.microsoft")],
            np.ones((4, 1, 16), np.uint8),
            "packed as 4 bits in blocks of 0: only",
        ),
    ],
)
def test_declined(make, nodes, weight, expected):
    assert reason(make(nodes, {"x": [5, 6]}, {"w": weight}, ["y"])).startswith(expected)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Relu", "x", "a"), node("MatMul", "x", "a", "y")],
        [node("Mul", "x", "w", "a"), node("MatMul", "x", "a", "y")],
        [node("MatMul", "x", "given", "y")],
        [node("Add", "x", "w", "y")],
    ],
    ids=["attention", "modulated", "graph-input", "no-weight-operator"],
)
def test_not_a_candidate(make, nodes):
    result = found(make(nodes, {"x": [6, 6], "given": [6, 6]}, {"w": SQUARE}, ["y"]))
    assert result == Candidates((), ())


def test_overridable_initializer_is_a_site(make):
    proto = make([node("MatMul", "x", "w", "y")], {"x": [5, 6], "w": [6, 4]}, {"w": W}, ["y"])
    assert [site.initializer for site in found(proto).sites] == ["w"]


def test_bodies_are_walked(make):
    empty = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    inner = helper.make_graph(
        [node("MatMul", "x", "v", "m"), node("MatMul", "m", "outer", "o")],
        "then",
        [],
        [empty],
        [numpy_helper.from_array(SQUARE, "v")],
    )
    middle = helper.make_graph(
        [helper.make_node("If", ["c"], ["o"], "IN", then_branch=inner, else_branch=inner)],
        "middle",
        [],
        [empty],
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], "OUT", then_branch=middle, else_branch=middle),
        node("MatMul", "y", "w", "z"),
    ]
    initializers = {"w": SQUARE, "outer": SQUARE, "c": np.array(True)}
    result = found(make(nodes, {"x": [6, 6]}, initializers, ["z"]))
    inside, captured, _ = result.sites
    assert [site.initializer for site in result.sites] == ["v", "outer", "w"]
    ways = {f"OUT:{a}_branch/IN:{b}_branch" for a in ("then", "else") for b in ("then", "else")}
    [tap] = inside.taps
    assert tap.value.removesuffix("/x") in ways
    assert {tap.value for tap in captured.taps} == {f"{way}/m" for way in ways}
    # Four copies of the inner body hold a weight of their own; only one can have the name.
    assert {(d.initializer, d.reason) for d in result.declined} == {
        ("v", "another body stores a tensor of the same name: rename one")
    }
    names = [d.name for d in result.declined]
    assert len(names) == len(set(names)) == 3


def test_model_local_functions(make):
    weight = numpy_helper.from_array(W, "value")
    body = [
        helper.make_node("Constant", [], ["k"], value=weight),
        helper.make_node("MatMul", ["a", "k"], ["b"]),
    ]
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "Linear", ["a", "u"], ["b"], body, opset)
    call = helper.make_node("Linear", ["x", "w"], ["y"], domain="local")
    proto = make([call], {"x": [5, 6]}, {"w": SQUARE}, ["y"], functions=[function])
    [inside] = found(proto).declined
    assert inside.reason.startswith("inside a model-local function: inline the functions first")
    # What cannot be unfolded keeps its calls.
    function.opset_import[0].version = 16
    proto = make([call], {"x": [5, 6]}, {"w": SQUARE}, ["y"], functions=[function])
    passed, inside = found(proto).declined
    assert passed.reason.startswith("passed to the model-local function Linear: inline")
    assert inside.reason == "inside the model-local function Linear"


def test_missing_input_is_a_model_error(make):
    proto = make([node("Conv", "", "w", "y")], {}, {"w": np.ones((4, 4, 3), np.float32)}, ["y"])
    with pytest.raises(ModelError, match="Conv lacks input 0"):
        found(proto)


# ---- real graphs

REAL = {"magika": (3, {}), "resnet20": (20, {}), "stories15M": (42, {"m.lm_head.weight"})}


def test_real_models(real_model, magika):
    result = found(real_model)
    sites, declined = REAL["magika" if real_model == magika else real_model.stem]
    assert len(result.sites) == sites
    assert {d.name for d in result.declined} == set(declined)
    assert len({site.name for site in result.sites}) == sites


def test_finding_does_not_load_external_weights(make, tmp_path):
    proto = make([node("MatMul", "x", "w", "y")], {"x": [5, 6]}, {"w": W}, ["y"])
    onnx.save(
        proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.bin"
    )
    model = load_model(tmp_path / "m.onnx")
    (tmp_path / "m.bin").unlink()
    assert len(find_sites(model).sites) == 1


def corpus() -> list[Path]:
    return sorted((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"))


def test_onnx_corpus_never_crashes():
    files = corpus()
    assert len(files) > 100
    refused = []
    candidates = 0
    for file in files:
        try:
            result = found(file)
        except InputError as error:
            refused.append((file, str(error)))
            continue
        candidates += len(result.sites) + len(result.declined)
        names = [record.name for record in (*result.sites, *result.declined)]
        assert len(names) == len(set(names))
    for file, message in refused:
        assert file.name in message
        assert "sparse" in message, message
    assert candidates > 100


def test_weight_of_many_uses(make):
    """Ten thousand nodes on one weight: a quadratic walk would take minutes."""
    nodes = [node("MatMul", f"x{i}", "w", f"x{i + 1}") for i in range(10_000)]
    proto = make(nodes, {"x0": [5, 6]}, {"w": SQUARE}, ["x10000"])
    [site] = found(proto).sites
    assert len(site.nodes) == 10_000
