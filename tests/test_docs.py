"""What the documents say is so: code is run, options are all there, the site builds."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.passes.ops.use import Handler
from iobs_onnx.runtime.data.images import Preprocess

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_solver_of_the_page_works(monkeypatch, capsys) -> None:
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where dataclasses look
    for code in blocks("adding-a-solver.md", "python"):
        exec(code, page.__dict__)
    assert 0 < float(capsys.readouterr().out) < 1


def test_the_handler_of_the_page_is_the_one_in_the_code() -> None:
    (code,) = blocks("adding-an-operator.md", "python")
    source = (ROOT / "passes" / "ops" / "gemm.py").read_text()
    # Comments of the code are left out on the page.
    source = "\n".join(line for line in source.splitlines() if not line.strip().startswith("#"))
    assert code.strip() in source


def test_what_the_page_of_operators_names_is_there() -> None:
    page = (ROOT / "docs" / "adding-an-operator.md").read_text()
    tables = re.findall(r"^\| (.*?`passes/[^|]*) \|", page, re.MULTILINE)
    assert len(tables) == 6
    for row in tables:
        *names, file = re.findall(r"`([^`]+)`", row)
        source = (ROOT / file).read_text()
        assert all(f"{name} = " in source or f"{name}: " in source for name in names), row
    for file in re.findall(r"`((?:passes|runtime|iobs_onnx|tests)/[^`]*)`", page):
        assert (ROOT / file).exists(), file
    fields = {field.name for field in dataclasses.fields(Handler)} - {"operands", "describe"}
    assert set(re.findall(r"^\| `(\w+)` \| [^|]* \| [^|]* \|$", page, re.MULTILINE)) == fields


def test_the_toml_of_the_quickstart_is_valid() -> None:
    (toml,) = blocks("index.md", "toml")
    options = tomllib.loads(toml)
    for name in ("calibration", "output", "report_dir"):
        options.pop(name)
    assert str(make_config(options).sparsity) == "2:4"


@pytest.mark.parametrize("page", ["../README.md", "index.md"])
def test_the_programs_of_the_quickstart_work(
    page: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(8, 8)).astype(np.float32), rng.normal(size=(64, 8))
    tensors = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 8]) for name in "xy"
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "toy",
        tensors[:1],
        tensors[1:],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(page, "python")
    feeds = {"x": x.astype(np.float32)}
    exec(code, {"feeds": feeds, "weight": weight, "hessian": (x.T @ x / 64).astype(np.float32)})
    assert 0 < float(capsys.readouterr().out.split()[0]) < 1
    assert (tmp_path / "sparse.onnx").is_file()


def test_the_json_of_the_pages_is_read(tmp_path: Path) -> None:
    (preprocess,) = blocks("calibration.md", "json")
    (tmp_path / "p.json").write_text(preprocess)
    steps = Preprocess.read(str(tmp_path / "p.json"))
    grey = Image.new("RGB", (300, 224), (63, 127, 255))
    assert np.allclose(steps.apply(grey)[5, 7], [-0.5, 0, 1])  # (rgb - 127) / 128
    (step,) = blocks("olive.md", "json")
    workflow = json.loads((ROOT / "examples/olive/workflow.json").read_text())
    assert json.loads(f"{{{step}}}") == {"prune": workflow["passes"]["prune"]}


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    """Files and folders of the repository, and targets of make."""
    text = (ROOT / page).read_text()
    folders = "iobs_onnx|passes|runtime|tests|benchmarks|examples|docs"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)(?:\w+=\w+ )?make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target


def test_every_folder_of_code_has_a_row_in_the_layout() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = set(re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE))
    folders = {
        str(file.parent.relative_to(ROOT))
        for top in ("iobs_onnx", "passes", "runtime")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert rows - {"tests"} == folders


@pytest.mark.slow
def test_the_site_builds_and_names_every_option(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "options" / "index.html").read_text()
    for field in dataclasses.fields(PruneConfig):
        assert f'id="{field.name}"' in page
    assert "--max-output-error" in page
    assert "iobs-onnx compare" in (tmp_path / "commands" / "index.html").read_text()
