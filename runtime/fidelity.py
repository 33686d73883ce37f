"""Compare the outputs of a sparse model with those of the dense one, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.runtime.stream import Batch

Array = NDArray[Any]
# A note: what is not finite was not so before, whatever was pruned.
NEVER_FINITE = "the dense model's values are not finite either"


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
        feeds: how many there were.
        apart: feeds on which the shapes differ: `relative_error` and `cosine` leave them out, and
            are None where there are no others.
        note: what was not compared, and why; None where all was.
    """

    name: str
    relative_error: float | None
    cosine: float | None
    finite: bool
    feeds: int = 0
    apart: int = 0
    note: str | None = None

    @property
    def counted(self) -> float:
        """The error to decide by: a feed on which the shapes differ counts as an error of 1."""
        if self.relative_error is None:
            return 1.0
        if not self.apart:
            return self.relative_error
        share = self.apart / self.feeds
        return sqrt(share + (1 - share) * self.relative_error**2)


class Fidelity:
    """Compares outputs batch by batch; only sums are kept."""

    def __init__(self) -> None:
        self._totals: dict[str, _Totals] = {}

    def add(self, dense: Batch, sparse: Batch) -> None:
        """Take the same outputs of both models for one batch; only float ones are compared.

        Positions that the mask marks as padding are left out of the outputs that it is for. Where
        the shapes differ, nothing is compared but whether values are finite.
        """
        for name, expected in dense.values.items():
            if not expected.is_floating_point():
                continue
            found = sparse.values[name]
            total = self._totals.setdefault(name, _Totals())
            if expected.shape != found.shape:
                total.leave_out(expected, found)
                continue
            counts = dense.counts(name)
            total.add(_unpadded(expected, counts), _unpadded(found, counts))

    def result(self) -> list[OutputFidelity]:
        """Return what was found, an item for each float output."""
        return [total.result(name) for name, total in self._totals.items()]


class _Totals:
    """Running sums over feeds, float64."""

    def __init__(self) -> None:
        self._difference = self._norm = self._cosines = 0.0
        self._vectors = self._feeds = 0
        self._finite = self._finite_before = True
        self._apart: list[str] = []

    def leave_out(self, y_dense: torch.Tensor, y_sparse: torch.Tensor) -> None:
        self._feeds += 1
        self._finite &= bool(y_sparse.isfinite().all())
        self._finite_before &= bool(y_dense.isfinite().all())
        self._apart.append(f"{tuple(y_dense.shape)} and {tuple(y_sparse.shape)}")

    def add(self, y_dense: Array, y_sparse: Array) -> None:
        self._feeds += 1
        width = y_dense.shape[-1] if y_dense.ndim else 1
        a, b = y_dense.reshape(-1, width), y_sparse.reshape(-1, width)
        self._finite &= bool(np.isfinite(b).all())
        self._finite_before &= bool(np.isfinite(a).all())
        self._vectors += len(a)
        with np.errstate(invalid="ignore", over="ignore"):  # of what is not finite, nothing is told
            self._difference += float(((b - a) ** 2).sum())
            self._norm += float((a**2).sum())
            norms = np.stack([np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)])
            product = norms.prod(axis=0)
            cosine = (a * b).sum(axis=-1) / np.where(product > 0, product, 1.0)
            self._cosines += float(np.where(norms.any(axis=0), cosine, 1.0).sum())

    def result(self, name: str) -> OutputFidelity:
        feeds, apart, note = self._feeds, len(self._apart), None
        if not (self._finite or self._finite_before):
            note = NEVER_FINITE
        elif apart:
            some = f"compared on {feeds - apart} of {feeds} feeds, those in which the models agree"
            note = (
                f"{some if feeds > apart else 'not compared'}: its length depends on the values, "
                f"{self._apart[0]} in the dense and the sparse model"
            )
        if feeds == apart:
            return OutputFidelity(name, None, None, self._finite, feeds, apart, note)
        if self._norm > 0:
            error = sqrt(self._difference / self._norm)
        else:
            error = inf if self._difference else 0.0
        cosine = self._cosines / self._vectors if self._vectors else 1.0
        return OutputFidelity(name, error, cosine, self._finite, feeds, apart, note)


def _unpadded(value: torch.Tensor, counts: torch.Tensor | None) -> Array:
    array: Array = (value if counts is None else value[counts]).double().numpy()
    return array
