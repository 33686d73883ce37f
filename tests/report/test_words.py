"""Words that must not say more than is so: engines, caches, sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.cli import main
from iobs_onnx.report.outputs import judged
from iobs_onnx.report.sentences import outcome

WIDTH = 288


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear, wide enough for engines, and a cache: its input, which pruning ruins in part.

    `foreign.onnx` is the same by an operator of com.microsoft.
    """
    folder = tmp_path_factory.mktemp("words")
    draw = np.random.default_rng(0)
    square = (WIDTH, WIDTH)
    weights = [
        numpy_helper.from_array((draw.normal(size=square) / 17).astype(np.float32), name)
        for name in ("keys", "out")
    ]
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH])
        for name in ("x", "logits", "present.0.key")
    }
    for file, domain, op_type in (
        ("plain", "", "MatMul"),
        ("foreign", "com.microsoft", "FusedMatMul"),
    ):
        nodes = [
            helper.make_node("MatMul", ["x", "keys"], ["present.0.key"]),
            helper.make_node(op_type, ["x", "out"], ["logits"], domain=domain),
        ]
        graph = helper.make_graph(
            nodes, file, [infos["x"]], [infos["logits"], infos["present.0.key"]], weights
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.save(model, folder / f"{file}.onnx")
    np.savez(folder / "rows.npz", x=draw.normal(size=(64, WIDTH)).astype(np.float32))
    return folder


def pruned(folder: Path, where: Path, model: str, *more: str) -> dict:
    command = ["prune", str(folder / f"{model}.onnx"), "--calibration", str(folder / "rows.npz")]
    command += ["--output", str(where / "out.onnx"), "--report-dir", str(where)]
    assert main([*command, "--solver", "magnitude", *more]) == 0
    return json.loads((where / "report.json").read_text())


@pytest.mark.parametrize(
    ("model", "sparsity", "takes"),
    [("plain", "2:4", 2), ("plain", "60%", 0), ("plain", "4:8", 0), ("foreign", "2:4", 0)],
)
def test_engines_are_named_where_they_take_the_file(
    folder: Path, tmp_path: Path, model: str, sparsity: str, takes: int, capsys
) -> None:
    found = pruned(folder, tmp_path, model, "--sparsity", sparsity)["deployment"]
    printed = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert (found["tensorrt"], found["tensorrt_likely"]) == (takes, takes)
    for text in (printed, page):
        assert ("trtexec" in text) == (takes > 0)
        assert ("likely to pick" in text) == (takes > 0 or found["cusparselt"] > 0)
    assert (found["trtexec"] is None) == (takes == 0)
    if model == "foreign":
        assert any("com.microsoft FusedMatMul" in line for line in found["warnings"])
        assert found["cusparselt"] == 2


def test_caches_are_neither_judged_by_nor_listed(folder: Path, tmp_path: Path, capsys) -> None:
    report = pruned(folder, tmp_path, "plain", "--sparsity", "2:4", "--include", "keys")
    errors = {out["name"]: out["relative_error"] for out in report["verification"]}
    assert errors["present.0.key"] > 0.1
    assert errors["logits"] == 0
    assert report["rounds"][0]["error"] == 0
    printed = capsys.readouterr().out
    assert "output logits" in printed
    assert "output present" not in printed
    assert "1 cache of keys and values, not judged by: mean relative" in printed
    more = ["--budget-error", "0.01", "--max-output-error", "0.01"]
    bounded = pruned(folder, tmp_path, "plain", "--sparsity", "2:4", "--include", "keys", *more)
    assert len(bounded["sites"]) == 1
    check = ["verify", str(tmp_path / "out.onnx"), "--dense", str(folder / "plain.onnx")]
    capsys.readouterr()
    assert main([*check, "--data", str(folder / "rows.npz")]) == 0
    assert "output present" not in capsys.readouterr().out
    assert judged(["present.0.key", "present.0.value"]) == ["present.0.key", "present.0.value"]


def test_a_file_that_grew_is_said_so() -> None:
    report = {
        "model": {"bytes": 1000, "zstd_bytes": 100},
        "output": {
            "form": "dense",
            "bytes": 900,
            "zstd_bytes": 125,
            "left_dense": {},
            "refused": None,
        },
        "totals": {},
        "sites": [],
    }
    assert "what is written is larger than the dense model: by 25.0% with zstd" in outcome(report)
    report["output"]["zstd_bytes"] = 100
    assert not any("larger" in line for line in outcome(report))
