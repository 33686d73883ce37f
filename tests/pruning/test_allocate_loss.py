"""Sparsity where the model's own loss allows it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pruning.distil.small_models import build

import iobs_onnx
from iobs_onnx.config import make_config
from iobs_onnx.errors import ModelError, OptionError
from iobs_onnx.passes import find_sites
from iobs_onnx.pruning.distil.curvature import root
from iobs_onnx.pruning.distil.losses import Target, distance
from iobs_onnx.pruning.prior.allocate import GRID, REACH, between, pick
from iobs_onnx.pruning.prior.loss import ModelLoss
from iobs_onnx.runtime.differentiable import Evaluator
from iobs_onnx.sparsity import parse_sparsity

RANDOM = np.random.default_rng(11)
WIDTH = 32


@pytest.fixture(scope="module")
def branches() -> ir.Model:
    """Two layers that read one input; what the second makes is a hundredth of the sum."""
    weights = {
        "loud": RANDOM.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5,
        "quiet": RANDOM.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5,
        "head": RANDOM.normal(size=(WIDTH, 8)) / WIDTH**0.5,
        "share": np.array(0.01),
    }
    return build(
        [
            helper.make_node("MatMul", ["x", "loud"], ["a"], name="loud"),
            helper.make_node("MatMul", ["x", "quiet"], ["b"], name="quiet"),
            helper.make_node("Mul", ["b", "share"], ["c"]),
            helper.make_node("Add", ["a", "c"], ["d"]),
            helper.make_node("Tanh", ["d"], ["e"]),
            helper.make_node("MatMul", ["e", "head"], ["logits"], name="head"),
        ],
        {name: array.astype(np.float32) for name, array in weights.items()},
        {"x": (TensorProto.FLOAT, ["n", WIDTH])},
        {"logits": (TensorProto.FLOAT, ["n", 8])},
    )


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    mixed = RANDOM.normal(size=(256, WIDTH)) @ RANDOM.normal(size=(WIDTH, WIDTH)) / 4
    return mixed.astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "shape", "masked"),
    [("kl", (6, 5), 0), ("kl", (3, 4, 5), 2), ("mse", (3, 4, 5), 2), ("embedding", (3, 4, 5), 2)],
)
def test_the_square_of_a_root_is_the_loss_of_a_small_change(
    kind: str, shape: tuple[int, ...], masked: int
) -> None:
    """Against the loss itself at a small step: within a tenth, as 4,000 are drawn."""
    draw = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=draw)
    change = torch.randn(shape, generator=draw)
    mask = None
    if masked:
        mask = torch.ones(shape[:2])
        mask[0, -masked:] = 0
    targets = [Target("y", "y", kind)]  # type: ignore[arg-type]
    step = 1e-2
    after = distance(targets, {"y": dense}, {"y": dense + step * change}, mask)
    found = []
    for _ in range(4000):
        scale = torch.zeros((), requires_grad=True)
        drawn = root(targets, {"y": dense + scale * change}, mask, draw)
        found.append(float(torch.autograd.grad(drawn, scale)[0]) ** 2)
    assert np.mean(found) * step**2 == pytest.approx(float(after.loss), rel=0.1)


def test_costs_are_what_single_sites_cost(branches: ir.Model, rows: np.ndarray) -> None:
    """Against the KL with one site changed: within a third, as 128 are drawn."""
    sites = find_sites(branches).sites
    feeds = [{"x": rows[start : start + 64]} for start in range(0, 256, 64)]
    targets = [Target("logits", "logits", "kl")]
    evaluator = Evaluator(branches, precision="float32")
    changes = {
        site: 0.02 * RANDOM.normal(size=(2, *site.shape)).astype(np.float32) for site in sites
    }
    costs = ModelLoss(evaluator, targets, feeds, 0).costs(changes)
    inputs = {"x": torch.from_numpy(rows)}
    dense = evaluator(inputs)
    for site in sites:
        for change, cost in zip(changes[site], costs[site], strict=True):
            weight = evaluator.weight(site.initializer) + torch.from_numpy(change)
            sparse = evaluator(inputs, weights={site.initializer: weight})
            true = float(distance(targets, dense, sparse, None).loss)
            assert cost == pytest.approx(true, rel=1 / 3)


def prune(model: ir.Model, rows: np.ndarray, **options: object) -> iobs_onnx.PruneResult:
    return iobs_onnx.prune(model, calibration={"x": rows}, **options)


def test_what_the_loss_does_not_see_is_removed(branches: ir.Model, rows: np.ndarray) -> None:
    report = prune(branches, rows, sparsity=0.6, allocate="loss").report
    assert report.totals["sparsity"] == pytest.approx(0.6, abs=0.005)
    shares = {item["site"]: item for item in report.allocation}
    assert shares["quiet"]["removed"] == pytest.approx(0.6 + REACH)
    assert all(abs(item["removed"] - 0.6) < REACH + 1e-9 for item in shares.values())
    # Their layer errors are alike, and so are their shares by these.
    error = prune(branches, rows, sparsity=0.6, allocate="error").report.allocation
    assert {item["price"] for item in error} == {None}
    by_error = {item["site"]: item["removed"] for item in error}
    assert by_error["quiet"] == pytest.approx(by_error["loud"], abs=0.1)
    # Ten thousandths of the squares.
    assert shares["quiet"]["price"] < 0.01 * shares["loud"]["price"]
    for item in shares.values():
        errors = between([y for _, y in item["curve"]], np.array([item["removed"]]))
        assert item["predicted_loss"] == pytest.approx(item["price"] * errors[0])


def tensor(file: Path, name: str) -> np.ndarray:
    stored = {item.name: item for item in onnx.load(file).graph.initializer}
    return numpy_helper.to_array(stored[name])


@pytest.mark.parametrize("how", ["error", "loss"])
def test_sites_choose_from_patterns(
    branches: ir.Model, rows: np.ndarray, how: str, tmp_path: Path
) -> None:
    names = ("3:4", "1:4", "2:4")
    options = {"sparsity": 0.5, "allocate": how, "patterns": names, "output": tmp_path / "a.onnx"}
    report = prune(branches, rows, **options).report
    chosen = {item["site"]: item for item in report.allocation}
    assert report.totals["sparsity"] >= 0.5
    assert {item["removed"] for item in chosen.values()} <= {0.25, 0.5, 0.75}
    assert [x for x, _ in chosen["quiet"]["curve"]] == [0.25, 0.5, 0.75]
    assert report.options["patterns"] == list(names)
    for site in report.sites:
        kept = {0.25: "3:4", 0.5: "2:4", 0.75: "1:4"}[chosen[site.name]["removed"]]
        weight = tensor(tmp_path / "a.onnx", site.name)
        assert parse_sparsity(kept).violations(weight.T) == 0
        assert np.mean(weight == 0) == chosen[site.name]["removed"]
    if how == "loss":
        assert chosen["quiet"]["removed"] == 0.75
        at = dict(map(tuple, chosen["loud"]["curve"]))[chosen["loud"]["removed"]]
        assert chosen["loud"]["predicted_loss"] == pytest.approx(chosen["loud"]["price"] * at)


def test_what_is_picked_is_the_least_of_all_choices_near_the_fraction() -> None:
    """Against every choice, where the last site that changes is small."""
    grid = [0.25, 0.5, 0.75]
    sizes = np.array([1000, 1000, 1000, 1000, 10])
    curves = np.sort(RANDOM.random((5, 3)), 1).cumsum(1)
    found = pick(list(curves), sizes, 0.5, grid)
    gone = np.array([grid[i] for i in found]) @ sizes
    assert gone >= 0.5 * sizes.sum() - 1e-6
    cost = curves[range(5), found].sum()
    for other in product(range(3), repeat=5):
        if np.array([grid[i] for i in other]) @ sizes >= gone:
            assert cost <= curves[range(5), other].sum() + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocate": "loss", "sparsity": "2:4"}, "patterns 2:4: go with allocate error or loss"),
        ({"sparsity": 0.5}, "patterns 2:4: go with allocate error or loss"),
        ({"sparsity": 0.6, "allocate": "error"}, "none removes as much as sparsity 0.6"),
        ({"allocate": "error", "patterns": "4:4"}, "patterns 4:4: expected N:M with N below M"),
    ],
)
def test_patterns_that_mean_nothing(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_config({"sparsity": 0.5, "patterns": ["2:4"], **options})


def test_curves_run_through_their_points() -> None:
    curve = [0.0, *np.geomspace(1e-3, 1.0, len(GRID) - 1)]
    assert between(curve, np.array(GRID)) == pytest.approx(np.array(curve))
    steps = between(curve, np.linspace(0, 0.95, 200))
    assert (np.diff(steps) > 0).all()


def test_the_costliest_sites_go_back_to_dense_first(branches: ir.Model, rows: np.ndarray) -> None:
    """With 2:4 and a bound that some sites may break: what the loss does not see stays sparse."""
    whole = prune(branches, rows, sparsity="2:4").report.verification[0].relative_error
    result = prune(branches, rows, sparsity="2:4", allocate="loss", budget_error=0.5 * whole)
    assert "quiet" in {site.name for site in result.report.sites}
    reasons = {item["reason"] for item in result.report.declined}
    assert all("highest costs in the model's loss" in reason for reason in reasons)
    assert result.report.allocation == []


def test_a_pattern_without_a_bound_is_refused(branches: ir.Model, rows: np.ndarray) -> None:
    with pytest.raises(OptionError, match=r"allocate loss: 2:4 is the same for every site"):
        prune(branches, rows, sparsity="2:4", allocate="loss")


def test_a_model_without_a_gradient_is_refused(tmp_path: Path, rows: np.ndarray) -> None:
    model = build(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("RandomNormalLike", ["a"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["c"]),
            helper.make_node("MatMul", ["c", "v"], ["y"]),
        ],
        {name: RANDOM.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in "wv"},
        {"x": (TensorProto.FLOAT, ["n", WIDTH])},
        {"y": (TensorProto.FLOAT, ["n", WIDTH])},
    )
    feeds = [{"x": rows} for _ in range(3)]
    with pytest.raises(ModelError, match=r"^allocate loss: .*; give allocate error or uniform$"):
        iobs_onnx.prune(
            model, calibration=feeds, sparsity=0.5, allocate="loss", output=tmp_path / "out.onnx"
        )
    assert not list(tmp_path.iterdir())


def test_integers_are_priced_in_what_they_stand_for(rows: np.ndarray) -> None:
    """A layer whose weight is stored as int8 beside the same in float: one price, within a half."""
    draw = np.random.default_rng(5)
    stored = draw.integers(-127, 128, size=(WIDTH, WIDTH)).astype(np.int8)
    scale = np.float32(1 / (127 * WIDTH**0.5))
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["a"], name="integers"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "head"], ["logits"], name="head"),
    ]
    head = draw.normal(size=(WIDTH, 8)).astype(np.float32)
    io = {"x": (TensorProto.FLOAT, ["n", WIDTH])}, {"logits": (TensorProto.FLOAT, ["n", 8])}
    integers = build(nodes, {"q": stored, "scale": scale, "head": head}, *io)
    floats = build(nodes[1:], {"w": stored * scale, "head": head}, *io)
    prices = [
        prune(model, rows, sparsity=0.5, allocate="loss").report.allocation[0]["price"]
        for model in (integers, floats)
    ]
    assert prices[0] == pytest.approx(prices[1], rel=0.5)


def test_allocation_is_the_same_twice(branches: ir.Model, rows: np.ndarray, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for file in files:
        prune(branches, rows, sparsity=0.5, allocate="loss", output=file)
    assert files[0].read_bytes() == files[1].read_bytes()
    onnx.checker.check_model(onnx.load(files[0]))
