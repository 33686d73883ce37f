"""Compare the outputs of a sparse model with those of the dense one, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.stream import Batch

Array = NDArray[Any]


@dataclass(frozen=True)
class OutputFidelity:
    """How near one float output of the sparse model comes to the dense one's, over all feeds.

    Attributes:
        name: of the output.
        relative_error: `‖y_sparse − y_dense‖_F / ‖y_dense‖_F`.
        cosine: mean cosine similarity of the vectors along the last axis; two zero vectors
            count as 1, a zero and another as 0.
        finite: whether the sparse model's values were all finite. If not, the other two say
            nothing.
    """

    name: str
    relative_error: float
    cosine: float
    finite: bool


class Fidelity:
    """Compares outputs batch by batch; only sums are kept."""

    def __init__(self) -> None:
        self._totals: dict[str, _Totals] = {}

    def add(self, dense: Batch, sparse: Batch) -> None:
        """Take the same outputs of both models for one batch; only float ones are compared.

        Positions that the mask marks as padding are left out of the outputs that it is for.

        Raises:
            ModelError: the shapes differ.
        """
        for name, expected in dense.values.items():
            if not expected.is_floating_point():
                continue
            found = sparse.values[name]
            if expected.shape != found.shape:
                raise ModelError(
                    f"output {name!r} has shape {tuple(expected.shape)} in the dense model, "
                    f"{tuple(found.shape)} in the sparse one"
                )
            total = self._totals.setdefault(name, _Totals())
            counts = dense.counts(name)
            total.add(_unpadded(expected, counts), _unpadded(found, counts))

    def result(self) -> list[OutputFidelity]:
        """Return what was found, an item for each float output."""
        return [total.result(name) for name, total in self._totals.items()]


class _Totals:
    """Running sums over feeds, float64."""

    def __init__(self) -> None:
        self._difference = self._norm = self._cosines = 0.0
        self._vectors = 0
        self._finite = True

    def add(self, y_dense: Array, y_sparse: Array) -> None:
        width = y_dense.shape[-1] if y_dense.ndim else 1
        a, b = y_dense.reshape(-1, width), y_sparse.reshape(-1, width)
        self._finite &= bool(np.isfinite(b).all())
        self._difference += float(((b - a) ** 2).sum())
        self._norm += float((a**2).sum())
        norms = np.stack([np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)])
        product = norms.prod(axis=0)
        cosine = (a * b).sum(axis=-1) / np.where(product > 0, product, 1.0)
        self._cosines += float(np.where(norms.any(axis=0), cosine, 1.0).sum())
        self._vectors += len(a)

    def result(self, name: str) -> OutputFidelity:
        if self._norm > 0:
            error = sqrt(self._difference / self._norm)
        else:
            error = inf if self._difference else 0.0
        cosine = self._cosines / self._vectors if self._vectors else 1.0
        return OutputFidelity(name, error, cosine, self._finite)


def _unpadded(value: torch.Tensor, counts: torch.Tensor | None) -> Array:
    array: Array = (value if counts is None else value[counts]).double().numpy()
    return array
