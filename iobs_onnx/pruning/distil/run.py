"""Distil a model that was pruned elsewhere: files and data in, a file out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.engine import Engine, default_memory_budget, memory_faults
from iobs_onnx.errors import CheckError, DataError, ModelError
from iobs_onnx.passes import (
    check_model,
    find_sites,
    load_model,
    place_of,
    require_output,
    rewrite,
    saving,
    scratch,
    writing_to,
)
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.distil.blocks import distil_blocks
from iobs_onnx.pruning.distil.feeds import endless, in_turn, mirrored, own_text
from iobs_onnx.pruning.distil.losses import predicts_tokens
from iobs_onnx.pruning.distil.model import distil, telling
from iobs_onnx.pruning.distil.settings import STEPS, Distilled, DistilSettings
from iobs_onnx.pruning.distil.trained import Mask, kept_masks
from iobs_onnx.pruning.progress import Advance, Progress
from iobs_onnx.pruning.sources import calibration_sources, open_sources
from iobs_onnx.runtime import (
    Data,
    Feed,
    SelfSamples,
    find_device,
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
        distilled: what training of the whole gave; None where only blocks were trained.
        blocks: what is told of the blocks, as in `report.json`; None where they were not trained.
        output: the file it was written to, None if none was asked for.
    """

    model: ir.Model
    distilled: Distilled | None
    blocks: dict[str, Any] | None
    output: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        whole = {} if self.distilled is None else self.distilled.as_dict()
        return {"output": self.output, **whole, "blocks": self.blocks}


def distil_file(
    dense: str | os.PathLike[str],
    sparse: str | os.PathLike[str],
    *,
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    holdout: Any = None,
    distill: str = "model",
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
        distill: `blocks`, `model`, or `both`, one after the other.
        mirror: mirror images by chance, as if there were twice as many.
        settings: how to train.
        progress: is told how far it is.
        options: of :class:`iobs_onnx.config.PruneConfig`, those that read data.

    Raises:
        InputError: a model, the data or an option is at fault.
        CheckError: onnx.checker refuses the result and not the sparse model.
    """
    full = memory_faults("distillation", "make --batch-size or --sequence-length smaller")
    with writing_to(output), full:
        return _distil_file(
            dense,
            sparse,
            calibration=calibration,
            output=output,
            holdout=holdout,
            distill=distill,
            mirror=mirror,
            settings=settings or DistilSettings(),
            progress=progress or Progress(),
            options=options,
        )


def _distil_file(
    dense: str | os.PathLike[str],
    sparse: str | os.PathLike[str],
    *,
    calibration: Any,
    output: str | os.PathLike[str] | None,
    holdout: Any,
    distill: str,
    mirror: bool,
    settings: DistilSettings,
    progress: Progress,
    options: Mapping[str, Any],
) -> Distillation:
    """Distil into an output that is this run's alone; see :func:`distil_file`."""
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
    request = _Request(calibration, holdout, config, teacher, dense, mirror)
    blocks, found = None, None
    if distill == "both" and settings.seconds is not None:
        settings = replace(settings, seconds=settings.seconds / 2)
    if distill != "model":
        with progress.stage("distil blocks", None) as advance:
            blocks = _blocks(request, student, kept, settings, advance)
    if distill != "blocks":
        found = _whole(request, student, kept, settings, progress)
    if place.file is None:
        return Distillation(student, found, blocks, None)
    with saving(student, place.file, beside=place.beside) as file:
        _check(os.fspath(file), sparse)
    return Distillation(student, found, blocks, os.fspath(place.file))


@dataclass(frozen=True)
class _Request:
    """What a call asks for, besides the sparse model."""

    calibration: Any
    holdout: Any
    config: PruneConfig
    dense: ir.Model
    path: str | os.PathLike[str]
    mirror: bool

    @cached_property
    def sources(self) -> list[Any]:
        """All that calibrates."""
        inputs = input_specs(self.dense)
        return calibration_sources(self.calibration, self.config, self.dense, self.path, inputs)

    @cached_property
    def own(self) -> list[Any]:
        """Those of the sources in which the model writes."""
        return [each for each in self.sources if isinstance(each, SelfSamples)]

    @cached_property
    def given(self) -> Data | None:
        """All data that the model does not write, read once and to their end; None for none."""
        sources = [each for each in self.sources if not isinstance(each, SelfSamples)]
        if not sources:
            return None
        inputs = input_specs(self.dense)
        return open_sources(sources, self.holdout, inputs, self.config).in_memory()

    def data(self) -> tuple[list[Feed], list[Feed]]:
        """Return all feeds to train on, and those that judge."""
        parts = [] if self.given is None else [self.given]
        if self.own:
            # Data that only judge stand with what was given, and here where nothing was.
            holdout, inputs = None if parts else self.holdout, input_specs(self.dense)
            judge = self.holdout is None
            own = open_sources(self.own, holdout, inputs, self.config, judge=judge)
            parts.append(own.in_memory())
        return (
            [feed for part in parts for feed in part.calibration],
            [feed for part in parts for feed in part.held_out],
        )


def _blocks(
    request: _Request,
    student: ir.Model,
    kept: Mapping[str, Mask],
    settings: DistilSettings,
    advance: Advance,
) -> dict[str, Any]:
    """Train block by block, in place, and return what a report tells of it."""
    feeds, held_out = request.data()
    if request.mirror:
        feeds = [*feeds, *mirrored(feeds, settings.seed)]
    with scratch() as folder:
        config = request.config
        device = find_device(config.device)
        engine = Engine(config.provider, default_memory_budget(), folder, device=device)
        found = distil_blocks(
            request.dense,
            student,
            find_sites(student).sites,
            feeds,
            held_out,
            kept=kept,
            engine=engine,
            checkpoint=Checkpoint(folder),
            settings=settings,
            advance=advance,
        )
    rewrite(student, found.tensors)
    return found.as_dict()


def _whole(
    request: _Request,
    student: ir.Model,
    kept: Mapping[str, Mask],
    settings: DistilSettings,
    progress: Progress,
) -> Distilled:
    """Train the whole model, in place."""
    feeds, held_out = _endless(request)
    if request.mirror:
        feeds = mirrored(feeds, settings.seed)
    total = None if settings.seconds else settings.steps or STEPS
    with progress.stage("distil", total) as advance:
        found = distil(
            request.dense,
            student,
            feeds,
            held_out,
            kept=kept,
            settings=settings,
            told=telling(advance),
        )
    if found.accepted:
        rewrite(student, found.tensors)
    return found


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


def _endless(request: _Request) -> tuple[Iterator[Feed], list[Feed]]:
    """Return feeds without end, and those that judge."""
    config, holdout, inputs = request.config, request.holdout, input_specs(request.dense)
    streams: list[Iterator[Feed]] = []
    held_out: list[Feed] = []
    if request.given is not None:
        feeds, vary = request.given.calibration, predicts_tokens(request.dense)
        streams.append(endless(feeds, config.seed, vary=vary))
        held_out += request.given.held_out
    elif holdout is not None:
        held_out += open_data(holdout, inputs, holdout=0).calibration
    if request.own:
        streams.append(own_text(request.dense, request.path, inputs, config))
        held_out += islice(streams[-1], _JUDGING) if holdout is None else ()
    if not held_out:
        raise DataError("distillation: one sample cannot both train and judge; give --holdout")
    return in_turn(*streams), held_out
