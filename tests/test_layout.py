"""What must stay true of the package as a whole."""

from __future__ import annotations

import ast
import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import iobs_onnx
from iobs_onnx.config import SOLVER_NAMES
from iobs_onnx.solvers import SOLVERS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"iobs_onnx": "iobs_onnx", "passes": "iobs_onnx.passes", "runtime": "iobs_onnx.runtime"}


def test_public_names_are_pinned() -> None:
    assert sorted(iobs_onnx.__all__) == [
        "Bench",
        "Inspection",
        "NM",
        "PruneReport",
        "PruneResult",
        "Solution",
        "Unstructured",
        "Verification",
        "bench",
        "inspect",
        "prune",
        "solve_layer",
        "verify",
    ]
    for name in iobs_onnx.__all__:
        assert getattr(iobs_onnx, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        iobs_onnx.missing  # noqa: B018


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found.append((".".join((package, *parts)).removesuffix(".__init__"), file))
    return sorted(found)


def test_every_package_is_listed_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {name for name, file in modules() if file.name == "__init__.py"}
    # The one folder that belongs to another package's namespace, hence has no __init__.
    assert set(settings["packages"]) == on_disk | {"optimum.commands.register"}


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_imports_are_absolute_and_pass_the_root_by(name: str, file: Path) -> None:
    """Their direction is in pyproject.toml; `make types` holds it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, name
            assert node.module != "iobs_onnx", name
        elif isinstance(node, ast.Import):
            assert all(alias.name != "iobs_onnx" for alias in node.names), name


def test_a_room_can_be_overlooked() -> None:
    """The root has few rooms, a file is read at a sitting, a function at a glance."""
    rooms = [path for path in (ROOT / "iobs_onnx").iterdir() if path.name != "__pycache__"]
    assert len(rooms) <= 20
    for name, file in modules():
        text = file.read_text()
        assert text.count("\n") <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{name}.{node.name}"


def test_solver_names_in_the_options_are_those_of_the_registry() -> None:
    assert set(SOLVER_NAMES) == set(SOLVERS)


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in asked}
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Why each dependency")[1]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", table.split("\n## ")[0], re.MULTILINE)
    explained = {word.lower() for row in rows for word in re.findall(r"[\w.-]+", row)}
    assert names - explained == {"iobs-onnx", "onnxruntime-gpu"}


def test_no_path_of_a_machine_is_named() -> None:
    for folder in ("iobs_onnx", "passes", "runtime", "examples", "benchmarks", "docs"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".md", ".toml"}:
                assert "/" + "work/" not in file.read_text(), file
