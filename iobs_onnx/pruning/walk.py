"""One walk through a model: segment by segment, measure, let the stages work, go on."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir

from iobs_onnx.hessian import Cross, Hessian
from iobs_onnx.passes import (
    Segment,
    Surroundings,
    find_surroundings,
    find_token_input,
    partition,
    prepare,
    stored_slots,
)
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.executor import Executor
from iobs_onnx.pruning.forgetting import Recall
from iobs_onnx.pruning.records import Facts, Run, SolvedSite
from iobs_onnx.pruning.stages import SegmentStage, Work
from iobs_onnx.site import Site, Tap


@dataclass(frozen=True)
class Route:
    """How every walk goes through a model.

    Attributes:
        model: the dense model with every value that taps read; never written.
        segments: of it, first to last.
        surroundings: of every site: the biases that may be moved, and the streams that outputs
            are added to.
        tokens: the input that looks up tokens and their number, where random ones are mixed in.
    """

    model: ir.Model
    segments: Sequence[Segment]
    surroundings: Mapping[Site, Surroundings]
    tokens: tuple[str, int] | None

    @classmethod
    def of(cls, run: Run) -> Route:
        """Find the route of a run."""
        config = run.config
        around = find_surroundings(run.dense, run.sites)
        model = prepare(run.dense, run.sites)
        streams = {s: found.residual for s, found in around.items() if found.residual is not None}
        segments = partition(
            model,
            run.sites,
            beside=streams if config.residual and config.target == "dense" else {},
            sequential=config.sequential,
            budget=run.engine.budget,
        )
        tokens = find_token_input(run.dense) if config.random_tokens else None
        return cls(model, segments, around, tokens)

    def measured(self, feeds: int) -> int:
        """Return how many are measured of so many feeds, random tokens mixed in."""
        return feeds + (feeds + 1) // 2 if self.tokens else feeds


@dataclass(frozen=True)
class Walked:
    """What one walk came to.

    Attributes:
        sites: what each became, but for those that no row reached.
        facts: about the feeds.
        seconds: spent on measuring (`calibrate`) and in each stage, by name.
    """

    sites: dict[Site, SolvedSite]
    facts: Facts
    seconds: dict[str, float]


class Walk:
    """Prunes a model towards the dense one.

    Args:
        run: what all of the run shares.
        route: of its walks.
        number: of the round, from 1.
        start: what earlier rounds made of sites; the others are dense.
        stages: what is done to each segment, in their order.
        executor: runs the segments.
        checkpoint: takes what stages make, and gives back what a run that was cut off had made.
        advance: called after every batch that is measured and every site of every stage.
    """

    def __init__(
        self,
        run: Run,
        route: Route,
        number: int,
        start: Mapping[Site, SolvedSite],
        *,
        stages: Sequence[SegmentStage],
        executor: Executor,
        checkpoint: Checkpoint,
        advance: Callable[[], None],
    ) -> None:
        self._run, self._route, self._number, self._start = run, route, number, start
        self._stages, self._executor = stages, executor
        self._checkpoint, self._advance = checkpoint, advance
        self._stored = stored_slots(route.model)
        self._recall = Recall(checkpoint, number, run.config.forgetting_factor)
        self._hessians: dict[Tap, Hessian] = {}
        self._pending = {site for segment in route.segments for site in segment.sites}
        self._facts = Facts()
        self._seconds: dict[str, float] = defaultdict(float)

    def run(self) -> Walked:
        """Walk once."""
        sites: dict[Site, SolvedSite] = {}
        for index, segment in enumerate(self._route.segments):
            new = self._pass(index, segment)
            sites |= new
            with self._timed("calibrate"):
                self._executor.propagate(segment, new)
        return Walked(sites, self._facts, dict(self._seconds))

    def _pass(self, index: int, segment: Segment) -> dict[Site, SolvedSite]:
        """Measure a segment, and return what the stages make of its sites."""
        names = [f"round-{self._number}-segment-{index:04d}-{s.name}" for s in self._stages]
        held = [self._checkpoint.get(name, segment.sites) for name in names]
        first = held[0]
        with self._timed("calibrate"):
            known = first is not None and self._recall.holds(index)
            residuals, facts = self._measure(index, segment, solved=known)
        if first is not None:
            facts = Facts(**first[1])
        sites: dict[Site, SolvedSite] = {}
        for stage, name, found in zip(self._stages, names, held, strict=True):
            if found is not None:
                for _ in segment.sites:
                    self._advance()
                sites |= found[0]
                continue
            start = {**self._start, **sites}
            work = Work(
                self._run,
                segment,
                self._hessians,
                residuals,
                self._route.surroundings,
                self._stored,
                start,
                self._executor.tasks,
            )
            with self._timed(stage.name):
                proposal = stage.run(work, self._advance)
                taken = proposal.sites if proposal.accepted else {}
                sites |= self._checkpoint.put(name, taken, dataclasses.asdict(facts))
        self._facts = self._facts.joined(facts)
        self._pending -= set(segment.sites)
        later = {tap for site in self._pending for tap in site.taps}
        self._hessians = {tap: kept for tap, kept in self._hessians.items() if tap in later}
        return sites

    def _measure(
        self, index: int, segment: Segment, *, solved: bool
    ) -> tuple[Mapping[tuple[Tap, Tap], Cross], Facts]:
        """Collect Hessians; return the residuals and what was found of the feeds.

        Behind a segment that is solved only the taps that later ones read too are measured.
        """
        taps, beside = segment.taps, dict[tuple[Tap, Tap], None]()
        if solved:
            after = self._pending - set(segment.sites)
            wanted = {tap for site in after for tap in site.taps}
            taps = tuple(tap for tap in taps if tap in wanted)
        else:
            beside = {(site.taps[-1], tap): None for site, tap in segment.beside.items()}
        measured = self._executor.measure(segment, taps, tuple(beside), self._advance).finish()
        measured = self._recall.joined(index, measured, whole=not solved)
        self._hessians |= measured.hessians
        kept = [tap.label for tap in measured.padding_kept]
        apart = [tap.label for tap in measured.out_of_step]
        facts = Facts(measured.batches, measured.padding_excluded, kept, apart)
        return measured.residuals, facts

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - started
