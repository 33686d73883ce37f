"""How far the activations of the model as pruned so far are from the dense model's.

Where lengths follow from values, a pruned model may compute more or fewer rows than the dense one:
rows then have no partners, and no difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock

import torch

from iobs_onnx.runtime.geometry import output_space
from iobs_onnx.runtime.stream import Batch
from iobs_onnx.site import Patches, Routed, Tap


class Away:
    """The differences `x_d − x_s` of a batch's activations, once for all jobs.

    A difference is held from the first job that needs it to the last.

    Args:
        taps: whose differences are asked for, as often as they are.
        batch: of the pruned model.
        dense: of the dense model, in shapes that agree; None where no difference is asked for.
        device: where the differences are computed and stay.
    """

    def __init__(
        self, taps: Iterable[Tap], batch: Batch, dense: Batch | None, device: torch.device
    ) -> None:
        self._batch, self._dense, self._device = batch, dense, device
        self._waiting = Counter(taps)
        self._locks = {tap: Lock() for tap in self._waiting}
        self._held: dict[Tap, torch.Tensor] = {}

    @contextmanager
    def of(self, tap: Tap) -> Iterator[torch.Tensor]:
        """Give the difference of a tap's activations to one job."""
        with self._locks[tap]:
            if tap not in self._held:
                self._held[tap] = self._difference(tap)
            difference = self._held[tap]
        try:
            yield difference
        finally:
            with self._locks[tap]:
                self._waiting[tap] -= 1
                if not self._waiting[tap]:
                    del self._held[tap]

    def _difference(self, tap: Tap) -> torch.Tensor:
        assert self._dense is not None, "a drift is summed only with the dense model's values"
        ours, theirs = (
            each.values[tap.value].to(self._device).float() for each in (self._batch, self._dense)
        )
        away = theirs - ours
        if isinstance(tap.form, Routed):
            # Where each model chose a matrix of its own, the difference counts as 0.
            chosen = (each.values[tap.form.index] for each in (self._batch, self._dense))
            same = torch.eq(*chosen).flatten().to(self._device)
            shape = [1] * away.ndim
            shape[tap.form.along] = len(same)
            away = away * same.reshape(shape)
        return away


def out_of_step(
    taps: Iterable[Tap], beside: Iterable[tuple[Tap, Tap]], batch: Batch, dense: Batch
) -> set[Tap]:
    """Return the taps whose values, or the stream beside them, differ in shape in a batch."""

    def differs(tap: Tap) -> bool:
        return any(batch.values[name].shape != dense.values[name].shape for name in tap.values)

    return {tap for tap in taps if differs(tap)} | {tap for tap, r in beside if differs(r)}


def fits(tap: Tap, other: Tap, batch: Batch) -> bool:
    """Whether the stream beside a tap has a row for each of the site's output."""
    x, r = batch.values[tap.value], batch.values[other.value]
    if isinstance(tap.form, Patches):
        space = output_space(tuple(x.shape[2:]), tap.form)
        return tuple(r.shape) == (x.shape[0], other.features, *space)
    return tuple(r.shape) == (*x.shape[:-1], other.features)
