"""Rounds of I-OBS: walk, judge, keep what is better, walk again on fresh data.

Wu et al., NeurIPS 2024, algorithm 1, over a whole model: round t measures a fresh part of the
calibration data on the model as pruned so far, takes a step of length η from its weights, and
projects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.engine import Place
from iobs_onnx.errors import CheckError, DataError, OptionError
from iobs_onnx.passes import (
    Surroundings,
    check_pattern,
    find_surroundings,
    find_token_input,
    load_model,
    partition,
    prepare,
)
from iobs_onnx.pruning.checkpoint import Finished, Shelf
from iobs_onnx.pruning.judge import Judge, Verdict
from iobs_onnx.pruning.walk import Facts, Walk, rewrite_sites
from iobs_onnx.report.record import Round
from iobs_onnx.runtime import Data, Feed, OutputFidelity, with_random_tokens
from iobs_onnx.site import Site, Tap
from iobs_onnx.sparsity import Pattern

# Why a site in a body of If, Loop or Scan may have no Hessian.
UNREACHED = "no sample of it runs the body that holds the weight; give data that do"


@dataclass
class Rounds:
    """Prunes a model in rounds.

    Attributes:
        dense: the target; unchanged.
        sites: to prune, each to its pattern in `patterns`.
        config: the options.
        place: where models run.
        device: where layers are solved.
        shelf: takes what is solved.
        judge: says which round is the best.
        trace: of the rounds so far.
        seconds, facts: of the walks so far.
    """

    dense: ir.Model
    sites: Sequence[Site]
    patterns: Mapping[Site, Pattern]
    config: PruneConfig
    place: Place
    device: torch.device
    shelf: Shelf
    judge: Judge
    trace: list[Round] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrate": 0.0, "solve": 0.0})
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        self.around = find_surroundings(self.dense, self.sites)
        self.reference = prepare(self.dense, self.sites)
        self.segments = partition(
            self.reference,
            self.sites,
            beside=_residuals(self.around, self.config),
            sequential=self.config.sequential,
            budget=self.place.budget,
        )
        self.tokens = find_token_input(self.dense) if self.config.random_tokens else None

    @property
    def random_tokens(self) -> float:
        """Share of the calibration that is random tokens."""
        return self.config.random_tokens if self.tokens else 0.0

    def steps(self, batches: int | None) -> int | None:
        """Return how often walks over so many batches call `advance`; None where unknown."""
        if batches is None:
            return None
        parts = [len(range(i, batches, self.config.rounds)) for i in range(self.config.rounds)]
        walked = sum(part + (part + 1) // 2 if self.tokens else part for part in parts)
        return walked * len(self.segments) + len(self.sites) * self.config.rounds

    def run(self, data: Data, advance: Callable[[], None]) -> tuple[dict[Site, Finished], Verdict]:
        """Walk as often as the options say; return what is best, and what it is worth.

        Sites that no row of the data reached are left out.

        Raises:
            DataError: no row reached any site.
            OptionError: there are too few feeds for the rounds, or none to judge them by.
            CheckError: a pattern does not hold, or a result is not finite.
        """
        best: dict[Site, Finished] = {}
        verdict: Verdict | None = None
        parts = _parts(data, self.config.rounds)
        for number, feeds in enumerate(parts, start=1):
            model, finished, facts = self._walk(number, best, feeds, advance)
            found = self._verdict(number, model)
            if self.config.rounds > 1 and found.error is found.metric is None:
                raise OptionError(
                    f"rounds {self.config.rounds}: nothing says which is the best; leave samples "
                    "to hold out, or give a metric"
                )
            accepted = verdict is None or found.better_than(verdict)
            if accepted:
                best, verdict = finished, found
            self.trace.append(
                Round(number, facts.batches, found.error, found.metric, accepted=accepted)
            )
            self.facts = self.facts.joined(facts)
        assert verdict is not None, "there is at least one round"
        last = max(i for i, item in enumerate(self.trace) if item.accepted)
        self.trace[last] = dataclasses.replace(self.trace[last], best=True)
        return best, verdict

    def _walk(
        self,
        number: int,
        start: Mapping[Site, Finished],
        feeds: Iterable[Feed],
        advance: Callable[[], None],
    ) -> tuple[ir.Model, dict[Site, Finished], Facts]:
        working = prepare(self.dense, self.sites)
        rewrite_sites(working, start)
        walk = Walk(
            self.reference,
            working,
            self.config,
            self.place,
            self.device,
            advance,
            self.shelf,
            number,
            surroundings=self.around,
            patterns=self.patterns,
        )
        mixed: Iterable[Feed | tuple[Feed, float]] = feeds
        if self.tokens:
            seed = self.config.seed + number - 1
            mixed = with_random_tokens(feeds, *self.tokens, self.config.random_tokens, seed)
        # A site that no row reached in this round stays what it was.
        finished = {**start, **walk.run(self.segments, mixed)}
        if not finished:
            raise DataError(f"calibration data: {UNREACHED}")
        for what, seconds in walk.seconds.items():
            self.seconds[what] += seconds
        model = self.pruned(finished)
        patterns = {site.name: self.patterns[site] for site in finished}
        if violations := check_pattern(model, self.sites, patterns):
            raise CheckError(violations[0].text)
        return model, finished, walk.facts

    def pruned(self, finished: Mapping[Site, Finished]) -> ir.Model:
        """Return the model in which these sites are sparse, and all others dense."""
        model = load_model(self.dense)
        rewrite_sites(model, finished)
        return model

    def _verdict(self, number: int, model: ir.Model) -> Verdict:
        """Judge a model once: a run that goes on must decide as it did before."""
        name = f"round-{number}-verdict"
        held: Mapping[str, Any] | None = self.shelf.noted(name)
        if held is not None:
            outputs = [OutputFidelity(**output) for output in held["outputs"]]
            return Verdict(outputs, held["error"], held["metric"])
        verdict = self.judge(model)
        self.shelf.note(name, dataclasses.asdict(verdict))
        return verdict


def _parts(data: Data, rounds: int) -> Sequence[Iterable[Feed]]:
    """Deal the feeds out to the rounds; one round reads them as they come."""
    if rounds == 1:
        return [data.calibration]
    feeds = list(data.calibration)
    if len(feeds) < rounds:
        raise OptionError(
            f"rounds {rounds}: there are only {len(feeds)} calibration feeds to deal out; give "
            "more, or a smaller batch size"
        )
    return [feeds[number::rounds] for number in range(rounds)]


def _residuals(around: Mapping[Site, Surroundings], config: PruneConfig) -> dict[Site, Tap]:
    """Return the streams that outputs are added to, where the target takes them into account."""
    if not config.residual or config.target != "dense":
        return {}
    return {site: found.residual for site, found in around.items() if found.residual is not None}
