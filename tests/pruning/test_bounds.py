"""The bounds of L-OBS in the report: above what is measured, and absent where they would not be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

import iobs_onnx
from iobs_onnx.pruning.pipeline import PruneResult
from iobs_onnx.solvers.lobs import network_bound

ONE_SHOT: Mapping[str, Any] = {"solver": "lobs", "sequential": "none"}
# What float32 makes of the same sums in another order.
ROUNDING = 1 + 1e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A trained MLP with two hidden layers, the rows to calibrate on, and others."""
    torch.manual_seed(0)
    centres = 1.5 * torch.randn(5, 24)
    labels = torch.randint(5, (1200,))
    rows = centres[labels] + torch.randn(1200, 24) @ torch.randn(24, 24) / 4
    sizes = (24, 40, 32, 5)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(rows[:800]), labels[:800]).backward()
        adam.step()
    nodes, tensors, value = [], {}, "x"
    for i, layer in enumerate(layers):
        tensors |= {f"w{i}": layer.weight, f"b{i}": layer.bias}
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], [f"l{i}"], transB=1))
        value = f"l{i}"
        if i < 2:
            nodes.append(helper.make_node("Relu", [value], [f"r{i}"]))
            value = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 24])],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(t.detach().numpy(), name) for name, t in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("bounds") / "mlp.onnx"
    onnx.save(model, path)
    return path, rows[:800].numpy(), rows[800:].numpy()


def values(model: onnx.ModelProto, names: list[str], x: np.ndarray) -> dict[str, np.ndarray]:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    present = {output.name for output in shown.graph.output}
    shown.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in present
    )
    session = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {"x": x})
    return dict(zip(names, (array.astype(np.float64) for array in found), strict=True))


def with_weights(dense: onnx.ModelProto, sparse: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The dense model with one tensor of the sparse one."""
    mixed = onnx.ModelProto()
    mixed.CopyFrom(dense)
    (new,) = [tensor for tensor in sparse.graph.initializer if tensor.name == name]
    (old,) = [tensor for tensor in mixed.graph.initializer if tensor.name == name]
    old.CopyFrom(new)
    return mixed


def samples_apart(one: np.ndarray, other: np.ndarray) -> float:
    """The root mean square over samples of the distance."""
    return float(np.linalg.norm(one - other) / len(one) ** 0.5)


def outputs_of_sites(model: onnx.ModelProto, result: PruneResult) -> dict[str, str]:
    made = {node.input[1]: node.output[0] for node in model.graph.node if len(node.input) > 1}
    return {site.name: made[site.initializer] for site in result.report.sites}


@pytest.mark.parametrize("sparsity", ["2:4", 0.7])
@pytest.mark.parametrize("compensation", [0.0, 0.5, 1.0])
def test_a_trained_mlp_stays_below_its_bounds(
    trained: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    sparsity: Any,
    compensation: float,
) -> None:
    path, rows, others = trained
    output = tmp_path / "sparse.onnx"
    result = iobs_onnx.prune(
        path,
        calibration={"x": rows},
        holdout={"x": others},
        output=output,
        sparsity=sparsity,
        bias_compensation=compensation,
        **ONE_SHOT,
    )
    dense, sparse, bound = onnx.load(path), onnx.load(output), result.report.network_bound
    assert bound["reason"] is None
    assert [item["name"] for item in bound["sites"]] == ["w0", "w1", "w2"]
    names = ["l0", "r0", "l1", "r1", "l2"]
    here = values(dense, names, rows)
    for i, site in enumerate(result.report.sites):  # theorem 3.1, before and after the ReLU
        mixed = with_weights(with_weights(dense, sparse, f"w{i}"), sparse, f"b{i}")
        alone = values(mixed, names, rows)
        change = samples_apart(alone[f"l{i}"], here[f"l{i}"])
        assert change <= site.output_bound * ROUNDING
        if compensation == 0.0:
            assert change == pytest.approx(site.output_bound, rel=1e-3)
        if i < 2:
            assert samples_apart(alone[f"r{i}"], here[f"r{i}"]) <= change * ROUNDING
    after = values(sparse, names, rows)
    for i, item in enumerate(bound["sites"]):  # theorem 3.2, at each depth
        assert samples_apart(after[f"l{i}"], here[f"l{i}"]) <= item["bound"] * ROUNDING
    (output_bound,) = bound["outputs"]
    assert output_bound == {"name": "l2", "bound": bound["sites"][2]["bound"], "reason": None}
    # The same by hand, and the paper's own with Frobenius norms, which is larger.
    stored = {t.name: numpy_helper.to_array(t) for t in sparse.graph.initializer}
    errors = [site.output_bound for site in result.report.sites]
    weights = [stored[f"w{i}"].astype(np.float64) for i in range(3)]
    norms = [float(np.linalg.norm(weight, 2)) for weight in weights]
    expected = (errors[0] * norms[1] + errors[1]) * norms[2] + errors[2]
    assert output_bound["bound"] == pytest.approx(expected, rel=1e-6)
    assert expected <= network_bound(errors, [torch.from_numpy(weight) for weight in weights])


def test_resnet_20_stays_below_its_bounds(shared: Path, tmp_path: Path) -> None:
    path, output = shared / "models/resnet20.onnx", tmp_path / "sparse.onnx"
    images = np.load(shared / "data/cifar10/train_first_2000.npz")["x"][:48]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rows = ((images / 255 - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)
    result = iobs_onnx.prune(
        path,
        calibration={"x": rows[:40]},
        holdout={"x": rows[40:]},
        output=output,
        sparsity=0.5,
        bias_compensation=0.5,
        **ONE_SHOT,
    )
    dense, sparse, bound = onnx.load(path), onnx.load(output), result.report.network_bound
    assert bound["reason"] is None
    made = outputs_of_sites(dense, result)
    rows = rows[:40]
    here, after = (values(model, list(made.values()), rows) for model in (dense, sparse))
    for site, item in zip(result.report.sites, bound["sites"], strict=True):
        value = made[site.name]
        mixed = with_weights(dense, sparse, site.initializer)
        (node,) = [node for node in dense.graph.node if node.output[0] == value]
        mixed = with_weights(mixed, sparse, node.input[2])
        alone = values(mixed, [value], rows)[value]
        channels = here[value].shape[1]
        change = np.linalg.norm(alone - here[value]) / (here[value].size / channels) ** 0.5
        assert 0 < change <= site.output_bound * ROUNDING, site.name
        assert samples_apart(after[value], here[value]) <= item["bound"] * ROUNDING
    (logits,) = bound["outputs"]
    assert logits["reason"] is None
    assert logits["bound"] == bound["sites"][-1]["bound"]


@pytest.mark.parametrize("compensation", [0.0, 0.5])
def test_groups_strides_tokens_and_biases_behind_keep_the_bounds(
    tmp_path: Path, compensation: float
) -> None:
    rng = np.random.default_rng(5)

    def numbers(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / 3).astype(np.float32)

    tensors = {"k": numbers(12, 4, 3, 3), "kb": numbers(12), "shape": np.array([0, 12, 25])}
    tensors |= {"g": numbers(12), "gb": numbers(12), "m": numbers(12), "s": numbers(12) ** 2 + 0.1}
    tensors |= {"w": numbers(25, 16), "wb": numbers(16), "o": numbers(3, 16), "ob": numbers(3)}
    nodes = [
        helper.make_node("Conv", ["x", "k", "kb"], ["c"], group=2, strides=[2, 2], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "g", "gb", "m", "s"], ["n"]),
        helper.make_node("LeakyRelu", ["n"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["p"]),
        helper.make_node("Add", ["p", "wb"], ["a"]),
        helper.make_node("Tanh", ["a"], ["h"]),
        helper.make_node("ReduceMean", ["h"], ["u"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["u", "o", "ob"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8, 9, 9])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    dense = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = (rng.normal(size=(60, 8, 9, 9)) + rng.normal(size=(8, 1, 1))).astype(np.float32)
    result = iobs_onnx.prune(
        dense,
        calibration={"x": x},
        holdout={"x": x[:5]},
        sparsity=0.5,
        output=tmp_path / "sparse.onnx",
        bias_compensation=compensation,
        **ONE_SHOT,
    )
    places = {"k": "c", "w": "a", "o": "y"}  # biases added
    sparse = onnx.load(tmp_path / "sparse.onnx")
    here, after = (values(model, list(places.values()), x) for model in (dense, sparse))
    sites = result.report.network_bound["sites"]
    assert [item["name"] for item in sites] == ["k", "w", "o"]
    for item in sites:
        place = places[item["name"]]
        apart = samples_apart(after[place], here[place])
        assert 0 < apart <= item["bound"] * ROUNDING
    if compensation == 0.0:
        assert samples_apart(after["c"], here["c"]) == pytest.approx(sites[0]["bound"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"sequential": "site"},
            "sequential site: layers are measured on the pruned model's inputs",
        ),
        ({"sequential": "segment"}, "sequential segment: "),
        ({"rounds": 2}, "rounds 2: "),
        ({"distill": "model", "distill_steps": 1}, "distill model: weights are trained after"),
        ({"quantize": "int8"}, "quantize int8: "),
    ],
)
def test_options_that_leave_no_bound_are_named(
    trained: tuple[Path, np.ndarray, np.ndarray],
    tmp_path: Path,
    options: dict[str, Any],
    reason: str,
) -> None:
    path, rows, _ = trained
    result = iobs_onnx.prune(
        path, calibration={"x": rows}, sparsity="2:4", **{**ONE_SHOT, **options}
    )
    bound = result.report.network_bound
    assert bound["reason"].startswith(reason)
    assert bound["sites"] == bound["outputs"] == []
    result.report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "There is none for the network." in page
    assert re.sub("'", "&#39;", bound["reason"]) in page


def test_the_page_shows_bounds_and_the_node_that_ends_them(mlp: Path, tmp_path: Path) -> None:
    model = onnx.load(mlp / "mlp.onnx")
    (second,) = [node for node in model.graph.node if node.output[0] == "w1.relu"]
    second.op_type = "Exp"
    rows = np.load(mlp / "a.npz")["x"] / 50
    result = iobs_onnx.prune(model, calibration={"x": rows}, sparsity="2:4", **ONE_SHOT)
    sites = result.report.network_bound["sites"]
    why = "Exp 'w1.relu': there is no rule for this operator"
    assert [item["reason"] for item in sites] == [None, None, why, why]
    assert sites[1]["bound"] > sites[0]["bound"] > 0
    assert sites[2]["bound"] is None
    result.report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"{sites[1]['bound']:.4g}" in page
    assert re.sub("'", "&#39;", why) in page
    for site in result.report.sites:
        assert f"{site.output_bound:.4g}" in page
