"""What a run calibrates on: one of the kinds of data that the options name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import OptionError
from iobs_onnx.passes import find_token_input
from iobs_onnx.runtime import (
    AudioSamples,
    ImageSamples,
    InputSpec,
    RandomSamples,
    Samples,
    TextSamples,
    read_audio_config,
)
from iobs_onnx.runtime.noise import WARNING

_KINDS = ("text", "images", "audio")
# What each of the other options is an option of.
_BELONG = {
    "tokenizer": ("text",),
    "pack": ("text",),
    "preprocess": ("images", "audio"),
    "sequence_length": ("text", "audio", "calibration random"),
}

logger = logging.getLogger(__name__)


def calibration_source(
    calibration: Any, config: PruneConfig, model: ir.Model, path: Any, inputs: Sequence[InputSpec]
) -> Any:
    """Return what :func:`iobs_onnx.runtime.open_data` takes for the data that were asked for.

    Args:
        calibration: as :func:`iobs_onnx.prune` takes it, None where an option names the data.
        config: with `text`, `images`, `audio` and the options that go with them.
        model: whose vocabulary bounds random tokens.
        path: of the model, where it has one: `preprocessor_config.json` is looked for beside it.
        inputs: of the model.

    Raises:
        OptionError: there are no data or several, or an option does not go with them.
        DataError: the data cannot be read or do not fit the model.
    """
    random = isinstance(calibration, str) and calibration == "random"
    given = [name for name in _KINDS if getattr(config, name) is not None]
    given += [] if calibration is None else ["calibration random" if random else "calibration"]
    if not given:
        raise OptionError(
            "--calibration is missing: give it, or --text, --images or --audio, as a flag or in "
            "the --config file"
        )
    if len(given) > 1:
        raise OptionError(f"--{given[0]} and --{given[1]}: give one kind of calibration data")
    (kind,) = given
    for name, kinds in _BELONG.items():
        if getattr(config, name) and kind not in kinds:
            raise OptionError(f"{name}: goes with {' and '.join(kinds)}, not with {kind}")
    if kind == "calibration":
        return calibration
    if random:
        logger.warning("%s", WARNING)
        tokens = find_token_input(model)
        return RandomSamples(inputs, tokens, length=config.sequence_length, seed=config.seed)
    return _samples(config, path, inputs)


def _samples(config: PruneConfig, model: Any, inputs: Sequence[InputSpec]) -> Samples:
    length = config.sequence_length
    if config.text is not None:
        tokenizer = config.tokenizer or _beside(model, "tokenizer.json", "tokenizer")
        return TextSamples(config.text, tokenizer, inputs, length=length, pack=config.pack)
    preprocess = config.preprocess or _beside(model, "preprocessor_config.json", "preprocess")
    if config.images is not None:
        return ImageSamples(config.images, preprocess, inputs)
    assert config.audio is not None, "one of three kinds"
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
    raise OptionError(f"--{flag} is missing, and no {name} lies beside the model")
