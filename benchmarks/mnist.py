"""MNIST's test digits with their labels, for what is trained in a program."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import sparse_recovery
import torch
from torch import Tensor

from iobs_onnx.errors import DataError


def labelled_digits(shared: Path) -> tuple[Tensor, Tensor]:
    """Return the 10,000 images, `(count, 28, 28)` float32 from 0 to 1, and labels, `(count,)`.

    Raises:
        DataError: a file is missing or broken.
    """
    images = sparse_recovery.read_images(shared / "data/mnist/t10k-images-idx3-ubyte.gz")
    file = shared / "data/mnist/t10k-labels-idx1-ubyte.gz"
    if not file.is_file():
        raise DataError(f"{file}: no such file; it is published beside the images")
    labels = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=8)
    if len(labels) != len(images):
        raise DataError(f"{file}: {len(labels)} labels for {len(images)} images")
    x = torch.from_numpy(images).float().view(-1, 28, 28) / 255
    return x, torch.from_numpy(labels.astype(np.int64))
