"""What the dense and the sparse model compute, block by block, over all feeds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np
import onnx_ir as ir
from torch import Tensor

from iobs_onnx.engine import Engine, give_back
from iobs_onnx.passes import Segment, instrument, release
from iobs_onnx.runtime import Feed
from iobs_onnx.runtime.data.open import PAD_MASK
from iobs_onnx.runtime.differentiable import Evaluator

# In a feed of a block, what the dense model computed stands beside what the sparse one did.
_DENSE = "dense:"


class Streams:
    """Both models' values at the borders of blocks; those that judge come first.

    Args:
        dense, sparse: models of one graph; `sparse` gets its new weights from outside.
        held_out, feeds: read once.
        engine: runs the models, and keeps values beyond its budget on disk.
    """

    def __init__(
        self,
        dense: ir.Model,
        sparse: ir.Model,
        held_out: Sequence[Feed],
        feeds: Iterable[Feed],
        engine: Engine,
    ) -> None:
        self._dense, self._sparse, self._engine = dense, sparse, engine
        self._ours = engine.stream(dense, chain(held_out, feeds))
        self._theirs = self._ours.over()
        self._judging = len(held_out)

    def advance(self, segment: Segment) -> None:
        """Let the dense model compute a segment, and hold what goes in and what comes out."""
        alive = {*segment.alive, *segment.inputs, PAD_MASK}
        session = self._engine.open(self._dense, segment, segment.outputs, self._ours)
        for _ in self._ours.run(session, keep=segment.outputs, alive=alive):
            pass

    def follow(self, segment: Segment, *, differs: bool) -> None:
        """Let the sparse model compute it where it differs, and drop what is read no more."""
        alive = {*segment.alive, PAD_MASK}
        if differs:
            keep = segment.outputs
            session = self._engine.open(self._sparse, segment, keep, self._theirs)
            for _ in self._theirs.run(session, keep=keep, alive=alive):
                pass
        self._ours.release(alive)
        self._theirs.release(alive)
        for model in (self._dense, self._sparse):
            release(model, segment.weights)
        give_back()

    def differ(self, names: Iterable[str]) -> set[str]:
        """Return those of these values that the sparse model computed otherwise."""
        return {name for name in names if self._theirs.holds([name])}

    def part(self, model: ir.Model, segment: Segment, values: Sequence[str]) -> ir.Model:
        """Return the part of a model that computes values of a segment."""
        return instrument(model, values, self._ours.kinds(segment.inputs))

    def block(self, segment: Segment, targets: Sequence[str]) -> Block:
        """Return the feeds of a segment, with the values of the dense model that are targets."""
        recorded = set(targets) <= set(segment.outputs)
        return Block(self, segment.inputs, tuple(targets) if recorded else segment.inputs, recorded)

    def feed(self, index: int, inputs: Sequence[str], dense: Sequence[str]) -> Feed:
        """Return what the sparse model gives a block on one batch, and the dense one's values."""
        beside = self._ours.read(index, dense)
        mask = self._ours.read(index, [PAD_MASK] if self._ours.kinds([PAD_MASK]) else [])
        return {
            **mask,
            **self._theirs.read(index, inputs),
            **{_DENSE + name: array for name, array in beside.items()},
        }

    @property
    def indices(self) -> tuple[range, range]:
        """Indices of the batches that judge, and of those to train on."""
        return range(self._judging), range(self._judging, len(self._ours))


@dataclass(frozen=True)
class Block:
    """The feeds of one block.

    Attributes:
        streams: hold them.
        inputs: of the block.
        dense: values of the dense model in each feed: the targets, or else the block's inputs.
        recorded: whether these are the targets.
    """

    streams: Streams
    inputs: tuple[str, ...]
    dense: tuple[str, ...]
    recorded: bool

    def held_out(self) -> HeldOut:
        """Return the feeds that judge."""
        return HeldOut(self, self.streams.indices[0])

    def feeds(self, seed: int) -> Iterator[Feed]:
        """Yield feeds to train on, for ever, each pass in an order of its own."""
        random = np.random.default_rng([seed, 4])
        indices = self.streams.indices[1]
        while True:
            for index in random.permutation(len(indices)):
                yield self.streams.feed(indices[int(index)], self.inputs, self.dense)

    def teacher(self, part: Evaluator) -> Recorded | Computed:
        """Return what gives the targets; `part` computes them where none are recorded."""
        return Recorded() if self.recorded else Computed(part)


@dataclass(frozen=True)
class HeldOut(Sequence[Feed]):
    """Feeds that judge a block, read from the streams each time."""

    block: Block
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Feed: ...

    @overload
    def __getitem__(self, index: slice) -> HeldOut: ...

    def __getitem__(self, index: int | slice) -> Feed | HeldOut:
        if isinstance(index, slice):
            return HeldOut(self.block, self.indices[index])
        block = self.block
        return block.streams.feed(self.indices[index], block.inputs, block.dense)


class Recorded:
    """Targets that lie in the feed."""

    def __call__(
        self, inputs: Mapping[str, Tensor], *, outputs: Collection[str]
    ) -> dict[str, Tensor]:
        """Return them by name."""
        return {name: inputs[_DENSE + name] for name in outputs}


@dataclass(frozen=True)
class Computed:
    """Targets that the dense model's part computes from its own inputs."""

    part: Evaluator

    def __call__(
        self, inputs: Mapping[str, Tensor], *, outputs: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return them by name."""
        start = len(_DENSE)
        own = {name[start:]: value for name, value in inputs.items() if name.startswith(_DENSE)}
        return self.part(own, outputs=outputs)
