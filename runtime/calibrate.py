"""Collect the Hessian of every tapped activation while calibration feeds stream through.

The activations of one batch are alive at a time. On CUDA they stay on the device: ONNX Runtime
writes them there and torch reads them in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.hessian import (
    Cross,
    CrossAccumulator,
    GramAccumulator,
    Hessian,
    exact_float32,
)
from iobs_onnx.runtime.geometry import output_space
from iobs_onnx.runtime.rows import read_rows
from iobs_onnx.runtime.stream import Batch
from iobs_onnx.site import Patches, Rows, Tap


@dataclass(frozen=True)
class Calibration:
    """What calibration measured.

    Attributes:
        hessians: one for each tap; `hessians[tap].rows` counts its rows. A tap in a body that no
            batch ran has none.
        residuals: for a tap and the stream beside it, `(r_d − r_s)ᵀx_s / n` and its mean; absent
            where the two have not the same rows.
        batches: feeds that went through the model.
        padding_excluded: whether any feed held padding and rows were dropped for it.
        padding_kept: taps whose rows include padding, because the shape of the activation does
            not match that of the mask.
    """

    hessians: dict[Tap, Hessian]
    residuals: dict[tuple[Tap, Tap], Cross]
    batches: int
    padding_excluded: bool
    padding_kept: tuple[Tap, ...]


def calibrate(
    taps: Sequence[Tap],
    batches: Iterable[Batch],
    dense: Iterable[Batch] | None = None,
    *,
    beside: Collection[tuple[Tap, Tap]] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
) -> Calibration:
    """Return the Hessian of every tap over all batches.

    Args:
        taps: what to collect; several may read one value.
        batches: the values of the taps, iterated once. Rows of positions whose mask is False are
            left out, and those of a batch count as often as its weight says.
        dense: the same of the dense model, where it differs: its drift is then collected too.
        beside: pairs of a tap and the stream `r` that its site's output is added to; only where
            `dense` is given.
        device: where the Hessians are summed and stay.
        progress: called after every batch.

    Raises:
        DataError: there is no batch, every row is padding, or an activation holds NaN or Inf.
        ModelError: a tap's value has not the shape its weight multiplies.
    """
    device = torch.device(device)
    collector = _Collector(taps, tuple(beside) if dense is not None else (), device)
    done = 0
    with exact_float32(), collector:
        # The dense model goes first: the other may read what it has just computed.
        pairs = (
            zip(dense, batches, strict=True) if dense is not None else ((None, b) for b in batches)
        )
        for reference, batch in pairs:
            collector.add(batch, reference, done)
            done += 1
            if progress is not None:
                progress()
    if not done:
        raise DataError("calibration data: there are no feeds")
    return collector.result(done)


@dataclass(frozen=True)
class _Job:
    """A share of one sum; `left` is the tap whose drift is the left factor, None for `XᵀX`."""

    tap: Tap
    left: Tap | None
    part: int
    parts: int


class _Collector:
    """Adds the rows of every tap to its sums, on a pool of single-threaded workers.

    A threaded BLAS call for each tap would wake and join its threads some thousand times next to
    ONNX Runtime's own: several times slower on a busy machine. Here each worker takes whole sums,
    the large ones split into parts so that none holds up the rest.
    """

    def __init__(
        self, taps: Sequence[Tap], beside: Sequence[tuple[Tap, Tap]], device: torch.device
    ) -> None:
        self._device = device
        self._grams = {tap: GramAccumulator(tap.features, tap.groups, device) for tap in taps}
        self._drifts: dict[Tap, CrossAccumulator] = {}
        self._beside = {
            (tap, other): CrossAccumulator(other.features, tap.features, tap.groups, device)
            for tap, other in beside
        }
        self._kept: dict[Tap, None] = {}
        self._reached: set[Tap] = set()
        self._excluded = False
        self._threads = torch.get_num_threads()
        self._workers = self._threads if device.type == "cpu" else 1
        self._jobs: list[_Job] = []
        self._pool = ThreadPoolExecutor(
            self._workers, initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # A worker's setting is also the default of threads that torch has not seen yet.
        torch.set_num_threads(self._threads)

    def add(self, batch: Batch, dense: Batch | None, index: int) -> None:
        """Add one batch; `dense` is given with every batch or with none."""
        if dense is not None and not self._drifts:
            self._drifts = {
                tap: CrossAccumulator(tap.features, tap.features, tap.groups, self._device)
                for tap in self._grams
            }
        self._reached.update(tap for tap in self._grams if batch.values[tap.value].numel())
        keeps = self._keeps(batch)
        for tap, other in list(self._beside):
            if not _same_rows(tap, other, batch):
                del self._beside[tap, other]
                self._jobs = []
        self._jobs = self._jobs or self._share_out()

        def work(job: _Job) -> None:
            tap, share = job.tap, {"part": job.part, "parts": job.parts}
            activation = batch.values[tap.value].to(self._device)
            rows = read_rows(activation, tap, keeps[tap])
            if job.left is None:
                for chunk in rows:
                    self._grams[tap].add(chunk, batch.weight, **share)
                if not self._grams[tap].finite(job.part, job.parts):
                    raise DataError(_not_finite(activation, tap, index))
                return
            assert dense is not None, "a drift is summed only with the dense model's values"
            sums = self._drifts[tap] if job.left is tap else self._beside[tap, job.left]
            lefts = self._away(job.left, keeps[tap], dense, batch)
            for left, chunk in _in_step(lefts, rows):
                sums.add(left, chunk, batch.weight, **share)

        for _ in self._pool.map(work, self._jobs):
            pass
        if self._device.type == "cuda":
            # ONNX Runtime reuses the buffers on a stream of its own.
            torch.cuda.synchronize(self._device)

    def _keeps(self, batch: Batch) -> dict[Tap, torch.Tensor | None]:
        """Return for each tap the mask of rows that are no padding, None to keep all."""
        keeps: dict[Tap, torch.Tensor | None] = dict.fromkeys(self._grams)
        if batch.mask is None or batch.mask.all():
            return keeps
        for tap in self._grams:
            mask = torch.from_numpy(batch.mask)
            keeps[tap] = _matching(mask, batch.values[tap.value], tap)
            if keeps[tap] is None and batch.values[tap.value].numel():
                self._kept[tap] = None
            elif keeps[tap] is not None:
                self._excluded = True
        return keeps

    def _away(
        self, tap: Tap, keep: torch.Tensor | None, dense: Batch, batch: Batch
    ) -> Iterator[torch.Tensor]:
        """Yield the rows of `x_d − x_s`."""
        ours, theirs = (b.values[tap.value].to(self._device).float() for b in (batch, dense))
        if ours.shape != theirs.shape:
            raise ModelError(
                f"activation {tap.value!r} has shape {tuple(ours.shape)} in the pruned model and "
                f"{tuple(theirs.shape)} in the dense one: its size depends on the data; "
                "use target layer"
            )
        return read_rows(theirs - ours, tap, keep)

    def _share_out(self) -> list[_Job]:
        """Return the jobs, the largest first, none larger than a worker's fair share."""
        sums: list[tuple[Tap, Tap | None, GramAccumulator | CrossAccumulator]] = [
            *((tap, None, gram) for tap, gram in self._grams.items()),
            *((tap, tap, cross) for tap, cross in self._drifts.items()),
            *((tap, other, cross) for (tap, other), cross in self._beside.items()),
        ]
        # A drift is a full product, a Gram matrix half of one.
        cost = [
            tap.groups * tap.features * (left.features if left else tap.features / 2)
            for tap, left, _ in sums
        ]
        share = sum(cost) / self._workers
        jobs = []
        for i in sorted(range(len(sums)), key=cost.__getitem__, reverse=True):
            tap, left, total = sums[i]
            parts = min(total.parts, math.ceil(cost[i] / share))
            jobs += [_Job(tap, left, part, parts) for part in range(parts)]
        return jobs

    def result(self, batches: int) -> Calibration:
        hessians = {tap: self._grams[tap].finish() for tap in self._grams if tap in self._reached}
        for tap, cross in self._drifts.items():
            if tap in hessians:
                hessians[tap] = replace(hessians[tap], drift=cross.finish())
        residuals = {pair: cross.finish() for pair, cross in self._beside.items()}
        return Calibration(hessians, residuals, batches, self._excluded, tuple(self._kept))


def _same_rows(tap: Tap, other: Tap, batch: Batch) -> bool:
    """Whether the stream beside a tap has a row for each of the site's output."""
    x, r = batch.values[tap.value], batch.values[other.value]
    if isinstance(tap.form, Patches):
        space = output_space(tuple(x.shape[2:]), tap.form)
        return tuple(r.shape) == (x.shape[0], other.features, *space)
    return tuple(r.shape) == (*x.shape[:-1], other.features)


def _in_step(
    left: Iterator[torch.Tensor], rows: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both in chunks of equal length; they are cut at different places."""
    chunks = list(left)
    if not chunks:
        return
    held = torch.cat(chunks, dim=1)
    start = 0
    for chunk in rows:
        yield held[:, start : start + chunk.shape[1]], chunk
        start += chunk.shape[1]


def _matching(keep: torch.Tensor, activation: torch.Tensor, tap: Tap) -> torch.Tensor | None:
    """Return the mask over the activation's leading axes, or None where it does not fit them."""
    if tap.form not in (Rows(-1), Rows(activation.ndim - 1)):
        return None
    keep = keep.to(activation.device)
    if activation.ndim > keep.ndim and activation.shape[: keep.ndim] == keep.shape:
        return keep
    if activation.ndim == 2 and activation.shape[0] == keep.numel():
        return keep.flatten()
    return None


def _not_finite(activation: torch.Tensor, tap: Tap, batch: int) -> str:
    where = f"activation {tap.value!r}, batch {batch}"
    if activation.isnan().any():
        return f"{where}: holds NaN; the model or the data are at fault"
    if activation.isinf().any():
        return f"{where}: holds Inf; the model overflows on these data"
    largest = float(activation.abs().max())
    return f"{where}: values up to {largest:.1e} overflow when squared in float32; scale the data"
