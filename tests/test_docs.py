"""What the documents say is so: code is run, options are all there, the site builds."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from iobs_onnx.config import PruneConfig, make_config

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


def test_the_toml_of_the_quickstart_is_valid() -> None:
    (toml,) = blocks("index.md", "toml")
    options = tomllib.loads(toml)
    for name in ("calibration", "output", "report_dir"):
        options.pop(name)
    assert str(make_config(options).sparsity) == "2:4"


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
