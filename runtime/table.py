"""Tables of arrays as calibration data: `.jsonl` and `.parquet`, a column for each input."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError
from iobs_onnx.runtime.feeds import Feed
from iobs_onnx.runtime.samples import Samples, require
from iobs_onnx.runtime.session import InputSpec

SUFFIXES = frozenset({".jsonl", ".parquet"})


class TableSamples(Samples):
    """Every row is a sample; a field is a number or nested lists, named after an input.

    Numbers take the model's types where that loses nothing: JSON has no others. Columns that are
    no inputs (an id, a label) are left alone.

    Args:
        path: a `.jsonl` with an object a line, or a `.parquet`.
        inputs: of the model.

    Raises:
        DataError: the file cannot be read, or a column is missing.
        DependencyError: pyarrow is missing, for `.parquet`.
    """

    def __init__(self, path: str, inputs: Sequence[InputSpec]) -> None:
        self.label, self._inputs = f"data {path}", inputs
        parquet = Path(path).suffix.lower() == ".parquet"
        names = {spec.name for spec in inputs}
        self._count, self._take = (_parquet if parquet else _json_lines)(path, names, self.label)
        if not self._count:
            raise DataError(f"{self.label}: it holds no rows")

    def __len__(self) -> int:
        return self._count

    def feed(self, index: Sequence[int]) -> Feed:
        """Return rows stacked, in the model's types."""
        rows = self._take(index)
        feed = {}
        for spec in self._inputs:
            cells = [row[spec.name] for row in rows if row.get(spec.name) is not None]
            if len(cells) == len(rows):
                feed[spec.name] = _stack(cells, spec, f"{self.label}: input {spec.name!r}")
            elif cells or not spec.optional:
                raise DataError(f"{self.label}: input {spec.name!r} is missing in some rows")
        return feed


Rows = list[Mapping[str, Any]]
Take = Callable[[Sequence[int]], Rows]


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
