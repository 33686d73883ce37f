"""Kinds of models that users hold: a table that is tested.

`test_kinds.py` runs every row and holds `docs/kinds.md` to this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import languages
import pictures
import sounds
from made import Made


@dataclass(frozen=True)
class Kind:
    """One row.

    Attributes:
        title: what it is.
        origin: who wrote the file; with the package that brings it, if that is no part of `dev`.
        make: makes it in an empty folder, or finds it.
        data: the option that gives the calibration data.
        sites: weights that can be pruned at all, those pruned at 2:4, and at 60 %.
        runs: what its own runtime does with the sparse file.
        fast: whether it is cheap enough for every run of the tests.
    """

    title: str
    origin: str
    make: Callable[[Path], Made]
    data: str
    sites: tuple[int, int, int]
    runs: str
    fast: bool = False


_NPZ, _FEEDS = "`--calibration` .npz", "`--calibration` folder of .npz"
_GENAI = "ONNX Runtime GenAI's builder, "
_NEAR = "ONNX Runtime"
_GENERATES = "ONNX Runtime GenAI generates"

KINDS = {
    "bert": Kind(
        "BERT (all-MiniLM-L6-v2, trained)",
        "torch dynamo",
        languages.bert,
        "`--text`",
        (36, 36, 36),
        "ONNX Runtime: similarities of other text",
    ),
    "roberta": Kind(
        "RoBERTa",
        "TorchScript",
        languages.roberta,
        "`--text`",
        (12, 12, 12),
        _NEAR,
    ),
    "vit-dynamo": Kind(
        "ViT",
        "torch dynamo",
        partial(pictures.vit, dynamo=True),
        "`--images`",
        (14, 13, 14),
        _NEAR,
    ),
    "vit-script": Kind(
        "ViT",
        "TorchScript",
        partial(pictures.vit, dynamo=False),
        "`--images`",
        (14, 13, 14),
        _NEAR,
    ),
    "cnn": Kind(
        "CNN (PP-OCR, which way up, trained)",
        "Paddle2ONNX",
        pictures.mobile,
        "`--images`",
        (43, 35, 43),
        "ONNX Runtime: same answers",
    ),
    "detector": Kind(
        "detector (PP-OCR v4, trained)",
        "Paddle2ONNX",
        pictures.text_detector,
        "`--images`",
        (50, 43, 50),
        "RapidOCR's detector, where OpenCV is installed; ONNX Runtime: same places",
    ),
    "yolox": Kind(
        "detector (YOLOX, trained)",
        "torch; package ddddocr 1.6.1",
        pictures.yolox,
        "`--images`",
        (83, 83, 83),
        "ddddocr's detector, where OpenCV is installed; ONNX Runtime: sure at the same places",
    ),
    "ocr": Kind(
        "OCR (PP-OCR v4, trained)",
        "Paddle2ONNX",
        pictures.reader,
        "`--images`",
        (33, 32, 33),
        "RapidOCR, where OpenCV is installed; ONNX Runtime: same letters",
    ),
    "ocr-lstm": Kind(
        "OCR (Conv and LSTM, trained)",
        "torch; package ddddocr 1.6.1",
        pictures.word_reader,
        _FEEDS,
        (23, 23, 23),
        "ONNX Runtime: same letters",
    ),
    "lstm": Kind(
        "LSTM, two layers, both directions",
        "TorchScript",
        sounds.lstm,
        _NPZ,
        (5, 5, 5),
        _NEAR,
        fast=True,
    ),
    "silero": Kind(
        "LSTM in If (Silero VAD, trained)",
        "package silero-vad 6.2.3",
        sounds.silero,
        _FEEDS,
        (14, 12, 14),
        "ONNX Runtime, along a recording, states handed on",
    ),
    "unet": Kind(
        "U-Net",
        "torch dynamo",
        pictures.unet,
        _NPZ,
        (9, 9, 9),
        _NEAR,
    ),
    "whisper": Kind(
        "Whisper",
        "torch dynamo",
        sounds.whisper,
        _FEEDS,
        (18, 18, 18),
        "ONNX Runtime, token by token",
    ),
    "vits": Kind(
        "text to speech (VITS)",
        "TorchScript",
        sounds.vits,
        "`--text`",
        (40, 40, 40),
        "ONNX Runtime: a waveform, of another length than the dense model's",
    ),
    "mixtral": Kind(
        "Mixtral",
        "torch dynamo",
        languages.mixtral,
        "`--text`",
        (8, 8, 8),
        "ONNX Runtime, token by token",
    ),
    "llama": Kind(
        "Llama",
        "torch dynamo",
        languages.llama,
        "`--text`",
        (15, 15, 15),
        "ONNX Runtime, token by token",
    ),
    "llama-past": Kind(
        "Llama with past",
        "optimum-cli (`make test-optimum`)",
        languages.optimum_past,
        "`--text`",
        (15, 15, 15),
        "Optimum generates, with and without the cache",
    ),
    "genai-fp32": Kind(
        "Llama",
        f"{_GENAI}fp32",
        partial(languages.built, precision="fp32", provider="cpu"),
        "`--text --pack`",
        (10, 10, 10),
        _GENERATES,
    ),
    "genai-fp16": Kind(
        "Llama",
        f"{_GENAI}fp16, `-e cuda`",
        partial(languages.built, precision="fp16", provider="cuda"),
        "`--text --pack`",
        (10, 10, 10),
        f"{_GENERATES}, on the CPU",
    ),
    "genai-int4": Kind(
        "Llama",
        f"{_GENAI}int4",
        partial(languages.built, precision="int4", provider="cpu"),
        "`--text --pack`",
        (10, 10, 10),
        _GENERATES,
    ),
    "qdq": Kind(
        "QDQ, int8 (the U-Net)",
        "onnxruntime.quantization",
        pictures.qdq,
        _NPZ,
        (9, 9, 9),
        _NEAR,
    ),
}


def table() -> str:
    """The table of `docs/kinds.md`."""
    heads = ("kind", "file by", "inspect", "calibrate", "2:4", "60 %", "verify", "own runtime")
    lines = [heads, ("---",) * len(heads)]
    for kind in KINDS.values():
        found, *pruned = kind.sites
        cells = [f"{count} ✓" for count in pruned]
        lines.append(
            (kind.title, kind.origin, f"{found} ✓", f"{kind.data} ✓", *cells, "✓", f"{kind.runs} ✓")
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
