"""What decisions before the first walk rest on: Hessians of the dense model's activations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from iobs_onnx.hessian import Hessian
from iobs_onnx.passes import Segment, partition, release
from iobs_onnx.pruning.blame import explained
from iobs_onnx.pruning.records import Run
from iobs_onnx.runtime import NotFinite, calibrate
from iobs_onnx.site import Site, Tap


def measure_once(
    run: Run, model: ir.Model, sites: Sequence[Site]
) -> Iterator[tuple[Segment, dict[Tap, Hessian]]]:
    """Run a model as it is, and yield after each segment what was measured so far.

    Args:
        run: its feeds are read once.
        model: the dense model with every value that taps read.
        sites: whose taps are measured.

    Yields:
        The segment, and the Hessians; the caller deletes those that it needs no more.
    """
    stream = run.engine.stream(model, run.data.calibration, mask_padding=run.config.mask_padding)
    hessians: dict[Tap, Hessian] = {}
    for segment in partition(model, sites, budget=run.engine.budget):
        fetch = tuple(dict.fromkeys(name for tap in segment.taps for name in tap.values))
        session = run.engine.open(model, segment, (*fetch, *segment.outputs), stream)
        batches = stream.run(
            session, fetch=fetch, keep=segment.outputs, alive=segment.alive, device=run.device
        )
        try:
            hessians |= calibrate(segment.taps, batches, device=run.device).hessians
        except NotFinite as error:
            raise explained(error, run, model, run.data.calibration) from error
        stream.release(segment.alive)
        yield segment, hessians
        release(model, segment.weights)


def keep_only(hessians: dict[Tap, Hessian], taps: Collection[Tap]) -> None:
    """Delete the Hessians of all other taps."""
    for tap in [tap for tap in hessians if tap not in taps]:
        del hessians[tap]
