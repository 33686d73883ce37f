"""Matrices that an index picks from a stack: the experts of a mixture."""

from __future__ import annotations

import math
from pathlib import Path

import experts
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.passes import find_sites, load_model
from iobs_onnx.runtime import calibrate
from iobs_onnx.runtime.stream import Batch
from iobs_onnx.site import Routed, Tap

OUT, IN, EXPERTS = 6, 8, 4
# Tokens of each expert: many, enough, fewer than inputs, none.
TOKENS = (60, 30, 3, 0)


def mixture(pick: str, weight: np.ndarray) -> onnx.ModelProto:
    """Return `y = W[ids] x` with the experts of every row picked by Gather or GatherND."""
    picked = [helper.make_node("Gather", ["w", "ids"], ["picked"], axis=0)]
    if pick == "GatherND":
        picked = [
            helper.make_node("Unsqueeze", ["ids", "last"], ["places"]),
            helper.make_node("GatherND", ["w", "places"], ["picked"]),
        ]
    nodes = [
        *picked,
        helper.make_node("Unsqueeze", ["x", "last"], ["columns"]),
        helper.make_node("MatMul", ["picked", "columns"], ["products"]),
        helper.make_node("Squeeze", ["products", "last"], ["y"]),
    ]
    arrays = {"w": weight, "last": np.array([-1])}
    graph = helper.make_graph(
        nodes,
        "mixture",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", IN]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUT])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    """Rows of all experts mixed; those of the second are named by a negative number."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(np.arange(EXPERTS), TOKENS))
    x = rng.normal(size=(len(ids), IN)) * (1 + ids[:, None]) @ rng.normal(size=(IN, IN))
    return {"x": x.astype(np.float32), "ids": np.where(ids == 1, 1 - EXPERTS, ids)}


@pytest.mark.parametrize("pick", ["Gather", "GatherND"])
def test_every_expert_is_solved_by_the_hessian_of_its_tokens(
    rows: dict[str, np.ndarray], pick: str
) -> None:
    weight = np.random.default_rng(1).normal(size=(EXPERTS, OUT, IN)).astype(np.float32)
    result = iobs_onnx.prune(
        mixture(pick, weight), calibration=[rows], sparsity="2:4", bias_compensation=0.0
    )
    stored = result.model.graph.initializers["w"].const_value.numpy()
    x, ids = rows["x"].astype(np.float64), rows["ids"] % EXPERTS
    shared = x.T @ x / len(x)
    for expert, count in enumerate(TOKENS):
        own = x[ids == expert]
        hessian = own.T @ own + max(0, IN - count) * shared
        expected = iobs_onnx.solve_layer(
            weight[expert], (hessian / len(x)).astype(np.float32), sparsity="2:4"
        )
        # One mask, and weights that agree to what summing in float32 leaves.
        assert ((stored[expert] != 0) == expected.mask).all()
        np.testing.assert_allclose(stored[expert], expected.weight, rtol=1e-3, atol=1e-4)
    (site,) = result.report.sites
    assert (site.groups, site.rows, site.thin_groups) == (EXPERTS, sum(TOKENS), 2)
    assert any("2 of 4 matrices of 'w' met" in note for note in result.report.calibration.notes)


def test_a_row_that_the_models_deal_out_differently_has_no_drift() -> None:
    rng = np.random.default_rng(2)
    tap = Tap("x", Routed(-1, -2, 2, "ids"), 3)
    ours, theirs = (torch.tensor(rng.normal(size=(5, 3)), dtype=torch.float32) for _ in range(2))
    ids, others = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 1, 0, 0, 0])
    found = calibrate(
        [tap],
        [Batch({"x": ours, "ids": ids})],
        [Batch({"x": theirs, "ids": others})],
    ).hessians[tap]
    assert found.shares is not None
    assert found.shares.tolist() == [2, 3]
    for group in range(2):
        own = (ids == group).numpy()
        x = ours.numpy()[own]
        away = np.where((ids == others).numpy()[:, None], (theirs - ours).numpy(), 0)[own]
        np.testing.assert_allclose(found.matrix[group], x.T @ x / 5, rtol=1e-5, atol=1e-6)
        assert found.drift is not None
        np.testing.assert_allclose(found.drift.matrix[group], away.T @ x / 5, rtol=1e-4, atol=1e-5)


def test_what_is_looked_up_and_not_multiplied_is_no_site() -> None:
    """One matrix for all rows is no stack dealt out, and a table of vectors is no weight."""
    model = mixture("Gather", np.ones((EXPERTS, OUT, IN), np.float32))
    model.graph.node[1].input[0] = "one"  # x of one row, met by every matrix picked
    model.graph.node[1].op_type = "Identity"
    del model.graph.node[1].input[1:]
    model.graph.input.append(helper.make_tensor_value_info("one", TensorProto.FLOAT, [1, IN, 1]))
    del model.graph.value_info[:]
    found = find_sites(load_model(onnx.shape_inference.infer_shapes(model)))
    assert not found.sites
    assert "not every row meets a matrix of its own" in found.declined[0].reason


@pytest.fixture(params=["mixtral", "qwen2_moe"])
def exported(request: pytest.FixtureRequest) -> Path:
    """A mixture of experts that torch 2.13 exported with dynamo."""
    return experts.DATA / f"{request.param}.onnx"


def test_experts_of_a_torch_export_are_pruned(exported: Path, tmp_path: Path) -> None:
    inspected = iobs_onnx.inspect(exported)
    stacks = {site.name: site for site in inspected.sites if site.groups > 1}
    assert {name.rpartition(".")[2] for name in stacks} == {"gate_up_proj", "down_proj"}
    ids = np.random.default_rng(3).integers(0, 64, (32, 16))
    result = iobs_onnx.prune(
        exported,
        calibration={"input_ids": ids},
        sparsity="2:4",
        preset="fast",
        output=tmp_path / "sparse.onnx",
    )
    assert iobs_onnx.verify(tmp_path / "sparse.onnx", sparsity="2:4").ok
    reports = {site.name: site for site in result.report.sites}
    for name, site in stacks.items():
        assert reports[name].sparsity == 0.5
        assert reports[name].rows > 0
        assert 0 < reports[name].layer_error < 0.2
        assert math.prod(site.shape) == site.groups * site.out_features * site.in_features
    # What the summary says of all numbers, experts included.
    assert result.report.totals["zeros"] > 0.4 * result.report.totals["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_torch_still_exports_what_lies_here(kind: str, tmp_path: Path) -> None:
    found = iobs_onnx.inspect(experts.export(kind, tmp_path / "model.onnx"))
    stored = iobs_onnx.inspect(experts.DATA / f"{kind}.onnx")
    assert [(s.name, s.shape) for s in found.sites] == [(s.name, s.shape) for s in stored.sites]
