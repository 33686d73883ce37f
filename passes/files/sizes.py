"""How large a model is on disk, and how large when it travels compressed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import zstandard

from iobs_onnx.passes.files.load_save import model_files

# zstd's own default: what a package registry or a download server would use.
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model file with its external data, as they are and compressed with zstd."""

    bytes: int
    zstd_bytes: int


def model_sizes(path: str | os.PathLike[str]) -> Sizes:
    """Measure a model file and its external data files; the latter are compressed apart.

    Raises:
        ModelError: as :func:`iobs_onnx.passes.load_model`.
    """
    whole = compressed = 0
    for file in model_files(path):
        with file.open("rb") as stream:
            packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).read_to_iter(stream)
            compressed += sum(len(chunk) for chunk in packed)
        whole += file.stat().st_size
    return Sizes(whole, compressed)
