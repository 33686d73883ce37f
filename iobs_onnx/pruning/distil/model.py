"""Distil a whole sparse model towards its dense one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import onnx_ir as ir

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.passes import masks_of
from iobs_onnx.pruning.distil.losses import steady_targets
from iobs_onnx.pruning.distil.memory import fitting
from iobs_onnx.pruning.distil.settings import Distilled, DistilSettings
from iobs_onnx.pruning.distil.trained import Mask, masters
from iobs_onnx.pruning.distil.training import TRIED, Pair, first, fit
from iobs_onnx.pruning.progress import Advance
from iobs_onnx.runtime import Feed
from iobs_onnx.runtime.differentiable import (
    Evaluator,
    agreement,
    multiplies_bfloat16,
    unsupported,
)
from iobs_onnx.site import Site


def distil(
    dense: ir.Model,
    sparse: ir.Model,
    feeds: Iterable[Feed],
    held_out: Sequence[Feed],
    *,
    kept: Mapping[str, Mask],
    settings: DistilSettings | None = None,
    told: Callable[[int, int, float], None] | None = None,
) -> Distilled:
    """Train what is kept of a sparse model towards the dense model's outputs, without labels.

    Minimises the mean over outputs of KL(dense ‖ sparse) for logits, `‖s − d‖² / ‖d‖²` for other
    outputs, and for embeddings the mean of this for hidden states, pooled vectors and pairwise
    similarities (see :func:`iobs_onnx.pruning.distil.losses.find_targets`), by Adam with warm-up
    and a cosine schedule. The state with the lowest held-out loss is returned, and only if that is
    below the loss before. The same arguments give the same bytes on one machine, unless
    `settings.seconds` is given.

    Self-generated text against overfitting: Ji et al., "Beware of Calibration Data for Pruning
    Large Language Models", 2024, section 4. Training the kept weights of a fixed mask towards the
    dense model: Guo et al., "EBFT", 2024, section 3, there block by block.

    Args:
        dense, sparse: models with the same inputs and outputs; neither is changed.
        feeds: one a step, in the models' input dtypes; may be endless. `attention_mask`,
            `(batch, length)`, marks padding with 0: outputs leave it out.
        held_out: judge the first and the best state; of very many a part, evenly spread, judges
            the states on the way.
        kept: name of a stored float tensor of `sparse` to its mask, boolean in the stored shape,
            True = kept. Biases, scales and offsets are trained too, see
            :func:`iobs_onnx.pruning.distil.trained.masters`.
        settings: how; the defaults without.
        told: is called after every step with the step, the number of steps and the last held-out
            loss.

    Returns:
        New tensors by name, float32 masters rounded to their stored dtype; none if the held-out
        loss did not fall.

    Raises:
        ModelError: a model cannot be evaluated in torch, or is evaluated otherwise than by ONNX
            Runtime; a mask does not fit; there is no output to match.
        DataError: there are no feeds to train on, or none to judge by.
    """
    settings = settings or DistilSettings()
    held_out = list(held_out)
    stream = iter(feeds)
    ahead = first(stream, TRIED)
    if not ahead or not held_out:
        what = "held-out feeds to judge by" if ahead else "feeds to train on"
        raise DataError(f"distillation: there are no {what}")
    began = time.perf_counter()
    pair, notes = _pair(dense, sparse, ahead[0], kept, settings)
    spent = time.perf_counter() - began
    if settings.seconds is not None:
        settings = replace(settings, seconds=max(1e-3, settings.seconds - spent))
    fitted = fit(pair, ahead, chain(ahead, stream), held_out, settings, told)
    run = fitted.run
    accepted = fitted.after < fitted.before
    return Distilled(
        tensors={m.name: m.stored() for m in pair.masters} if accepted else {},
        curve=run.curve,
        before=fitted.before,
        after=fitted.after,
        accepted=accepted,
        steps=run.steps,
        feeds=run.steps,
        rows=run.rows,
        seconds=time.perf_counter() - began,
        rate=fitted.rate,
        losses={target.output: target.kind for target in pair.targets},
        trained=sum(m.count for m in pair.masters),
        factors="bfloat16" if pair.rounds else "float32",
        notes=(*notes, *([run.note] if run.note else [])),
    )


def telling(advance: Advance) -> Callable[[int, int, float], None]:
    """Return what tells a stage's progress of each step, their number and the held-out loss."""
    return lambda _step, steps, loss: advance(f"held-out loss {loss:.4g}", steps)


def require_trainable(model: ir.Model, feed: Feed, sites: Iterable[Site]) -> None:
    """Hold a model's evaluation in torch against ONNX Runtime's on a feed, and a step to memory.

    Args:
        model: the dense one.
        feed: as steps take.
        sites: that will be sparse.

    Raises:
        ModelError: it cannot be evaluated, is evaluated otherwise, or has no output to match; or a
            step takes more memory than there is.
    """
    weights = {name: np.ones_like(mask) for name, mask in masks_of(model, sites).items()}
    targets = steady_targets(model, "auto", weights).targets
    both = evaluator(model, feed, "dense")
    trained = masters(model, weights, small=True, embeddings=False)
    fitting(Pair(both, both, targets, trained, multiplies_bfloat16()), feed)


def _pair(
    dense: ir.Model,
    sparse: ir.Model,
    feed: Feed,
    kept: Mapping[str, Mask],
    settings: DistilSettings,
) -> tuple[Pair, list[str]]:
    steady = steady_targets(dense, settings.loss, kept)
    targets = steady.targets
    if found := [t.value for t in targets if t.value not in set(_values(sparse))]:
        raise ModelError(f"distillation: the sparse model has no value {found[0]!r}")
    trained = masters(sparse, kept, small=settings.small, embeddings=settings.embeddings)
    if not trained:
        raise ModelError("distillation: no mask was given, and the model has no biases to train")
    models = evaluator(dense, feed, "dense"), evaluator(sparse, feed, "sparse")
    pair = Pair(*models, targets, trained, multiplies_bfloat16())
    return fitting(pair, feed), steady.notes


def evaluator(model: ir.Model, feed: Feed, which: str) -> Evaluator:
    """Return a model's evaluation in float32, once it has been held against ONNX Runtime's.

    Args:
        model: the model.
        feed: on which the two are compared.
        which: `dense` or `sparse`, for the message.

    Raises:
        ModelError: it cannot be evaluated, or is evaluated otherwise.
    """
    if reasons := unsupported(model):
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise ModelError(
            f"distillation: the {which} model cannot be evaluated in torch: {reasons[0]}{more}"
        )
    made = Evaluator(model, precision="float32")
    found = agreement(model, [feed], evaluator=made)
    if not found.ok:
        raise ModelError(f"distillation: the {which} model: {found.reason}")
    return made


def _values(model: ir.Model) -> Iterator[str]:
    yield from (value.name or "" for value in model.graph.inputs)
    for node in model.graph:
        yield from (value.name or "" for value in node.outputs)
