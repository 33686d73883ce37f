"""One walk through a model: segment by segment, measure, solve, rewrite, go on."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.engine import Place
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
from iobs_onnx.pruning.checkpoint import Finished, Shelf
from iobs_onnx.pruning.forgetting import Recall
from iobs_onnx.pruning.solve import Layer, Solved, solve_sites
from iobs_onnx.runtime import Batch, Feed, Stream, calibrate
from iobs_onnx.site import Site, Tap
from iobs_onnx.sparsity import Pattern


@dataclass(frozen=True)
class Facts:
    """What the feeds turned out to be.

    Attributes:
        batches: how many there were.
        padding_excluded: whether rows were left out as padding.
        padding_kept: labels of taps that count padding, because their shape hides it.
    """

    batches: int = 0
    padding_excluded: bool = False
    padding_kept: list[str] = field(default_factory=list)

    def joined(self, other: Facts) -> Facts:
        """Return what holds of two segments that read the same feeds."""
        return Facts(
            max(self.batches, other.batches),
            self.padding_excluded or other.padding_excluded,
            list(dict.fromkeys([*self.padding_kept, *other.padding_kept])),
        )


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
        shelf: takes what is solved, and gives back what a run that was cut off had solved.
        number: of the round, from 1; later ones find `sparse` pruned already.
        surroundings: the biases that may be moved, and the streams that outputs are added to.
        patterns: of every site.
        seconds: spent on measuring and on solving.
        facts: about the feeds, complete after the walk.
    """

    dense: ir.Model
    sparse: ir.Model
    config: PruneConfig
    place: Place
    device: torch.device
    advance: Callable[[], None]
    shelf: Shelf
    number: int
    surroundings: Mapping[Site, Surroundings] = field(default_factory=dict)
    patterns: Mapping[Site, Pattern] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrate": 0.0, "solve": 0.0})
    facts: Facts = field(default_factory=Facts)
    _hessians: dict[Tap, Hessian] = field(default_factory=dict)
    _residuals: dict[tuple[Tap, Tap], Cross] = field(default_factory=dict)
    _pending: set[Site] = field(default_factory=set)

    def run(
        self, segments: Sequence[Segment], feeds: Iterable[Feed | tuple[Feed, float]]
    ) -> dict[Site, Finished]:
        """Walk once; return what each site became, but for those that no row reached.

        Args:
            segments: from :func:`iobs_onnx.passes.taps.partition`.
            feeds: read once.
        """
        feeds = self.shelf.digested(f"round-{self.number}", feeds)
        stream = self.place.stream(self.dense, feeds, mask_padding=self.config.mask_padding)
        pruned = stream.over() if self.config.target == "dense" else stream
        finished: dict[Site, Finished] = {}
        self._pending = {site for segment in segments for site in segment.sites}
        for index, segment in enumerate(segments):
            name = f"round-{self.number}-segment-{index:04d}"
            found = self.shelf.get(name, segment.sites)
            if found is None:
                with self._timed("calibrate"):
                    facts = self._measure(index, segment, segment.taps, stream, pruned)
                with self._timed("solve"):
                    new = self.shelf.put(name, self._solve(segment), dataclasses.asdict(facts))
            else:
                new, facts = found[0], Facts(**found[1])
                self._pending -= set(segment.sites)
                later = self._later()
                with self._timed("calibrate"):
                    taps = [tap for tap in segment.taps if tap in later]
                    self._measure(index, segment, taps, stream, pruned)
                for _ in segment.sites:
                    self.advance()
            self.facts = self.facts.joined(facts)
            rewrite_sites(self.sparse, new)
            finished |= new
            with self._timed("calibrate"):
                self._propagate(segment, stream, pruned)
            release(self.dense, segment.weights)
            release(self.sparse, segment.weights)
            give_back()
        return finished

    def _again(self, segment: Segment) -> bool:
        """Whether later segments read what this one computes with its new weights."""
        sequential = self.config.sequential != "none"
        return sequential and bool(segment.sites) and bool(segment.changed)

    def _measure(
        self, index: int, segment: Segment, taps: Sequence[Tap], stream: Stream, pruned: Stream
    ) -> Facts:
        """Collect the Hessians of taps; advance the streams that need no new weights."""
        again = self._again(segment)
        beside = {
            (site.taps[-1], tap): None
            for site, tap in segment.beside.items()
            if site in self._pending
        }
        fetch = tuple(dict.fromkeys(tap.value for tap in (*taps, *(tap for _, tap in beside))))
        alive = {*segment.alive, *segment.inputs} if again else set(segment.alive)

        def run(model: ir.Model, through: Stream, keep: Sequence[str]) -> Iterator[Batch]:
            session = self.place.session(model, segment, (*fetch, *keep), through)
            return through.run(session, fetch=fetch, keep=keep, alive=alive, device=self.device)

        if pruned is stream:
            batches, dense = run(self.sparse, stream, () if again else segment.outputs), None
        elif self.number > 1 or pruned.holds(segment.inputs):
            batches = run(self.sparse, pruned, () if again else segment.changed)
            dense = run(self.dense, stream, segment.outputs)
        else:
            batches, dense = run(self.dense, stream, segment.outputs), None
        measured = calibrate(
            taps, batches, dense, beside=beside, device=self.device, progress=self.advance
        )
        recall = Recall(self.shelf.folder, self.number, self.config.forgetting_factor)
        measured = recall.joined(index, measured)
        self._hessians |= measured.hessians
        self._residuals = measured.residuals
        kept = [tap.label for tap in measured.padding_kept]
        return Facts(measured.batches, measured.padding_excluded, kept)

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
        together: dict[tuple[tuple[Tap, ...], Pattern], list[Site]] = defaultdict(list)
        for site in segment.sites:
            together[site.taps, self.patterns[site]].append(site)
        dense, sparse = stored_slots(self.dense), stored_slots(self.sparse)
        solved: dict[Site, Solved] = {}
        for (taps, pattern), members in together.items():
            config = dataclasses.replace(self.config, sparsity=pattern)
            for _ in members:
                self.advance()
            if not (reached := [self._hessians[tap] for tap in taps if tap in self._hessians]):
                continue  # they are in a body that never ran
            layers = {site: self._layer(site, segment, dense, sparse, taps[-1]) for site in members}
            solved |= solve_sites(layers, combine(reached), config, self.device)
        self._pending -= set(segment.sites)
        later = self._later()
        self._hessians = {tap: held for tap, held in self._hessians.items() if tap in later}
        return solved

    def _later(self) -> set[Tap]:
        """Return the taps of sites that are yet to be solved."""
        return {tap for site in self._pending for tap in site.taps}

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


def rewrite_sites(model: ir.Model, finished: Mapping[Site, Finished]) -> None:
    """Put solved weights, and the biases that were moved, into a model, in place."""
    rewrite(model, {site.initializer: item.weight for site, item in finished.items()})
    rewrite_biases(model, {s: item.bias for s, item in finished.items() if item.bias is not None})
