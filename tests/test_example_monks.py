"""MONK's problems: the rules, the derivatives, and what is left of the networks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "monks.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("monks_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rules(example: ModuleType) -> None:
    x, labels = example.robots()
    assert x.shape == (432, 17)
    assert len(torch.unique(x, dim=0)) == 432
    assert torch.equal(x.sum(1), torch.full((432,), 6.0, dtype=torch.float64))
    # As many positive cases as the published test files hold.
    assert {problem: int(y.sum()) for problem, y in labels.items()} == {1: 216, 2: 142, 3: 228}
    # a = (1, 1, 1, 1, 3, 1): five ones, a1 = a2, a5 = 3 and a4 = 1.
    robot = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0]).double()
    (at,) = (x == robot).all(1).nonzero().squeeze(1).tolist()
    assert [float(labels[problem][at]) for problem in (1, 2, 3)] == [1.0, 0.0, 1.0]


def test_training_cases_are_drawn_by_seed(example: ModuleType) -> None:
    x, labels = example.robots()
    for problem, size, wrong in ((1, 124, 0), (2, 169, 0), (3, 122, 6)):
        network, _ = example.trained(problem, 5, 1, 1)
        again, _ = example.trained(problem, 5, 1, 1)
        other, _ = example.trained(problem, 6, 1, 1)
        assert torch.equal(network.x, again.x)
        assert torch.equal(network.y, again.y)
        assert not torch.equal(network.x, other.x)
        assert len(torch.unique(network.x, dim=0)) == len(network.x) == size
        rows = [int((x == case).all(1).nonzero()) for case in network.x]
        assert int((labels[problem][rows] != network.y).sum()) == wrong


def test_derivatives(example: ModuleType) -> None:
    network, _ = example.trained(2, 0, 1, 1)
    w = torch.randn(39, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = torch.arange(39) % 3 != 1
    objective = network.objective(kept)
    value, gradient = objective.evaluate(w[kept])
    for i in range(0, int(kept.sum()), 5):
        step = torch.zeros_like(gradient)
        step[i] = 1e-6
        ahead, behind = (objective.evaluate(w[kept] + s)[0] for s in (step, -step))
        assert float((ahead - behind) / 2e-6) == pytest.approx(float(gradient[i]), abs=1e-7)
    assert float(value) == pytest.approx(float(network.loss(w * kept)))
    # The output is linear in the last layer's weights: there the outer product is the Hessian.
    last = torch.arange(39) >= 36
    objective = network.objective(last)
    exact = torch.autograd.functional.hessian(
        lambda z: network.loss(torch.zeros_like(w).masked_scatter(last, z)), w[last]
    )
    assert torch.allclose(objective.hessian(w[last]), exact, atol=1e-12)


def test_one_network_from_the_command_line(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--problems", "2", "--restarts", "3", "--output", str(tmp_path / "new")]
    assert example.main([*arguments, "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "169 of the 432 robots drawn with seed 0" in printed
    (found,) = json.loads(figures.read_text())
    assert found["dense_training"] == found["training"] == 1.0
    assert found["weights"] == 39
    assert found["kept"] <= 20
    assert f"{found['removed']:.0%}" in printed
    # The file alone tells the rule, by NumPy.
    model = onnx.load(tmp_path / "new" / "monk2.onnx")
    a, b, v, c = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    assert sum(int(np.count_nonzero(part)) for part in (a, b, v, c)) == found["kept"]
    x, labels = example.robots()
    logit = np.tanh(x.numpy() @ a.T + b) @ v.T + c
    accuracy = float(((logit[:, 0] > 0) == (labels[2].numpy() > 0.5)).mean())
    assert accuracy == pytest.approx(found["all"])
    assert accuracy > 0.95


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--restarts", "0"], "--restarts 0"),
        (["--steps", "0"], "--steps 0"),
        (["--retrain", "-1"], "--retrain -1"),
        (["--json", "no/such/folder/f.json"], "the folder does not exist"),
    ],
)
def test_bad_usage(
    example: ModuleType, capsys: pytest.CaptureFixture[str], bad: list[str], message: str
) -> None:
    assert example.main(bad) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_shares_removed_are_near_the_papers(example: ModuleType, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    for seed in ("0", "1"):
        arguments = ["--seed", seed, "--output", str(tmp_path), "--json", str(figures)]
        assert example.main(arguments) == 0
        for found in json.loads(figures.read_text()):
            assert found["removed"] >= found["paper"] - 0.05
            assert found["training"] >= found["dense_training"]
            assert found["all"] >= found["dense_all"] - 0.05
