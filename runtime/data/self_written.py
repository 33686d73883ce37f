"""Calibration text that a causal language model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.samples import Samples
from iobs_onnx.runtime.data.tokens import DEFAULT_LENGTH, IDS, row_length, token_feed
from iobs_onnx.runtime.session import InputSpec, run_errors

if TYPE_CHECKING:
    import onnxruntime as ort

COUNT = 64
# Beside those that calibrate one in ten is written to be held out.
_HELD_OUT = 9


class SelfSamples(Samples):
    """Texts sampled from the model, token by token, each from the full softmax distribution.

    Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2023,
    section 3.1, calibrate so. A text starts with `start`, or else with a token of its own, drawn
    from the whole vocabulary. Where the model has a cache of past keys and values, it is used.

    Args:
        session: of the whole model; it must be causal.
        inputs: of the model.
        vocabulary: the number of tokens.
        count: texts to calibrate on; some more are there to be held out.
        length: tokens in a text. Default: what the model fixes, else 128.
        start: the first token of every text.
        seed: with its own index it decides what a text becomes.

    Raises:
        DataError: the model takes no `input_ids`, gives no logits, a token changes what stands
            before it, or, while text is written, logits are not finite.
        OptionError: `start` is not a token of the model.
    """

    label = "text that the model wrote"
    notes = ("calibrated on text that the model wrote itself",)

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[InputSpec],
        vocabulary: int,
        *,
        count: int | None = None,
        length: int | None = None,
        start: int | None = None,
        seed: int = 0,
    ) -> None:
        ids = next((spec for spec in inputs if spec.name == IDS), None)
        if ids is None:
            raise DataError(f"calibration self: the model has no input {IDS!r} to write to")
        if start is not None and not 0 <= start < vocabulary:
            raise OptionError(f"start_token {start}: the model has tokens 0 to {vocabulary - 1}")
        self._session, self._inputs, self._vocabulary = session, inputs, vocabulary
        self._count = count or COUNT
        self._length, self._fixed = row_length(ids, length, DEFAULT_LENGTH)
        self._start, self._seed = start, seed
        self._rows: list[NDArray[np.int64]] = []
        self._logits = self._find_logits((ids.shape or (None,))[0] or 1)
        self._presents = self._find_presents()

    def __len__(self) -> int:
        return self._count + max(1, self._count // _HELD_OUT)

    def feed(self, index: Sequence[int]) -> Feed:
        """Return the texts at these indices; the first call writes all, and gives the model up."""
        if not self._rows:
            self._rows = self._write_all(len(index))
            del self._session  # it holds the whole model
        return token_feed([self._rows[i] for i in index], self._inputs, 0, self._length)

    def _write_all(self, batch: int) -> list[NDArray[np.int64]]:
        last, rows = len(self) - 1, []
        for start in range(0, len(self), batch):
            # The model may be made for batches of one size: the last one is filled up.
            rows += list(self._write([min(start + i, last) for i in range(batch)]))
        return rows[: last + 1]

    def _write(self, index: Sequence[int]) -> NDArray[np.int64]:
        draws = [np.random.default_rng([self._seed, i]) for i in index]
        firsts = [draw.integers(self._vocabulary) for draw in draws]
        rows = np.array([[first if self._start is None else self._start] for first in firsts])
        past: Feed = {}
        while rows.shape[1] < self._length:
            logits, past = self._next(rows, past)
            rows = np.column_stack([rows, _sample(logits, draws)])
        return rows

    def _next(self, rows: NDArray[np.int64], past: Feed) -> tuple[NDArray[np.float64], Feed]:
        """Return the logits behind the last token, `(rows, vocabulary)`, and the cache so far."""
        length = rows.shape[1]
        feed = token_feed(list(rows), self._inputs, 0, self._length if self._fixed else length)
        if past:  # the mask covers the past as well
            own = {name: feed[name][:, -1:] for name in (IDS, "position_ids") if name in feed}
            feed |= {**own, **past}
            if "use_cache_branch" in feed:
                feed["use_cache_branch"] = np.ones(1, bool)
        with run_errors():
            logits, *presents = self._session.run([self._logits, *self._presents], feed)
        last = logits[:, length - 1 if self._fixed else -1].astype(np.float64)
        return last, dict(zip(self._presents.values(), presents, strict=True))

    def _find_logits(self, rows: int) -> str:
        """Return the output `(rows, sequence, vocabulary)`, having seen that it only looks back."""
        probe = np.zeros((rows, self._length if self._fixed else 4), np.int64)
        changed = probe.copy()
        changed[:, -1] = self._vocabulary - 1
        with run_errors():
            first, second = (
                self._session.run(None, token_feed(list(ids), self._inputs, 0, ids.shape[1]))
                for ids in (probe, changed)
            )
        shape = (*probe.shape, self._vocabulary)
        for output, a, b in zip(self._session.get_outputs(), first, second, strict=True):
            if np.shape(a) == shape:
                if np.allclose(a[:, :-1], b[:, :-1], rtol=1e-3, atol=1e-3):
                    return str(output.name)
                raise DataError(
                    f"calibration self: output {output.name!r} changes where a later token does: "
                    "the model cannot write text; give data"
                )
        raise DataError(
            f"calibration self: no output is a number for each of {self._vocabulary} tokens at "
            "each position: the model cannot write text; give data"
        )

    def _find_presents(self) -> dict[str, str]:
        """Return outputs and the inputs that take them in the next step; none if one is missing."""
        outputs = {output.name for output in self._session.get_outputs()}
        pairs = {
            spec.name.replace("past_key_values", "present", 1): spec.name
            for spec in self._inputs
            if spec.cache
        }
        return pairs if pairs.keys() <= outputs and not self._fixed else {}


def _sample(logits: NDArray[np.float64], draws: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """Draw a token for each row from the softmax of its logits."""
    shares = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
    if not np.isfinite(shares[:, -1]).all():
        raise DataError("calibration self: the model's logits hold NaN or Inf; give data")
    marks = [draw.random() * row[-1] for draw, row in zip(draws, shares, strict=True)]
    return np.array([np.searchsorted(r, m, "right") for r, m in zip(shares, marks, strict=True)])
