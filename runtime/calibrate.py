"""Collect the Hessian of every tapped activation while calibration feeds stream through.

The activations of one batch are alive at a time. On CUDA they stay on the device: ONNX Runtime
writes them there and torch reads them in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.hessian import GramAccumulator, Hessian, exact_float32
from iobs_onnx.runtime.data import default_pad_mask
from iobs_onnx.runtime.feeds import Feed
from iobs_onnx.runtime.patches import read_rows
from iobs_onnx.runtime.session import input_specs, on_cuda, run_errors
from iobs_onnx.site import Rows, Tap

if TYPE_CHECKING:
    import onnxruntime as ort


@dataclass(frozen=True)
class Calibration:
    """What calibration measured.

    Attributes:
        hessians: one for each tap; `hessians[tap].rows` counts its rows.
        batches: feeds that went through the model.
        padding_excluded: whether any feed held padding and rows were dropped for it.
        padding_kept: taps whose rows include padding, because the shape of the activation does
            not match that of the mask.
    """

    hessians: dict[Tap, Hessian]
    batches: int
    padding_excluded: bool
    padding_kept: tuple[Tap, ...]


def calibrate(
    session: ort.InferenceSession,
    taps: Sequence[Tap],
    batches: Iterable[Feed],
    *,
    mask_padding: bool = True,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Run an instrumented model over the feeds and return the Hessian of every tap.

    Args:
        session: a session whose outputs include the value of every tap.
        taps: what to collect; several may read one value.
        batches: feeds, iterated once.
        mask_padding: leave out the rows of positions where the feed's `attention_mask` is 0.
        device: where the Hessians are summed and stay.
        progress: called after every batch with the number of batches done.

    Raises:
        DataError: there is no feed, every row is padding, or an activation holds NaN or Inf.
        ModelError: a tap's value is no output of the session or has not the shape its weight
            multiplies, or ONNX Runtime cannot run a feed.
    """
    if not taps:
        raise ModelError("there is nothing to calibrate: no weight of the model is to be pruned")
    outputs = {arg.name for arg in session.get_outputs()}
    if missing := [tap.value for tap in taps if tap.value not in outputs]:
        raise ModelError(f"activation {missing[0]!r} is no output of the instrumented model")
    device = torch.device(device)
    pad_mask = default_pad_mask(input_specs(session)) if mask_padding else None
    runner = _Runner(session, tuple({tap.value: None for tap in taps}), device)
    collector = _Collector(taps, device)
    done = 0
    with exact_float32(), collector:
        for feed in batches:
            mask = None if pad_mask is None or pad_mask not in feed else feed[pad_mask] != 0
            collector.add(runner.run(feed), mask, done)
            done += 1
            if progress is not None:
                progress(done)
    if not done:
        raise DataError("calibration data: there are no feeds")
    return collector.result(done)


class _Runner:
    """Runs feeds and hands the wanted outputs to torch without a copy."""

    def __init__(
        self, session: ort.InferenceSession, values: Sequence[str], device: torch.device
    ) -> None:
        self._session = session
        self._values = values
        # ONNX Runtime copies to the host itself where the sums are made there.
        self._where = "cuda" if device.type == "cuda" and on_cuda(session) else "cpu"

    def run(self, feed: Feed) -> dict[str, torch.Tensor]:
        binding = self._session.io_binding()
        with run_errors():
            for name, array in feed.items():
                binding.bind_cpu_input(name, np.asarray(array, order="C"))
            for value in self._values:
                binding.bind_output(value, self._where)
            self._session.run_with_iobinding(binding)
        # Each tensor keeps its ONNX Runtime buffer alive, and nothing else does.
        outputs = map(from_dlpack, binding.get_outputs())
        return dict(zip(self._values, outputs, strict=True))


class _Collector:
    """Adds the rows of every tap to its accumulator, on a pool of single-threaded workers.

    A threaded BLAS call for each tap would wake and join its threads some thousand times next to
    ONNX Runtime's own: several times slower on a busy machine. Here each worker takes whole taps,
    the large ones split into parts so that none holds up the rest.
    """

    def __init__(self, taps: Sequence[Tap], device: torch.device) -> None:
        self._device = device
        self._sums = {tap: GramAccumulator(tap.features, tap.groups, device) for tap in taps}
        self._kept: dict[Tap, None] = {}
        self._excluded = False
        self._threads = torch.get_num_threads()
        workers = self._threads if device.type == "cpu" else 1
        self._jobs = _jobs(self._sums, workers)
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        # A worker's setting is also the default of threads that torch has not seen yet.
        torch.set_num_threads(self._threads)

    def add(
        self, activations: dict[str, torch.Tensor], mask: np.ndarray | None, batch: int
    ) -> None:
        keep = None if mask is None or mask.all() else torch.from_numpy(mask)
        keeps: dict[Tap, torch.Tensor | None] = dict.fromkeys(self._sums)
        if keep is not None:
            for tap in self._sums:
                keeps[tap] = _matching(keep, activations[tap.value], tap)
                if keeps[tap] is None:
                    self._kept[tap] = None
                else:
                    self._excluded = True

        def work(job: tuple[Tap, int, int]) -> None:
            tap, part, parts = job
            sums = self._sums[tap]
            activation = activations[tap.value].to(self._device)
            for rows in read_rows(activation, tap, keeps[tap]):
                sums.add(rows, part, parts)
            if not sums.finite(part, parts):
                raise DataError(_not_finite(activation, tap, batch))

        for _ in self._pool.map(work, self._jobs):
            pass
        if self._device.type == "cuda":
            # ONNX Runtime reuses the buffers on a stream of its own.
            torch.cuda.synchronize(self._device)

    def result(self, batches: int) -> Calibration:
        hessians = {tap: sums.finish() for tap, sums in self._sums.items()}
        return Calibration(hessians, batches, self._excluded, tuple(self._kept))


def _jobs(sums: dict[Tap, GramAccumulator], workers: int) -> list[tuple[Tap, int, int]]:
    """Return (tap, part, parts), the largest first, none larger than a worker's fair share."""
    cost = {tap: tap.groups * tap.features**2 for tap in sums}
    share = sum(cost.values()) / workers
    jobs = []
    for tap in sorted(sums, key=cost.__getitem__, reverse=True):
        parts = min(sums[tap].parts, -int(-cost[tap] // share))
        jobs += [(tap, part, parts) for part in range(parts)]
    return jobs


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
