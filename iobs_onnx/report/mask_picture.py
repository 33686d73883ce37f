"""A mask small enough for the report: one corner of it bit by bit, and all of it as densities."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# At most 0.5 KB and 1 KB of text, whatever the weight's size.
_CORNER = (48, 64)
_CELLS = (24, 32)


@dataclass(frozen=True)
class MaskPicture:
    """Which weights of a site are kept; rows are outputs, all groups below each other.

    Attributes:
        shape: rows and columns of the whole mask.
        corner_shape: rows and columns of its top left corner that are stored exactly.
        corner: that corner, row by row, a bit a weight (1 = kept), most significant bit first,
            in base64.
        density_shape: rows and columns of the cells that the whole mask is cut into.
        density: the share of kept weights of each cell, row by row, as a byte (255 = all), in
            base64.
    """

    shape: list[int]
    corner_shape: list[int]
    corner: str
    density_shape: list[int]
    density: str

    @classmethod
    def of(cls, weight: NDArray[np.generic]) -> MaskPicture:
        """Draw the support of a weight `(groups, out, in)`."""
        mask = (weight != 0).reshape(-1, weight.shape[-1])
        rows, columns = mask.shape
        corner = mask[: _CORNER[0], : _CORNER[1]]
        density = _densities(mask, min(_CELLS[0], rows), min(_CELLS[1], columns))
        return cls(
            [rows, columns],
            list(corner.shape),
            _text(np.packbits(corner)),
            list(density.shape),
            _text(np.rint(255 * density).astype(np.uint8)),
        )


def _densities(mask: NDArray[np.bool_], rows: int, columns: int) -> NDArray[np.float64]:
    """Cut a mask into `rows × columns` cells as equal as can be; return the share kept in each."""
    edges = [np.arange(n) * size // n for n, size in zip((rows, columns), mask.shape, strict=True)]
    sizes = [np.diff(edge, append=size) for edge, size in zip(edges, mask.shape, strict=True)]
    along = np.add.reduceat(mask, edges[1], axis=1, dtype=np.int64)
    counts = np.add.reduceat(along, edges[0], axis=0)
    return counts / np.outer(*sizes)


def _text(data: NDArray[np.uint8]) -> str:
    return base64.b64encode(data.tobytes()).decode("ascii")
