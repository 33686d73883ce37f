"""Distil block by block: each towards what the dense model computes at its end."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.engine import Engine
from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.passes import Segment, load_model, partition, prepare, rewrite, stored_slots, widen
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.distil.losses import Steady, Target, steady_targets
from iobs_onnx.pruning.distil.memory import fitting
from iobs_onnx.pruning.distil.settings import DistilSettings
from iobs_onnx.pruning.distil.streams import Streams
from iobs_onnx.pruning.distil.trained import FLOATS, Mask, Master, masters
from iobs_onnx.pruning.distil.training import Pair, first, fit
from iobs_onnx.pruning.distil.worth import held_out_loss
from iobs_onnx.pruning.progress import Advance, silent
from iobs_onnx.runtime import Feed
from iobs_onnx.runtime.differentiable import Evaluator, agreement, multiplies_bfloat16, unsupported
from iobs_onnx.site import Site

# Passes over the data, and feeds on which rates are tried.
EPOCHS = 8
_TRIED = 4
# Sites in a block, at least: a single matrix is a worse unit than one with what follows.
_LEAST = 2


@dataclass(frozen=True)
class BlockReport:
    """What became of one block.

    Attributes:
        inputs, outputs: activations that it reads and that later blocks read, or that are matched.
        sites: names of the sparse weights in it.
        before, after: held-out loss; None where it was not trained.
        accepted: whether what was trained is kept.
        steps, rate, trained, seconds: as in :class:`Distilled`.
        reason: why it was not trained or not kept; empty if it was.
    """

    inputs: list[str]
    outputs: list[str]
    sites: list[str]
    before: float | None = None
    after: float | None = None
    accepted: bool = False
    steps: int = 0
    rate: float | None = None
    trained: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Blocks:
    """A model cut into blocks.

    Attributes:
        model: the sparse model with every value that the cut is made by.
        segments: the blocks; the last ends where the last output that is matched is computed.
        steady: outputs that are matched, and values that none is trained towards.
        shared: stored tensors that more than one block reads, which none may train.
    """

    model: ir.Model
    segments: tuple[Segment, ...]
    steady: Steady
    shared: frozenset[str]

    @classmethod
    def of(cls, sparse: ir.Model, sites: Sequence[Site], loss: Any, budget: int) -> Blocks:
        """Cut a model where as few tensors are alive as anywhere between two of its sites.

        Raises:
            ModelError: it has no output to match.
        """
        steady = steady_targets(sparse, loss, [site.initializer for site in sites])
        targets = steady.targets
        matched = {target.output for target in targets}
        model = prepare(sparse, sites)
        # Caches leave the graph at every layer, and would hide its narrow places.
        kept = [value for value in model.graph.outputs if value.name in matched]
        model.graph.outputs[:] = kept
        segments = partition(
            model,
            sites,
            outputs=[target.value for target in targets],
            sequential="segment",
            least=_LEAST,
            budget=budget,
        )
        readers = Counter(name for segment in segments for name in segment.weights)
        shared = frozenset(name for name, count in readers.items() if count > 1)
        return cls(model, segments, steady, shared)

    def notes(self) -> list[str]:
        """Return what a report must say of the cut."""
        notes = list(self.steady.notes)
        if len(self.segments) == 1:
            notes.append("no place between two sites is narrow: the model is one block")
        if self.shared:
            notes.append(f"not trained: {len(self.shared)} stored tensors that several blocks read")
        return notes

    def matched(self, segment: Segment) -> list[Target]:
        """Return what a block is trained towards."""
        values = {v.name: v for node in self.model.graph for v in node.outputs}
        ends = [target for target in self.steady.targets if target.value in segment.wanted]
        known = {target.value for target in ends}
        return [
            *ends,
            *(
                Target(name, name, "mse")
                for name in segment.changed
                if name not in known | self.steady.moving and values[name].dtype in (None, *FLOATS)
            ),
        ]


@dataclass(frozen=True)
class BlocksDistilled:
    """What distillation block by block gave.

    Attributes:
        tensors: stored tensors of accepted blocks, by name; none where the model's
            outputs did not come nearer.
        blocks: all of them, first to last.
        before, after: held-out loss of the model's outputs without and with these tensors.
        notes: what a report must say.
    """

    tensors: dict[str, NDArray[np.generic]]
    blocks: list[BlockReport]
    before: float
    after: float
    seconds: float
    notes: list[str]

    @property
    def accepted(self) -> bool:
        """Whether the outputs came nearer."""
        return self.after < self.before

    def as_dict(self) -> dict[str, Any]:
        """Return all but the tensors, as JSON types."""
        return {
            "before": self.before,
            "after": self.after,
            "accepted": self.accepted,
            "seconds": self.seconds,
            "steps": sum(block.steps for block in self.blocks),
            "trained": sum(block.trained for block in self.blocks),
            "notes": self.notes,
            "each": [dataclasses.asdict(block) for block in self.blocks],
        }


@dataclass(frozen=True)
class BlockTrainer:
    """Trains what is kept block by block, in the order of the graph.

    Minimises `‖s − d‖² / ‖d‖²` at the end of each block: `d` is the dense model's activation there,
    `s` the block's output on what the sparse model, earlier blocks trained, gives it. At the
    model's outputs the loss is that of :func:`iobs_onnx.pruning.distil.distil`. A block is kept
    only if its held-out loss falls. Memory holds one block's weights; activations beyond the
    engine's budget wait on disk.

    Guo et al., "EBFT", 2024, section 3; Li et al., "BRECQ", 2021, for the block as a unit.

    Attributes:
        dense: the target.
        blocks: of the sparse model, whose weights are replaced on the way.
        kept: name of a stored float tensor to its mask, True = kept.
        names: stored tensors that may be trained.
        engine: runs both models.
        checkpoint: takes every block, and gives back those of a run that was cut off.
        settings: how.
    """

    dense: ir.Model
    blocks: Blocks
    kept: Mapping[str, Mask]
    names: Collection[str]
    engine: Engine
    checkpoint: Checkpoint
    settings: DistilSettings

    def run(
        self, feeds: Iterable[Feed], held_out: Sequence[Feed], advance: Advance
    ) -> tuple[dict[str, NDArray[np.generic]], list[BlockReport]]:
        """Train every block; `advance` is called after each.

        Returns:
            New tensors by name, of accepted blocks, and what became of each block.

        Raises:
            DataError: there are no feeds to train on.
            ModelError: ONNX Runtime cannot run a block.
        """
        began = time.perf_counter()
        streams = Streams(self.dense, self.blocks.model, held_out, feeds, self.engine)
        tensors: dict[str, NDArray[np.generic]] = {}
        reports: list[BlockReport] = []
        left = sum(1 for segment in self.blocks.segments if self._masks(segment))
        for index, segment in enumerate(self.blocks.segments):
            streams.advance(segment)
            if not streams.indices[1]:
                raise DataError("distillation: there are no feeds to train on")
            budget = self._budget(streams, time.perf_counter() - began, left)
            new, report = self._block(index, segment, streams, budget)
            left -= bool(self._masks(segment))
            rewrite(self.blocks.model, new)
            tensors |= {name: tensor.numpy() for name, tensor in new.items()}
            reports.append(report)
            differs = bool(new or self._masks(segment) or streams.differ(segment.inputs))
            streams.follow(segment, differs=differs)
            advance(f"block {index + 1}", len(self.blocks.segments))
        return tensors, reports

    def _budget(self, streams: Streams, spent: float, left: int) -> DistilSettings:
        """Return the settings of the next block: its share of the steps or of the time left."""
        settings = self.settings
        if settings.seconds is not None:
            return dataclasses.replace(settings, seconds=max(1e-3, settings.seconds - spent) / left)
        steps = EPOCHS * len(streams.indices[1])
        if settings.steps is not None:
            trained = sum(1 for segment in self.blocks.segments if self._masks(segment))
            steps = max(1, settings.steps // trained)
        return dataclasses.replace(settings, steps=steps)

    def _masks(self, segment: Segment) -> dict[str, Mask]:
        chosen = set(segment.weights) - self.blocks.shared
        return {name: mask for name, mask in self.kept.items() if name in chosen}

    def _block(
        self, index: int, segment: Segment, streams: Streams, settings: DistilSettings
    ) -> tuple[dict[str, ir.TensorProtocol], BlockReport]:
        """Return the new tensors of a block, from disk where it was trained before."""
        name = f"block-{index:04d}"
        held = self.checkpoint.get_tensors(name)
        if held is None:
            began = time.perf_counter()
            arrays, report = self._trained(segment, streams, settings)
            report = dataclasses.replace(report, seconds=time.perf_counter() - began)
            held = self.checkpoint.put_tensors(name, arrays, dataclasses.asdict(report))
        tensors, facts = held
        return dict(tensors), BlockReport(**facts)

    def _trained(
        self, segment: Segment, streams: Streams, settings: DistilSettings
    ) -> tuple[dict[str, NDArray[np.generic]], BlockReport]:
        targets = self.blocks.matched(segment)
        report = BlockReport(
            list(segment.inputs),
            [target.value for target in targets],
            [name for name in self.kept if name in segment.weights],
        )
        try:
            pair = self._pair(segment, streams, targets)
            block = streams.block(segment, report.outputs)
            held_out, feeds = block.held_out(), block.feeds(settings.seed)
            ahead = first(feeds, _TRIED)
            pair = fitting(pair, ahead[0])
        except ModelError as error:
            return {}, dataclasses.replace(report, reason=str(error))
        fitted = fit(pair, ahead, chain(ahead, feeds), held_out, settings)
        before, after, run = fitted.before, fitted.after, fitted.run
        accepted = after < before
        report = dataclasses.replace(
            report,
            before=before,
            after=after,
            accepted=accepted,
            steps=run.steps,
            rate=fitted.rate,
            trained=sum(master.count for master in pair.masters),
            reason="" if accepted else "the held-out loss did not fall",
        )
        return {m.name: m.stored() for m in pair.masters} if accepted else {}, report

    def _pair(self, segment: Segment, streams: Streams, targets: Sequence[Target]) -> Pair:
        """Return the block as a function, held against ONNX Runtime.

        Raises:
            ModelError: it has nothing to train, or cannot be evaluated.
        """
        masks = self._masks(segment)
        if not masks:
            shared = any(name in segment.weights for name in self.kept)
            raise ModelError(
                "other blocks read its sparse weights too" if shared else "it has no sparse weight"
            )
        if not targets:
            raise ModelError("no float activation leaves it whose length both models agree on")
        values = [target.value for target in targets]
        part = streams.part(self.blocks.model, segment, values)
        sparse = self._evaluator(part, streams, segment)
        block = streams.block(segment, values)
        dense = sparse
        if not block.recorded:
            dense = self._evaluator(streams.part(self.dense, segment, values), streams, segment)
        # What is matched need not depend on all of the block.
        reached = stored_slots(part)
        masks = {name: mask for name, mask in masks.items() if name in reached}
        trained = self._masters(part, masks, streams)
        return Pair(block.teacher(dense), sparse, targets, trained, multiplies_bfloat16())

    def _masters(self, part: ir.Model, masks: Mapping[str, Mask], streams: Streams) -> list[Master]:
        settings = self.settings
        found = masters(
            part,
            masks,
            small=settings.small,
            embeddings=False,
            weighed=streams.differ(value.name or "" for value in part.graph.inputs),
        )
        return [m for m in found if m.name in self.names and m.name not in self.blocks.shared]

    def _evaluator(self, part: ir.Model, streams: Streams, segment: Segment) -> Evaluator:
        if reasons := unsupported(part):
            raise ModelError(f"torch cannot evaluate it: {reasons[0]}")
        evaluator = Evaluator(part, precision="float32")
        names = [value.name or "" for value in part.graph.inputs]
        feed = streams.feed(streams.indices[0][0], names, ())
        own = {name: feed[name] for name in names if name in feed}
        run = part.clone()
        widen(run)  # as the engine ran what it is fed with
        found = agreement(run, [own], evaluator=evaluator)
        if not found.ok:
            raise ModelError(found.reason)
        return evaluator


def distil_blocks(
    dense: ir.Model,
    sparse: ir.Model,
    sites: Sequence[Site],
    feeds: Iterable[Feed],
    held_out: Sequence[Feed],
    *,
    kept: Mapping[str, Mask],
    engine: Engine,
    checkpoint: Checkpoint,
    settings: DistilSettings | None = None,
    advance: Advance | None = None,
) -> BlocksDistilled:
    """Train what is kept of a sparse model block by block: see :class:`BlockTrainer`.

    The same arguments give the same bytes on one machine, unless `settings.seconds` is given.

    Args:
        dense, sparse: models of one graph; neither is changed.
        sites: whose weights are sparse.
        feeds: read once, to their end.
        held_out: judge every block.
        kept: name of a stored float tensor of `sparse` to its mask, True = kept.
        engine: runs the models.
        checkpoint: takes every block, and gives back those of a run that was cut off.
        settings: how; `steps` and `seconds` are for all blocks together.
        advance: is called after every block.

    Raises:
        DataError: there are no feeds to train on, or none to judge by.
        ModelError: there is no output to match, or ONNX Runtime cannot run a model.
    """
    began = time.perf_counter()
    settings, held_out = settings or DistilSettings(), list(held_out)
    if not held_out:
        raise DataError("distillation: there are no held-out feeds to judge by")
    blocks = Blocks.of(sparse, sites, settings.loss, engine.budget)
    trainer = BlockTrainer(
        prepare(dense, sites), blocks, kept, set(stored_slots(sparse)), engine, checkpoint, settings
    )
    tensors, reports = trainer.run(feeds, held_out, advance or silent)
    trained = load_model(sparse)
    rewrite(trained, tensors)
    before, after = (
        held_out_loss(dense, model, blocks.steady.targets, held_out, engine)
        for model in (sparse, trained)
    )
    seconds = time.perf_counter() - began
    kept_ones = tensors if after < before else {}
    return BlocksDistilled(kept_ones, reports, before, after, seconds, blocks.notes())
