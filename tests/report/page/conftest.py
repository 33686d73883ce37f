"""A run of a toy model, whose report the tests draw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import iobs_onnx

# A name that would break out of HTML, of a script and of a mathematical text.
EVIL = "</script><script>alert('$x$')</script>&.weight"


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """The folder of a 2:4 run compared with SparseGPT: `toy.onnx`, `out.onnx`, `report/`."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", EVIL], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "down"], ["c"], transB=1),
        helper.make_node("Gemm", ["c", "odd"], ["y"], transB=1),
    ]
    shapes = {EVIL: (16, 96), "down": (16, 96), "odd": (3, 16)}
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) / 4, name)
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "toy.onnx")
    result = iobs_onnx.prune(
        str(folder / "toy.onnx"),
        calibration={"x": rng.normal(size=(64, 16)).astype(np.float32)},
        sparsity="2:4",
        compare="sparsegpt",
        exclude=["odd"],
        output=folder / "out.onnx",
    )
    result.report.save(folder / "report")
    return folder


@pytest.fixture
def report(run: Path) -> dict[str, Any]:
    """A fresh copy of what `report.json` holds."""
    return json.loads((run / "report" / "report.json").read_text())


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's, driven by playwright."""
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without its sandbox, which does not work for root; the pages are our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
