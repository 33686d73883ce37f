"""Kinds of models by the documented commands: inspect, prune on files, verify, and use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from kinds import KINDS, Kind, table
from made import Made

from iobs_onnx.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kinds.md"
PATTERNS = ("2:4", "60%")
# The exporters' own warnings are no affair of ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_has_the_table() -> None:
    assert table() in DOCS.read_text()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, id=name, marks=[] if kind.fast else pytest.mark.slow)
        for name, kind in KINDS.items()
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Kind, Made]:
    """A kind and its model."""
    return request.param, request.param.make(tmp_path_factory.mktemp("kind"))


def test_inspect(case: tuple[Kind, Made], capsys: pytest.CaptureFixture[str]) -> None:
    kind, made = case
    assert main(["inspect", str(made.model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == kind.sites[0]
    assert all(site["reason"] for site in found["declined"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prune_verify_and_use(case: tuple[Kind, Made], pattern: str, tmp_path: Path) -> None:
    kind, made = case
    sparse = tmp_path / "sparse" / made.model.name
    output = f"{sparse.parent}{os.sep}" if made.folder else str(sparse)
    command = ["prune", str(made.model), *made.data, "--sparsity", pattern, "--preset", "fast"]
    assert main([*command, "--output", output, "--report-dir", str(tmp_path)]) == 0
    totals = json.loads((tmp_path / "report.json").read_text())["totals"]
    assert totals["sites"] == kind.sites[1 + PATTERNS.index(pattern)]
    assert totals["sparsity"] == pytest.approx(0.5 if pattern == "2:4" else 0.6, abs=0.01)
    data = ["--data" if option == "--calibration" else option for option in made.data]
    check = ["verify", str(sparse), "--sparsity", pattern, "--dense", str(made.model), *data]
    assert main(check) == 0
    made.use(sparse)
