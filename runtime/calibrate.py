"""Collect the Hessian of every tapped activation while calibration feeds stream through.

The activations of one batch are alive at a time. On CUDA they stay on the device: ONNX Runtime
writes them there and torch reads them in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from iobs_onnx.errors import DataError
from iobs_onnx.hessian import Cross, Hessian, exact_float32
from iobs_onnx.runtime.drift import Away, fits, out_of_step
from iobs_onnx.runtime.rows import in_step, read_rows, shares_of
from iobs_onnx.runtime.stream import Batch
from iobs_onnx.runtime.sums import CrossAccumulator, GramAccumulator
from iobs_onnx.site import Routed, Rows, Tap

_Chunk = TypeVar("_Chunk")


class NotFinite(DataError):
    """An activation holds NaN or Inf; whose fault that is, is not told here.

    Attributes:
        value: the activation.
        batch: its index.
    """

    def __init__(self, message: str, value: str, batch: int) -> None:
        super().__init__(message)
        self.value = value
        self.batch = batch

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str, str, int]]:
        """Travel between processes."""
        return NotFinite, (str(self), self.value, self.batch)


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
        padding_kept: taps whose rows include padding, because the mask is not for them or that
            cannot be told.
        out_of_step: taps without drift and residual, because their values, or the stream beside
            them, had other shapes in the dense model in some batch.
    """

    hessians: dict[Tap, Hessian]
    residuals: dict[tuple[Tap, Tap], Cross]
    batches: int
    padding_excluded: bool
    padding_kept: tuple[Tap, ...]
    out_of_step: tuple[Tap, ...] = ()


@dataclass
class Sums:
    """Raw sums over some shards, which add up with those over others.

    Attributes:
        grams: `XᵀX` of every tap.
        drifts: `(X_d − X_s)ᵀX_s` of every tap, where there is a dense model beside; else empty.
        beside: `(r_d − r_s)ᵀX_s` of pairs of a tap and a stream; a pair whose rows do not fit in
            some batch is missing.
        reached: taps that some batch had rows for.
        kept: taps whose rows include padding.
        apart: taps that are out of step, and have neither drift nor residual.
        batches, excluded: as in :class:`Calibration`.
    """

    grams: dict[Tap, GramAccumulator]
    drifts: dict[Tap, CrossAccumulator]
    beside: dict[tuple[Tap, Tap], CrossAccumulator]
    reached: set[Tap] = field(default_factory=set)
    kept: dict[Tap, None] = field(default_factory=dict)
    apart: dict[Tap, None] = field(default_factory=dict)
    batches: int = 0
    excluded: bool = False

    @classmethod
    def of(
        cls, taps: Iterable[Tap], beside: Iterable[tuple[Tap, Tap]], device: torch.device
    ) -> Sums:
        """Return empty sums of taps, and of pairs of a tap and the stream beside it."""
        crosses = {
            (tap, other): CrossAccumulator(other.features, tap.features, tap.groups, device)
            for tap, other in beside
        }
        grams = {tap: GramAccumulator(tap.features, tap.groups, device) for tap in taps}
        return cls(grams, {}, crosses)

    def merge(self, other: Sums) -> None:
        """Add the sums over another shard; `other` is used up.

        The result is that of :func:`collect` with these sums as `onto`, bit by bit.
        """
        for tap, gram in self.grams.items():
            gram.merge(other.grams[tap])
        for tap, drift in other.drifts.items():
            if tap in self.drifts:
                self.drifts[tap].merge(drift)
            else:
                self.drifts[tap] = drift
        for pair in list(self.beside):
            if pair in other.beside:
                self.beside[pair].merge(other.beside[pair])
            else:
                del self.beside[pair]
        self.leave_out(other.apart)
        self.reached |= other.reached
        self.kept |= other.kept
        self.batches += other.batches
        self.excluded |= other.excluded

    def seal(self) -> None:
        """End a shard, in every sum."""
        for sums in self._all():
            sums.seal()

    def move(self, device: torch.device) -> None:
        """Move every sum to a device; they are sealed."""
        for sums in self._all():
            sums.move(device)

    def _all(self) -> list[GramAccumulator | CrossAccumulator]:
        return [*self.grams.values(), *self.drifts.values(), *self.beside.values()]

    def leave_out(self, taps: Iterable[Tap]) -> None:
        """Drop drift and residual of taps, for good: what some batches lack says nothing of all."""
        self.apart |= dict.fromkeys(taps)
        self.drifts = {tap: sums for tap, sums in self.drifts.items() if tap not in self.apart}
        self.beside = {pair: s for pair, s in self.beside.items() if pair[0] not in self.apart}

    def finish(self) -> Calibration:
        """Divide by the weight of the rows, round to float32, and release the sums.

        Raises:
            DataError: there was no batch, or every row was padding.
        """
        if not self.batches:
            raise DataError("calibration data: there are no feeds")
        hessians = {tap: self.grams[tap].finish() for tap in self.grams if tap in self.reached}
        for tap, cross in self.drifts.items():
            if tap in hessians:
                hessians[tap] = replace(hessians[tap], drift=cross.finish())
        residuals = {pair: cross.finish() for pair, cross in self.beside.items()}
        kept, apart = tuple(self.kept), tuple(self.apart)
        return Calibration(hessians, residuals, self.batches, self.excluded, kept, apart)


def calibrate(
    taps: Sequence[Tap],
    batches: Iterable[Batch],
    dense: Iterable[Batch] | None = None,
    *,
    beside: Collection[tuple[Tap, Tap]] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
) -> Calibration:
    """Return the Hessian of every tap over all batches; arguments and errors as for both its steps.

    See :func:`collect` and :meth:`Sums.finish`.
    """
    found = collect(taps, batches, dense, beside=beside, device=device, progress=progress)
    return found.finish()


def collect(
    taps: Sequence[Tap],
    batches: Iterable[Batch],
    dense: Iterable[Batch] | None = None,
    *,
    beside: Collection[tuple[Tap, Tap]] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[], None] | None = None,
    onto: Sums | None = None,
    first: int = 0,
) -> Sums:
    """Sum the products of every tap's rows over the batches of a shard.

    Args:
        taps: what to collect; several may read one value.
        batches: the values of the taps, iterated once. Rows of positions whose mask is False are
            left out, and those of a batch count as often as its weight says.
        dense: the same of the dense model, where it differs: its drift is then collected too.
        beside: pairs of a tap and the stream `r` that its site's output is added to; only where
            `dense` is given.
        device: where the Hessians are summed and stay.
        progress: called after every batch.
        onto: sums over the shards before this one, of the same taps and pairs: they are added to,
            and returned. None for the first shard.
        first: number of the first batch, for messages.

    Raises:
        NotFinite: an activation holds NaN or Inf.
        DataError: an activation is too large to be squared.
        ModelError: a tap's value does not have the shape its weight multiplies.
    """
    device = torch.device(device)
    pairs_beside = tuple(beside) if dense is not None else ()
    sums = Sums.of(taps, pairs_beside, device) if onto is None else onto
    collector = _Collector(sums, pairs_beside, device)
    with exact_float32(), collector:
        # The dense model goes first: the other may read what it has just computed.
        pairs = (
            zip(dense, batches, strict=True) if dense is not None else ((None, b) for b in batches)
        )
        for number, (reference, batch) in enumerate(pairs, start=first):
            collector.add(batch, reference, number)
            if progress is not None:
                progress()
    sums.seal()
    return sums


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

    def __init__(self, sums: Sums, beside: Sequence[tuple[Tap, Tap]], device: torch.device) -> None:
        self.sums, self._pairs, self._device = sums, beside, device
        self._threads = torch.get_num_threads()
        self._workers = self._threads if device.type == "cpu" else 1
        self._jobs: list[_Job] = []
        self._pool = ThreadPoolExecutor(self._workers, initializer=_begin, initargs=(self._device,))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # A worker's setting is also the default of threads that torch has not seen yet.
        torch.set_num_threads(self._threads)

    def add(self, batch: Batch, dense: Batch | None, number: int) -> None:
        """Add one batch; `dense` is given with every batch or with none."""
        if dense is not None and not self.sums.batches:
            self.sums.drifts = {
                tap: CrossAccumulator(tap.features, tap.features, tap.groups, self._device)
                for tap in self.sums.grams
            }
        self.sums.reached.update(tap for tap in self.sums.grams if batch.values[tap.value].numel())
        keeps = self._keeps(batch)
        if dense is not None:
            found = out_of_step(self.sums.grams, self._pairs, batch, dense)
            if not found <= self.sums.apart.keys():
                self.sums.leave_out(tap for tap in self.sums.grams if tap in found)
                self._jobs = []
        for tap, other in list(self.sums.beside):
            if not fits(tap, other, batch):
                del self.sums.beside[tap, other]
                self._jobs = []
        self._jobs = self._jobs or self._share_out()
        lefts = [job.left for job in self._jobs if job.left is not None]
        away = Away(lefts, batch, dense, self._device)

        def work(job: _Job) -> torch.Tensor | None:
            """Add to a sum; of a Gram matrix return whether it is finite."""
            tap, share = job.tap, {"part": job.part, "parts": job.parts}
            activation = batch.values[tap.value].to(self._device)
            routes = _routes(tap, batch)
            rows = read_rows(activation, tap, keeps[tap], routes)
            shares = None if routes is None else shares_of(activation, tap, routes)
            if job.left is None:
                for chunk, here in _first(rows, shares):
                    self.sums.grams[tap].add(chunk, batch.weight, shares=here, **share)
                return self.sums.grams[tap].finite(job.part, job.parts)
            sums = self.sums.drifts[tap] if job.left is tap else self.sums.beside[tap, job.left]
            with away.of(job.left) as difference:
                lefts = read_rows(difference, job.left, keeps[tap], _routes(job.left, batch))
                for (left, chunk), here in _first(in_step(lefts, rows), shares):
                    sums.add(left, chunk, batch.weight, shares=here, **share)
            return None

        flags = zip(self._jobs, self._pool.map(work, self._jobs), strict=True)
        finite = [(job.tap, flag) for job, flag in flags if flag is not None]
        # Looked at together: on a GPU each look waits for it.
        if finite and not bool(torch.stack([flag for _, flag in finite]).all()):
            tap = next(tap for tap, flag in finite if not bool(flag))
            raise _not_finite(batch.values[tap.value], tap, number)
        self.sums.batches += 1

    def _keeps(self, batch: Batch) -> dict[Tap, torch.Tensor | None]:
        """Return for each tap the mask of rows that are not padding, None to keep all."""
        keeps: dict[Tap, torch.Tensor | None] = dict.fromkeys(self.sums.grams)
        if batch.mask is None or batch.mask.all():
            return keeps
        for tap in self.sums.grams:
            if tap.form in (Rows(-1), Rows(batch.values[tap.value].ndim - 1)):
                keeps[tap] = batch.counts(tap.value)
            if keeps[tap] is None and batch.values[tap.value].numel():
                self.sums.kept[tap] = None
            elif keeps[tap] is not None:
                self.sums.excluded = True
        return keeps

    def _share_out(self) -> list[_Job]:
        """Return the jobs, the largest first, none larger than a worker's fair share."""
        sums: list[tuple[Tap, Tap | None, GramAccumulator | CrossAccumulator]] = [
            *((tap, None, gram) for tap, gram in self.sums.grams.items()),
            *((tap, tap, cross) for tap, cross in self.sums.drifts.items()),
            *((tap, other, cross) for (tap, other), cross in self.sums.beside.items()),
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


def _begin(device: torch.device) -> None:
    """Set a thread of the pool up."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _routes(tap: Tap, batch: Batch) -> torch.Tensor | None:
    """Return what deals the rows of a tap out; None where all matrices meet all rows."""
    return batch.values[tap.form.index] if isinstance(tap.form, Routed) else None


def _first(
    chunks: Iterator[_Chunk], shares: torch.Tensor | None
) -> Iterator[tuple[_Chunk, torch.Tensor | None]]:
    """Yield all chunks of a batch, its shares with the first and zeros with the others."""
    for chunk in chunks:
        yield chunk, shares
        shares = None if shares is None else torch.zeros_like(shares)


def _not_finite(activation: torch.Tensor, tap: Tap, batch: int) -> DataError:
    where = f"activation {tap.value!r}, batch {batch}"
    for what, found in (("NaN", activation.isnan()), ("Inf", activation.isinf())):
        if found.any():
            return NotFinite(f"{where}: holds {what}", tap.value, batch)
    largest = float(activation.abs().max())
    return DataError(
        f"{where}: values up to {largest:.1e} overflow when squared in float32; scale the data"
    )
