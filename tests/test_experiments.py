"""The experiments of the papers: how their lines become the page, and small runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "benchmarks" / "experiments"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    root = EXPERIMENTS.parents[1]
    for folder in (EXPERIMENTS, EXPERIMENTS.parent, root / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    import lab

    return lab


def test_an_interrupted_experiment_goes_on_where_it_was(lab: ModuleType, tmp_path: Path) -> None:
    made = []

    def runs(settings: object) -> list[object]:
        def measure(number: int) -> dict[str, int]:
            made.append(number)
            if number == 2 and len(made) == 3:
                raise KeyboardInterrupt
            return {"square": number**2}

        return [lab.Run({"number": n}, lambda n=n: measure(n)) for n in range(4)]

    experiment = lab.Experiment("toy", "Toy", (), runs, lambda lines, folder: [])
    settings, results = lab.Settings(True, tmp_path), tmp_path / "toy.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lab.perform(experiment, settings, results)
    lines = lab.perform(experiment, settings, results)
    assert made == [0, 1, 2, 2, 3]
    assert [(line["number"], line["square"]) for line in lines] == [(n, n**2) for n in range(4)]
    assert lab.read(results) == lines


def test_the_page_is_drawn_from_lines(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "experiments.md"
    page.write_text("before\n<!-- claims: begin -->old<!-- claims: end -->\nafter\n")
    monkeypatch.setattr(lab, "PAGE", page)
    monkeypatch.setattr(lab, "HERE", tmp_path)
    claim = lab.Claim("Seed 1999", "it grows", lambda lines: lab.Finding(f"{len(lines)}", "yes"))
    experiment = lab.Experiment(
        "toy", "Toy", (claim,), lambda settings: (), lambda lines, folder: ["## Toy", "part"]
    )
    experiment.results.parent.mkdir()
    experiment.results.write_text(json.dumps({"a": 1}) + "\n")
    for _ in range(2):  # drawn again, it stays what it is
        lab.render([experiment])
        text = page.read_text()
        assert "| Seed 1999 | it grows | 1 | yes | `python benchmarks/experiments/toy.py` |" in text
        assert text.count("## Toy") == 1
        assert "old" not in text
        assert text.startswith("before")


def test_every_experiment_is_listed_with_its_results_on_the_page(lab: ModuleType) -> None:
    names = [experiment.name for experiment in lab.everything()]
    page = (EXPERIMENTS.parents[1] / "docs/experiments.md").read_text(encoding="utf8")
    for name in names:
        assert f"<!-- {name}: begin -->" in page, name
        assert lab.read(EXPERIMENTS / "results" / f"{name}.jsonl"), name


def test_quick_rates_of_recovery_keep_their_bounds(lab: ModuleType, tmp_path: Path) -> None:
    import recovery_rates

    settings = lab.Settings(True, tmp_path)
    lines = lab.perform(recovery_rates.EXPERIMENT, settings, tmp_path / "rates.jsonl")
    quadratics = [line for line in lines if line["loss"] == "quadratic"]
    assert quadratics
    for line in quadratics:
        for name in recovery_rates.ALGORITHMS:
            assert 0 < line[name]["worst"] <= line[name]["bound"] * (1 + 1e-9)
        # A whole Newton step ends at the minimiser, which is sparse enough to be kept.
        for name in ("Topk-I-OBS", "I-OBS"):
            assert (line[name]["found"], line[name]["steps"]) == (1.0, 1.0)
    for line in lines:
        if line["loss"] == "logistic":
            assert max(line["shares"].values()) <= 1


def test_quick_layers_of_an_mlp_keep_their_bounds(
    lab: ModuleType, shared: Path, tmp_path: Path
) -> None:
    import layer_bounds

    experiment = layer_bounds.EXPERIMENT
    (line,) = lab.perform(experiment, lab.Settings(True, shared), tmp_path / "lines.jsonl")
    assert len(line["layers"]) == 5
    for layer in line["layers"]:  # a linear layer's bound is its error, and a ReLU takes from it
        assert layer["measured"] == pytest.approx(layer["bound"], rel=1e-3)
        assert layer["measured, activated"] <= layer["measured"] * (1 + 1e-6)
        assert layer["network measured"] <= layer["network bound"] * (1 + 1e-3)
    assert line["layers"][-1]["network bound"] == line["bound"] < line["paper's bound"]
    assert [claim.judge([line]).agrees for claim in experiment.claims[:2]] == ["yes", "yes"]
    page = "\n".join(experiment.draw([line], tmp_path))
    assert f"| MLP | 50% | {line['top-1'][0]:.2f} |" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cbs_vision", "rounds_vision"])
def test_quick_runs_on_vision_models(lab: ModuleType, tmp_path: Path, name: str) -> None:
    shared = EXPERIMENTS.parents[2] / "shared"
    if not (shared / "models/resnet20.onnx").exists():
        pytest.skip("the shared folder is absent")
    experiment = next(item for item in lab.everything() if item.name == name)
    lines = lab.perform(experiment, lab.Settings(True, shared), tmp_path / "lines.jsonl")
    dense = next(line["top-1"] for line in lines if line["method"] == "dense")
    assert 91 < dense < 92.5  # ResNet-20 on the first 2,000 test images
    judged = [line for line in lines[1:] if "top-1" in line]
    tops = [top for x in judged for top in (x["top-1"] if name[0] == "r" else [x["top-1"]])]
    assert len(tops) >= 3
    assert all(0 <= top <= 100 for top in tops)
    if name == "cbs_vision":  # at 70 % second-order methods keep far more than magnitude
        by = {line["method"]: line["top-1"] for line in lines[1:]}
        assert min(by["CBS"], by["I-OBS"]) > by["magnitude"] + 20
