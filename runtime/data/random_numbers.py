"""Random numbers in the place of calibration data, to try things out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.samples import Samples
from iobs_onnx.runtime.data.tokens import DEFAULT_LENGTH, IDS, determined, token_feed
from iobs_onnx.runtime.session import InputSpec

COUNT = 128
WARNING = (
    "CALIBRATED ON RANDOM NUMBERS: the errors in this report and the accuracy of the sparse model "
    "say nothing about real data; give real samples before the model is used"
)


class RandomSamples(Samples):
    """Random samples that fit a model's inputs.

    Tokens are drawn from the whole vocabulary, floats from a standard normal distribution, all
    other integers and booleans are 0 or 1; masks and positions are those of full sequences.

    Args:
        inputs: of the model.
        tokens: the input that looks up tokens and their number, None if there is none.
        length: of every dynamic axis but the first. Default: 128.
        seed: of the numbers.

    Raises:
        ModelError: an input has no shape.
    """

    label = "random calibration data"
    notes = (WARNING,)

    def __init__(
        self,
        inputs: Sequence[InputSpec],
        tokens: tuple[str, int] | None = None,
        *,
        length: int | None = None,
        seed: int = 0,
    ) -> None:
        self._inputs, self._tokens, self._seed = inputs, tokens, seed
        self._length = length or DEFAULT_LENGTH
        if shapeless := [spec.name for spec in inputs if spec.shape is None]:
            raise ModelError(f"input {shapeless[0]!r} has no shape: random data cannot fit it")

    def __len__(self) -> int:
        return COUNT

    def feed(self, index: Sequence[int]) -> Feed:
        """Return random numbers that depend on the seed and the indices."""
        draw = np.random.default_rng([self._seed, *index])
        ids = next((spec for spec in self._inputs if spec.name == IDS), None)
        vocabulary = self._tokens[1] if self._tokens else 2
        feed: Feed = {}
        if ids is not None:
            length = (ids.shape or (None,))[-1] or self._length
            rows = list(draw.integers(0, vocabulary, (len(index), length)))
            feed = token_feed(rows, [s for s in self._inputs if determined(s)], 0, length)
        for spec in self._inputs:
            if spec.optional or spec.name in feed:
                continue
            first, *rest = spec.shape or (1,)
            shape = (
                *([first or len(index)] if spec.shape else []),
                *(size or self._length for size in rest),
            )
            bound = vocabulary if self._tokens and spec.name == self._tokens[0] else 2
            real = spec.dtype.kind == "f"
            numbers = draw.standard_normal(shape) if real else draw.integers(0, bound, shape)
            feed[spec.name] = np.asarray(numbers).astype(spec.dtype)
        return feed
