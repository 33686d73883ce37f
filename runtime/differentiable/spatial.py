"""Kernels over spatial axes: padding by every rule, as convolutions and pools share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iobs_onnx.runtime.differentiable.context import Context


@dataclass(frozen=True)
class Windows:
    """How a kernel is laid over an input, one number for each spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def spans(self) -> tuple[int, ...]:
        """From the first to the last element that a kernel reads."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def symmetric(self) -> bool:
        """Whether both ends are padded alike."""
        return self.begin == self.end

    def flat_pads(self) -> list[int]:
        """Return begin and end of each axis, last axis first, as torch's `pad` takes them."""
        pairs = zip(reversed(self.begin), reversed(self.end), strict=True)
        return [amount for pair in pairs for amount in pair]


def windows(context: Context, space: Sequence[int], kernel: Sequence[int]) -> Windows:
    """Read strides, dilations and padding of a node for an input of size `space`.

    Raises:
        ModelError: `auto_pad` is unknown, or there are more than three spatial axes.
    """
    rank = len(space)
    if not 1 <= rank <= 3:
        raise context.error(f"{rank} spatial axes: torch has kernels for one to three")
    strides = context.integers("strides") or (1,) * rank
    dilations = context.integers("dilations") or (1,) * rank
    pads = context.integers("pads") or (0,) * (2 * rank)
    begin, end = tuple(pads[:rank]), tuple(pads[rank:])
    mode = context.text("auto_pad", "NOTSET") or "NOTSET"
    plain = Windows(tuple(kernel), tuple(strides), tuple(dilations), begin, end)
    if mode == "NOTSET":
        return plain
    zeros = (0,) * rank
    if mode == "VALID":
        return Windows(plain.kernel, plain.strides, plain.dilations, zeros, zeros)
    if not mode.startswith("SAME"):
        raise context.error(f"auto_pad {mode!r} is not known")
    totals = [
        max(0, (-(-length // stride) - 1) * stride + span - length)
        for length, stride, span in zip(space, strides, plain.spans, strict=True)
    ]
    small = tuple(total // 2 for total in totals)
    large = tuple(total - total // 2 for total in totals)
    ends = (small, large) if mode == "SAME_UPPER" else (large, small)
    return Windows(plain.kernel, plain.strides, plain.dilations, *ends)
