"""Distil a model that was pruned elsewhere: files and data in, a file out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.errors import CheckError, DataError, ModelError
from iobs_onnx.passes import (
    check_model,
    find_sites,
    load_model,
    place_of,
    require_output,
    rewrite,
    saving,
)
from iobs_onnx.pruning.distil.feeds import endless, in_turn, mirrored, own_text
from iobs_onnx.pruning.distil.model import distil
from iobs_onnx.pruning.distil.settings import Distilled, DistilSettings
from iobs_onnx.pruning.distil.trained import kept_masks
from iobs_onnx.pruning.progress import Progress
from iobs_onnx.pruning.sources import calibration_sources, open_sources
from iobs_onnx.runtime import (
    Feed,
    SelfSamples,
    input_specs,
    open_data,
)

# Feeds that a model wrote and that judge.
_JUDGING = 4


@dataclass(frozen=True)
class Distillation:
    """A distilled model.

    Attributes:
        model: in memory.
        distilled: what training gave.
        output: the file it was written to, None if none was asked for.
    """

    model: ir.Model
    distilled: Distilled
    output: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {"output": self.output, **self.distilled.as_dict()}


def distil_file(
    dense: str | os.PathLike[str],
    sparse: str | os.PathLike[str],
    *,
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    holdout: Any = None,
    mirror: bool = False,
    settings: DistilSettings | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Distillation:
    """Distil a pruned model towards the dense one it was made from; its zeros stay.

    What is zero in a weight that :func:`iobs_onnx.inspect` lists is taken for pruned. If the
    held-out loss does not fall, `output` holds the sparse model as it came.

    Args:
        dense, sparse: files with the same inputs and outputs.
        calibration: as for :func:`iobs_onnx.prune`; `"self"` goes on writing text for as long as
            training lasts.
        output: the file or folder to write, as for :func:`iobs_onnx.prune`; nothing is written if
            anything fails.
        holdout: data that only judge. Without it a tenth of the calibration data.
        mirror: mirror images by chance, as if there were twice as many.
        settings: how to train.
        progress: is told how far it is.
        options: of :class:`iobs_onnx.config.PruneConfig`, those that read data.

    Raises:
        InputError: a model, the data or an option is at fault.
        CheckError: onnx.checker refuses the result and not the sparse model.
    """
    settings = settings or DistilSettings()
    # A pattern is not asked for: the zeros that are there say which.
    config = make_config({"sparsity": "2:4", **options, "seed": settings.seed})
    teacher, student = load_model(dense), load_model(sparse)
    place = place_of(output, sparse)
    if place.file is not None:
        require_output(student, place.file)
    _require_alike(teacher, student)
    kept = kept_masks(student, find_sites(student).sites)
    if not kept:
        raise ModelError(f"model {os.fspath(sparse)}: no weight holds a zero; prune it first")
    feeds, held_out = _data(calibration, holdout, config, teacher, dense)
    if mirror:
        feeds = mirrored(feeds, settings.seed)
    total = None if settings.seconds else settings.steps
    with (progress or Progress()).stage("distil", total) as advance:
        found = distil(
            teacher,
            student,
            feeds,
            held_out,
            kept=kept,
            settings=settings,
            told=lambda _step, _steps, _loss: advance(),
        )
    if found.accepted:
        rewrite(student, found.tensors)
    if place.file is None:
        return Distillation(student, found, None)
    with saving(student, place.file, beside=place.beside) as file:
        _check(os.fspath(file), sparse)
    return Distillation(student, found, os.fspath(place.file))


def _require_alike(dense: ir.Model, sparse: ir.Model) -> None:
    for what, ours, theirs in (
        ("inputs", dense.graph.inputs, sparse.graph.inputs),
        ("outputs", dense.graph.outputs, sparse.graph.outputs),
    ):
        names = [[value.name or "" for value in values] for values in (ours, theirs)]
        if set(names[0]) != set(names[1]):
            raise ModelError(
                f"distillation: the dense model has the {what} {', '.join(names[0])}, the sparse "
                f"one {', '.join(names[1])}; give the model that it was made from"
            )


def _check(file: str, sparse: str | os.PathLike[str]) -> None:
    """Raise what onnx.checker says, unless it says so of the model as it came."""
    try:
        check_model(file)
    except CheckError:
        with suppress(CheckError):
            check_model(sparse)
            raise
        return


def _data(
    calibration: Any,
    holdout: Any,
    config: PruneConfig,
    model: ir.Model,
    path: str | os.PathLike[str],
) -> tuple[Iterator[Feed], list[Feed]]:
    """Return feeds without end, and those that judge."""
    inputs = input_specs(model)
    items = calibration if isinstance(calibration, list | tuple) else [calibration]
    own = any(isinstance(item, str) and item == "self" for item in items)
    sources = calibration_sources(calibration, config, model, path, inputs)
    given = [source for source in sources if not isinstance(source, SelfSamples)]
    streams: list[Iterator[Feed]] = []
    held_out: list[Feed] = []
    if given:
        data = open_sources(given, holdout, inputs, config).in_memory()
        streams.append(endless(data.calibration, config.seed))
        held_out += data.held_out
    elif holdout is not None:
        held_out += open_data(holdout, inputs, holdout=0).calibration
    if own:
        streams.append(own_text(model, path, inputs, config))
        held_out += islice(streams[-1], _JUDGING) if holdout is None else ()
    if not held_out:
        raise DataError("distillation: one sample cannot both train and judge; give --holdout")
    return in_turn(*streams), held_out
