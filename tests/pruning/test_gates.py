"""Bounds that the caller sets, exit codes, JSON on every command, completion."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.cli import main
from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, GateError
from iobs_onnx.pruning.judge import require_output_error
from iobs_onnx.runtime import OutputFidelity


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """One linear `(16, 16)` and feeds for it."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "toy.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(64, 16)).astype(np.float32))
    return tmp_path


def prune(folder: Path, *more: str) -> int:
    command = ["prune", str(folder / "toy.onnx"), "--calibration", str(folder / "data.npz")]
    return main([*command, "--sparsity", "2:4", "--output", str(folder / "out.onnx"), *more])


def test_a_bound_that_does_not_hold_writes_nothing_and_exits_with_4(toy: Path, capsys) -> None:
    assert prune(toy, "--max-output-error", "0.001", "--report-dir", str(toy / "report")) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "output 'y'" in error
    assert "max_output_error 0.001" in error
    assert sorted(path.name for path in toy.iterdir()) == ["data.npz", "toy.onnx"]
    assert prune(toy, "--max-output-error", "0.9", "--quiet") == 0
    assert (toy / "out.onnx").is_file()


def test_the_worst_output_decides_and_nan_does_not_pass() -> None:
    good, bad, unknown = (
        OutputFidelity(name, error, 1.0, True)
        for name, error in (("a", 0.1), ("b", 0.3), ("c", float("nan")))
    )
    require_output_error([good, bad], 0.3)
    require_output_error([], None)
    with pytest.raises(GateError, match="output 'b'"):
        require_output_error([good, bad], 0.29)
    with pytest.raises(GateError, match="output 'c'"):
        require_output_error([unknown], 1.0)
    with pytest.raises(DataError, match="hold out"):
        require_output_error([], 1.0)


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_a_bound_must_be_a_number(toy: Path, value: str, capsys) -> None:
    assert prune(toy, "--max-output-error", value) == 2
    assert "max_output_error" in capsys.readouterr().err


def test_prune_prints_its_report_as_json(toy: Path, capsys) -> None:
    assert prune(toy, "--json", "--report-dir", str(toy)) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((toy / "report.json").read_text())


def test_every_command_prints_json() -> None:
    from iobs_onnx.cli import make_parser

    commands = next(a.choices for a in make_parser()._actions if a.metavar == "COMMAND")
    assert commands is not None
    for name, command in commands.items():  # type: ignore[attr-defined]
        assert any("--json" in action.option_strings for action in command._actions), name


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_option(shell: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code == 0
    script = capsys.readouterr().out
    for word in ("prune", "inspect", "verify", "report", "compare", "bench"):
        assert word in script
    for field in dataclasses.fields(PruneConfig):
        assert field.name.replace("_", "-") in script


def test_completion_is_a_script_that_the_shell_takes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "iobs_onnx", "--print-completion", "bash"]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in ("--max-output-error", "compare", "sparsegpt"):
        assert word in script
    (tmp_path / "complete.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "complete.sh")], check=True)
