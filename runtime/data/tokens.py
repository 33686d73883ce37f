"""The inputs of a language model, from token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.session import InputSpec

IDS = "input_ids"
DEFAULT_LENGTH = 128
_KNOWN = (IDS, "attention_mask", "token_type_ids", "position_ids", "use_cache_branch")


def row_length(spec: InputSpec, asked: int | None, default: int) -> tuple[int, bool]:
    """Return the length of a row of an input `(batch, length)`, and whether the model fixes it.

    Raises:
        OptionError: another length was asked for than the model fixes.
    """
    fixed = spec.shape[-1] if spec.shape else None
    if fixed is None:
        return asked or default, False
    if asked not in (None, fixed):
        raise OptionError(
            f"sequence_length {asked}: input {spec.name!r} is made for {fixed}; leave it out"
        )
    return fixed, True


def token_feed(
    rows: Sequence[NDArray[np.int64]], inputs: Sequence[InputSpec], pad: int, length: int
) -> Feed:
    """Return ids padded to `length`, and the inputs that go with them, as the model asks.

    `attention_mask` marks tokens with 1, `position_ids` count from 0, `token_type_ids` are 0, a
    cache of past keys and values is empty, and a merged decoder is told to use none.

    Raises:
        DataError: the model has an input that token ids do not determine.
    """
    feed = {}
    for spec in inputs:
        if determined(spec):
            feed[spec.name] = _determined(spec, rows, pad, length)
        elif not spec.optional:
            raise DataError(
                f"input {spec.name!r}: tokens do not determine it; known are {', '.join(_KNOWN)} "
                "and past_key_values; give feeds with all inputs (.npz or module:callable)"
            )
    return feed


def determined(spec: InputSpec) -> bool:
    """Whether token ids say what an input of a language model is."""
    return spec.cache or spec.name in _KNOWN


def _determined(
    spec: InputSpec, rows: Sequence[NDArray[np.int64]], pad: int, length: int
) -> NDArray[np.generic]:
    if spec.cache:
        return _no_past(spec, len(rows))
    if spec.name == "use_cache_branch":
        return np.zeros(1, spec.dtype)
    made = np.zeros((len(rows), length), np.int64)
    match spec.name:
        case "input_ids":
            made[:] = pad
            for at, row in enumerate(rows):
                made[at, : len(row)] = row
        case "attention_mask":
            for at, row in enumerate(rows):
                made[at, : len(row)] = 1
        case "position_ids":
            made[:] = np.arange(length)
    return made.astype(spec.dtype)


def _no_past(spec: InputSpec, count: int) -> NDArray[np.generic]:
    """An empty cache `(batch, heads, 0, size)`: of its dynamic axes the second is the past."""
    shape = spec.shape or ()
    dynamic = [axis for axis, size in enumerate(shape) if size is None and axis > 0]
    if len(shape) != 4 or len(dynamic) != 1:
        raise DataError(
            f"input {spec.name!r} {shape}: a cache of past keys and values has four axes, of which "
            "the first and one other are dynamic; give feeds with all inputs"
        )
    sizes = [0 if axis in dynamic else size or count for axis, size in enumerate(shape)]
    return np.zeros(sizes, spec.dtype)
