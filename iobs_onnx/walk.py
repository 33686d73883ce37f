"""One walk through a model: segment by segment, measure, solve, rewrite, go on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.hessian import Cross, Hessian, combine
from iobs_onnx.memory import give_back
from iobs_onnx.passes import (
    Segment,
    Slot,
    Surroundings,
    release,
    rewrite,
    rewrite_biases,
    stored_slots,
)
from iobs_onnx.runtime import Batch, Calibration, Feed, Stream, calibrate
from iobs_onnx.segments import Place
from iobs_onnx.site import Site, Tap
from iobs_onnx.solve_sites import Layer, Solved, solve_sites


@dataclass
class Walk:
    """Prunes `sparse`, in place, towards `dense`; both have the same graph.

    The dense model's values run in one stream, those of the model as pruned so far in another
    that holds only what differs. Without the dense target there is one stream, of the model as
    pruned so far (or, one-shot, before it is pruned).

    Attributes:
        dense: the target.
        sparse: the weights to step from; its sites are rewritten segment by segment.
        config: the options.
        place: where segments run.
        device: where Hessians are summed and sites solved.
        advance: called after every batch that is measured and every site that is solved.
        surroundings: the biases that may be moved, and the streams that outputs are added to.
        seconds: spent on measuring and on solving.
    """

    dense: ir.Model
    sparse: ir.Model
    config: PruneConfig
    place: Place
    device: torch.device
    advance: Callable[[], None]
    surroundings: Mapping[Site, Surroundings] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrate": 0.0, "solve": 0.0})
    _measured: list[Calibration] = field(default_factory=list)
    _hessians: dict[Tap, Hessian] = field(default_factory=dict)
    _residuals: dict[tuple[Tap, Tap], Cross] = field(default_factory=dict)
    _pending: set[Site] = field(default_factory=set)

    def run(
        self, segments: Sequence[Segment], feeds: Iterable[Feed | tuple[Feed, float]]
    ) -> dict[Site, Solved]:
        """Walk once; return what each site became.

        Args:
            segments: from :func:`iobs_onnx.passes.partition`.
            feeds: read once.
        """
        stream = self.place.stream(self.dense, feeds, mask_padding=self.config.mask_padding)
        pruned = stream.over() if self.config.target == "dense" else stream
        solved: dict[Site, Solved] = {}
        self._pending = {site for segment in segments for site in segment.sites}
        for segment in segments:
            with self._timed("calibrate"):
                self._measure(segment, stream, pruned)
            with self._timed("solve"):
                new = self._solve(segment)
            rewrite_sites(self.sparse, new, self.surroundings)
            solved |= new
            with self._timed("calibrate"):
                self._propagate(segment, stream, pruned)
            release(self.dense, segment.weights)
            give_back()
        return solved

    @property
    def calibration(self) -> Calibration:
        """What all segments measured, without the Hessians."""
        kept = dict.fromkeys(tap for part in self._measured for tap in part.padding_kept)
        return Calibration(
            {},
            {},
            max((part.batches for part in self._measured), default=0),
            any(part.padding_excluded for part in self._measured),
            tuple(kept),
        )

    def _again(self, segment: Segment) -> bool:
        """Whether later segments read what this one computes with its new weights."""
        sequential = self.config.sequential != "none"
        return sequential and bool(segment.sites) and bool(segment.changed)

    def _measure(self, segment: Segment, stream: Stream, pruned: Stream) -> None:
        """Collect the Hessians of the taps; advance the streams that need no new weights."""
        again = self._again(segment)
        beside = {(site.taps[-1], tap): None for site, tap in segment.beside.items()}
        taps = (*segment.taps, *segment.beside.values())
        fetch = tuple(dict.fromkeys(tap.value for tap in taps))
        alive = {*segment.alive, *segment.inputs} if again else set(segment.alive)

        def run(model: ir.Model, through: Stream, keep: Sequence[str]) -> Iterator[Batch]:
            session = self.place.session(model, segment, (*fetch, *keep), through)
            return through.run(session, fetch=fetch, keep=keep, alive=alive, device=self.device)

        if pruned is stream:
            batches, dense = run(self.sparse, stream, () if again else segment.outputs), None
        elif pruned.holds(segment.inputs):
            batches = run(self.sparse, pruned, () if again else segment.changed)
            dense = run(self.dense, stream, segment.outputs)
        else:
            batches, dense = run(self.dense, stream, segment.outputs), None
        measured = calibrate(
            segment.taps, batches, dense, beside=beside, device=self.device, progress=self.advance
        )
        self._hessians |= measured.hessians
        self._residuals = measured.residuals
        self._measured.append(replace(measured, hessians={}, residuals={}))

    def _propagate(self, segment: Segment, stream: Stream, pruned: Stream) -> None:
        """Run the segment with its new weights, and drop what no later segment reads."""
        if self._again(segment):
            keep = segment.outputs if pruned is stream else segment.changed
            session = self.place.session(self.sparse, segment, keep, pruned)
            for _ in pruned.run(session, keep=keep, alive=segment.alive):
                pass
        stream.release(segment.alive)
        pruned.release(segment.alive)

    def _solve(self, segment: Segment) -> dict[Site, Solved]:
        """Solve the segment's sites; those that read the same taps share one factorisation."""
        together: dict[tuple[Tap, ...], list[Site]] = defaultdict(list)
        for site in segment.sites:
            together[site.taps].append(site)
        dense, sparse = stored_slots(self.dense), stored_slots(self.sparse)
        solved: dict[Site, Solved] = {}
        for taps, members in together.items():
            hessian = combine([self._hessians[tap] for tap in taps])
            layers = {site: self._layer(site, segment, dense, sparse, taps[-1]) for site in members}
            solved |= solve_sites(layers, hessian, self.config, self.device)
            for _ in members:
                self.advance()
        self._pending -= set(segment.sites)
        later = {tap for site in self._pending for tap in site.taps}
        self._hessians = {tap: held for tap, held in self._hessians.items() if tap in later}
        return solved

    def _layer(
        self,
        site: Site,
        segment: Segment,
        dense: Mapping[str, Slot],
        sparse: Mapping[str, Slot],
        tap: Tap,
    ) -> Layer:
        target, start = dense[site.initializer].tensor, sparse[site.initializer].tensor
        around = self.surroundings.get(site, Surroundings())
        array = target.numpy()
        return Layer(
            array,
            array if start is target else start.numpy(),
            None if around.bias is None else dense[around.bias].tensor.numpy(),
            self._residuals.get((tap, segment.beside[site])) if site in segment.beside else None,
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started


def rewrite_sites(
    model: ir.Model, solved: Mapping[Site, Solved], surroundings: Mapping[Site, Surroundings]
) -> None:
    """Put solved weights, and the biases that were moved, into a model, in place."""
    rewrite(model, {site.initializer: result.stored for site, result in solved.items()})
    moved = {
        site: (name, result.bias)
        for site, result in solved.items()
        if result.bias is not None and (name := surroundings[site].bias) is not None
    }
    rewrite_biases(model, moved)
