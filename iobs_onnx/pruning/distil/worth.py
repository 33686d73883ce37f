"""How far a sparse model's outputs lie from the dense model's, as training counts it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import onnx_ir as ir
import torch

from iobs_onnx.engine import Engine, give_back
from iobs_onnx.passes import partition, release
from iobs_onnx.pruning.distil.losses import Target, distance
from iobs_onnx.runtime import Feed


def held_out_loss(
    dense: ir.Model,
    sparse: ir.Model,
    targets: Sequence[Target],
    feeds: Iterable[Feed],
    engine: Engine,
) -> float:
    """Return the loss of whole models in ONNX Runtime: the mean over targets of means over rows.

    Args:
        dense, sparse: models of one graph, run segment by segment.
        targets: what is compared, and how.
        feeds: at least one.
        engine: runs both.

    Raises:
        ModelError: a model cannot be run, or the outputs do not fit each other.
    """
    losses, rows = defaultdict[str, float](float), Counter[str]()
    ours = engine.stream(dense, feeds)
    theirs = ours.over()
    values = [target.value for target in targets]
    # Two models are in memory at once.
    for segment in partition(dense, outputs=values, budget=engine.budget // 2):
        here = [target for target in targets if target.value in segment.wanted]
        runs = [
            stream.run(
                engine.open(model, segment, (*segment.wanted, *segment.outputs), stream),
                fetch=segment.wanted,
                keep=segment.outputs,
                alive=segment.alive,
            )
            for model, stream in ((dense, ours), (sparse, theirs))
        ]
        for expected, found in zip(*runs, strict=True):
            mask = None if expected.mask is None else torch.from_numpy(expected.mask)
            for target in here:
                one = distance([target], expected.values, found.values, mask)
                losses[target.value] += float(one.loss) * one.rows
                rows[target.value] += one.rows
        del runs
        for model in (dense, sparse):
            release(model, segment.weights)
        give_back()
    return sum(losses[value] / rows[value] for value in values) / len(values)
