"""The tasks of `model_quality.py`: a model, what it is calibrated on, and what judges it.

No text, story or image that calibrates a model judges it. A judge takes the path of a model and
returns its metrics by name; the first is the one that is plotted.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import export_models
import numpy as np
import prepare
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import minilm


@dataclass(frozen=True)
class Task:
    """One real model.

    Attributes:
        title: of the model, its calibration data and its judges, for the table.
        model: the dense model.
        calibration: returns what `prune` calibrates on: `count` texts, sequences or images.
        count: the default of that.
        judge: measures a model.
        metrics: what the judge returns, with the format each is written in.
        falls: whether the first metric is better the lower it is.
        writes: options with which a language model writes text to calibrate on too.
    """

    title: str
    model: Path
    calibration: Callable[[int], Any]
    count: int
    judge: Callable[[Path], dict[str, float]]
    metrics: Mapping[str, str]
    falls: bool = False
    writes: Mapping[str, int] | None = None


def minilm_task(made: Path, shared: Path) -> Task:
    """A sentence encoder: similarities of other text of the same kind and of another, STS-B."""
    from scipy.stats import spearmanr

    calibrating, judged = 2048, 256
    dense = minilm.export(made / "all-MiniLM-L6-v2.onnx")
    texts = minilm.docstrings(calibrating + judged)
    judges = {"docstrings": texts[calibrating:], "reference": minilm.reference_passages(judged)}
    pairs = found(shared / "data/stsb/stsb-dev.tsv").read_text(encoding="utf8").splitlines()
    columns = list(zip(*(line.split("\t")[4:7] for line in pairs), strict=True))
    scores, *sentences = [float(score) for score in columns[0]], *columns[1:]
    before = {name: _embed(dense, passages) for name, passages in judges.items()}

    def judge(model: Path) -> dict[str, float]:
        metrics = {
            name: minilm.similarity_correlation(before[name], _embed(model, passages))
            for name, passages in judges.items()
        }
        first, second = (_embed(model, column) for column in sentences)
        return {"STS-B": float(spearmanr((first * second).sum(1), scores)[0]), **metrics}

    return Task(
        "all-MiniLM-L6-v2, 36 linears, calibrated on docstrings of the standard library. STS-B "
        "dev: Spearman correlation; docstrings (others) and the language reference: correlation "
        "of pairwise similarities with the dense model's",
        dense,
        lambda count: minilm.feeds(texts[: min(count, calibrating)]),
        512,
        judge,
        {"STS-B": ".4f", "docstrings": ".4f", "reference": ".4f"},
    )


def _embed(model: Path, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return one unit vector a text, in the order of the texts; `feeds` sorts them by length."""
    lengths = [len(ids) for ids in minilm.token_ids(texts)]
    vectors = minilm.embed(model, minilm.feeds(texts, batch=32))
    ordered = np.empty_like(vectors)
    ordered[np.argsort(lengths, kind="stable")] = vectors
    return ordered


def stories_task(made: Path, shared: Path) -> Task:
    """A small Llama-shaped language model: perplexity of stories it was not calibrated on."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(
        model_file=str(found(shared / "models/stories15M.tokenizer.model"))
    )
    stories = json.loads(found(shared / "data/tinystories/stories_first_120.json").read_text())
    ids = [
        np.array([tokenizer.bos_id(), *tokenizer.encode(story.strip())][:256], np.int64)
        for story in stories
    ]
    return Task(
        "stories15M, 42 linears, calibrated on stories 0 to 59; perplexity of stories 60 to 119, "
        "up to 256 tokens each",
        found(shared / "models/stories15M.onnx"),
        lambda count: [{"input_ids": story[None]} for story in ids[: min(count, 60)]],
        60,
        lambda model: {"perplexity": perplexity(model, ids[60:120])},
        {"perplexity": ".3f"},
        falls=True,
        writes={"start_token": tokenizer.bos_id(), "sequence_length": 128, "samples": 64},
    )


def smollm2_task(made: Path, shared: Path) -> Task:
    """A language model of 135 M weights: perplexity of WikiText-2."""
    context, windows = 512, 24
    made.mkdir(parents=True, exist_ok=True)
    dense = export_models.smollm2(made / "smollm2.onnx")
    folder = shared / "data/wikitext2"
    train, valid = (
        export_models.smollm2_tokens(found(folder / name), made / f"smollm2-{name}.npy")
        for name in ("train_5k_lines.txt", "valid.txt")
    )

    def cut(ids: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        return list(ids[: len(ids) // context * context].reshape(-1, context)[:count])

    return Task(
        f"SmolLM2-135M-Instruct, 210 linears, calibrated on WikiText-2 (train) in sequences of "
        f"{context} tokens; perplexity of the first {windows} such sequences of WikiText-2 (valid)",
        dense,
        lambda count: [{"input_ids": ids[None]} for ids in cut(train, count)],
        32,
        lambda model: {"perplexity": perplexity(model, cut(valid, windows))},
        {"perplexity": ".3f"},
        falls=True,
    )


def resnet20_task(made: Path, shared: Path) -> Task:
    """A small convolutional classifier: top-1 on CIFAR-10."""
    test, train = (
        np.load(found(shared / f"data/cifar10/{part}_first_2000.npz")) for part in ("test", "train")
    )

    def normalised(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = (images / 255 - prepare.MEAN) / prepare.STD
        return scaled.transpose(0, 3, 1, 2).astype(np.float32)

    def batches() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(test["x"]), 100):
            yield normalised(test["x"][start : start + 100])

    return Task(
        "ResNet-20, 20 convolutions and linears, calibrated on 512 training images of CIFAR-10; "
        "top-1 in percent of the first 2,000 test images",
        found(shared / "models/resnet20.onnx"),
        lambda count: {"x": normalised(train["x"][:count])},
        512,
        lambda model: {"top-1": top1(model, batches, test["y"])},
        {"top-1": ".2f"},
    )


def efficientnet_task(made: Path, shared: Path, *, mixed: bool = False) -> Task:
    """EfficientNet-Lite0: top-1 on images of ImageNet's classes.

    Images are in the order of their classes. The first 200 show animals alone, most of the other
    400 things; `mixed` takes every third one, so that both kinds calibrate and judge.
    """
    folder = found(shared / "data/imagenet")
    rows = [line.split("\t") for line in (folder / "labels.tsv").read_text().splitlines()]
    calibrating = 200
    if mixed:
        chosen = rows[::3]
        random.Random(0).shuffle(chosen)
        rows = [*chosen, *(row for at, row in enumerate(rows) if at % 3)]

    def image(name: str) -> NDArray[np.float32]:
        from PIL import Image

        with Image.open(folder / "images" / name) as opened:
            left, top = ((side - 224) // 2 for side in opened.size)
            cropped = opened.convert("RGB").crop((left, top, left + 224, top + 224))
        return ((np.asarray(cropped, np.float32) - 127) / 128).transpose(2, 0, 1)

    def batches() -> Iterator[NDArray[np.float32]]:
        for start in range(calibrating, len(rows), 20):
            yield np.stack([image(row[0]) for row in rows[start : start + 20]])

    labels = np.array([int(row[1]) for row in rows[calibrating:]])
    return Task(
        "EfficientNet-Lite0, 50 convolutions and linears, calibrated on 200 images"
        + (" of all kinds" if mixed else " of animals")
        + "; top-1 in percent of 400 others, one a class (some may be training images)",
        export_models.efficientnet(made / "efficientnet-lite0.onnx"),
        lambda count: {"x": np.stack([image(row[0]) for row in rows[: min(count, calibrating)]])},
        calibrating,
        lambda model: {"top-1": top1(model, batches, labels)},
        {"top-1": ".2f"},
    )


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    "minilm": minilm_task,
    "stories15m": stories_task,
    "resnet20": resnet20_task,
    "efficientnet": efficientnet_task,
    "efficientnet-mixed": partial(efficientnet_task, mixed=True),
    "smollm2": smollm2_task,
}


def session(model: Path) -> Any:
    """Return an ONNX Runtime session whose threads do not spin, as other work may run."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Products with int8 weights would round activations, too: 4, the default, against float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def found(path: Path) -> Path:
    """Return `path`, or stop with where it can be had."""
    if not path.exists():
        raise SystemExit(
            f"{path} is absent: point --shared at a folder with the models and data that "
            "docs/benchmarks-notebook.md lists under 'Whole models'"
        )
    return path


def perplexity(model: Path, sequences: list[NDArray[np.int64]]) -> float:
    """Return exp of the mean negative log-likelihood of every token but the first of each."""
    running, total, count = session(model), 0.0, 0
    for ids in sequences:
        (logits,) = running.run(["logits"], fed(running, ids))
        shifted = logits[0, :-1] - logits[0, :-1].max(-1, keepdims=True)
        chosen = np.take_along_axis(shifted, ids[1:, None], -1)[:, 0]
        normaliser = np.log(np.exp(shifted).sum(-1, dtype=np.float64))
        total += float((normaliser - chosen).sum())
        count += len(ids) - 1
    return float(np.exp(total / count))


def fed(running: Any, ids: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the feed of one sequence `(n,)`, with the mask and positions that a model may read."""
    row = ids[None]
    known = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "position_ids": np.arange(len(ids))[None],
    }
    names = [item.name for item in running.get_inputs()]
    if unknown := sorted(set(names) - known.keys()):
        raise SystemExit(f"the model reads {unknown[0]!r}: export it without its cache")
    return {name: known[name] for name in names}


def top1(model: Path, feeds: Callable[[], Iterator[NDArray[Any]]], labels: NDArray[Any]) -> float:
    """Return the share of images, in percent, whose largest output is their label."""
    running = session(model)
    name = running.get_inputs()[0].name
    guesses = [running.run(None, {name: images})[0].argmax(-1) for images in feeds()]
    return float((np.concatenate(guesses) == labels).mean() * 100)
