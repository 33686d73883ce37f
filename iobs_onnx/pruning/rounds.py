"""Rounds of I-OBS: walk, judge, keep what is better, walk again on fresh data.

Wu et al., NeurIPS 2024, algorithm 1, over a whole model: round t measures a fresh part of the
calibration data on the model as pruned so far, takes a step of length η from its weights, and
projects.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from iobs_onnx.errors import CheckError, DataError, OptionError
from iobs_onnx.passes import check_pattern, prepare
from iobs_onnx.pruning.blame import explained
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.executor import Crew, LocalCrew
from iobs_onnx.pruning.judge import Judge, Verdict
from iobs_onnx.pruning.records import Facts, Run, SolvedSite, rewrite_sites, with_sites
from iobs_onnx.pruning.shard import Item, deal
from iobs_onnx.pruning.stages import Pruned, SegmentStage
from iobs_onnx.pruning.walk import Route, Walk, Walked
from iobs_onnx.report.record import Round
from iobs_onnx.runtime import Data, Feed, NotFinite, OutputFidelity, with_random_tokens
from iobs_onnx.site import Site

# Why a site in a body of If, Loop or Scan may have no Hessian.
UNREACHED = "no sample of it runs the body that holds the weight; give data that do"


@dataclass(frozen=True)
class Rounded:
    """What the rounds came to.

    Attributes:
        pruned: the best round's model; sites that no row of the data reached are left out.
        trace: of all rounds.
        facts, seconds: of all walks together.
    """

    pruned: Pruned
    trace: list[Round]
    facts: Facts
    seconds: dict[str, float]


@dataclass(frozen=True)
class Rounds:
    """Prunes a model in rounds.

    Attributes:
        run: what all parts of the run share.
        route: of every walk.
        stages: of every segment.
        checkpoint: takes what is made.
        judge: says which round is the best.
        crew: where walks take place.
    """

    run: Run
    route: Route
    stages: Sequence[SegmentStage]
    checkpoint: Checkpoint
    judge: Judge
    crew: Crew = field(default_factory=LocalCrew)

    def steps(self) -> int | None:
        """Return how often the walks call `advance`; None where the number of feeds is unknown."""
        batches, rounds = self.run.data.batches, self.run.config.rounds
        if batches is None:
            return None
        parts = [len(range(i, batches, rounds)) for i in range(rounds)]
        walked = sum(map(self.route.measured, parts))
        made = len(self.run.sites) * rounds * len(self.stages)
        return walked * len(self.route.segments) + made

    def walk(self, advance: Callable[[], None]) -> Rounded:
        """Walk as often as the options say, and keep the best.

        Raises:
            DataError: no row reached any site.
            OptionError: there are too few feeds for the rounds, or none to judge them by.
            CheckError: a pattern does not hold, or a result is not finite.
        """
        best: Pruned | None = None
        trace: list[Round] = []
        facts = Facts()
        # A run that goes on behind its last segment calibrates and solves nothing.
        names = ("calibrate", *(stage.name for stage in self.stages))
        seconds = defaultdict[str, float](float, dict.fromkeys(names, 0.0))
        parts = _parts(self.run.data, self.run.config.rounds)
        for number, (feeds, count) in enumerate(parts, start=1):
            before = {} if best is None else best.sites
            walked = self._walk(number, before, feeds, count, advance)
            # A site that no row reached in this round stays what it was.
            found = self._judged(number, {**before, **walked.sites})
            verdict = found.verdict
            accepted = best is None or verdict.better_than(best.verdict)
            trace.append(
                Round(number, walked.facts.batches, verdict.error, verdict.metric, accepted)
            )
            best = found if best is None or accepted else best
            facts = facts.joined(walked.facts)
            for what, spent in walked.seconds.items():
                seconds[what] += spent
        assert best is not None, "there is at least one round"
        last = max(i for i, item in enumerate(trace) if item.accepted)
        trace[last] = dataclasses.replace(trace[last], best=True)
        return Rounded(best, trace, facts, dict(seconds))

    def _walk(
        self,
        number: int,
        start: Mapping[Site, SolvedSite],
        feeds: Iterable[Feed],
        count: int | None,
        advance: Callable[[], None],
    ) -> Walked:
        working = prepare(self.run.dense, self.run.sites)
        rewrite_sites(working, start)
        return walk_once(
            self.run,
            self.route,
            number,
            working,
            start,
            feeds,
            count,
            stages=self.stages,
            checkpoint=self.checkpoint,
            crew=self.crew,
            advance=advance,
        )

    def _judged(self, number: int, sites: dict[Site, SolvedSite]) -> Pruned:
        """Check the patterns, and judge the model with these sites."""
        if not sites:
            raise DataError(f"calibration data: {UNREACHED}")
        model = with_sites(self.run.dense, sites)
        patterns = {site.name: self.run.patterns[site] for site in sites}
        if violations := check_pattern(model, self.run.sites, patterns):
            raise CheckError(violations[0].text)
        verdict = self._verdict(number, model)
        if self.run.config.rounds > 1 and verdict.error is verdict.metric is None:
            raise OptionError(
                f"rounds {self.run.config.rounds}: nothing says which is the best; leave samples "
                "to hold out, or give a metric"
            )
        return Pruned(sites, verdict)

    def _verdict(self, number: int, model: ir.Model) -> Verdict:
        """Judge a model once: a run that goes on must decide as it did before."""
        name = f"round-{number}-verdict"
        held: Mapping[str, Any] | None = self.checkpoint.noted(name)
        if held is not None:
            outputs = [OutputFidelity(**output) for output in held["outputs"]]
            return Verdict(outputs, held["error"], held["metric"])
        verdict = self.judge(model)
        self.checkpoint.note(name, dataclasses.asdict(verdict))
        return verdict


def walk_once(
    run: Run,
    route: Route,
    number: int,
    working: ir.Model,
    start: Mapping[Site, SolvedSite],
    feeds: Iterable[Feed],
    count: int | None,
    *,
    stages: Sequence[SegmentStage],
    checkpoint: Checkpoint,
    crew: Crew,
    advance: Callable[[], None],
) -> Walked:
    """Walk through a model once, and return what the stages made of it.

    Args:
        run: what all parts of the run share.
        route: of the walk.
        number: of the walk, from 1.
        working: the model as it is when the walk begins, with every value that taps read; it is
            changed in place.
        start: what became of its sites so far.
        feeds: measured on, random tokens mixed in where the route says so.
        count: of them, None where it is not known.
        stages: of every segment.
        checkpoint: takes what is made.
        crew: where it takes place.
        advance: as for :class:`Walk`.
    """
    config, store = run.config, run.engine.store()

    def mixed() -> Iterable[Item]:
        if not route.tokens:
            return feeds
        seed = config.seed + number - 1
        return with_random_tokens(feeds, *route.tokens, config.random_tokens, seed)

    dealt = deal(mixed(), None if count is None else route.measured(count), store)
    shards = checkpoint.digested(f"round-{number}", dealt)
    with crew.executor(run, route.model, working, shards, store, differ=number > 1) as executor:
        walk = Walk(
            run,
            route,
            number,
            start,
            stages=stages,
            executor=executor,
            checkpoint=checkpoint,
            advance=advance,
        )
        try:
            return walk.run()
        except NotFinite as error:
            raise explained(error, run, route.model, mixed()) from error


def _parts(data: Data, rounds: int) -> Sequence[tuple[Iterable[Feed], int | None]]:
    """Deal the feeds out to the rounds, with their numbers; one round reads them as they come."""
    if rounds == 1:
        return [(data.calibration, data.batches)]
    feeds = list(data.calibration)
    if len(feeds) < rounds:
        raise OptionError(
            f"rounds {rounds}: there are only {len(feeds)} calibration feeds to deal out; give "
            "more, or a smaller batch size"
        )
    return [(part, len(part)) for part in (feeds[number::rounds] for number in range(rounds))]
