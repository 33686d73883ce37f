"""Recordings as calibration data: the raw waveform, resampled where the rate differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.samples import Samples, files_below, require
from iobs_onnx.runtime.data.tokens import row_length
from iobs_onnx.runtime.session import InputSpec

_SUFFIXES = frozenset({".wav", ".flac", ".ogg"})
_RATES = ("sr", "sampling_rate", "sample_rate")


class AudioSamples(Samples):
    """Recordings cut into pieces of equal length, which are the samples.

    Channels are averaged. A recording shorter than a piece is filled with silence; what is left
    after the last whole piece of a longer one is dropped.

    Args:
        path: a recording, or a directory below which every .wav, .flac and .ogg is read.
        inputs: of the model: one `(batch, samples)` or `(batch, 1, samples)`, and perhaps the
            sampling rate.
        rate: samples a second that the model expects.
        length: samples in a piece. Default: what the model fixes, else one second.
        normalize: whether each piece gets mean 0 and variance 1, as wav2vec2 wants it.

    Raises:
        DataError: there are no recordings, or the model takes no waveform.
        DependencyError: soundfile or soxr is missing.
    """

    def __init__(
        self,
        path: str,
        inputs: Sequence[InputSpec],
        *,
        rate: int,
        length: int | None = None,
        normalize: bool = False,
    ) -> None:
        self.label = f"audio {path}"
        self._rate, self._normalize = rate, normalize
        self._specs = [spec for spec in inputs if not spec.optional]
        waves = [spec for spec in self._specs if spec.name not in _RATES]
        if len(waves) != 1 or not _is_waveform(waves[0]):
            names = ", ".join(f"{spec.name} {spec.shape}" for spec in waves)
            raise DataError(
                f"{self.label}: expected one waveform (batch, samples) among the inputs, found "
                f"{names}; give feeds through module:callable"
            )
        self._wave = waves[0]
        self._length, _ = row_length(self._wave, length, rate)
        self._sound = require("soundfile", "audio", self.label)
        files = files_below(path, _SUFFIXES, "audio")
        self._pieces = [(file, at) for file in files for at in range(self._count(file))]

    def __len__(self) -> int:
        return len(self._pieces)

    def feed(self, index: Sequence[int]) -> Feed:
        """Return the pieces as one array, and the rate where the model asks for it."""
        waves = np.stack([self._piece(*self._pieces[at]) for at in index])
        axes = len(self._wave.shape or ())
        feed: Feed = {
            spec.name: np.full([size or 1 for size in spec.shape or ()], self._rate, spec.dtype)
            for spec in self._specs
            if spec is not self._wave
        }
        feed[self._wave.name] = (waves[:, None] if axes == 3 else waves).astype(self._wave.dtype)
        return feed

    def _count(self, file: Path) -> int:
        with self._open(file) as sound:
            return max(1, sound.frames * self._rate // sound.samplerate // self._length)

    def _piece(self, file: Path, at: int) -> NDArray[np.float32]:
        """Read one piece; the rest of its file is not read."""
        with self._open(file) as sound:
            rate = sound.samplerate
            sound.seek(at * self._length * rate // self._rate)
            frames = -(-self._length * rate // self._rate)
            wave = sound.read(frames, dtype="float32", always_2d=True).mean(axis=1)
        if rate != self._rate:
            what = f"audio {file} has {rate} Hz, not {self._rate}: resampling"
            wave = require("soxr", "audio", what).resample(wave, rate, self._rate)
        piece = np.zeros(self._length, np.float32)
        piece[: len(wave)] = wave[: self._length]
        if self._normalize:
            piece = (piece - piece.mean()) / np.sqrt(piece.var() + np.float32(1e-7))
        return piece

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with self._sound.SoundFile(file) as sound:
                yield sound
        except (OSError, self._sound.SoundFileError) as error:
            raise DataError(f"audio {file}: cannot be read: {error}") from error


def read_audio_config(path: str) -> tuple[int, bool]:
    """Return the sampling rate and whether to normalise, of a `preprocessor_config.json`.

    Raises:
        DataError: it cannot be read, or names no rate.
    """
    label = f"preprocess {path}"
    try:
        asked = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{label}: cannot be read as JSON: {error}") from error
    rate = asked.get("sampling_rate") if isinstance(asked, dict) else None
    if not isinstance(rate, int) or isinstance(rate, bool) or rate < 1:
        raise DataError(f'{label}: expected an object with "sampling_rate", an integer')
    return rate, asked.get("do_normalize") is True


def _is_waveform(spec: InputSpec) -> bool:
    shape = spec.shape or ()
    return spec.dtype.kind == "f" and (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1))
