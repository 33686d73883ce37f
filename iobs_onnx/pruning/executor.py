"""What runs the segments of the two models over all feeds, and where.

The walk knows an :class:`Executor` only. A :class:`Shard` is a share of the feeds with the values
that both models have computed on it; :class:`LocalExecutor` runs shards in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import onnx_ir as ir

from iobs_onnx.engine import give_back
from iobs_onnx.passes import Segment, release
from iobs_onnx.pruning.records import Run, SolvedSite, rewrite_sites
from iobs_onnx.runtime import Batch, Feed, Stream, Sums, collect
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
        """Run the next segment over all feeds, and return the sums of products of taps.

        Args:
            segment: the one after that which was measured last.
            taps: of it.
            beside: pairs of a tap and the stream that its site's output is added to.
            advance: called after every batch.

        Raises:
            DataError: an activation is not finite.
            ModelError: a segment cannot be run.
        """

    def go_on(self, segment: Segment, solved: Mapping[Site, SolvedSite]) -> None:
        """Give the pruned model its new weights, run the segment with them, and forget it."""


class Shard:
    """A share of the feeds, and the streams of both models over it.

    The dense model's values run in one stream, those of the model as pruned so far in another
    that holds only what differs. Without the dense target there is one stream, of the model as
    pruned so far (or, one-shot, before it is pruned).

    Args:
        run: what all of the run shares.
        dense, sparse: the two models, with every value that taps read.
        feeds: read once.
        differ: whether the models differ before any site of this walk is solved.
    """

    def __init__(
        self,
        run: Run,
        dense: ir.Model,
        sparse: ir.Model,
        feeds: Iterable[Feed | tuple[Feed, float]],
        *,
        differ: bool,
    ) -> None:
        self._run = run
        self._dense, self._sparse = dense, sparse
        self._differ = differ
        self._ours = run.engine.stream(dense, feeds, mask_padding=run.config.mask_padding)
        self._theirs = self._ours.over() if run.config.target == "dense" else self._ours

    def measure(
        self,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        advance: Callable[[], None],
    ) -> Sums:
        """Sum the products of taps; advance the streams that need no new weights."""
        again = self._again(segment)
        fetch = tuple(dict.fromkeys(n for t in (*taps, *(t for _, t in beside)) for n in t.values))
        alive = {*segment.alive, *segment.inputs} if again else set(segment.alive)

        def run(model: ir.Model, through: Stream, keep: Sequence[str]) -> Iterator[Batch]:
            session = self._run.engine.open(model, segment, (*fetch, *keep), through)
            device = self._run.device
            return through.run(session, fetch=fetch, keep=keep, alive=alive, device=device)

        if self._theirs is self._ours:
            batches = run(self._sparse, self._ours, () if again else segment.outputs)
            reference = None
        elif self._differ or self._theirs.holds(segment.inputs):
            batches = run(self._sparse, self._theirs, () if again else segment.changed)
            reference = run(self._dense, self._ours, segment.outputs)
        else:
            batches, reference = run(self._dense, self._ours, segment.outputs), None
        return collect(
            taps, batches, reference, beside=beside, device=self._run.device, progress=advance
        )

    def propagate(self, segment: Segment) -> None:
        """Run the segment with its new weights, and drop what no later segment reads."""
        if self._again(segment):
            keep = segment.outputs if self._theirs is self._ours else segment.changed
            session = self._run.engine.open(self._sparse, segment, keep, self._theirs)
            for _ in self._theirs.run(session, keep=keep, alive=segment.alive):
                pass
        self._ours.release(segment.alive)
        self._theirs.release(segment.alive)

    def _again(self, segment: Segment) -> bool:
        """Whether later segments read what this one computes with its new weights."""
        sequential = self._run.config.sequential != "none"
        return sequential and bool(segment.sites) and bool(segment.changed)


class LocalExecutor:
    """Runs shards in this process, one after the other.

    Args:
        dense, sparse: the two models; `sparse` is changed in place.
        shards: of these models; their sums are added in this order.
    """

    def __init__(self, dense: ir.Model, sparse: ir.Model, shards: Sequence[Shard]) -> None:
        self._dense, self._sparse = dense, sparse
        self._shards = shards

    def measure(
        self,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        advance: Callable[[], None],
    ) -> Sums:
        """See :meth:`Executor.measure`."""
        first, *others = self._shards
        sums = first.measure(segment, taps, beside, advance)
        for shard in others:
            sums.merge(shard.measure(segment, taps, beside, advance))
        return sums

    def go_on(self, segment: Segment, solved: Mapping[Site, SolvedSite]) -> None:
        """See :meth:`Executor.go_on`."""
        rewrite_sites(self._sparse, solved)
        for shard in self._shards:
            shard.propagate(segment)
        release(self._dense, segment.weights)
        release(self._sparse, segment.weights)
        give_back()
