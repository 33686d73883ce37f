"""What a run calibrates on: all the data that the call and its options name."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.passes import find_token_input
from iobs_onnx.runtime import (
    AudioSamples,
    ImageSamples,
    InputSpec,
    RandomSamples,
    Samples,
    SelfSamples,
    TextSamples,
    open_session,
    read_audio_config,
)
from iobs_onnx.runtime.data.random_numbers import WARNING

_KINDS = ("text", "images", "audio")
# Data that are made, not given.
_MADE = ("random", "self")
# What each of the other options is an option of.
_BELONG = {
    "tokenizer": ("text",),
    "pack": ("text",),
    "preprocess": ("images", "audio"),
    "sequence_length": ("text", "audio", "calibration random", "calibration self"),
    "start_token": ("calibration self",),
}

logger = logging.getLogger(__name__)


def calibration_sources(
    calibration: Any, config: PruneConfig, model: ir.Model, path: Any, inputs: Sequence[InputSpec]
) -> list[Any]:
    """Return what :func:`iobs_onnx.runtime.open_data` takes for all data that were asked for.

    Args:
        calibration: as :func:`iobs_onnx.prune` takes it, None where an option names the data.
        config: with `text`, `images`, `audio` and the options that go with them.
        model: whose vocabulary bounds random tokens, and that writes its own text.
        path: the model as it was given; where it is a file, `preprocessor_config.json` and
            `tokenizer.json` are looked for beside it.
        inputs: of the model.

    Raises:
        OptionError: there are no data, or an option does not go with them.
        DataError: the data cannot be read or do not fit the model.
    """
    several = isinstance(calibration, list | tuple) and any(
        not isinstance(item, Mapping) for item in calibration
    )
    items = calibration if several else [] if calibration is None else [calibration]
    named = [kind for kind in _KINDS if getattr(config, kind) is not None]
    if len(named) > 1:
        raise OptionError(f"--{named[0]} and --{named[1]}: give one of them only")
    given = {*named, *map(_kind, items)}
    if not given:
        raise OptionError(
            "--calibration is missing: give it, or --text, --images or --audio, as a flag or in "
            "the --config file"
        )
    for name, kinds in _BELONG.items():
        if getattr(config, name) not in (None, False) and not given.intersection(kinds):
            found = " and ".join(sorted(given))
            raise OptionError(f"{name}: goes with {' and '.join(kinds)}, not with {found}")
    samples = [_samples(kind, config, path, inputs) for kind in named]
    return [*samples, *(_opened(item, config, model, path, inputs) for item in items)]


def _kind(item: Any) -> str:
    made = isinstance(item, str) and item in _MADE
    return f"calibration {item}" if made else "calibration"


def _opened(
    item: Any, config: PruneConfig, model: ir.Model, path: Any, inputs: Sequence[InputSpec]
) -> Any:
    kind = _kind(item)
    tokens = find_token_input(model)
    if kind == "calibration random":
        logger.warning("%s", WARNING)
        return RandomSamples(inputs, tokens, length=config.sequence_length, seed=config.seed)
    if kind == "calibration self":
        if tokens is None:
            raise DataError("calibration self: the model looks up no tokens; give data")
        return SelfSamples(
            open_session(path, config.provider),  # optimised, unlike one of a model in memory
            inputs,
            tokens[1],
            count=config.samples,
            length=config.sequence_length,
            start=config.start_token,
            seed=config.seed,
        )
    return item


def _samples(kind: str, config: PruneConfig, model: Any, inputs: Sequence[InputSpec]) -> Samples:
    length = config.sequence_length
    if kind == "text":
        assert config.text is not None, "it is given"
        tokenizer = config.tokenizer or _beside(model, "tokenizer.json", "tokenizer")
        return TextSamples(config.text, tokenizer, inputs, length=length, pack=config.pack)
    preprocess = config.preprocess or _beside(model, "preprocessor_config.json", "preprocess")
    if kind == "images":
        assert config.images is not None, "it is given"
        return ImageSamples(config.images, preprocess, inputs)
    assert config.audio is not None, "it is given"
    rate, normalize = read_audio_config(preprocess)
    return AudioSamples(config.audio, inputs, rate=rate, length=length, normalize=normalize)


def _beside(model: Any, name: str, option: str) -> str:
    """Return a file in the model's folder, or in the one above, where Optimum keeps it."""
    if isinstance(model, str | os.PathLike):
        folder = Path(model).resolve().parent
        for candidate in (folder / name, folder.parent / name):
            if candidate.is_file():
                return str(candidate)
    flag = option.replace("_", "-")
    raise OptionError(f"--{flag} is missing, and no {name} is beside the model")
