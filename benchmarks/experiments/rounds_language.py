"""Practical I-OBS by round on language models: 128 fresh sequences each round, half of the weights.

The paper prunes Llama-2-7B and Llama-3-8B by small symmetric steps (learning rate and damping 0.01)
projected by SparseGPT: perplexity falls over a few rounds and then rises, and MMLU is best at a
later round than the first. Here stories15M and SmolLM2-135M take their places; a round goes on from
the one before it, better or worse, and reads as many sequences as the first, none of them twice.
Beside it this project's defaults, and on stories15M the same recipe with longer steps, rounds that
read one text again and again, and one round that reads all the text.

stories15M is calibrated on text that it wrote, SmolLM2 on WikiText-2 (train); both are judged by
the perplexity of stories and of text of another kind, novels or WikiText-2 (valid). SmolLM2 is also
judged by the last word of 400 passages of LAMBADA and by five-shot MMLU (ten questions of each of
29 subjects): dense, after the first round and after the best. stories15M is not: it reads 256
tokens, too few for five examples, and passages of novels are text that it is judged by.

Any other model goes the same way: `--model FILE.onnx --tokenizer NAME` (a Llama-2-7B exported by
Optimum without its cache, and the name or folder of its tokenizer) makes the runs of SmolLM2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import export_models
import numpy as np
from lab import ROOT, Claim, Experiment, Finding, Line, Run, Settings, main, perform
from language_tasks import PASSAGES, QUESTIONS, lambada, mmlu, passages
from numpy.typing import NDArray
from quality_tasks import fed, found, perplexity, session
from rounds_vision import SPARSEGPT

import iobs_onnx

_PAPERS = {**SPARSEGPT, "random_tokens": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "paper": {**_PAPERS, "learning_rate": 0.01},
    "paper, η = 0.1": {**_PAPERS, "learning_rate": 0.1},
    "paper, η = 0.3": {**_PAPERS, "learning_rate": 0.3},
    "paper, η = 1": {**_PAPERS, "learning_rate": 1.0},
    "defaults": {},
    "defaults, one text": {},
    "defaults, all at once": {},
}
ROUNDS, SEQUENCES, LENGTH = 5, 128, 256
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Subject:
    """A language model of this experiment.

    Attributes:
        model: the dense one.
        texts: sequences to calibrate on.
        judges: sequences whose perplexity is taken, by name; the first decides which is the best.
        encode: returns the tokens of a text; None where LAMBADA and MMLU are left out.
    """

    model: Path
    texts: list[Tokens]
    judges: Mapping[str, list[Tokens]]
    encode: Callable[[str], list[int]] | None


def stories15m(settings: Settings) -> Subject:
    """Return stories15M, with text that it wrote."""
    from sentencepiece import SentencePieceProcessor

    shared, file = settings.shared, "models/stories15M.tokenizer.model"
    tokenizer = SentencePieceProcessor(model_file=str(found(shared / file)))
    model = found(shared / "models/stories15M.onnx")
    start = tokenizer.bos_id()
    judges = {
        name: [np.array([start, *tokenizer.encode(x)][:256]) for x in texts]
        for name, texts in (("stories", _stories(shared)), ("novels", passages(shared)[:100]))
    }
    count = 8 if settings.quick else 1120
    return Subject(model, _own_text(model, settings, count, start), judges, None)


def smollm2(settings: Settings) -> Subject:
    """Return SmolLM2-135M, with WikiText-2 (train)."""
    from transformers import AutoTokenizer

    settings.made.mkdir(parents=True, exist_ok=True)
    weights = export_models.smollm2_weights()
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = export_models.smollm2(settings.made / "smollm2.onnx")
    return _any_model(model, partial(tokenizer.encode, add_special_tokens=False), settings)


def _any_model(model: Path, encode: Callable[[str], list[int]], settings: Settings) -> Subject:
    folder = settings.shared / "data/wikitext2"
    train, valid = (
        np.array(encode(found(folder / name).read_text(encoding="utf8")), np.int64)
        for name in ("train_5k_lines.txt", "valid.txt")
    )
    judges = {
        "WikiText-2": list(valid[: 24 * 512].reshape(24, 512)),
        "stories": [np.array(encode(x)[:256], np.int64) for x in _stories(settings.shared)],
    }
    cut = train[: len(train) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return Subject(model, list(cut), judges, encode)


def _stories(shared: Path) -> list[str]:
    file = found(shared / "data/tinystories/stories_first_120.json")
    return [text.strip() for text in json.loads(file.read_text())[60:120]]


def _own_text(model: Path, settings: Settings, count: int, start: int) -> list[Tokens]:
    """Return text that the model wrote, kept for the next time: `count` takes an hour to write."""
    path = settings.made / "stories15m-own.npy"
    if path.exists():
        return list(np.load(path)[:count])
    from iobs_onnx.runtime.data.self_written import SelfSamples
    from iobs_onnx.runtime.session import InputSpec

    running = session(model)
    (ids,) = running.get_inputs()
    shape = tuple(length if isinstance(length, int) else None for length in ids.shape)
    inputs = [InputSpec(ids.name, np.dtype(np.int64), shape)]
    vocabulary = running.get_outputs()[0].shape[-1]
    written = SelfSamples(running, inputs, vocabulary, count=count, length=LENGTH, start=start)
    rows = np.concatenate([written.feed(range(i, i + 8))["input_ids"] for i in range(0, count, 8)])
    if not settings.quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rows)
    return list(rows)


def runs(settings: Settings) -> Iterator[Run]:
    """Each model dense, then its methods."""
    subjects: dict[str, Callable[[], Subject]] = {
        "stories15M": cache(partial(stories15m, settings)),
        "SmolLM2-135M": cache(partial(smollm2, settings)),
    }
    for name, subject in list(subjects.items())[: 1 if settings.quick else None]:
        own = name == "stories15M"
        yield Run({"model": name, "method": "dense"}, partial(_dense, subject, settings))
        chosen = list(METHODS) if own else ["paper", "paper, η = 1"]
        for seed in (0, 1) if own and not settings.quick else (0,):
            for method in ("paper", "defaults") if settings.quick else chosen:
                key = {"model": name, "method": method, "seed": seed}
                yield Run(key, partial(_prune, subject, method, seed, settings))


def _dense(subject: Callable[[], Subject], settings: Settings) -> Line:
    own = subject()
    return {**_perplexities(own, own.model), **_tasks(own, own.model, settings)}


def _perplexities(subject: Subject, model: Path) -> Line:
    return {name: perplexity(model, texts) for name, texts in subject.judges.items()}


def _prune(subject: Callable[[], Subject], method: str, seed: int, settings: Settings) -> Line:
    """Prune in rounds, each judged and gone on from."""
    own = subject()
    rounds, sequences = (2, 4) if settings.quick else (ROUNDS, SEQUENCES)
    order = np.random.default_rng(seed).permutation(len(own.texts))[: rounds * sequences]
    if method.endswith("one text"):
        order = np.repeat(order[:sequences], rounds)  # feeds are dealt out to rounds one by one
    running = session(own.model)
    feeds = [fed(running, own.texts[i]) for i in order]
    del running  # it holds the whole model
    first = next(iter(own.judges))
    seen: list[Line] = []

    def judged(path: str) -> float:
        line = _perplexities(own, Path(path))
        if not seen and "η" not in method:  # the first round begins where all steps end
            line |= _tasks(own, Path(path), settings)
        elif own.encode and all(line[first] < earlier[first] for earlier in seen):
            shutil.rmtree(best, ignore_errors=True)
            shutil.copytree(Path(path).parent, best)
        seen.append(line)
        print(method, json.dumps(line), flush=True)
        return float(len(seen))  # the last round is taken for the best, and the next begins there

    with tempfile.TemporaryDirectory(prefix="rounds-language-") as folder:
        best = Path(folder) / "best"
        iobs_onnx.prune(
            own.model,
            calibration=feeds,
            sparsity=0.5,
            rounds=1 if method.endswith("at once") else rounds,
            metric=judged,
            seed=seed,
            output=Path(folder) / "sparse.onnx",
            **METHODS[method],
        )
        if best.exists():
            (model,) = best.glob("*.onnx")
            min(seen, key=lambda line: line[first]).update(_tasks(own, model, settings))
    return {"rounds": seen}


def _tasks(subject: Subject, model: Path, settings: Settings) -> Line:
    """Return LAMBADA's and MMLU's accuracy in percent, where the model can be asked."""
    if subject.encode is None:
        return {}
    running = session(model)

    def logits(ids: list[int]) -> NDArray[np.float32]:
        return running.run(["logits"], fed(running, np.array(ids, np.int64)))[0][0]

    return {
        "LAMBADA": lambada(logits, subject.encode, settings.shared),
        "MMLU": mmlu(logits, subject.encode, settings.shared),
    }


def _curve(lines: Sequence[Line], model: str, method: str, judge: str) -> list[float]:
    """Return a judge's figures by round, the mean over the seeds."""
    own = [
        [item[judge] for item in line["rounds"]]
        for line in lines
        if (line["model"], line["method"]) == (model, method)
    ]
    return [sum(values) / len(values) for values in zip(*own, strict=True)]


def _dense_line(lines: Sequence[Line], model: str) -> Line:
    return next(x for x in lines if (x["model"], x["method"]) == (model, "dense"))


def _judges(lines: Sequence[Line], model: str) -> list[str]:
    """Return the names of the two texts, the kind that is calibrated on first."""
    return [x for x in _dense_line(lines, model) if x in ("stories", "novels", "WikiText-2")]


def _curves(lines: Sequence[Line], method: str) -> dict[str, list[float]]:
    """Return perplexity by round, by model and text."""
    models = dict.fromkeys(line["model"] for line in lines)
    found_curves = {
        f"{model} on {judge}": _curve(lines, model, method, judge)
        for model in models
        for judge in _judges(lines, model)
    }
    return {name: curve for name, curve in found_curves.items() if len(curve) > 1}


def _falls(method: str, lines: Sequence[Line]) -> Finding | None:
    curves = _curves(lines, method)
    if not curves:
        return None
    gains = {name: 100 * (1 - min(curve[1:]) / curve[0]) for name, curve in curves.items()}
    better = sum(gain > 0 for gain in gains.values())
    cells = ", ".join(f"{name} {gain:+.2f} %" for name, gain in gains.items())
    agrees = "yes" if better == len(curves) else "in part" if better else "no"
    return Finding(f"the best later round is lower than the first by: {cells}", agrees)


def _rises(method: str, lines: Sequence[Line]) -> Finding | None:
    curves = _curves(lines, method)
    if not curves:
        return None
    turned = [name for name, curve in curves.items() if 0 < int(np.argmin(curve)) < len(curve) - 1]
    lowest = ", ".join(f"{name} {int(np.argmin(curve)) + 1}" for name, curve in curves.items())
    agrees = "yes" if len(turned) == len(curves) else "in part" if turned else "no"
    return Finding(f"lowest after round, of {ROUNDS}: {lowest}", agrees)


def _answers(lines: Sequence[Line]) -> Finding | None:
    asked = [
        (f"{line['method']}, round {number}", item)
        for line in lines
        for number, item in enumerate(line.get("rounds", []), start=1)
        if "MMLU" in item
    ]
    if not asked:
        return None
    cells = [f"{name}: {item['MMLU']:.1f} and {item['LAMBADA']:.1f} %" for name, item in asked]
    text = "SmolLM2 is at chance in MMLU, dense too. MMLU and LAMBADA: " + "; ".join(cells)
    return Finding(text, "unclear")


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Return tables and a figure."""
    parts = [
        "## Rounds on language models",
        "",
        f"Perplexity by round at 50 %, {SEQUENCES} fresh sequences of {LENGTH} tokens a round, a "
        "round going on from the one before it; stories15M: mean of two seeds, of one where one "
        "text is read again or all at once; SmolLM2: one seed. stories15M is calibrated on "
        "text that it wrote, SmolLM2 on WikiText-2 (train). The best round in bold.",
        "",
        "| model | judged on | dense | method | "
        + " | ".join(map(str, range(1, ROUNDS + 1)))
        + " |",
        "|---" * (4 + ROUNDS) + "|",
    ]
    for model in dict.fromkeys(line["model"] for line in lines):
        dense = _dense_line(lines, model)
        for judge in _judges(lines, model):
            for method in METHODS:
                curve = _curve(lines, model, method, judge)
                if not curve:
                    continue
                cells = [
                    f"**{value:.3f}**" if value == min(curve) and len(curve) > 1 else f"{value:.3f}"
                    for value in curve
                ]
                cells += [""] * (ROUNDS - len(curve))
                parts.append(
                    f"| {model} | {judge} | {dense[judge]:.2f} | {method} | "
                    + " | ".join(cells)
                    + " |"
                )
    parts += _tasks_table(lines)
    _figure(lines, folder / "experiments-rounds-language.png")
    return [*parts, "", *READING, "", "![perplexity by round](img/experiments-rounds-language.png)"]


READING = [
    "With η = 0.01 perplexity falls in every round, on both texts of both models, but by 0.1 % in "
    "all: a removed weight gets a hundredth of itself back, and the mask stays nearly what the "
    "first round made it. Longer steps win more, 1 to 6 % with whole ones (η = 1), and then "
    "the lowest perplexity is before the last round in three of four curves, as the paper draws "
    "it, if not smoothly; where it turns hangs on the draw of the text. It is not all gain: "
    "SmolLM2's best round by perplexity finds fewer of LAMBADA's last words than the first.",
    "",
    "One round of the defaults is better than the best of SparseGPT's, and a second gains nothing. "
    "Rounds on one text lose on both kinds, more on the other one; with fresh text they lose "
    "less. One round that reads all the text at once is better than any that reads a fifth on "
    "novels; on stories the draw of that fifth decides (8.98 and 9.14 with one seed, all: 8.98).",
    "",
    "Another export, of Llama-2-7B say, goes the same way as SmolLM2: `python "
    "benchmarks/experiments/rounds_language.py --model FOLDER/model.onnx --tokenizer FOLDER`, with "
    "a model that Optimum exported without its cache. On one of 7 B that has not been run.",
    "",
    "SmolLM2 is at chance in MMLU when it is dense, and what it scores pruned says nothing.",
]


def _tasks_table(lines: Sequence[Line]) -> list[str]:
    asked = [
        (line["model"], line["method"], number, item)
        for line in lines
        for number, item in enumerate(line.get("rounds", [line]), start=1)
        if "MMLU" in item
    ]
    if not asked:
        return []
    parts = [
        "",
        f"The last word of {PASSAGES} passages of LAMBADA and five-shot MMLU, in percent, dense, "
        f"after the first round and after the best. MMLU: {QUESTIONS} questions of each of 29 "
        "subjects; a guess is right in 25 %, and the standard error is 2.5 points.",
        "",
        "| model | method | round | LAMBADA | MMLU |",
        "|---|---|---|---|---|",
    ]
    for model, method, number, item in asked:
        where = "" if method == "dense" else str(number)
        parts.append(
            f"| {model} | {method} | {where} | {item['LAMBADA']:.1f} | {item['MMLU']:.1f} |"
        )
    return parts


def _figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line["model"] for line in lines))
    figure = Figure(figsize=(4.6 * len(models), 6.6), layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        for axes, judge in zip(grid[:, column], _judges(lines, model), strict=True):
            for method in METHODS:
                curve = _curve(lines, model, method, judge)
                if not curve:
                    continue
                steps = np.arange(1, len(curve) + 1)
                (drawn,) = axes.plot(steps, curve, "o-", markersize=3, label=method)
                best = int(np.argmin(curve))
                axes.plot(steps[best], curve[best], "*", markersize=11, color=drawn.get_color())
            axes.set(title=f"{model}, {judge}", xlabel="round", ylabel="perplexity", yscale="log")
            axes.grid(alpha=0.3, which="both")
        grid[0, column].legend(fontsize="x-small")
    figure.savefig(path, dpi=90)


_PAPER = "Wu et al., NeurIPS 2024"
EXPERIMENT = Experiment(
    "rounds_language",
    "Rounds on language models",
    (
        Claim(
            _PAPER,
            "a later round on fresh text has a lower perplexity than the first (η = 0.01)",
            partial(_falls, "paper"),
        ),
        Claim(
            _PAPER,
            "perplexity falls by round, and then rises (η = 0.01)",
            partial(_rises, "paper"),
        ),
        Claim(
            _PAPER,
            "perplexity falls by round, and then rises (η = 1)",
            partial(_rises, "paper, η = 1"),
        ),
        Claim(_PAPER, "the best round answers more of MMLU than the first", _answers),
        Claim(
            "this project",
            "rounds pay with the defaults where fresh text is plentiful",
            partial(_falls, "defaults"),
        ),
    ),
    runs,
    draw,
)


def _other(model: Path, tokenizer: str, settings: Settings) -> None:
    """Make SmolLM2's runs on another model; their lines go to `build/experiments`."""
    from transformers import AutoTokenizer

    encode = partial(AutoTokenizer.from_pretrained(tokenizer).encode, add_special_tokens=False)
    subject = cache(partial(_any_model, model, encode, settings))

    def listed(settings: Settings) -> Iterator[Run]:
        yield Run({"model": model.stem, "method": "dense"}, partial(_dense, subject, settings))
        for method in ("paper", "defaults"):
            key = {"model": model.stem, "method": method, "seed": 0}
            yield Run(key, partial(_prune, subject, method, 0, settings))

    folder = ROOT / "build/experiments"
    folder.mkdir(parents=True, exist_ok=True)
    other = dataclasses.replace(EXPERIMENT, runs=listed)
    lines = perform(other, settings, folder / f"rounds_language-{model.stem}.jsonl")
    print("\n".join(draw(lines, folder)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    own, _ = parser.parse_known_args()
    if own.model is None:
        main(EXPERIMENT)
    else:
        _other(own.model, own.tokenizer or str(own.model.parent), Settings(False, own.shared))
