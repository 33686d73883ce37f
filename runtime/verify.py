"""Compare the outputs of a sparse model with those of the dense one, feed by feed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.runtime.data import PAD_MASK
from iobs_onnx.runtime.feeds import Feed
from iobs_onnx.runtime.session import Model, Provider, open_session, run_errors

if TYPE_CHECKING:
    import onnxruntime as ort

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


def compare(
    dense: Model, sparse: Model, batches: Iterable[Feed], provider: Provider = "auto"
) -> list[OutputFidelity]:
    """Run both models over the feeds and compare every float output of the dense one.

    Where a feed holds an `attention_mask`, positions it marks 0 are left out of outputs of shape
    `(batch, seq, ..., features)`. One feed's outputs are alive at a time.

    Raises:
        DataError: there is no feed.
        ModelError: a model cannot be loaded or run, or the outputs do not correspond.
    """
    reference, candidate = open_session(dense, provider), open_session(sparse, provider)
    totals = {name: _Totals() for name in _float_outputs(reference)}
    present = {arg.name for arg in candidate.get_outputs()}
    if missing := [name for name in totals if name not in present]:
        raise ModelError(f"output {missing[0]!r} of the dense model is not in the sparse one")
    for feed in _some(batches):
        expected = _run(reference, list(totals), feed)
        found = _run(candidate, list(totals), feed)
        for name, y_dense, y_sparse in zip(totals, expected, found, strict=True):
            if y_dense.shape != y_sparse.shape:
                raise ModelError(
                    f"output {name!r} has shape {y_dense.shape} in the dense model, "
                    f"{y_sparse.shape} in the sparse one"
                )
            totals[name].add(_unpadded(y_dense, feed), _unpadded(y_sparse, feed))
    return [total.result(name) for name, total in totals.items()]


def run_finite(
    model: Model, batches: Iterable[Feed], provider: Provider = "auto"
) -> dict[str, bool]:
    """Run one model over the feeds; say of each float output whether it was finite throughout.

    Raises:
        DataError: there is no feed.
        ModelError: the model cannot be loaded or run.
    """
    session = open_session(model, provider)
    finite = dict.fromkeys(_float_outputs(session), True)
    for feed in _some(batches):
        for name, value in zip(finite, _run(session, list(finite), feed), strict=True):
            finite[name] &= bool(np.isfinite(_unpadded(value, feed)).all())
    return finite


class _Totals:
    """Running sums over feeds, float64."""

    def __init__(self) -> None:
        self._difference = self._norm = self._cosines = 0.0
        self._vectors = 0
        self._finite = True

    def add(self, y_dense: Array, y_sparse: Array) -> None:
        width = y_dense.shape[-1] if y_dense.ndim else 1
        a = y_dense.reshape(-1, width).astype(np.float64)
        b = y_sparse.reshape(-1, width).astype(np.float64)
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


def _some(batches: Iterable[Feed]) -> Iterable[Feed]:
    count = 0
    for feed in batches:
        count += 1
        yield feed
    if not count:
        raise DataError("verification data: there are no feeds to run the model on")


def _float_outputs(session: ort.InferenceSession) -> list[str]:
    kinds = ("tensor(float)", "tensor(float16)", "tensor(double)")
    return [arg.name for arg in session.get_outputs() if arg.type in kinds]


def _run(session: ort.InferenceSession, names: list[str], feed: Feed) -> list[Array]:
    with run_errors():
        # An empty list of names would mean all outputs.
        return session.run(names, feed) if names else []


def _unpadded(value: Array, feed: Feed) -> Array:
    mask = feed.get(PAD_MASK)
    # A matrix is left alone: (batch, features) can have the mask's shape by chance.
    if mask is None or value.ndim <= mask.ndim or value.shape[: mask.ndim] != mask.shape:
        return value
    return value[mask != 0]
