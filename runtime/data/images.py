"""Images as calibration data, prepared as a Hugging Face `preprocessor_config.json` says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.samples import Samples, files_below, require
from iobs_onnx.runtime.session import InputSpec

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
_MODES = {1: "L", 3: "RGB"}
# From here on crop_pct means no crop: the image is warped to a square.
_WARPED_FROM = 384


class ImageSamples(Samples):
    """Every image below a directory is a sample.

    Args:
        path: a directory, or one image.
        preprocess: a `preprocessor_config.json`.
        inputs: of the model; one input, `(batch, channels, height, width)` or channels last.

    Raises:
        DataError: there are no images, the file cannot be read or asks for what is not
            supported, or the model takes no image.
        DependencyError: Pillow is missing.
    """

    def __init__(self, path: str, preprocess: str, inputs: Sequence[InputSpec]) -> None:
        self.label = f"images {path}"
        required = [spec for spec in inputs if not spec.optional]
        if len(required) != 1 or len(required[0].shape or ()) != 4:
            names = ", ".join(f"{spec.name} {spec.shape}" for spec in required)
            raise DataError(f"{self.label}: expected one input of four axes, found {names}")
        self._spec = required[0]
        self._steps = Preprocess.read(preprocess)
        self._last, self._channels = _layout(self._spec)
        self._library = require("PIL.Image", "images", self.label)
        self._files = files_below(path, _SUFFIXES, "images")

    def __len__(self) -> int:
        return len(self._files)

    def feed(self, index: Sequence[int]) -> Feed:
        """Return the images as one array."""
        pixels = [self._pixels(self._files[at]) for at in index]
        shapes = sorted({array.shape for array in pixels})
        if len(shapes) > 1:
            raise DataError(
                f"{self.label}: images of a batch have shapes {shapes[:2]}: let the preprocessor "
                "file give a height and width or a crop_size, or use batch_size 1"
            )
        stacked = np.stack(pixels)
        if not self._last:
            stacked = stacked.transpose(0, 3, 1, 2)
        return {self._spec.name: np.ascontiguousarray(stacked, self._spec.dtype)}

    def _pixels(self, file: Path) -> NDArray[np.float32]:
        """Return one image, `(height, width, channels)`."""
        # What Pillow raises over damaged files, besides OSError.
        broken = (OSError, ValueError, SyntaxError, self._library.DecompressionBombError)
        try:
            with self._library.open(file) as image:
                converted = image.convert(_MODES[self._channels])
        except broken as error:
            raise DataError(f"image {file}: cannot be read: {error}") from error
        return self._steps.apply(converted)


@dataclass(frozen=True)
class Preprocess:
    """What a `preprocessor_config.json` asks for: resize, crop, rescale, normalise, in this order.

    Attributes:
        resize: `(height, width)`, or one number for the shorter side; None to leave it.
        resample: Pillow's number of a filter; 2 is bilinear.
        crop: `(height, width)` cut from the centre, filled with black where there is less.
        factor: what pixels, 0 to 255, are multiplied with.
        mean, deviation: per channel, of the product.
    """

    resize: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def read(cls, path: str) -> Preprocess:
        """Read a file.

        Raises:
            DataError: it cannot be read, or asks for a step that is not supported.
        """
        label = f"preprocess {path}"
        try:
            asked = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{label}: cannot be read as JSON: {error}") from error
        if not isinstance(asked, dict):
            raise DataError(f"{label}: expected a JSON object")
        known = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
        other = [key for key in asked if key.startswith("do_") and key not in known and asked[key]]
        if other:
            raise DataError(
                f"{label}: {other[0]} is not supported; give feeds through module:callable"
            )
        try:
            return cls._of(asked)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{label}: {type(error).__name__} {error}: not as expected") from error

    @classmethod
    def _of(cls, asked: Mapping[str, Any]) -> Preprocess:
        resize = _size(asked["size"]) if asked.get("do_resize", "size" in asked) else None
        crop = None
        if asked.get("do_center_crop", False):
            crop = _pair(_size(asked.get("crop_size", asked.get("size"))))
        if asked.get("crop_pct") is not None and isinstance(resize, int):
            square = (resize, resize)
            warped = resize >= _WARPED_FROM
            resize, crop = (square, None) if warped else (int(resize / asked["crop_pct"]), square)
        normalize = asked.get("do_normalize", "image_mean" in asked)
        return cls(
            resize=resize,
            resample=int(asked.get("resample", 2)),
            crop=crop,
            factor=float(asked.get("rescale_factor", 1 / 255))
            if asked.get("do_rescale", True)
            else 1.0,
            mean=_numbers(asked["image_mean"]) if normalize else (0.0,),
            deviation=_numbers(asked["image_std"]) if normalize else (1.0,),
        )

    def apply(self, image: Image.Image) -> NDArray[np.float32]:
        """Return an image as the model takes it, `(height, width, channels)` float32."""
        if self.resize is not None:
            height, width = _fit(image.height, image.width, self.resize)
            image = image.resize((width, height), self.resample)
        if self.crop is not None:
            top = (image.height - self.crop[0]) // 2
            left = (image.width - self.crop[1]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = np.asarray(image, np.float32)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels * np.float32(self.factor) - np.array(self.mean, np.float32)
        return (pixels / np.array(self.deviation, np.float32)).astype(np.float32)


def _layout(spec: InputSpec) -> tuple[bool, int]:
    """Return whether channels are last, and how many there are."""
    _, second, _, last = spec.shape or ()
    if second in _MODES or (second is None and last not in _MODES):
        return False, second or 3
    if last in _MODES:
        return True, last
    raise DataError(
        f"input {spec.name!r} {spec.shape}: images have 1 or 3 channels, second or last"
    )


def _size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        return int(size["height"]), int(size["width"])
    if isinstance(size, list):
        height, width = size
        return int(height), int(width)
    return int(size)


def _pair(size: tuple[int, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))


def _fit(height: int, width: int, size: tuple[int, int] | int) -> tuple[int, int]:
    """Return height and width for a size, or for a length of the shorter side."""
    if not isinstance(size, int):
        return size
    shorter = min(height, width)
    return int(height * size / shorter), int(width * size / shorter)
