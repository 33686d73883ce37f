"""Tables of arrays as calibration data: `.jsonl` and `.parquet`, a column for each input."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.samples import Samples, require
from iobs_onnx.runtime.data.tokens import IDS, token_feed
from iobs_onnx.runtime.session import InputSpec

SUFFIXES = frozenset({".jsonl", ".parquet"})


Rows = list[Mapping[str, Any]]
Take = Callable[[Sequence[int]], Rows]


class TableSamples(Samples):
    """Every row is a sample; a field is a number or nested lists, named after an input.

    Numbers take the model's types where that loses nothing: JSON has no others. Columns that are
    no inputs (an id, a label) are left alone. In a table with `input_ids`, rows of different
    lengths are padded with 0, and what goes with them is filled in: see
    :func:`iobs_onnx.runtime.data.tokens.token_feed`.

    Args:
        count: of rows.
        take: returns the rows at some indices.
        inputs: of the model.
        label: what the table is.

    Raises:
        DataError: there are no rows.
    """

    def __init__(self, count: int, take: Take, inputs: Sequence[InputSpec], label: str) -> None:
        self.label, self._inputs = label, inputs
        self._count, self._take = count, take
        if not count:
            raise DataError(f"{label}: it holds no rows")

    @classmethod
    def read(cls, path: str, inputs: Sequence[InputSpec]) -> TableSamples:
        """Open a `.jsonl` with an object a line, or a `.parquet`.

        Raises:
            DataError: the file cannot be read.
            DependencyError: pyarrow is missing, for `.parquet`.
        """
        label, names = f"data {path}", {spec.name for spec in inputs}
        parquet = Path(path).suffix.lower() == ".parquet"
        count, take = (_parquet if parquet else _json_lines)(path, names, label)
        return cls(count, take, inputs, label)

    def __len__(self) -> int:
        return self._count

    def feed(self, index: Sequence[int]) -> Feed:
        """Return rows stacked, in the model's types."""
        rows = self._take(index)
        columns = {
            spec.name: [row[spec.name] for row in rows if row.get(spec.name) is not None]
            for spec in self._inputs
        }
        ids = columns.get(IDS, [])
        length = max(map(len, ids), default=0)
        absent = [spec for spec in self._inputs if not columns[spec.name]]
        feed = {}
        for spec in self._inputs:
            cells = columns[spec.name]
            if len(cells) == len(rows):
                padded = [_padded(cell, length) for cell in cells] if ids else cells
                feed[spec.name] = _stack(padded, spec, f"{self.label}: input {spec.name!r}")
            elif cells or (not ids and not spec.optional):
                raise DataError(f"{self.label}: input {spec.name!r} is missing in some rows")
        if ids:
            feed |= token_feed([np.asarray(row, np.int64) for row in ids], absent, 0, length)
        return feed


def _padded(cell: Any, length: int) -> Any:
    """Fill a list of numbers with zeros."""
    flat = isinstance(cell, list) and not any(isinstance(item, list) for item in cell)
    return [*cell, *[0] * (length - len(cell))] if flat else cell


def _json_lines(path: str, names: Collection[str], label: str) -> tuple[int, Take]:
    rows: Rows = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line) if line.strip() else None
                if isinstance(row, dict):
                    rows.append({name: row[name] for name in row if name in names})
                elif row is not None:
                    raise DataError(f"{label} line {number}: expected an object, input to array")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{label}: cannot be read as lines of JSON: {error}") from error
    return len(rows), lambda index: [rows[at] for at in index]


def _parquet(path: str, names: Collection[str], label: str) -> tuple[int, Take]:
    arrow = require("pyarrow", "parquet", label)
    parquet = require("pyarrow.parquet", "parquet", label)
    try:
        found = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in found if name in names])
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{label}: cannot be read as parquet: {error}") from error
    return table.num_rows, lambda index: table.take(index).to_pylist()


def _stack(cells: Sequence[Any], spec: InputSpec, where: str) -> NDArray[np.generic]:
    """Return cells as one array of the model's type."""
    try:
        array = np.array(cells)
    except ValueError as error:
        raise DataError(
            f"{where}: the rows of a batch differ in shape; pad them, or use batch_size 1"
        ) from error
    kinds = {"b": "b", "i": "biu", "u": "biu", "f": "biuf"}
    whole = array.dtype.kind == "f" and spec.dtype.kind in "iu" and (array == np.rint(array)).all()
    if not whole and array.dtype.kind not in kinds.get(spec.dtype.kind, ""):
        raise DataError(f"{where} holds {array.dtype}, the model takes {spec.dtype}")
    stored = array.astype(spec.dtype)
    if spec.dtype.kind in "iu" and (stored != array).any():
        raise DataError(f"{where} holds numbers beyond the range of {spec.dtype}")
    return stored
