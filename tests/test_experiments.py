"""The experiments of the papers: how their lines become the page, and small runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
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


def test_quick_phase_transitions_end_in_success(lab: ModuleType, tmp_path: Path) -> None:
    import phase_transition

    settings = lab.Settings(True, tmp_path)
    lines = lab.perform(phase_transition.EXPERIMENT, settings, tmp_path / "phase.jsonl")
    # With six observations a weight second-order steps find what is sought.
    assert {line["loss"] for line in lines} == set(phase_transition.LOSSES)
    for line in lines:
        for name in ("Topk-I-OBS", "I-OBS"):
            assert line[name]["success"] == 1.0, (line["loss"], name)
            assert line[name]["steps"] <= 10


def test_early_brain_damage_judges_by_the_optimum_of_a_weight(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import early_brain_damage as study

    for name, value in {"STEPS": 200, "RETRAIN": 20, "FINISH": 100, "STAGES": 3}.items():
        monkeypatch.setattr(study, name, value)
    lines = lab.perform(study.EXPERIMENT, lab.Settings(True, tmp_path), tmp_path / "ebd.jsonl")
    assert len(lines) == len(study.REGIMES) * (1 + len(study.METHODS))
    for line in lines:
        if line["method"] == "judged":
            ranks = line["ranks"]
            assert ranks["EBD"]["over its optimum"] >= ranks["OBD"]["over its optimum"] - 0.01
        else:
            assert line["left"] == [82, 62, 46, 35]
            assert not any(line["revived"]) or line["method"] == "EBD"
    gradients = {x["regime"]: x["gradient"] for x in lines if x["method"] == "judged"}
    assert gradients["end"] < gradients["early"] / 10


def test_early_brain_damage_is_that_of_its_formula(lab: ModuleType, tmp_path: Path) -> None:
    import early_brain_damage as study
    import torch

    net = study.network(tmp_path, "MONK 3", 0)
    w = net.start(torch.Generator().manual_seed(0))
    kept = torch.arange(len(w)) % 2 == 0
    w = w * kept
    gradient = torch.func.grad(net.loss)(w)
    # The Gauss-Newton matrix, of the loss with the network made linear at w.
    x, _ = net.train
    jacobian = torch.func.jacrev(lambda w: net.scores(w, x))(w)
    h = torch.zeros(len(w), len(w), dtype=w.dtype)
    for rows, p in zip(jacobian, net.scores(w, x).softmax(1), strict=True):
        h += rows.T @ (p.diag() - p.outer(p)) @ rows / len(x)
    h.diagonal().add_(net.decay)
    h.diagonal().add_(study.DAMPING * float(h.diagonal().mean()))
    assert torch.allclose(net.hessian(w), h, rtol=1e-9, atol=1e-12)
    saliency = h.diagonal() * (w - gradient / h.diagonal()).square() / 2
    sparse, chosen = study.METHODS["EBD"](net, w, kept, 30)
    assert set(chosen.nonzero().flatten().tolist()) == set(saliency.topk(30).indices.tolist())
    assert torch.equal(sparse, w * chosen)


@pytest.mark.slow
def test_quick_recurrent_network_keeps_more_by_its_hessian(lab: ModuleType, tmp_path: Path) -> None:
    import recurrent

    shared = EXPERIMENTS.parents[2] / "shared"
    if not (shared / "data/mnist").exists():
        pytest.skip("the shared folder is absent")
    settings = lab.Settings(True, shared)
    lines = lab.perform(recurrent.EXPERIMENT, settings, tmp_path / "recurrent.jsonl")
    by = {line["method"]: line["accuracy"] for line in lines}
    assert by["dense"] > 50
    assert by["OBS"] > by["magnitude"] + 10


@pytest.mark.slow
def test_quick_rounds_on_a_language_model(lab: ModuleType, tmp_path: Path) -> None:
    shared = EXPERIMENTS.parents[2] / "shared"
    if not (shared / "models/stories15M.onnx").exists():
        pytest.skip("the shared folder is absent")
    experiment = next(item for item in lab.everything() if item.name == "rounds_language")
    settings = lab.Settings(True, shared, tmp_path)
    dense, *others = lab.perform(experiment, settings, tmp_path / "lines.jsonl")
    assert dense["stories"] == pytest.approx(6.664, abs=0.01)  # on 60 stories, in ONNX Runtime
    assert [line["method"] for line in others] == ["paper", "defaults"]
    for line in others:
        assert len(line["rounds"]) == 2
        assert all(item["stories"] > dense["stories"] for item in line["rounds"])
    # A step of 0.01 leaves the second round where the first was, four texts or not.
    first, second = (item["stories"] for item in others[0]["rounds"])
    assert second == pytest.approx(first, rel=0.02)


def test_letters_are_what_mmlu_asks_for(lab: ModuleType, tmp_path: Path) -> None:
    """A model that reads the choices finds all answers, one that says A those that are A."""
    import language_tasks

    rows = [("2 + 2", "4", "5", "6", "7", 0), ("3 + 3", "5", "6", "7", "8", 1)]
    head = "question,choice0,choice1,choice2,choice3,answer"
    for part, count in (("dev", 3), ("test", 1)):
        folder = tmp_path / "data/mmlu" / part
        folder.mkdir(parents=True)
        table = [head, *(",".join(map(str, row)) for row in rows * count)]
        (folder / f"sums_{part}.csv").write_text("\n".join(table))
    asked: list[str] = []

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def knows(ids: list[int]) -> np.ndarray:
        text = "".join(map(chr, ids))
        asked.append(text)
        lines = text.splitlines()[-6:]
        right = str(sum(int(x) for x in lines[0].split("+")))
        logits = np.zeros((len(ids), 128))
        logits[-1, ord(next(line[0] for line in lines[1:] if line.endswith(f" {right}")))] = 1
        return logits

    def says_a(ids: list[int]) -> np.ndarray:
        return np.eye(128)[[ord("A")] * len(ids)]

    assert language_tasks.mmlu(knows, encode, tmp_path) == 100
    assert language_tasks.mmlu(says_a, encode, tmp_path) == 50
    assert all(text.count("Answer: ") == 5 and text.endswith("Answer:") for text in asked)


def test_a_language_model_is_fed_what_it_reads(lab: ModuleType) -> None:
    """Optimum's exports read a mask, and positions; a cache is refused."""
    import quality_tasks

    def session(*names: str) -> SimpleNamespace:
        return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name=name) for name in names])

    ids = np.array([5, 6, 7])
    feed = quality_tasks.fed(session("attention_mask", "input_ids", "position_ids"), ids)
    assert {name: array.tolist() for name, array in feed.items()} == {
        "attention_mask": [[1, 1, 1]],
        "input_ids": [[5, 6, 7]],
        "position_ids": [[0, 1, 2]],
    }
    with pytest.raises(SystemExit, match=r"past_key_values\.0\.key.*without its cache"):
        quality_tasks.fed(session("input_ids", "past_key_values.0.key"), ids)
