"""The grids of stored integers: what the numbers of a quantized weight stand for."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Quantized:
    """The grid that an integer tensor stands for: `(stored - zero_point) * scale`.

    `scale` and `zero_point` hold one entry, or with an `axis` (of the stored tensor) one for each
    index of it. A zero is stored as the zero point, hence is exactly zero when read.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None

    def dequantize(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the numbers that a stored tensor stands for, float32."""
        shape = self._spread(stored.ndim)
        zero = np.array(self.zero_point, np.int32).reshape(shape)
        scale = np.array(self.scale, np.float32).reshape(shape)
        return (stored.astype(np.int32) - zero).astype(np.float32) * scale

    def quantize(
        self, real: NDArray[np.float32], dtype: np.dtype[np.generic]
    ) -> NDArray[np.generic]:
        """Return the nearest stored tensor of an integer `dtype`; ends of the range saturate."""
        shape = self._spread(real.ndim)
        zero = np.array(self.zero_point, np.int32).reshape(shape)
        scale = np.array(self.scale, np.float32).reshape(shape)
        steps = np.zeros_like(real)
        # A channel of scale 0 stands for zeros, whatever is stored.
        np.divide(real, scale, out=steps, where=scale != 0)
        limits = ml_dtypes.iinfo(dtype)
        stored = np.clip(np.rint(steps) + zero, int(limits.min), int(limits.max))
        return stored.astype(np.int32).astype(dtype)

    def _spread(self, rank: int) -> list[int]:
        """The shape in which scales meet a stored tensor of `rank` axes."""
        return [-1 if axis == self.axis else 1 for axis in range(rank)]


@dataclass(frozen=True)
class Packed:
    """The grid of a weight `(out, in)` as com.microsoft MatMulNBits packs it.

    The stored tensor is `(out, blocks, bytes)`, uint8. A byte holds `8 / bits` integers, the first
    in its lowest bits. Each block of an output has a scale and a zero point of its own, and stands
    for `(integer - zero_point) * scale`; what fills the last block up counts for nothing.

    `scales`, float32, and `zeros`, uint8, are the bytes of arrays `(out, blocks)`: millions of
    numbers, which are to be hashed once.
    """

    bits: int
    block: int
    columns: int
    scales: bytes
    zeros: bytes

    @classmethod
    def of(
        cls,
        bits: int,
        block: int,
        columns: int,
        scales: NDArray[np.generic],
        zeros: NDArray[np.generic] | None,
    ) -> Packed | None:
        """Return the grid; None where scales are not finite, or zero points no integers of it.

        Args:
            bits, block, columns: as above; `columns` is the number of inputs.
            scales: `(out, blocks)`.
            zeros: packed, `(out, bytes)`, or one number a block, `(out, blocks)`, of a floating
                type; None for half the range.
        """
        outputs, blocks = scales.shape
        if zeros is None:
            points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
        elif zeros.dtype == np.uint8:
            points = _unpacked(zeros.reshape(outputs, -1), bits)[:, :blocks]
        else:
            points = zeros.reshape(scales.shape).astype(np.float32).round().astype(np.uint8)
            if (points != zeros.reshape(scales.shape)).any() or (points >> bits).any():
                return None
        if not np.isfinite(scales.astype(np.float32)).all():
            return None
        wide = scales.astype(np.float32)
        return cls(bits, block, columns, wide.tobytes(), np.ascontiguousarray(points).tobytes())

    @property
    def zero_point(self) -> tuple[int, ...]:
        """The zero points that occur."""
        return tuple(sorted(set(self.zeros)))

    def dequantize(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the numbers `(out, in)` that a stored tensor stands for, float32."""
        scale, zero = self._grid(len(stored))
        codes = _unpacked(stored.reshape(len(stored), -1), self.bits)
        return ((codes.astype(np.float32) - zero) * scale)[:, : self.columns]

    def quantize(
        self, real: NDArray[np.float32], dtype: np.dtype[np.generic]
    ) -> NDArray[np.generic]:
        """Return the nearest stored tensor of `dtype`, uint8; ends of the range saturate."""
        scale, zero = self._grid(len(real))
        steps = np.zeros_like(scale)
        # A block of scale 0 stands for zeros, whatever is stored.
        np.divide(
            real,
            scale[:, : self.columns],
            out=steps[:, : self.columns],
            where=scale[:, : self.columns] != 0,
        )
        codes = np.clip(np.rint(steps) + zero, 0, (1 << self.bits) - 1).astype(np.uint8)
        parts = codes.reshape(len(real), -1, 8 // self.bits)
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        packed = np.bitwise_or.reduce(parts << shifts, axis=-1)
        return packed.reshape(len(real), -1, self.block * self.bits // 8).astype(dtype)

    def _grid(self, outputs: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scale and zero point of every stored integer, `(out, blocks * block)`."""
        scale = np.frombuffer(self.scales, np.float32).reshape(outputs, -1)
        zero = np.frombuffer(self.zeros, np.uint8).reshape(outputs, -1).astype(np.float32)
        return scale.repeat(self.block, axis=1), zero.repeat(self.block, axis=1)


def _unpacked(stored: NDArray[np.generic], bits: int) -> NDArray[np.uint8]:
    """Return the integers of packed rows, `(rows, bytes * 8 / bits)`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (stored.astype(np.uint8)[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(stored), -1)
