"""How to distil, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError

# Steps over a whole model, where neither steps nor a time are given; and under preset best.
STEPS, BEST_STEPS = 400, 1600

Loss: TypeAlias = Literal["auto", "kl", "mse", "embedding"]


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """How a sparse model is trained towards the dense one.

    Attributes:
        steps: of Adam, all blocks together; each takes one feed. None for 400 over the whole model,
            or for eight passes of each block over the data.
        seconds: of wall time instead of `steps`: the first steps are timed and as many are planned
            as fit. Two runs then differ, as their numbers of steps do.
        rate: Adam's learning rate at the top of the schedule; None for one that a range test finds.
        loss: `kl`, `mse` or `embedding` for every output; `auto` lets the outputs decide.
        warm_up: steps over which the rate rises; at most a tenth of all.
        clip: the largest norm of a gradient over all tensors.
        checks: how often the held-out loss is taken.
        small: train biases, and scales and offsets of normalisations, too.
        embeddings: train stored tables of embeddings too, and heads that are tied to them.
        keeps: Ctrl-C ends the training, and what is best so far is what it gave.
        seed: of what the training draws itself; feeds have seeds of their own.
    """

    steps: int | None = None
    seconds: float | None = None
    rate: float | None = None
    loss: Loss = "auto"
    warm_up: int = 20
    clip: float = 1.0
    checks: int = 20
    small: bool = True
    embeddings: bool = False
    keeps: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise OptionError for a value out of range."""
        for name, value in (("steps", self.steps), ("checks", self.checks)):
            if value is not None and value < 1:
                raise OptionError(f"distillation: {name} {value}: must be at least 1")
        for name, number in (("seconds", self.seconds), ("rate", self.rate), ("clip", self.clip)):
            if number is not None and not number > 0:
                raise OptionError(f"distillation: {name} {number}: must be above 0")
        if self.loss not in get_args(Loss):
            raise OptionError(
                f"distillation: loss {self.loss!r}: expected {', '.join(get_args(Loss))}"
            )


@dataclass(frozen=True)
class Distilled:
    """What distillation gave.

    Attributes:
        tensors: name of a stored tensor to its new values, in the stored shape and dtype; zeros
            that were outside the mask are zeros. Empty where the result was not accepted.
        curve: `(step, training loss since the last point, held-out loss)`, step 0 included, where
            the training loss is None; the held-out loss is that of a part of the feeds where all
            of them would have taken too long.
        before, after: held-out loss of the sparse model as it came, and of the best state.
        accepted: whether `after < before`. If not, the weights stay as they were.
        steps, feeds, rows: steps of Adam, feeds and valid rows of outputs (tokens, images) seen.
        seconds: of wall time.
        rate: the learning rate at the top of the schedule.
        losses: output to the kind of loss it had.
        trained: numbers in tensors that were trained, those outside the masks not counted.
        factors: in what steps multiplied: `bfloat16` where the processor has instructions for it
            (sums, weights and all that judges are float32), else `float32`.
        notes: what a report must say.
    """

    tensors: Mapping[str, NDArray[np.generic]]
    curve: tuple[tuple[int, float | None, float], ...]
    before: float
    after: float
    accepted: bool
    steps: int
    feeds: int
    rows: int
    seconds: float
    rate: float
    losses: Mapping[str, str]
    trained: int
    factors: str
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Return all but the tensors, as JSON types."""
        names = ("before", "after", "accepted", "steps", "feeds", "rows", "seconds", "rate")
        return {
            **{name: getattr(self, name) for name in names},
            "losses": dict(self.losses),
            "trained": self.trained,
            "factors": self.factors,
            "curve": [list(point) for point in self.curve],
            "notes": list(self.notes),
        }
