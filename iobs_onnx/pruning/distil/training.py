"""Adam over the masters, towards the dense model's outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from iobs_onnx.engine import kept_memory
from iobs_onnx.errors import ModelError
from iobs_onnx.pruning.distil.losses import Distance, Target, distance
from iobs_onnx.pruning.distil.settings import STEPS, DistilSettings
from iobs_onnx.pruning.distil.trained import Master
from iobs_onnx.runtime import Feed
from iobs_onnx.runtime.data.open import PAD_MASK
from iobs_onnx.runtime.differentiable import Evaluator, bfloat16_factors

BETAS = (0.9, 0.99)
# Rates that the range test tries, in units of the root mean square of the masked weights, and the
# feeds that each is tried on.
RATES = (0.0003, 0.001, 0.003, 0.01)
TRIED = 8
# Judging on a feed costs about half a step, and all checks together shall cost a fourth of all.
_SHARE, _FEWEST = 0.5, 4
# A held-out loss that has risen so far beyond the first will not come back.
_LOST = 4.0


class Teacher(Protocol):
    """The dense model, or a part of it, as a function of a feed."""

    def __call__(
        self, inputs: Mapping[str, Tensor], *, outputs: Sequence[str]
    ) -> Mapping[str, Tensor]:
        """Return values by name."""


@dataclass(frozen=True)
class Pair:
    """The dense and the sparse model as functions of a feed.

    Attributes:
        dense: gives the values to come near to.
        sparse: evaluated in float32.
        targets: what is compared.
        masters: take the place of stored tensors of the sparse model.
        rounds: whether steps multiply in bfloat16 what is large enough.
    """

    dense: Teacher
    sparse: Evaluator
    targets: Sequence[Target]
    masters: Sequence[Master]
    rounds: bool = False

    def distance(self, feed: Feed, *, rounded: bool = False) -> Distance:
        """Return the loss on a feed; `rounded` as the weights would be stored."""
        inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        values = [target.value for target in self.targets]
        weights = {m.name: m.rounded() if rounded else m.value for m in self.masters}
        with torch.no_grad():
            dense = self.dense(inputs, outputs=values)
        sparse = self.sparse(inputs, weights=weights, outputs=values)
        return distance(self.targets, dense, sparse, inputs.get(PAD_MASK))

    def judge(self, feeds: Iterable[Feed]) -> float:
        """Return the loss on held-out feeds, the mean over their rows; inf if it is not finite."""
        total, rows = 0.0, 0
        with torch.no_grad():
            for feed in feeds:
                found = self.distance(feed, rounded=True)
                total += float(found.loss) * found.rows
                rows += found.rows
        mean = total / max(1, rows)
        return mean if math.isfinite(mean) else math.inf

    def scale(self) -> float:
        """Return the root mean square of the kept weights: the unit of learning rates."""
        with torch.no_grad():
            weights = [m for m in self.masters if m.mask is not None] or list(self.masters)
            squares = sum(float(m.value.double().square().sum()) for m in weights)
        return math.sqrt(squares / max(1, sum(m.count for m in weights))) or 1.0


@dataclass
class State:
    """What of the masters was best so far."""

    loss: float
    values: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, pair: Pair, loss: float) -> State:
        """Keep a copy of the masters."""
        return cls(loss, [m.value.detach().clone() for m in pair.masters])

    def restore(self, pair: Pair) -> None:
        """Put the copy back."""
        with torch.no_grad():
            for master, value in zip(pair.masters, self.values, strict=True):
                master.value.copy_(value)


class Steps:
    """Steps of Adam over a pair's masters; zeros outside the masks stay zeros.

    Kingma and Ba, "Adam", 2015. A gradient that is zero from the first step on moves nothing, so
    that masking gradients is enough. What is judged is computed in float32 throughout; steps round
    the factors of large products where the pair says so.
    """

    def __init__(self, pair: Pair, clip: float) -> None:
        self._pair, self._clip = pair, clip
        self._values = [master.value for master in pair.masters]
        self._adam = torch.optim.Adam(self._values, betas=BETAS, fused=True)

    def take(self, feed: Feed, rate: float) -> Distance:
        """Take one step; a loss or gradient that is not finite moves nothing."""
        for value in self._values:
            value.grad = None
        with bfloat16_factors(self._pair.rounds):
            found = self._pair.distance(feed)
            if not found.loss.requires_grad:
                raise ModelError("distillation: no output depends on the weights to train")
            if not bool(torch.isfinite(found.loss)):
                return Distance(found.loss.detach(), found.rows)
            found.loss.backward()
        for master in self._pair.masters:
            if master.mask is not None and master.value.grad is not None:
                master.value.grad.mul_(master.mask)
        norm = torch.nn.utils.clip_grad_norm_(self._values, self._clip)
        if bool(torch.isfinite(norm)):
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
        return Distance(found.loss.detach(), found.rows)


def schedule(step: int, steps: int, warm_up: int) -> float:
    """Return the rate of step `0 ... steps - 1` as a share of the highest: linear, then cosine."""
    rise = min(warm_up, max(1, steps // 10))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def find_rate(pair: Pair, feeds: Sequence[Feed], clip: float, start: State) -> float:
    """Return the rate with which a few steps leave the lowest loss, judged on the same feeds.

    Each candidate starts from `start` and rises to its full rate on the way; the search ends at the
    first one that leaves a higher loss than the one before. The masters are as before afterwards.
    """
    unit, lowest, found = pair.scale(), math.inf, RATES[0]
    for share in RATES:
        steps = Steps(pair, clip)
        for index, feed in enumerate(feeds):
            steps.take(feed, unit * share * (index + 1) / len(feeds))
        loss = pair.judge(feeds)
        start.restore(pair)
        if loss >= lowest:
            break
        lowest, found = loss, share
    return unit * found


@dataclass(frozen=True)
class Run:
    """What a run of training left behind; the masters hold the best state.

    Attributes:
        curve: step, training loss since the last point, held-out loss.
        best: the lowest held-out loss.
        steps, rows: taken, and seen.
        note: why it ended early; empty if it did not.
    """

    curve: tuple[tuple[int, float | None, float], ...]
    best: float
    steps: int
    rows: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A run of training.

    Attributes:
        steps: how many.
        rate: at the top of the schedule.
        warm_up, clip, checks: as in :class:`DistilSettings`.
        told: is called after each step with the step and the last held-out loss.
        keeps: Ctrl-C ends the run as if it had no more steps; else it raises.
    """

    steps: int
    rate: float
    warm_up: int
    clip: float
    checks: int
    told: Callable[[int, float], None]
    keeps: bool = False


def train(
    pair: Pair, feeds: Iterator[Feed], held_out: Iterable[Feed], plan: Plan, start: State
) -> Run:
    """Train, judging now and then, and leave the best state in the masters.

    Args:
        pair: whose masters are trained.
        feeds: one a step; the run ends when there are no more.
        held_out: judge.
        plan: the run.
        start: the masters as they are, with their held-out loss.
    """
    taken = Steps(pair, plan.clip)
    every = max(1, plan.steps // plan.checks)
    curve: list[tuple[int, float | None, float]] = [(0, None, start.loss)]
    best, losses, rows, step, note = start, [], 0, 0, ""
    try:
        for feed in islice(feeds, plan.steps):
            share = schedule(step, plan.steps, plan.warm_up)
            found = taken.take(feed, plan.rate * share)
            losses.append(float(found.loss))
            rows += found.rows
            step += 1
            if step % every == 0 or step == plan.steps:
                judged = pair.judge(held_out)
                curve.append((step, sum(losses) / len(losses), judged))
                losses = []
                if judged < best.loss:
                    best = State.of(pair, judged)
                if not judged < _LOST * start.loss:
                    note = f"stopped at step {step}: the held-out loss rose to {judged:.4g}"
                    break
            plan.told(step, curve[-1][2])
    except KeyboardInterrupt:
        if not plan.keeps:
            raise
        note, losses = f"interrupted at step {step}: what was best until then is kept", []
    if losses:
        curve.append((step, sum(losses) / len(losses), judged := pair.judge(held_out)))
        best = State.of(pair, judged) if judged < best.loss else best
    best.restore(pair)
    return Run(tuple(curve), best.loss, step, rows, note)


def planned(pair: Pair, feeds: Sequence[Feed], seconds: float, clip: float, start: State) -> int:
    """Return how many steps fit into a time: the first feeds are stepped on, timed, and undone."""
    steps = Steps(pair, clip)
    steps.take(feeds[0], 0.0)  # folds constants
    began = time.perf_counter()
    for feed in feeds[:3]:
        steps.take(feed, 0.0)
    each = (time.perf_counter() - began) / len(feeds[:3])
    start.restore(pair)
    return max(1, int(seconds / each))


@dataclass(frozen=True)
class Fitted:
    """What training came to.

    Attributes:
        before, after: held-out loss of the masters as they were, and as they are.
        rate: at the top of the schedule.
        run: the training.
    """

    before: float
    after: float
    rate: float
    run: Run


def fit(
    pair: Pair,
    ahead: Sequence[Feed],
    feeds: Iterator[Feed],
    held_out: Sequence[Feed],
    settings: DistilSettings,
    told: Callable[[int, int, float], None] | None = None,
) -> Fitted:
    """Find the rate and the number of steps where they are not given, and train.

    Where all held-out feeds would make the checks on the way too dear, a part of them, spread
    evenly, says which state is the best; all of them say what it is worth.

    Args:
        pair: whose masters are trained.
        ahead: feeds that rates and times are tried on.
        feeds: one a step, `ahead` among them.
        held_out: judge, at most every tenth step; each is read again for every check.
        settings: how.
        told: is called after each step with the step, their number and the last held-out loss.
    """
    began = time.perf_counter()
    with kept_memory():
        before = pair.judge(held_out)
        start = State.of(pair, before)
        rate = settings.rate or find_rate(pair, ahead, settings.clip, start)
        steps = settings.steps or STEPS
        if settings.seconds is not None:
            left = settings.seconds - (time.perf_counter() - began)
            steps = planned(pair, ahead, left, settings.clip, start)

        def tell(step: int, loss: float) -> None:
            if told is not None:
                told(step, steps, loss)

        checks = min(settings.checks, max(1, steps // 10))
        plan = Plan(steps, rate, settings.warm_up, settings.clip, checks, tell, settings.keeps)
        judging = spread(held_out, max(_FEWEST, int(_SHARE * steps / checks)))
        if len(judging) == len(held_out):
            run = train(pair, feeds, held_out, plan, start)
            return Fitted(before, run.best, rate, run)
        run = train(pair, feeds, judging, plan, replace(start, loss=pair.judge(judging)))
        return Fitted(before, pair.judge(held_out), rate, run)


def spread(feeds: Sequence[Feed], count: int) -> Sequence[Feed]:
    """Return at most `count` feeds, evenly spread."""
    return feeds[:: -(-len(feeds) // count)]


def first(feeds: Iterator[Feed], count: int) -> list[Feed]:
    """Take up to `count` feeds."""
    return list(islice(feeds, count))
