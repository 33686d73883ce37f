"""What a run calibrates on: all the data that the call and its options name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.passes import find_positions, find_token_input
from iobs_onnx.runtime import (
    AudioSamples,
    Data,
    ImageSamples,
    InputSpec,
    RandomSamples,
    Samples,
    SelfSamples,
    TextSamples,
    join,
    open_data,
    open_session,
    read_audio_config,
)
from iobs_onnx.runtime.data.random_numbers import WARNING
from iobs_onnx.runtime.data.tokens import DEFAULT_LENGTH, IDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the samples of a run are opened by.

    Attributes:
        config: the options.
        model: whose vocabulary bounds random tokens, and that writes its own text.
        path: the model as it was given.
        inputs: of the model.
    """

    config: PruneConfig
    model: ir.Model
    path: Any
    inputs: Sequence[InputSpec]

    def beside(self, name: str, option: str) -> str:
        """Return a file in the model's folder, or in the one above, where Optimum keeps it.

        Raises:
            OptionError: there is none.
        """
        if isinstance(self.path, str | os.PathLike):
            folder = Path(self.path).resolve().parent
            for candidate in (folder / name, folder.parent / name):
                if candidate.is_file():
                    return str(candidate)
        flag = option.replace("_", "-")
        raise OptionError(f"--{flag} is missing, and no {name} is beside the model")

    def length(self) -> int | None:
        """Return the tokens in a text, as far as an option or the model's positions say.

        Raises:
            OptionError: there are fewer positions than that.
        """
        asked, positions = self.config.sequence_length, find_positions(self.model)
        if any(spec.name == IDS and (spec.shape or (None,))[-1] for spec in self.inputs):
            return asked  # the model fixes it
        if positions is None or (asked or DEFAULT_LENGTH) <= positions:
            return asked
        if asked is None:
            return positions
        raise OptionError(
            f"sequence_length {asked}: the model has {positions} positions; give at most that"
        )


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
    named = [kind for kind in KINDS if getattr(config, kind, None) is not None]
    if len(named) > 1:
        raise OptionError(f"--{named[0]} and --{named[1]}: give one of them only")
    given = {*named, *map(_kind, items)}
    if not given:
        raise OptionError(
            "--calibration is missing: give it, or --text, --images or --audio, as a flag or in "
            "the --config file"
        )
    for name in dict.fromkeys(option for kind in KINDS.values() for option in kind.options):
        kinds = [label for label, kind in KINDS.items() if name in kind.options]
        if getattr(config, name) not in (None, False) and not given.intersection(kinds):
            found = " and ".join(sorted(given))
            raise OptionError(f"{name}: goes with {' and '.join(kinds)}, not with {found}")
    request = Request(config, model, path, inputs)
    samples: list[Any] = [KINDS[kind].open(request) for kind in named]
    for item in items:
        kind = KINDS.get(_kind(item))
        samples.append(item if kind is None else kind.open(request))
    return samples


def open_sources(
    sources: Sequence[Any],
    holdout: Any,
    inputs: Sequence[InputSpec],
    config: PruneConfig,
    *,
    judge: bool = True,
) -> Data:
    """Open all sources of calibration data as one, and the one that only judges.

    Args:
        sources: from :func:`calibration_sources`.
        holdout: data that only judge; None to hold out a part of each source.
        inputs: of the model.
        config: names samples, batch size and seed.
        judge: whether to hold any out.

    Raises:
        DataError: the data cannot be read or do not fit the model.
        OptionError: an option does not fit the form of the data.
    """
    parts = [
        open_data(
            source,
            inputs,
            samples=config.samples,
            batch_size=config.batch_size,
            seed=config.seed,
            **({"holdout": 0} if holdout is not None or not judge else {}),
        )
        for source in sources
    ]
    return join(parts, None if holdout is None else open_data(holdout, inputs, holdout=0))


def _kind(item: Any) -> str:
    """Return `calibration random` or `calibration self` for data that are made, not given."""
    label = f"calibration {item}"
    return label if isinstance(item, str) and label in KINDS else "calibration"


def _text(request: Request) -> Samples:
    config = request.config
    assert config.text is not None, "it is given"
    tokenizer = config.tokenizer or request.beside("tokenizer.json", "tokenizer")
    tokens = find_token_input(request.model)
    return TextSamples(
        config.text,
        tokenizer,
        request.inputs,
        length=request.length(),
        pack=config.pack,
        vocabulary=None if tokens is None else tokens[1],
    )


def _images(request: Request) -> Samples:
    assert request.config.images is not None, "it is given"
    return ImageSamples(request.config.images, _preprocess(request), request.inputs)


def _audio(request: Request) -> Samples:
    config = request.config
    assert config.audio is not None, "it is given"
    rate, normalize = read_audio_config(_preprocess(request))
    length = config.sequence_length
    return AudioSamples(config.audio, request.inputs, rate=rate, length=length, normalize=normalize)


def _preprocess(request: Request) -> str:
    given = request.config.preprocess
    return given or request.beside("preprocessor_config.json", "preprocess")


def _random(request: Request) -> Samples:
    logger.warning("%s", WARNING)
    config, tokens = request.config, find_token_input(request.model)
    return RandomSamples(request.inputs, tokens, length=request.length(), seed=config.seed)


def _self_written(request: Request) -> Samples:
    config, tokens = request.config, find_token_input(request.model)
    if tokens is None:
        raise DataError("calibration self: the model looks up no tokens; give data")
    return SelfSamples(
        # Optimised, unlike one of a model in memory.
        open_session(request.path, config.provider, gpu=config.gpu),
        request.inputs,
        tokens[1],
        count=config.samples,
        length=request.length(),
        start=config.start_token,
        seed=config.seed,
    )


@dataclass(frozen=True)
class Kind:
    """A kind of samples: what opens them, and the options that go with them."""

    open: Callable[[Request], Samples]
    options: tuple[str, ...]


# The options that name data, and the data that `--calibration` names by a word.
KINDS = {
    "text": Kind(_text, ("tokenizer", "pack", "sequence_length")),
    "images": Kind(_images, ("preprocess",)),
    "audio": Kind(_audio, ("preprocess", "sequence_length")),
    "calibration random": Kind(_random, ("sequence_length",)),
    "calibration self": Kind(_self_written, ("sequence_length", "start_token")),
}
