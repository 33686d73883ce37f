"""A share of the feeds, and what both models compute on it: the unit that a walk is spread by.

Feeds are dealt to a fixed number of shards, whatever runs them, and sums are added in their order:
so one process and any number of workers give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeAlias

import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.engine import Engine, give_back
from iobs_onnx.passes import Segment, release
from iobs_onnx.pruning.records import SolvedSite, rewrite_sites
from iobs_onnx.runtime import Batch, Feed, Spool, Store, Stream, Sums, collect
from iobs_onnx.site import Site, Tap

# A feed, or one with the weight of its rows.
Item: TypeAlias = Feed | tuple[Feed, float]

SHARDS = 16


def deal(feeds: Iterable[Item], count: int | None, store: Store) -> list[Iterable[Item]]:
    """Deal feeds out to :data:`SHARDS` shards, or as many as there are feeds, in runs.

    Args:
        feeds: read once, as the shards are iterated, which has to happen in their order.
        count: how many there are; None where it is not known: they are then read to their end now.
        store: holds those.
    """
    if count is None:
        feeds = Spool(feeds, store)
        count = len(feeds)
    shards = max(1, min(SHARDS, count))
    feeds = iter(feeds)
    edges = [index * count // shards for index in range(shards)]
    sizes = [stop - start for start, stop in pairwise(edges)]
    return [*(islice(feeds, size) for size in sizes), feeds]


@dataclass(frozen=True)
class Place:
    """What one process that runs shards works with.

    Attributes:
        engine: where models run.
        store: holds the activations of all its shards.
        config: the options.
        device: where sums are formed.
    """

    engine: Engine
    store: Store
    config: PruneConfig
    device: torch.device


class Pair:
    """The dense model and the one as pruned so far, as one process holds them for all its shards.

    Args:
        place: where they run.
        dense, sparse: with every value that taps read; `sparse` is changed in place.
        differ: whether they differ before any site of this walk is solved.
    """

    def __init__(self, place: Place, dense: ir.Model, sparse: ir.Model, *, differ: bool) -> None:
        self.place, self.dense, self.sparse, self.differ = place, dense, sparse, differ
        self._sessions: dict[tuple[int, tuple[str, ...]], Any] = {}

    def open(self, model: ir.Model, segment: Segment, names: Sequence[str], stream: Stream) -> Any:
        """Open what computes `names` in a segment, once for all shards until :meth:`close`."""
        key = id(model), tuple(names)
        if key not in self._sessions:
            self._sessions[key] = self.place.engine.open(model, segment, names, stream)
        return self._sessions[key]

    def close(self) -> None:
        """Let go of what was opened: the segment, or its weights, will be another."""
        self._sessions.clear()

    def rewrite(self, solved: Mapping[Site, SolvedSite]) -> None:
        """Give the pruned model its new weights."""
        rewrite_sites(self.sparse, solved)

    def forget(self, segment: Segment) -> None:
        """Give back the memory that a segment took, once all shards are past it."""
        self.close()
        release(self.dense, segment.weights)
        release(self.sparse, segment.weights)
        give_back()


class Shard:
    """A share of the feeds, and the streams of both models over it.

    The dense model's values run in one stream, those of the model as pruned so far in another
    that holds only what differs. Without the dense target there is one stream, of the model as
    pruned so far (or, one-shot, before it is pruned).

    Args:
        models: of the walk.
        feeds: read once.
    """

    def __init__(self, models: Pair, feeds: Iterable[Item]) -> None:
        self._models, self._place = models, models.place
        config = self._place.config
        self._ours = self._place.engine.stream(
            models.dense, feeds, mask_padding=config.mask_padding, store=self._place.store
        )
        self._theirs = self._ours.over() if config.target == "dense" else self._ours

    def measure(
        self,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        *,
        advance: Callable[[], None] | None = None,
        onto: Sums | None = None,
        first: int = 0,
    ) -> Sums:
        """Sum the products of taps; advance the streams that need no new weights.

        Args:
            segment: the one after that which was measured last.
            taps: of it.
            beside: pairs of a tap and the stream that its site's output is added to.
            advance: called after every batch.
            onto: sums over the shards before, which are added to; None for new ones.
            first: number of the first batch, for messages.

        Raises:
            DataError: an activation is not finite.
            ModelError: a segment cannot be run.
        """
        again = self._again(segment)
        fetch = tuple(dict.fromkeys(n for t in (*taps, *(t for _, t in beside)) for n in t.values))
        alive = {*segment.alive, *segment.inputs} if again else set(segment.alive)
        device = self._place.device

        def run(model: ir.Model, through: Stream, keep: Sequence[str]) -> Iterator[Batch]:
            session = self._models.open(model, segment, (*fetch, *keep), through)
            return through.run(session, fetch=fetch, keep=keep, alive=alive, device=device)

        dense, sparse = self._models.dense, self._models.sparse
        reference = None
        if self._theirs is self._ours:
            batches = run(sparse, self._ours, () if again else segment.outputs)
        elif self._models.differ or self._theirs.holds(segment.inputs):
            batches = run(sparse, self._theirs, () if again else segment.changed)
            reference = run(dense, self._ours, segment.outputs)
        else:
            batches = run(dense, self._ours, segment.outputs)
        return collect(
            taps,
            batches,
            reference,
            beside=beside,
            device=device,
            progress=advance,
            onto=onto,
            first=first,
        )

    def propagate(self, segment: Segment) -> None:
        """Run the segment with its new weights, and drop what no later segment reads."""
        if self._again(segment):
            keep = segment.outputs if self._theirs is self._ours else segment.changed
            session = self._models.open(self._models.sparse, segment, keep, self._theirs)
            for _ in self._theirs.run(session, keep=keep, alive=segment.alive):
                pass
        self._ours.release(segment.alive)
        self._theirs.release(segment.alive)

    def _again(self, segment: Segment) -> bool:
        """Whether later segments read what this one computes with its new weights."""
        sequential = self._place.config.sequential != "none"
        return sequential and bool(segment.sites) and bool(segment.changed)
