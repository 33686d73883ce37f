"""Recurrent, OCR, float16, quantized and branching models at 2:4, against magnitude pruning.

    pip download --no-deps -d wheels rapidocr-onnxruntime==1.4.4 ddddocr==1.6.1 \\
        silero-vad==6.2.3 pyannote.audio==4.0.7
    for wheel in wheels/*.whl; do unzip -q "$wheel" -d FOLDER; done
    python benchmarks/odd_models.py --packages FOLDER --shared ../shared

Every model is pruned with the default options and by magnitude (one-shot); both are held against
the dense one on real input that calibrated neither. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image, ImageDraw, ImageFont

import iobs_onnx

Feed = dict[str, np.ndarray]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """A model with feeds to calibrate on and a judge.

    `run` makes of a model file what `judge` maps, with that of the dense model, to a number.
    """

    name: str
    model: Path
    calibration: list[Feed]
    run: Callable[[Path], list[np.ndarray]]
    metric: str
    judge: Callable[[list[np.ndarray], list[np.ndarray]], float]


def session(model: Path) -> ort.InferenceSession:
    """Open a model; warnings about its graph are the exporter's."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def on(feeds: list[Feed]) -> Callable[[Path], list[np.ndarray]]:
    """Return what runs a model on every feed and keeps the first output."""

    def run(model: Path) -> list[np.ndarray]:
        opened = session(model)
        return [opened.run(None, feed)[0] for feed in feeds]

    return run


def detection(packages: Path, shared: Path) -> Case:
    """PP-OCR v4's text detector on photographs with words; measured by the overlap of masks."""
    (model,) = packages.glob("**/ch_PP-OCRv4_det_infer.onnx")
    images = sorted((shared / "data" / "imagenet" / "images").iterdir())[:48]
    rng = np.random.default_rng(0)
    feeds = [{"x": photograph(image, 256, rng)} for image in images]

    def overlap(found: list[np.ndarray], dense: list[np.ndarray]) -> float:
        a, b = (np.concatenate([m.ravel() for m in maps]) > 0.3 for maps in (found, dense))
        return float((a & b).sum() / max((a | b).sum(), 1))

    metric = "overlap with dense"
    return Case("PP-OCR v4 detection", model, feeds[:24], on(feeds[24:]), metric, overlap)


LETTERS = np.array(list("0123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz"))


def photograph(path: Path, side: int, rng: np.random.Generator) -> np.ndarray:
    """Read an image as `(1, 3, side, side)`, and write four words on it."""
    image = Image.open(path).convert("RGB").resize((side, side))
    for row in range(4):
        text = "".join(rng.choice(LETTERS, int(rng.integers(4, 11))))
        place = int(rng.integers(5, side // 3)), (row + 0.2) * side / 4
        font = ImageFont.load_default(int(rng.integers(16, 30)))
        shade = (255,) * 3 if np.asarray(image).mean() < 128 else (0,) * 3
        ImageDraw.Draw(image).text(place, text, shade, font)
    pixels = np.asarray(image) / 255
    return ((pixels - _MEAN) / _STD).transpose(2, 0, 1)[None].astype(np.float32)


def recognition(packages: Path, _: Path) -> Case:
    """ddddocr's recogniser (Conv and LSTM) on rendered words; the measure is equal readings."""
    (model,) = packages.glob("**/ddddocr/common.onnx")
    name = onnx.load(model, load_external_data=False).graph.input[0].name
    rng = np.random.default_rng(0)
    feeds = [{name: word("".join(rng.choice(LETTERS, 5)), rng)} for _ in range(256)]

    def equal(found: list[np.ndarray], dense: list[np.ndarray]) -> float:
        return float(np.mean([reading(a) == reading(b) for a, b in zip(found, dense, strict=True)]))

    return Case("ddddocr (LSTM)", model, feeds[:192], on(feeds[192:]), "words read as dense", equal)


def word(text: str, rng: np.random.Generator) -> np.ndarray:
    """Render a word, turned a little, as `(1, 1, 64, 160)`."""
    image = Image.new("L", (160, 64), 255)
    font = ImageFont.load_default(int(rng.integers(30, 42)))
    ImageDraw.Draw(image).text((12, int(rng.integers(5, 18))), text, 0, font)
    image = image.rotate(float(rng.uniform(-6, 6)), fillcolor=255)
    pixels = np.asarray(image) / 255 + rng.normal(0, 0.05, (64, 160))
    return ((pixels - 0.5) / 0.5)[None, None].astype(np.float32)


def reading(output: np.ndarray) -> list[int]:
    """Decode the best path: the likeliest class at each step, doubles and blanks dropped."""
    classes = output.argmax(-1).ravel()
    kept = classes[np.insert(classes[1:] != classes[:-1], 0, True)]
    return [int(c) for c in kept if c]


def cifar(shared: Path, part: str, dtype: type) -> tuple[list[Feed], np.ndarray]:
    """Return batches of CIFAR-10 and their labels."""
    with np.load(shared / "data" / "cifar10" / f"{part}_first_2000.npz") as stored:
        images, labels = stored["x"][:1000], stored["y"][:1000]
    pixels = ((images / 255 - _MEAN) / _STD).transpose(0, 3, 1, 2).astype(dtype)
    return [{"x": batch} for batch in np.split(pixels, 20)], labels.ravel()


def resnet(shared: Path, name: str, dtype: type, model: Path) -> Case:
    """ResNet-20 in another precision; the measure is accuracy on 1,000 test images."""
    feeds, labels = cifar(shared, "test", dtype)

    def accuracy(found: list[np.ndarray], _: list[np.ndarray]) -> float:
        return float((np.concatenate(found).argmax(1) == labels).mean())

    return Case(name, model, cifar(shared, "train", dtype)[0][:10], on(feeds), "accuracy", accuracy)


def half(shared: Path, folder: Path) -> Case:
    """ResNet-20, all of it in float16."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(shared / "models" / "resnet20.onnx"))
    onnx.save(model, folder / "half.onnx")
    return resnet(shared, "ResNet-20, float16", np.float16, folder / "half.onnx")


def quantized(shared: Path, folder: Path) -> Case:
    """ResNet-20 with int8 weights and activations, QuantizeLinear and DequantizeLinear."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter(cifar(shared, "train", np.float32)[0][:4])

        def get_next(self) -> Feed | None:
            return next(self._feeds, None)

    target = folder / "quantized.onnx"
    source = shared / "models" / "resnet20.onnx"
    kind = quantization.QuantType.QInt8
    quantization.quantize_static(
        source, target, Reader(), per_channel=True, weight_type=kind, activation_type=kind
    )
    return resnet(shared, "ResNet-20, int8 QDQ", np.float32, target)


_RATE, _CHUNK, _CONTEXT = 16_000, 512, 64


def listen(model: Path, sound: np.ndarray) -> tuple[list[Feed], np.ndarray]:
    """Run Silero VAD along a recording; return its feeds, and the speech probability of each."""
    opened = session(model)
    state, feeds, found = np.zeros((2, 1, 128), np.float32), [], []
    padded = np.concatenate([np.zeros(_CONTEXT, np.float32), sound])
    for start in range(0, len(sound) - _CHUNK + 1, _CHUNK):
        piece = padded[start : start + _CONTEXT + _CHUNK][None]
        feeds.append({"input": piece, "state": state, "sr": np.array(_RATE, np.int64)})
        probability, state = opened.run(None, feeds[-1])
        found.append(probability.item())
    return feeds, np.array(found)


def voice(packages: Path, file: str, name: str) -> Case:
    """Silero VAD, whose If over the sampling rate holds both its networks, on a conversation.

    Every other second calibrates; the others judge, in a run of the model along all of it.
    """
    (model,) = packages.glob(f"**/{file}")
    (recording,) = packages.glob("**/pyannote/audio/sample/sample.wav")
    with wave.open(str(recording)) as opened:
        sound = np.frombuffer(opened.readframes(opened.getnframes()), np.int16) / np.float32(2**15)
    feeds, _ = listen(model, sound)
    middles = (np.arange(len(feeds)) + 0.5) * _CHUNK / _RATE
    speech = np.zeros(len(feeds), bool)
    for line in recording.with_suffix(".rttm").read_text().splitlines():
        begin, length = map(float, line.split()[3:5])
        speech |= (begin <= middles) & (middles < begin + length)
    judging = middles.astype(int) % 2 == 1

    def accuracy(found: list[np.ndarray], _: list[np.ndarray]) -> float:
        return float(((found[0] > 0.5) == speech)[judging].mean())

    calibration = [feed for feed, held in zip(feeds, judging, strict=True) if not held]
    return Case(
        name, model, calibration, lambda m: [listen(m, sound)[1]], "speech or not", accuracy
    )


def report(case: Case, folder: Path) -> str:
    """Prune a case both ways; return its row of the table."""
    dense = case.run(case.model)
    scores = [case.judge(dense, dense)]
    layers = {}
    for solver, options in (
        ("iobs", {"compare": "magnitude"}),
        ("magnitude", {"sequential": "none", "target": "layer", "bias_compensation": 0}),
    ):
        output = folder / f"{solver}.onnx"
        result = iobs_onnx.prune(
            case.model,
            calibration=case.calibration,
            sparsity="2:4",
            solver=solver,
            output=output,
            provider="cpu",
            **options,
        )
        scores.append(case.judge(case.run(output), dense))
        layers[solver] = result.report
    found = layers["iobs"]
    kinds = sorted({site.op_type for site in found.sites})
    worst = max(site.error_ratio or 0.0 for site in found.sites)
    cells = (
        case.name,
        f"{len(found.sites)} ({', '.join(kinds)})",
        len(found.declined),
        f"{found.totals['error_ratio_geomean']:.3f} ({worst:.3f})",
        case.metric,
        *(f"{score:.1%}" for score in scores),
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="unpacked wheels")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    arguments = parser.parse_args()
    heads = ("model", "weights pruned", "declined", "layer error ÷ magnitude's (worst)", "measure")
    print(f"| {' | '.join(heads)} | dense | iobs | magnitude |\n|{'---|' * 8}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for make in (
            lambda: half(arguments.shared, folder),
            lambda: quantized(arguments.shared, folder),
            lambda: recognition(arguments.packages, arguments.shared),
            lambda: detection(arguments.packages, arguments.shared),
            lambda: voice(arguments.packages, "silero_vad.onnx", "Silero VAD (in If)"),
            lambda: voice(
                arguments.packages, "silero_vad_op18_ifless.onnx", "Silero VAD (captured by If)"
            ),
        ):
            print(report(make(), folder), flush=True)


if __name__ == "__main__":
    main()
