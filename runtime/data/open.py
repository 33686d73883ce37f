"""Calibration and evaluation data: open, choose, hold out and batch.

Data come as

* an `.npz` file, or a dict of arrays: input name -> array whose first axis is samples;
* a `.jsonl` or `.parquet` of arrays: see :class:`iobs_onnx.runtime.TableSamples`;
* a directory of `.npz` files, one ready-made feed each, whose shapes may differ;
* `module:callable`, returning any of the forms that follow, or a dict of arrays;
* an iterable of feeds (input name -> array), or an ONNX Runtime `CalibrationDataReader`
  (`get_next()` returns a feed, None at the end), read once, front to back;
* :class:`iobs_onnx.runtime.Samples`: texts, images, recordings, random numbers.

A *sample* is a row of arrays or of a table, one of Samples, and a feed of the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.runtime.data.feeds import Feed, Files, check_feed, read, stream
from iobs_onnx.runtime.data.samples import Samples
from iobs_onnx.runtime.data.table import SUFFIXES, TableSamples
from iobs_onnx.runtime.session import InputSpec

DEFAULT_BATCH = 16
HOLDOUT = 64
PAD_MASK = "attention_mask"
_HOLDOUT_EVERY = 10


@dataclass
class Data:
    """Feeds to calibrate on, and others, never calibrated on, to verify with.

    Attributes:
        calibration: the feeds. Data that can be read only once are read while this is iterated,
            and it can then be iterated only once.
        held_out: the feeds set aside; complete when `calibration` has been read to its end.
        batches: the number of feeds in `calibration`, None while it is not known.
        samples: samples in `calibration`, counted as they are read if not known before.
        held_out_samples: samples in `held_out`, likewise.
        notes: what a report must say: samples that were missing or dropped.
    """

    calibration: Iterable[Feed] = ()
    held_out: Iterable[Feed] = ()
    batches: int | None = None
    samples: int = 0
    held_out_samples: int = 0
    notes: list[str] = field(default_factory=list)

    def in_memory(self) -> Data:
        """Return data whose feeds can be iterated more than once; these are read to their end."""
        feeds = list(self.calibration)
        return replace(self, calibration=feeds, batches=len(feeds))


def open_data(
    source: object,
    inputs: Sequence[InputSpec],
    *,
    samples: int | None = None,
    batch_size: int | None = None,
    holdout: int = HOLDOUT,
    seed: int = 0,
) -> Data:
    """Open data in any of the forms above; every feed is checked against `inputs`.

    About one sample in ten is held out: at most `holdout`, at least one where there are two.
    Rows and files are chosen by `seed` and keep their order. Of data that are read once, the
    2nd, 12th, 22nd ... feed is held out, so that nothing else need be kept. A model with a static
    batch size holds out and calibrates on whole batches; what does not fill one is dropped.

    Args:
        source: a path, `"module:callable"`, an iterable of feeds, a CalibrationDataReader or a
            dict of arrays.
        inputs: what the model takes, from :func:`iobs_onnx.runtime.session.input_specs`.
        samples: calibrate on exactly this many where that leaves one to hold out; otherwise all
            are used, a tenth of them held out, and a note says so.
        batch_size: samples in a batch, for arrays and Samples only. Default: the model's static
            batch size, else 16.
        holdout: the most samples to hold out; 0 for none.
        seed: of the choice of samples.

    Raises:
        DataError: the data cannot be read or do not fit the model; the message names the tensor.
        OptionError: an option is out of range or does not fit this form of data.
    """
    for name, value, least in (
        ("samples", samples, 1),
        ("batch size", batch_size, 1),
        ("holdout", holdout, 0),
    ):
        if value is not None and value < least:
            raise OptionError(f"{name} {value}: must be at least {least}")
    label = "calibration data"
    if isinstance(source, str | os.PathLike):
        label = f"data {os.fspath(source)}"
        path = os.fspath(source)
        table = Path(path).suffix.lower() in SUFFIXES
        source = TableSamples.read(path, inputs) if table else read(path, inputs, label)
    split = _Split(samples, holdout, seed)
    if isinstance(source, Samples):
        return _from_samples(source, inputs, batch_size, split)
    if isinstance(source, Mapping):
        arrays = _Arrays(check_feed(source, inputs, label, rows=True), label)
        return _from_samples(arrays, inputs, batch_size, split)
    if batch_size is not None:
        raise OptionError(
            f"batch size {batch_size}: {label} holds ready-made feeds, whose size is fixed; "
            "leave the option out"
        )
    if isinstance(source, Files):
        return _from_files(source, split)
    return _from_stream(stream(source, inputs, label), split, label)


def join(parts: Sequence[Data], judging: Data | None = None) -> Data:
    """Return several data as one, read one after the other, once.

    Args:
        parts: calibrate and, without `judging`, hold out.
        judging: all of it is held out.
    """
    if len(parts) == 1 and judging is None:
        return parts[0]
    counts = [part.batches for part in parts]
    known = [count for count in counts if count is not None]
    joined = Data(batches=sum(known) if len(known) == len(counts) else None)
    if judging is not None:
        joined.held_out = list(judging.calibration)
        joined.held_out_samples = judging.samples
    else:
        joined.held_out = _Chained(parts)

    def calibration() -> Iterator[Feed]:
        for part in parts:
            yield from part.calibration
            joined.samples += part.samples
            joined.held_out_samples += part.held_out_samples
            joined.notes += part.notes

    joined.calibration = calibration()
    return joined


@dataclass(frozen=True)
class _Chained:
    """The held-out feeds of several data, read anew each time."""

    parts: Sequence[Data]

    def __iter__(self) -> Iterator[Feed]:
        for part in self.parts:
            yield from part.held_out


@dataclass(frozen=True)
class _Split:
    """How many samples calibrate, how many are held out, and which."""

    samples: int | None
    holdout: int
    seed: int

    def held_out(self, available: int) -> int:
        count = min(self.holdout, max(1, available // _HOLDOUT_EVERY), available - 1)
        if self.samples is not None and self.samples < available:
            count = min(count, available - self.samples)
        return count

    def choose(self, available: int, held: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Return the indices that calibrate and those held out, each in order."""
        order = np.random.default_rng(self.seed).permutation(available)
        stop = available if self.samples is None else min(available, held + self.samples)
        return np.sort(order[held:stop]), np.sort(order[:held])

    def note(self, data: Data) -> None:
        """Say in `data.notes` if fewer samples calibrate than were asked for."""
        if self.samples is not None and data.samples < self.samples:
            data.notes.append(
                f"{self.samples} samples were asked for: {data.samples} calibrate and "
                f"{data.held_out_samples} are held out; there are no more"
            )


class _Arrays(Samples):
    """The rows of arrays in memory."""

    def __init__(self, arrays: Feed, label: str) -> None:
        lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
        self.label, self._arrays = label, arrays
        self._available = min(lengths.values(), default=0)
        if self._available == 0 or len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name!r} {count}" for name, count in lengths.items())
            raise DataError(f"{label}: first axes (samples) differ or are empty: {counts}")

    def __len__(self) -> int:
        return self._available

    def feed(self, index: Sequence[int]) -> Feed:
        """Return the chosen rows."""
        return {name: array[np.asarray(index)] for name, array in self._arrays.items()}


@dataclass(frozen=True)
class _Batches:
    """Batches of chosen samples, checked one by one; the last one may be short."""

    samples: Samples
    inputs: Sequence[InputSpec]
    chosen: NDArray[np.intp]
    size: int

    def __iter__(self) -> Iterator[Feed]:
        for start in range(0, len(self.chosen), self.size):
            index = self.chosen[start : start + self.size].tolist()
            yield check_feed(self.samples.feed(index), self.inputs, self.samples.label)


def _from_samples(
    samples: Samples, inputs: Sequence[InputSpec], batch_size: int | None, split: _Split
) -> Data:
    size, fixed = _batch_size(inputs, batch_size)
    available = len(samples)
    held = split.held_out(available)
    if fixed and held:
        # At least one batch, if that leaves one to calibrate on.
        held = max(size, held // size * size) if available >= 2 * size else 0
    kept, rest = split.choose(available, held)
    dropped = len(kept) % size if fixed else 0
    if len(kept) == dropped:
        raise DataError(
            f"{samples.label}: {dropped} samples do not fill the model's batch of {size}"
        )
    kept = kept[: len(kept) - dropped]
    data = Data(
        _Batches(samples, inputs, kept, size),
        _Batches(samples, inputs, rest, size),
        -(-len(kept) // size),
        len(kept),
        held,
        list(samples.notes),
    )
    if dropped:
        data.notes.append(f"{dropped} samples were dropped: they do not fill a batch of {size}")
    split.note(data)
    return data


def _from_files(files: Files, split: _Split) -> Data:
    held = split.held_out(len(files.paths))
    kept, rest = split.choose(len(files.paths), held)
    data = Data(files.select(kept), files.select(rest), len(kept), len(kept), held)
    split.note(data)
    return data


def _from_stream(feeds: Iterator[Feed], split: _Split, label: str) -> Data:
    held: list[Feed] = []
    data = Data(held_out=held)

    def calibration() -> Iterator[Feed]:
        for index, feed in enumerate(feeds):
            # The second of every ten, so that two feeds are enough to hold one out.
            if index % _HOLDOUT_EVERY == 1 and len(held) < split.holdout:
                held.append(feed)
                data.held_out_samples += 1
            else:
                data.samples += 1
                yield feed
            if data.samples == split.samples and (held or not split.holdout):
                return
        if data.samples == 0:
            raise DataError(f"{label}: there are no feeds in it")
        split.note(data)

    data.calibration = calibration()
    return data


def _batch_size(inputs: Sequence[InputSpec], asked: int | None) -> tuple[int, bool]:
    """Return the batch size for data in rows, and whether the model fixes it."""
    firsts = [spec.shape[0] for spec in inputs if spec.shape and not spec.optional]
    static = sorted({size for size in firsts if size is not None})
    if not static:
        return asked or DEFAULT_BATCH, False
    if len(static) > 1:
        raise DataError(
            f"the model's inputs have different static first dimensions {static}: give ready-made "
            "feeds, in a directory of .npz files or an iterable"
        )
    if static[0] == 0:
        raise DataError("the model's inputs have a static first dimension of 0: export it again")
    if asked not in (None, static[0]):
        raise OptionError(f"batch size {asked}: the model is made for batches of {static[0]}")
    return static[0], True
