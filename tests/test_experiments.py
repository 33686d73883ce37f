"""The experiments of the papers: how their lines become the page, and small runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "benchmarks" / "experiments"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
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
