"""Pad in all its modes, and CenterCropPad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.shape import sizes


def pad(
    context: Context,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """Pad; pads and value are attributes before operator set 11. Negative pads cut off."""
    if context.version < 11:
        amounts = list(context.integers("pads") or ())
        fill = context.number("value", 0.0)
    else:
        amounts = [] if pads is None else sizes(pads)
        fill = 0.0 if value is None or not value.numel() else value.item()
    along = range(x.ndim) if axes is None else [axis % x.ndim for axis in sizes(axes)]
    both = [(0, 0)] * x.ndim
    for place, axis in enumerate(along):
        both[axis] = (amounts[place], amounts[place + len(amounts) // 2])
    mode = context.text("mode", "constant")
    if mode == "constant":
        flat = [amount for pair in reversed(both) for amount in pair]
        return nn.pad(x, flat, value=fill) if any(flat) else x
    for axis, (begin, end) in enumerate(both):
        if begin < 0 or end < 0:
            # What is cut off is not repeated.
            x = x.narrow(axis, max(0, -begin), x.shape[axis] + min(begin, 0) + min(end, 0))
            begin, end = max(begin, 0), max(end, 0)  # noqa: PLW2901
        if begin or end:
            x = x.index_select(axis, _source(context, mode, x.shape[axis], begin, end).to(x.device))
    return x


def _source(context: Context, mode: str, length: int, begin: int, end: int) -> Tensor:
    """Return which element each place of a padded axis repeats."""
    places = torch.arange(-begin, length + end)
    match mode:
        case "edge":
            return places.clamp(0, length - 1)
        case "wrap":
            return places % length
        case "reflect":
            period = max(2 * (length - 1), 1)
            places = places % period
            return torch.minimum(places, period - places) if length > 1 else places * 0
    raise context.error(f"mode {mode!r} is not known")


def center_crop_pad(context: Context, x: Tensor, target: Tensor) -> Tensor:
    """CenterCropPad: to a size, around the middle."""
    axes = context.integers("axes") or tuple(range(x.ndim))
    for axis, wanted in zip(axes, sizes(target), strict=True):
        length = x.shape[axis]
        if wanted <= length:
            x = x.narrow(axis, (length - wanted) // 2, wanted)
            continue
        amounts = [0, 0] * x.ndim
        place = 2 * (x.ndim - 1 - axis % x.ndim)
        amounts[place] = (wanted - length) // 2
        amounts[place + 1] = wanted - length - amounts[place]
        x = nn.pad(x, amounts)
    return x
