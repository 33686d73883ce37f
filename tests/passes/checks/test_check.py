"""The pattern check against polygraphy's and against a count by loops."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.errors import CheckError, OptionError
from iobs_onnx.passes import (
    achieved_sparsity,
    check_model,
    check_pattern,
    find_sites,
    load_model,
    rewrite,
    save_model,
)
from iobs_onnx.sparsity import NM, Unstructured

RNG = np.random.default_rng(3)


def magnitude(array: np.ndarray, axis: int, kept: int = 2, of: int = 4) -> np.ndarray:
    """Keep the `kept` largest of each `of` along an axis."""
    moved = np.moveaxis(array.copy(), axis, -1)
    groups = np.ascontiguousarray(moved).reshape(-1, of)
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, : of - kept], 0, axis=1)
    return np.moveaxis(groups.reshape(moved.shape), -1, axis).copy()


def polygraphy_says(proto: onnx.ModelProto) -> set[str]:
    """Names of the initializers that polygraphy finds 2:4."""
    from polygraphy.logger import G_LOGGER
    from polygraphy.tools.sparse import SparsityPruner

    # It overflows float32 on purpose, to mark the smallest as used.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(over="ignore"):
        pruner = SparsityPruner(proto)
        pruner.check()
    return set(pruner.sparse_tensors)


CASES = {
    "matmul-right": ("MatMul", ["x", "w"], (8, 12), {}, 0),
    "matmul-left": ("MatMul", ["w", "x"], (12, 8), {}, 1),
    "gemm": ("Gemm", ["x", "w"], (8, 12), {}, 0),
    "gemm-transB": ("Gemm", ["x", "w"], (12, 8), {"transB": 1}, 1),
    "conv1d": ("Conv", ["x", "w"], (4, 8, 4), {}, 1),
    "conv2d": ("Conv", ["x", "w"], (4, 8, 4, 4), {}, 1),
    "conv2d-groups": ("Conv", ["x", "w"], (8, 8, 4, 4), {"group": 2}, 1),
    "conv3d": ("Conv", ["x", "w"], (4, 4, 4, 4, 4), {}, 1),
}


# Polygraphy inverts a Transpose's perm, so only swaps of two axes compare.
BEHIND_TRANSPOSE = [(case, True) for case, (_, _, shape, *_) in CASES.items() if len(shape) == 2]


@pytest.mark.parametrize(("case", "transposed"), [(c, False) for c in CASES] + BEHIND_TRANSPOSE)
def test_agrees_with_polygraphy_on_the_right_and_the_wrong_axis(make, case, transposed):
    op_type, inputs, shape, attributes, axis = CASES[case]
    dense = RNG.standard_normal(shape).astype(np.float32)
    for masked in range(len(shape)):
        weight = magnitude(dense, masked)
        nodes = [helper.make_node(op_type, inputs, ["y"], **attributes)]
        stored = weight
        if transposed:
            stored = weight.T.copy()
            nodes.insert(0, helper.make_node("Transpose", ["s"], ["w"], perm=[1, 0]))
        name = "s" if transposed else "w"
        proto = make(nodes, {"x": ["a", "b"]}, {name: stored}, ["y"])
        model = load_model(proto)
        [site] = find_sites(model).sites
        found = check_pattern(model, [site], {site.name: NM(2, 4)})
        assert (found == []) == (masked == axis) == (polygraphy_says(proto) == {name})


def test_counts_agree_with_loops_and_name_the_tensor(make):
    weight = RNG.standard_normal((5, 8, 3, 2)).astype(np.float32)
    weight[RNG.random(weight.shape) < 0.5] = 0
    proto = make(
        [helper.make_node("Conv", ["x", "w"], ["y"])], {"x": [1, 8, 9, 9]}, {"w": weight}, ["y"]
    )
    model = load_model(proto)
    [site] = find_sites(model).sites
    expected = 0
    for m, r, s in itertools.product(range(5), range(3), range(2)):
        for first in (0, 4):
            expected += sum(weight[m, first + i, r, s] != 0 for i in range(4)) > 2
    [violation] = check_pattern(model, [site], {site.name: NM(2, 4)})
    assert violation.count == expected > 0
    assert (violation.site, violation.initializer, violation.pattern) == ("w", "w", "2:4")
    assert "axis 1" in violation.text


def test_groups_are_judged_one_by_one_when_unstructured(make):
    # Half of all weights are zero, but all in the first group's filters.
    weight = np.ones((4, 4, 3), np.float32)
    weight[:2] = 0
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    model = load_model(make([node], {"x": [1, 8, 9]}, {"w": weight}, ["y"]))
    [site] = find_sites(model).sites
    [violation] = check_pattern(model, [site], {site.name: Unstructured(0.5)})
    assert violation.count == 12
    rewrite(model, {"w": magnitude(RNG.standard_normal((4, 4, 3)).astype(np.float32), 1)})
    assert check_pattern(model, [site], {site.name: Unstructured(0.5)}) == []
    assert len(check_pattern(model, [site], {site.name: Unstructured(0.6)})) == 1


def test_a_pattern_that_does_not_fit_is_violated(make):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = load_model(make([node], {"x": [5, 6]}, {"w": np.zeros((6, 4), np.float32)}, ["y"]))
    [site] = find_sites(model).sites
    [violation] = check_pattern(model, [site], {"w": NM(2, 4)})
    assert "not a multiple of 4" in violation.text
    assert check_pattern(model, [site], {"w": NM(1, 3)}) == []
    assert check_pattern(model, [site], {}) == []
    with pytest.raises(OptionError, match="no such site"):
        check_pattern(model, [site], {"v": NM(2, 4)})
    other = load_model(make([node], {"x": [5, 6], "w": [6, 4]}, {}, ["y"]))
    with pytest.raises(CheckError, match="stores no tensor 'w'"):
        check_pattern(other, [site], {"w": NM(2, 4)})


def test_a_pruned_real_model_holds_for_both(magika, tmp_path):
    model = load_model(magika)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(magika).graph.initializer}
    # MatMul's weight alone: polygraphy takes a second for a million elements.
    site = find_sites(model).sites[2]
    pruned = magnitude(stored[site.initializer], site.axis)
    rewrite(model, {site.initializer: pruned})
    assert achieved_sparsity(pruned) == 0.5
    save_model(model, tmp_path / "sparse.onnx")
    check_model(tmp_path / "sparse.onnx")
    check_model(model)
    again = load_model(tmp_path / "sparse.onnx")
    assert check_pattern(again, find_sites(again).sites, {site.name: NM(2, 4)}) == []
    assert polygraphy_says(onnx.load(tmp_path / "sparse.onnx")) == {site.initializer}


def test_achieved_sparsity():
    assert achieved_sparsity(np.array([[0.0, -0.0], [1.0, 1e-30]])) == 0.5
    assert achieved_sparsity(np.zeros(0)) == 0.0


def test_checker_complaints_are_one_line(make, tmp_path: Path):
    proto = make([helper.make_node("MatMul", ["x", "nope"], ["y"])], {"x": [5, 6]}, {}, ["y"])
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(CheckError, match=r"m.onnx: onnx.checker refuses it") as caught:
        check_model(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
