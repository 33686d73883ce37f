"""Read feeds from files and from Python, and check each one against the model's inputs.

A feed is a dict, input name -> array. Every function raises DataError with one line that starts
with a label of the data and names the tensor at fault.
"""

from __future__ import annotations

import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, IobsError
from iobs_onnx.runtime.data.named import NoCallable, find_callable
from iobs_onnx.runtime.session import InputSpec

Feed: TypeAlias = dict[str, NDArray[Any]]

_END = object()
# What archives may expand to beyond their own size. Masks and token ids shrink a thousandfold.
_MAX_EXPANDED_BYTES = 2**30
_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile and numpy raise over damaged archives. RuntimeError: encryption, or deep nesting;
# the last four: an array's header that is not a Python literal, or not the one expected.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    LookupError,
)


@dataclass(frozen=True)
class Files:
    """Feeds in `.npz` files of their own, loaded and checked one by one."""

    paths: tuple[Path, ...]
    inputs: tuple[InputSpec, ...]

    def select(self, chosen: Iterable[int]) -> Files:
        """Return the files at these indices."""
        return Files(tuple(self.paths[index] for index in chosen), self.inputs)

    def __iter__(self) -> Iterator[Feed]:
        for path in self.paths:
            label = f"data {path}"
            yield check_feed(_load_npz(path, label), self.inputs, label)


def read(source: str, inputs: Sequence[InputSpec], label: str) -> object:
    """Return the arrays of an `.npz`, the Files of a directory, or what `module:callable` returns.

    Pickled arrays are refused: loading them could run code.
    """
    path = Path(source)
    if path.is_dir():
        paths = tuple(sorted(path.glob("*.npz")))
        if not paths:
            raise DataError(f"{label}: the directory holds no .npz file")
        return Files(paths, tuple(inputs))
    if path.is_file():
        return _load_npz(path, label)
    if re.fullmatch(r"[\w.]+:[\w.]+", source):
        return _call(source, label)
    raise DataError(f"{label}: no such file or directory, and not of the form module:callable")


def stream(source: object, inputs: Sequence[InputSpec], label: str) -> Iterator[Feed]:
    """Yield the checked feeds of an iterable or a CalibrationDataReader, front to back."""
    get_next = getattr(source, "get_next", None)
    if callable(get_next):
        end, advance = None, get_next
    elif isinstance(source, Iterable):
        iterator = _guarded(lambda: iter(source), label)
        end, advance = _END, lambda: next(iterator, _END)
    else:
        raise DataError(
            f"{label}: {type(source).__name__} is neither a dict of arrays, an iterable of feeds "
            "nor a CalibrationDataReader"
        )
    return _checked(advance, end, inputs, label)


def check_feed(
    feed: object, inputs: Sequence[InputSpec], label: str, *, rows: bool = False
) -> Feed:
    """Return the feed's arrays if they are exactly what the model takes.

    Inputs with a default in the model may be missing. With `rows` the first axis, of samples,
    may have any length.
    """
    if not isinstance(feed, Mapping):
        raise DataError(f"{label}: expected a dict of arrays, found {type(feed).__name__}")
    names = [spec.name for spec in inputs]
    if extra := [name for name in feed if name not in names]:
        raise DataError(
            f"{label}: {extra[0]!r} is not an input of the model, which takes {', '.join(names)}"
        )
    arrays = {}
    for spec in inputs:
        if spec.name in feed:
            where = f"{label}: input {spec.name!r}"
            arrays[spec.name] = _check_array(feed[spec.name], spec, where, rows)
        elif not spec.optional:
            raise DataError(f"{label}: input {spec.name!r} is missing")
    return arrays


def _check_array(value: object, spec: InputSpec, where: str, rows: bool) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} is not an array: {error}") from error
    if array.dtype != spec.dtype:
        raise DataError(
            f"{where} is {array.dtype}, the model takes {spec.dtype}: "
            f"convert it with .astype('{spec.dtype}')"
        )
    if spec.shape is not None:
        if array.ndim != len(spec.shape):
            raise DataError(
                f"{where} has shape {array.shape}, the model takes {len(spec.shape)} dimensions"
            )
        for axis, (found, wanted) in enumerate(zip(array.shape, spec.shape, strict=True)):
            if wanted is not None and found != wanted and not (rows and axis == 0):
                raise DataError(
                    f"{where} has shape {array.shape}, the model takes {wanted} along axis {axis}"
                )
    if array.size == 0 and not spec.cache:
        raise DataError(f"{where} is empty: shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where} holds NaN or Inf")
    return array


def _load_npz(path: Path, label: str) -> Feed:
    """Load an archive whose arrays, sizes and types are declared honestly.

    What it says it holds is read and bounded before any array is made: a few kilobytes of deflated
    zeros, or a header alone, may declare terabytes.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                raise DataError(
                    f"{label}: a lone array; save an .npz with one array for each input"
                )
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _require_bounded(members, path.stat().st_size, label)
            return {
                member.filename.removesuffix(".npy"): _load_member(archive, member, label)
                for member in members
            }
    except _UNREADABLE as error:
        fault = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{label}: not a readable .npz of plain arrays: {fault}") from error


def _require_bounded(members: Sequence[zipfile.ZipInfo], file_size: int, label: str) -> None:
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        raise DataError(f"{label}: it holds two arrays of one name; save it again")
    total = sum(member.file_size for member in members)
    if total > _MAX_EXPANDED_BYTES + file_size:
        raise DataError(
            f"{label}: {file_size} bytes that expand to {total}; save it uncompressed "
            "(numpy.savez), or in several files"
        )


def _load_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, label: str) -> NDArray[Any]:
    what = f"{label}: array {member.filename!r:.200}"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{what} is compressed in an unknown way; save it with numpy.savez")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in _READ_HEADER:
            raise DataError(f"{what} is stored in format {version}, which no plain array needs")
        shape, _, dtype = _READ_HEADER[version](stream)
        if dtype.hasobject:
            raise DataError(f"{what} is pickled, and loading it could run code; save plain arrays")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != member.file_size - stream.tell():
            raise DataError(f"{what} does not fit its shape {shape}; save it again")
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _call(source: str, label: str) -> object:
    try:
        function = _guarded(lambda: find_callable(source), label)
    except NoCallable as error:
        raise DataError(f"{label}: {error}") from error
    return _guarded(function, label)


def _checked(
    advance: Callable[[], Any], end: object, inputs: Sequence[InputSpec], label: str
) -> Iterator[Feed]:
    index = 0
    while (feed := _guarded(advance, label)) is not end:
        yield check_feed(feed, inputs, f"{label}: feed {index}")
        index += 1


def _guarded(call: Callable[[], Any], label: str) -> Any:
    """Call code of the user's, which may raise anything; say whose it was."""
    try:
        return call()
    except IobsError:
        raise
    except Exception as error:
        raise DataError(f"{label}: it raised {type(error).__name__}: {error}") from error
