"""The experiments of the papers: how their lines become the page, and small runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

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


def test_obs_on_an_eigenspace_nears_the_whole_hessian(lab: ModuleType) -> None:
    import eigenspace

    generator = torch.Generator().manual_seed(0)
    # Strongly correlated inputs, so that what a weight's removal costs depends on the others.
    basis = torch.randn(96, 96, generator=generator) * torch.logspace(0, -1.5, 96)
    mixing, _ = torch.linalg.qr(torch.randn(96, 96, generator=generator))
    mixed = basis @ mixing
    weight = torch.randn(16, 96, generator=generator)
    hessian = mixed.T @ mixed / 96
    line = eigenspace.compare(eigenspace.Layer(weight, hessian, torch.eye(96)), "2:4", (1, 24, 96))
    for form in eigenspace.FORMS:
        # The whole eigenspace is the whole Hessian: the same weights go, but for rounding.
        assert line[form]["96"]["error"] == pytest.approx(line["whole"]["error"], rel=0.02)
        assert line[form]["24"]["error"] < line[form]["1"]["error"]
    assert line["spectrum"]["96"] == pytest.approx(1, rel=1e-5)
    assert line["whole"]["error"] < line["rest"]["24"]["error"] < line["diagonal"]["error"]


@pytest.mark.slow
def test_quick_obs_on_eigenspaces_of_a_real_layer(lab: ModuleType, tmp_path: Path) -> None:
    import eigenspace

    pytest.importorskip("transformers")
    (line,) = lab.perform(
        eigenspace.EXPERIMENT, lab.Settings(True, tmp_path), tmp_path / "eigenspace.jsonl"
    )
    assert line["whole"]["error"] < line["rest"]["4"]["error"] < line["diagonal"]["error"]
    for cell in (line["whole"], line["diagonal"], *line["rest"].values()):
        assert 0 < cell["error"] < cell["other"] < 1  # other text is harder


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
