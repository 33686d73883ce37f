"""The loop that every recovery algorithm shares: options, trace, stopping rule and status."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import torch
from torch import Tensor

from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.recovery.objective import Objective


@dataclass(frozen=True)
class Options:
    """What every algorithm takes.

    Attributes:
        learning_rate: η, the fraction taken of the algorithm's own step (gradient/L, or
            Newton); the quadratic model that is minimised at `w_t` is
            `∇f(w_t)ᵀ(w − w_t) + ‖w − w_t‖²_H / 2η`.
        damping: λ is added to the curvature's diagonal, this fraction of its mean size.
        max_steps: the most steps taken.
        tolerance: stop when `‖w_{t+1} − w_t‖ ≤ tolerance · η ‖w_{t+1}‖`; None never stops
            early, for curves of one length.

    Raises:
        OptionError: when a value is out of its range.
    """

    learning_rate: float = 1.0
    damping: float = 0.0
    max_steps: int = 100
    tolerance: float | None = 1e-10

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate {self.learning_rate:g}: must be positive")
        if not 0 <= self.damping < math.inf:
            raise OptionError(f"damping {self.damping:g}: must be at least 0")
        if self.max_steps < 0:
            raise OptionError(f"max_steps {self.max_steps}: must be at least 0")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise OptionError(f"tolerance {self.tolerance:g}: must be at least 0, or None")


DEFAULTS = Options()


class Status(StrEnum):
    """Why a run ended."""

    CONVERGED = "converged"
    """The stopping rule was met."""
    MAX_STEPS = "max_steps"
    """All steps were taken; with a tolerance, it was not reached."""
    DIVERGED = "diverged"
    """The loss is not finite: the step is too long for this objective and start."""
    STOPPED = "stopped"
    """The callback asked for it."""


@dataclass(frozen=True)
class Iterate:
    """Where a run stands after `step` steps; what the callback gets, step 0 included.

    Attributes:
        step: number of steps taken.
        weight: `w_step`, `(d,)`.
        loss: `f(w_step)`.
        distance: `‖w_step − target‖₂`, or None where no target is known.
        support_changes: how many indices entered or left the support in this step.
    """

    step: int
    weight: Tensor
    loss: float
    distance: float | None
    support_changes: int


@dataclass(frozen=True)
class Trace:
    """A run, step by step: entry t belongs to `w_t`, entry 0 to the start.

    Attributes:
        loss: `f(w_t)`.
        distance: `‖w_t − target‖₂`; None where no target is known.
        support_changes: how many indices entered or left the support in step t.
    """

    loss: tuple[float, ...]
    distance: tuple[float, ...] | None
    support_changes: tuple[int, ...]


@dataclass(frozen=True)
class Recovery:
    """What an algorithm returns.

    Attributes:
        weight: the last iterate, `(d,)`; at most k non-zeros once a step was taken.
        status: why the run ended.
        steps: number of steps taken.
        trace: `steps + 1` entries.
    """

    weight: Tensor
    status: Status
    steps: int
    trace: Trace

    @property
    def support(self) -> Tensor:
        """Mask of the non-zeros of `weight`, `(d,)`, True = kept."""
        return self.weight != 0


Move: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""One step of an algorithm: (`w_t`, `∇f(w_t)`) to `w_{t+1}`."""
Callback: TypeAlias = Callable[[Iterate], bool | None]
"""Sees every iterate; True ends the run."""


def iterate(
    objective: Objective,
    start: Tensor,
    move: Move,
    *,
    options: Options,
    target: Tensor | None,
    callback: Callback | None,
) -> Recovery:
    """Repeat `move` from `start` until the options, the callback or the numbers end it."""
    losses: list[float] = []
    distances: list[float] = []
    changes: list[int] = []
    weight, previous = start, start
    while True:
        step = len(losses)
        value, gradient = objective.evaluate(weight)
        losses.append(float(value))
        changes.append(int(((weight != 0) != (previous != 0)).sum()))
        if target is not None:
            distances.append(float(torch.linalg.vector_norm(weight - target)))
        here = Iterate(step, weight, losses[-1], distances[-1] if distances else None, changes[-1])
        if (status := _status(here, previous, options, callback)) is not None:
            trace = Trace(tuple(losses), tuple(distances) or None, tuple(changes))
            return Recovery(weight, status, step, trace)
        previous, weight = weight, move(weight, gradient)


def _status(
    here: Iterate, previous: Tensor, options: Options, callback: Callback | None
) -> Status | None:
    """Return why the run ends here, or None."""
    if callback is not None and callback(here):
        return Status.STOPPED
    if not math.isfinite(here.loss):
        return Status.DIVERGED
    if here.step and options.tolerance is not None:
        moved = torch.linalg.vector_norm(here.weight - previous)
        size = torch.linalg.vector_norm(here.weight)
        if moved <= options.tolerance * options.learning_rate * size:
            return Status.CONVERGED
    return Status.MAX_STEPS if here.step == options.max_steps else None


def check_problem(start: Tensor, k: int, target: Tensor | None) -> None:
    """Refuse a start, a support size or a target that do not fit together."""
    if start.ndim != 1 or not start.is_floating_point():
        raise DataError(
            f"start {tuple(start.shape)} {start.dtype}: a floating vector (d,) is required"
        )
    if not 1 <= k <= len(start):
        raise OptionError(f"k {k}: must be from 1 to the {len(start)} weights there are")
    if target is not None and target.shape != start.shape:
        raise DataError(
            f"target {tuple(target.shape)}: the shape of start {tuple(start.shape)} is required"
        )
