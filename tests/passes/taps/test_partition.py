"""Segments: where they are cut, what they hand on, and that nothing is lost between them."""

import numpy as np
import onnx
import pytest
from onnx import helper

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import find_sites, load_model, partition


def matrix(seed: int, rows: int = 8, columns: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.fixture
def blocks(make) -> onnx.ModelProto:
    """Three residual blocks `x + relu(x q + x k) o`, and a mask alive throughout."""
    nodes, weights, x = [helper.make_node("Abs", ["m"], ["mask"])], {}, "x"
    for b in range(3):
        for i, name in enumerate("qko"):
            weights[f"{name}{b}"] = matrix(3 * b + i)
        nodes += [
            helper.make_node("MatMul", [x, f"q{b}"], [f"xq{b}"], f"Q{b}"),
            helper.make_node("MatMul", [x, f"k{b}"], [f"xk{b}"], f"K{b}"),
            helper.make_node("Add", [f"xq{b}", f"xk{b}"], [f"s{b}"]),
            helper.make_node("Mul", [f"s{b}", "mask"], [f"r{b}"]),
            helper.make_node("MatMul", [f"r{b}", f"o{b}"], [f"d{b}"], f"O{b}"),
            helper.make_node("Add", [x, f"d{b}"], [f"y{b}"]),
        ]
        x = f"y{b}"
    return make(nodes, {"x": ["n", 8], "m": ["n", 8]}, weights, ["y2"])


def names(segments):
    return [[site.name for site in segment.sites] for segment in segments]


def test_one_segment_without_reason_to_cut(blocks):
    model = load_model(blocks)
    [segment] = partition(model, find_sites(model).sites)
    assert segment.inputs == ("m", "x")
    assert segment.outputs == segment.alive == ()
    assert [tap.value for tap in segment.taps] == ["x", "r0", "y0", "r1", "y1", "r2"]


def test_sites_that_depend_on_each_other_are_parted(blocks):
    model = load_model(blocks)
    segments = partition(model, find_sites(model).sites, sequential="site")
    assert names(segments) == [["q0", "k0"], ["o0"], ["q1", "k1"], ["o1"], ["q2", "k2"], ["o2"]]
    second = segments[1]
    # The tap is made in the first segment if that is where the fewest tensors are alive.
    assert set(second.inputs) <= {"x", "r0", "mask"}
    assert second.outputs == second.changed == ("y0",)
    assert set(second.alive) == {"y0", "mask"}
    # Nothing after the last tap is run.
    assert segments[-1].outputs == ()


def test_blocks_are_parted_where_one_tensor_is_alive_beside_the_mask(blocks):
    model = load_model(blocks)
    segments = partition(model, find_sites(model).sites, sequential="segment")
    assert names(segments) == [["q0", "k0", "o0"], ["q1", "k1", "o1"], ["q2", "k2", "o2"]]
    assert [set(segment.outputs) for segment in segments] == [{"mask", "y0"}, {"y1"}, set()]
    assert segments[0].changed == ("y0",)  # the mask does not depend on a weight


@pytest.mark.parametrize("sequential", ["none", "segment", "site"])
def test_budget(blocks, sequential):
    model = load_model(blocks)
    sites = find_sites(model).sites
    weight, work = 256, 8 * 256
    budget = 2 * (2 * weight + work)
    segments = partition(model, sites, sequential=sequential, budget=budget)
    for segment in segments:
        assert segment.weight_bytes + work * len(segment.taps) <= budget
    assert len(segments) > len(partition(model, sites)) + 1
    assert sorted(site.name for segment in segments for site in segment.sites) == sorted(
        site.name for site in sites
    )


def test_a_node_larger_than_the_budget_stands_alone(blocks):
    model = load_model(blocks)
    segments = partition(model, outputs=["y2"], budget=1)
    assert len(segments) == 9
    assert segments[-1].wanted == ("y2",)


def test_a_weight_met_twice_is_solved_at_the_last_meeting(make):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "A"),
        helper.make_node("MatMul", ["a", "v"], ["b"], "B"),
        helper.make_node("MatMul", ["b", "w"], ["y"], "C"),
    ]
    weights = {"w": matrix(0), "v": matrix(1)}
    model = load_model(make(nodes, {"x": ["n", 8]}, weights, ["y"]))
    segments = partition(model, find_sites(model).sites, sequential="site")
    assert names(segments) == [[], ["v"], ["w"]]
    assert [[tap.value for tap in s.taps] for s in segments] == [["x"], ["a"], ["b"]]


def test_what_bodies_capture_is_handed_on(make):
    out = helper.make_tensor_value_info("o", 1, None)
    body = helper.make_graph([helper.make_node("Add", ["early", "b"], ["o"])], "body", [], [out])
    nodes = [
        helper.make_node("Relu", ["x"], ["early"]),
        helper.make_node("MatMul", ["x", "w"], ["a"], "A"),
        helper.make_node("MatMul", ["a", "v"], ["b"], "B"),
        helper.make_node("If", ["c"], ["i"], then_branch=body, else_branch=body),
        helper.make_node("MatMul", ["i", "u"], ["y"], "C"),
    ]
    weights = {"w": matrix(0), "v": matrix(1), "u": matrix(2), "c": np.array(True)}
    model = load_model(make(nodes, {"x": ["n", 8]}, weights, ["y"]))
    segments = partition(model, find_sites(model).sites, sequential="site")
    assert names(segments) == [["w"], ["v"], ["u"]]
    assert "early" in segments[0].alive
    assert "c" not in segments[0].alive  # constant: each segment has its own


def test_outputs_are_fetched_where_they_are_made(blocks):
    model = load_model(blocks)
    segments = partition(model, outputs=["y2", "y0", "x"], sequential="none", budget=4000)
    assert sorted(name for segment in segments for name in segment.wanted) == ["x", "y0", "y2"]
    assert segments[0].wanted[-1] == "x"
    with pytest.raises(ModelError, match="output 'nope'"):
        partition(model, outputs=["nope"])


def test_sequences_are_not_cut(make):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "A"),
        helper.make_node("SequenceConstruct", ["a", "x"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=0),
        helper.make_node("MatMul", ["c", "v"], ["y"], "B"),
    ]
    proto = make(nodes, {"x": ["n", 8]}, {"w": matrix(0), "v": matrix(1)}, ["y"])
    proto.graph.value_info.append(
        helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, None)
    )
    model = load_model(proto)
    for segment in partition(model, find_sites(model).sites, sequential="site"):
        assert "s" not in segment.alive
