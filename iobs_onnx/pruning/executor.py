"""What runs the shards of a walk, and where, and the solving between two segments.

A walk knows an :class:`Executor` only, and a run a :class:`Crew`, which makes one for every walk.
:class:`LocalExecutor` does all in this process,
:class:`iobs_onnx.pruning.workers.RayExecutor` the same on workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import onnx_ir as ir

from iobs_onnx.passes import Segment
from iobs_onnx.pruning.records import Run, SolvedSite
from iobs_onnx.pruning.shard import Item, Pair, Place, Shard
from iobs_onnx.pruning.stages import Here, Tasks
from iobs_onnx.runtime import Store, Sums
from iobs_onnx.site import Site, Tap


class Executor(Protocol):
    """Runs the dense model and the model as pruned so far, one segment after the other."""

    def measure(
        self,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        advance: Callable[[], None],
    ) -> Sums:
        """Run the next segment over all shards, and return their sums, added in their order.

        Args:
            segment: the one after that which was measured last.
            taps: of it.
            beside: pairs of a tap and the stream that its site's output is added to.
            advance: called once for every batch.

        Raises:
            DataError: an activation is not finite.
            ModelError: a segment cannot be run.
        """

    def propagate(self, segment: Segment, solved: Mapping[Site, SolvedSite]) -> None:
        """Give the pruned model its new weights, run the segment with them, and forget it."""

    @property
    def tasks(self) -> Tasks:
        """Where the stages of the walk compute."""


class Crew(Protocol):
    """Where all walks of a run take place."""

    def executor(
        self,
        run: Run,
        dense: ir.Model,
        sparse: ir.Model,
        shards: Sequence[Iterable[Item]],
        store: Store,
        *,
        differ: bool,
    ) -> AbstractContextManager[Executor]:
        """Enter what runs one walk.

        Args:
            run: what all of the run shares.
            dense, sparse: the two models, with every value that taps read; `sparse` may be changed
                in place.
            shards: their feeds, each read once, in their order.
            store: for activations that this process holds.
            differ: whether the models differ before any site of this walk is solved.
        """


class LocalExecutor:
    """Does all in this process, one after the other.

    Args:
        models: of the walk.
        shards: of these models.
    """

    tasks = Here()

    def __init__(self, models: Pair, shards: Sequence[Shard]) -> None:
        self._models, self._shards = models, shards

    def measure(
        self,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        advance: Callable[[], None],
    ) -> Sums:
        """See :meth:`Executor.measure`."""
        first, *others = self._shards
        sums = first.measure(segment, taps, beside, advance=advance)
        for shard in others:
            shard.measure(segment, taps, beside, advance=advance, onto=sums, first=sums.batches)
        self._models.close()
        return sums

    def propagate(self, segment: Segment, solved: Mapping[Site, SolvedSite]) -> None:
        """See :meth:`Executor.propagate`."""
        self._models.rewrite(solved)
        for shard in self._shards:
            shard.propagate(segment)
        self._models.forget(segment)


class LocalCrew:
    """This process."""

    @contextmanager
    def executor(
        self,
        run: Run,
        dense: ir.Model,
        sparse: ir.Model,
        shards: Sequence[Iterable[Item]],
        store: Store,
        *,
        differ: bool,
    ) -> Iterator[Executor]:
        """See :meth:`Crew.executor`."""
        models = Pair(
            Place(run.engine, store, run.config, run.device), dense, sparse, differ=differ
        )
        yield LocalExecutor(models, [Shard(models, feeds) for feeds in shards])
