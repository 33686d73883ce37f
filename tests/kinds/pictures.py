"""Models that look at images: PNG files through `--images`, or rendered words."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from difflib import SequenceMatcher
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from made import Made, export, outputs_of, packaged, save_feeds, session, stays_near
from PIL import Image, ImageDraw, ImageFont

LETTERS = np.array([*string.ascii_letters, *string.digits])


def words(count: int, size: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(LETTERS, size)) for _ in range(count)]


def written(text: str, size: tuple[int, int], points: int, seed: int) -> Image.Image:
    """Write a word in dark on a light ground, or the other way round, with some noise."""
    draw = np.random.default_rng(seed)
    ground, ink = (int(shade) for shade in (draw.integers(190, 255), draw.integers(0, 70)))
    image = Image.new("RGB", size, (ground,) * 3)
    at = tuple(int(place) for place in draw.integers(2, 10, 2))
    ImageDraw.Draw(image).text(at, text, (ink,) * 3, ImageFont.load_default(points))
    noisy = np.asarray(image) + draw.normal(0, 6, (size[1], size[0], 3))
    noisy = 255 - noisy if seed % 2 else noisy
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def folder_of(images: Sequence[Image.Image], folder: Path, asked: dict[str, object]) -> list[str]:
    """Write images and their preprocessing; return the options that name both."""
    (folder / "images").mkdir(parents=True)
    for at, image in enumerate(images):
        image.save(folder / "images" / f"{at:03d}.png")
    (folder / "preprocess.json").write_text(json.dumps(asked))
    return ["--images", str(folder / "images"), "--preprocess", str(folder / "preprocess.json")]


def pages(count: int, side: int, seed: int) -> list[Image.Image]:
    """Pictures of a few words each, on grounds that differ."""
    draw = np.random.default_rng(seed)
    made = []
    for at in range(count):
        coarse = draw.integers(90, 255, (4, 4, 3)).astype(np.uint8)
        page = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        for row, word in enumerate(words(4, int(draw.integers(4, 9)), seed + at)):
            place = int(draw.integers(4, side // 4)), int((row + 0.2) * side / 4)
            font = ImageFont.load_default(int(draw.integers(side // 12, side // 8)))
            ImageDraw.Draw(page).text(place, word, (int(draw.integers(0, 60)),) * 3, font)
        made.append(page)
    return made


def tensor(image: Image.Image, mean: float, std: float) -> np.ndarray:
    """Return `(1, 3, height, width)` float32 of `(rgb - mean) / std`."""
    return ((np.asarray(image, np.float32) - mean) / std).transpose(2, 0, 1)[None]


def vit(folder: Path, *, dynamo: bool) -> Made:
    """A vision transformer with random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64,
        patch_size=16,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=32,
        attn_implementation="eager",
    )
    model = export(
        ViTForImageClassification(config),
        {"pixel_values": torch.zeros(2, 3, 64, 64)},
        folder / "model.onnx",
        "logits",
        {"pixel_values": {0: "batch"}},
        dynamo=dynamo,
    )
    asked = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    data = folder_of(pages(48, 64, 0), folder, {**asked, "do_normalize": True})
    feeds = [{"pixel_values": tensor(page, 127.5, 127.5)} for page in pages(16, 64, 99)]
    return Made(model, data, stays_near(model, feeds, 0.9))


def mobile(folder: Path) -> Made:
    """A convolutional classifier with depthwise filters, trained: which way up a line is."""
    model = packaged("rapidocr_onnxruntime") / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"

    def lines(count: int, seed: int) -> list[Image.Image]:
        found = [written(w, (192, 48), 32, seed + i) for i, w in enumerate(words(count, 9, seed))]
        return [line.rotate(180) if i % 2 else line for i, line in enumerate(found)]

    asked = {"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    data = folder_of(lines(48, 0), folder, {**asked, "do_normalize": True})
    feeds = [{"x": tensor(line, 127.5, 127.5)} for line in lines(40, 5000)]

    def use(sparse: Path) -> None:
        dense, found = ([out.argmax() for out in outputs_of(m, feeds)] for m in (model, sparse))
        assert np.mean(np.equal(dense, found)) >= 0.7

    return Made(model, data, use)


def text_detector(folder: Path) -> Made:
    """PP-OCR's detector of text, trained: a map of where words stand."""
    model = packaged("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_det_infer.onnx"
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    asked = {"do_resize": False, "do_normalize": True, "image_mean": mean, "image_std": std}
    data = folder_of(pages(10, 128, 0), folder, asked)
    feeds = [
        {"x": (tensor(page, 0, 255) - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))}
        for page in pages(8, 128, 99)
    ]
    feeds = [{"x": feed["x"].astype(np.float32)} for feed in feeds]

    def use(sparse: Path) -> None:
        dense, found = (np.stack(outputs_of(m, feeds)) > 0.3 for m in (model, sparse))
        assert dense.any()
        assert (dense & found).sum() > 0.5 * (dense | found).sum()
        if find_spec("cv2"):
            from rapidocr_onnxruntime import RapidOCR

            # At the scale that it was calibrated on.
            engine = RapidOCR(det_model_path=str(sparse), det_limit_side_len=128)
            boxes, _ = engine(np.asarray(pages(1, 128, 7)[0]), use_cls=False, use_rec=False)
            assert len(boxes) == 4  # words

    return Made(model, data, use)


def yolox(folder: Path) -> Made:
    """A detector of objects, trained: ddddocr's YOLOX of characters, 1 × 3 × 416 × 416."""
    model = packaged("ddddocr") / "common_det.onnx"
    asked = {"size": {"height": 416, "width": 416}, "do_rescale": False, "do_normalize": False}
    data = folder_of(pages(6, 416, 0), folder, asked)

    def use(sparse: Path) -> None:
        (feed,) = ({"images": tensor(page, 0, 1)} for page in pages(1, 416, 99))
        dense, found = (outputs_of(m, [feed])[0] for m in (model, sparse))
        assert dense.shape == found.shape == (1, 3549, 6)
        # How sure it is of an object, at each place.
        assert np.corrcoef(dense[0, :, 4], found[0, :, 4])[0, 1] > 0.7
        if find_spec("cv2"):
            from ddddocr.core.detection_engine import DetectionEngine

            engine = DetectionEngine()
            engine.session = session(sparse)
            assert engine.predict(pages(1, 416, 99)[0])

    return Made(model, data, use)


def reader(folder: Path) -> Made:
    """PP-OCR's recogniser of text, trained: convolutions, then attention, then 6,625 classes."""
    model = packaged("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_rec_infer.onnx"

    def lines(count: int, seed: int) -> list[Image.Image]:
        return [written(w, (160, 48), 32, seed + i) for i, w in enumerate(words(count, 7, seed))]

    asked = {"do_resize": False, "do_normalize": True, "image_mean": [0.5] * 3}
    data = folder_of(lines(32, 0), folder, {**asked, "image_std": [0.5] * 3})
    feeds = [{"x": tensor(line, 127.5, 127.5)} for line in lines(24, 5000)]

    def use(sparse: Path) -> None:
        letters = [
            np.concatenate([out[0].argmax(-1) for out in outputs_of(m, feeds)])
            for m in (model, sparse)
        ]
        assert np.mean(letters[0] == letters[1]) > 0.6
        if find_spec("cv2"):
            from rapidocr_onnxruntime import RapidOCR

            engine = RapidOCR(rec_model_path=str(sparse))
            shown = np.asarray(written("Sparse", (160, 48), 32, 2))
            ((text, _),) = engine(shown, use_det=False, use_cls=False)[0]
            assert SequenceMatcher(None, text, "Sparse").ratio() > 0.5

    return Made(model, data, use)


def word_reader(folder: Path) -> Made:
    """ddddocr's recogniser of words, trained: convolutions and an LSTM."""
    model = packaged("ddddocr") / "common.onnx"
    (source,) = session(model).get_inputs()

    def feeds(count: int, seed: int) -> list[dict[str, np.ndarray]]:
        grey = [
            written(w, (160, 64), 36, seed + i).convert("L")
            for i, w in enumerate(words(count, 5, seed))
        ]
        return [{source.name: np.asarray(g, np.float32)[None, None] / 127.5 - 1} for g in grey]

    data = save_feeds(folder / "feeds", feeds(64, 0))
    judged = feeds(24, 5000)

    def use(sparse: Path) -> None:
        dense, found = (np.concatenate(outputs_of(m, judged)) for m in (model, sparse))
        assert dense.shape == found.shape
        assert np.mean(dense.argmax(-1) == found.argmax(-1)) > 0.8

    return Made(model, data, use)


def unet(folder: Path) -> Made:
    """A U-Net with group normalisation, transposed convolutions and a skip; random weights."""
    import torch
    from torch import nn

    def twice(source: int, out: int) -> nn.Module:
        layers = [nn.Conv2d(source, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU()]
        return nn.Sequential(*layers, nn.Conv2d(out, out, 3, padding=1), nn.SiLU())

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.down = twice(4, 16), nn.Conv2d(16, 32, 3, stride=2, padding=1)
            self.low, self.up = twice(32, 32), nn.ConvTranspose2d(32, 16, 2, stride=2)
            self.last, self.out = twice(32, 16), nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.first(x)
            low = self.up(self.low(self.down(first)))
            return self.out(self.last(torch.cat([first, low], 1)))

    torch.manual_seed(0)
    model = export(
        UNet(),
        {"x": torch.zeros(2, 4, 32, 32)},
        folder / "model.onnx",
        "y",
        {"x": {0: "batch"}},
        dynamo=True,
    )

    def latents(count: int, seed: int) -> np.ndarray:
        coarse = np.random.default_rng(seed).normal(size=(count, 4, 8, 8))
        return coarse.repeat(4, 2).repeat(4, 3).astype(np.float32)

    np.savez(folder / "latents.npz", x=latents(48, 0))
    data = ["--calibration", str(folder / "latents.npz")]
    return Made(model, data, stays_near(model, [{"x": latents(8, 9)}], 0.7))


def qdq(folder: Path) -> Made:
    """The U-Net with int8 weights and activations, by ONNX Runtime's static quantization."""
    from onnxruntime import quantization

    dense = unet(folder / "float")
    with np.load(folder / "float" / "latents.npz") as stored:
        batches = iter([{"x": stored["x"][:16]}, {"x": stored["x"][16:32]}])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    prepared, model = folder / "prepared.onnx", folder / "model.onnx"
    quantization.quant_pre_process(dense.model, prepared, skip_symbolic_shape=True)
    kind = quantization.QuantType.QInt8
    quantization.quantize_static(
        prepared, model, Reader(), per_channel=True, weight_type=kind, activation_type=kind
    )
    with np.load(folder / "float" / "latents.npz") as stored:
        judged = [{"x": stored["x"][32:]}]
    return Made(model, dense.data, stays_near(model, judged, 0.7))
