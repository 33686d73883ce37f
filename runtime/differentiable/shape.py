"""Operators that move elements about or tell of shapes, and compute nothing."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.context import Context


def sizes(x: Tensor) -> list[int]:
    """Return a tensor of integers as a list."""
    found: list[int] = x.reshape(-1).tolist()
    return found


def shape(context: Context, x: Tensor) -> Tensor:
    """Shape: of the axes from `start` to `end`."""
    start, end = context.integer("start", 0), context.integer("end", x.ndim)
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def size(context: Context, x: Tensor) -> Tensor:
    """Size: how many elements there are."""
    return torch.tensor(x.numel())


def reshape(context: Context, x: Tensor, target: Tensor) -> Tensor:
    """Reshape: 0 keeps an axis unless `allowzero`, -1 is what remains."""
    lengths: list[int] = target.tolist()
    if 0 in lengths and not context.integer("allowzero", 0):
        lengths = [length or x.shape[axis] for axis, length in enumerate(lengths)]
    if -1 in lengths and not x.numel():
        # torch will not tell -1 where there are no elements.
        others = prod(length for length in lengths if length != -1)
        lengths = [(0 if not others else x.numel() // others) if n == -1 else n for n in lengths]
    return x.reshape(lengths)


def flatten(context: Context, x: Tensor) -> Tensor:
    """Flatten to a matrix."""
    axis = context.integer("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _axes(context: Context, axes: Tensor | None) -> list[int] | None:
    if axes is not None:
        return sizes(axes)
    found = context.integers("axes")
    return None if found is None else list(found)


def squeeze(context: Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze: axes are an attribute before operator set 13."""
    found = _axes(context, axes)
    if found is None:
        return x.squeeze()
    for axis in found:
        if x.shape[axis] != 1:
            raise context.error(f"axis {axis} of shape {tuple(x.shape)} is not of length 1")
    return x.squeeze(found)


def unsqueeze(context: Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Unsqueeze: axes count in the result."""
    found = _axes(context, axes) or []
    if len(found) == 1:
        return x.unsqueeze(found[0])
    rank = x.ndim + len(found)
    for axis in sorted(axis % rank for axis in found):
        x = x.unsqueeze(axis)
    return x


def transpose(context: Context, x: Tensor) -> Tensor:
    """Transpose: reverses the axes without `perm`."""
    order = context.integers("perm")
    return x.permute(tuple(range(x.ndim))[::-1] if order is None else order)


def identity(context: Context, x: Tensor) -> Tensor:
    """Identity."""
    return x


def concat(context: Context, *parts: Tensor) -> Tensor:
    """Concat along `axis`."""
    return torch.cat(parts, context.integer("axis", 1))


def split(context: Context, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split: into given lengths, or evenly with what is left over last."""
    axis = context.integer("axis", 0)
    given = context.integers("split") if lengths is None else sizes(lengths)
    if given is None:
        count = context.integer("num_outputs", context.outputs)
        each = -(-x.shape[axis] // count)
        given = [max(0, min(each, x.shape[axis] - each * part)) for part in range(count)]
    return torch.split(x, list(given), axis)


def expand(context: Context, x: Tensor, target: Tensor) -> Tensor:
    """Expand: both shapes broadcast."""
    wanted = sizes(target)
    # torch.broadcast_shapes takes longer than the rest of a small node.
    own = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (x.ndim - len(wanted)) + wanted
    return x.expand([a if b == 1 else b for a, b in zip(own, wanted, strict=True)])


def tile(context: Context, x: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return x.repeat(sizes(repeats))


def slice_(
    context: Context,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Slice: bounds are attributes before operator set 10."""
    if starts is None or ends is None:
        first, last = list(context.integers("starts") or ()), list(context.integers("ends") or ())
        given = context.integers("axes")
    else:
        first, last = starts.tolist(), ends.tolist()
        given = None if axes is None else tuple(axes.tolist())
    along = range(len(first)) if given is None else given
    strides = [1] * len(first) if steps is None else steps.tolist()
    picks = [slice(None)] * x.ndim
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        length = x.shape[axis]
        if step > 0:  # torch warns of the lowest number of 64 bits
            picks[axis] = slice(*slice(start, end, step).indices(length))
            continue
        # torch has no negative steps. An end before the first element is None to Python.
        end = end + length if end < 0 else end  # noqa: PLW2901
        indices = range(length)[slice(start, None if end < 0 else end, step)]
        x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64, device=x.device))
    return x[tuple(picks)]


def depth_to_space(context: Context, x: Tensor) -> Tensor:
    """DepthToSpace, in modes DCR and CRD."""
    block = context.integer("blocksize", 1)
    batch, channels, height, width = x.shape
    inner = channels // block**2
    if context.text("mode", "DCR") == "DCR":
        x = x.reshape(batch, block, block, inner, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, inner, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, inner, height * block, width * block)


def space_to_depth(context: Context, x: Tensor) -> Tensor:
    """SpaceToDepth; mode CRD keeps the channels in front."""
    block = context.integer("blocksize", 1)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block, block, width // block, block)
    crd = context.text("mode", "DCR") == "CRD"
    x = x.permute(0, 1, 3, 5, 2, 4) if crd else x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, channels * block**2, height // block, width // block)


def trilu(context: Context, x: Tensor, k: Tensor | None = None) -> Tensor:
    """Trilu: the upper or lower triangle of each matrix."""
    diagonal = 0 if k is None else int(k)
    return x.triu(diagonal) if context.integer("upper", 1) else x.tril(diagonal)


def reverse_sequence(context: Context, x: Tensor, lengths: Tensor) -> Tensor:
    """ReverseSequence: the first elements of each sequence, as many as it is long."""
    time, batch = context.integer("time_axis", 0), context.integer("batch_axis", 1)
    steps = torch.arange(x.shape[time], device=x.device)
    ends = lengths.to(x.device)[:, None]
    order = torch.where(steps < ends, ends - 1 - steps, steps)  # (batch, time)
    moved = x.movedim((batch, time), (0, 1))
    rows = torch.arange(x.shape[batch], device=x.device)[:, None]
    return moved[rows, order].movedim((0, 1), (batch, time))
