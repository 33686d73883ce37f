"""Pools over windows and over all of space."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.spatial import Windows, windows

_MAX = {1: nn.max_pool1d, 2: nn.max_pool2d, 3: nn.max_pool3d}
_MEAN = {1: nn.avg_pool1d, 2: nn.avg_pool2d, 3: nn.avg_pool3d}


def _plan(context: Context, x: Tensor) -> tuple[Windows, tuple[int, ...], bool]:
    """Return the windows, how far the end is padded so that they fit, and whether that is more."""
    plan = windows(context, x.shape[2:], context.integers("kernel_shape") or ())
    ceil = bool(context.integer("ceil_mode", 0))
    ends = []
    for axis, length in enumerate(x.shape[2:]):
        begin, end, stride = plan.begin[axis], plan.end[axis], plan.strides[axis]
        room = length + begin + end - plan.spans[axis]
        count = (-(-room // stride) if ceil else room // stride) + 1
        # A window that would begin in the padding at the end is left out.
        if ceil and (count - 1) * stride >= length + begin:
            count -= 1
        ends.append((count - 1) * stride + plan.spans[axis] - length - begin)
    return plan, tuple(ends), any(e > p for e, p in zip(ends, plan.end, strict=True))


def _pads(plan: Windows, ends: tuple[int, ...]) -> list[int]:
    pairs = zip(reversed(plan.begin), reversed(ends), strict=True)
    return [amount for pair in pairs for amount in pair]


def max_pool(context: Context, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """MaxPool, with the places of the largest elements if they are asked for."""
    plan, ends, _ = _plan(context, x)
    pool = _MAX[x.ndim - 2]
    original = x.dtype
    if not x.is_floating_point():
        x = x.double()  # exact for the 8-bit types that the operator takes
    lowest = float("-inf")
    padded = nn.pad(x, _pads(plan, ends), value=lowest) if any((*plan.begin, *ends)) else x
    if context.outputs == 1:
        y: Tensor = pool(padded, plan.kernel, plan.strides, 0, plan.dilations)
        return y.to(original)
    y, places = pool(padded, plan.kernel, plan.strides, 0, plan.dilations, return_indices=True)
    return y.to(original), _flat_places(context, x, places, padded.shape[2:], plan)


def _flat_places(
    context: Context, x: Tensor, places: Tensor, padded: tuple[int, ...], plan: Windows
) -> Tensor:
    """Turn places in the padded space into places in the whole of `x`."""
    space = x.shape[2:]
    coordinates: list[Tensor] = []
    for length in reversed(padded):
        coordinates.insert(0, places % length)
        places = places // length
    coordinates = [c - begin for c, begin in zip(coordinates, plan.begin, strict=True)]
    order = range(len(space))
    if context.integer("storage_order", 0):
        order = range(len(space) - 1, -1, -1)
    flat = torch.zeros_like(places)
    for axis in order:
        flat = flat * space[axis] + coordinates[axis]
    images = torch.arange(x.shape[0] * x.shape[1]).view(*x.shape[:2], *[1] * len(space))
    return flat + images.to(x.device) * prod(space)


def average_pool(context: Context, x: Tensor) -> Tensor:
    """AveragePool; padding counts only if `count_include_pad`."""
    plan, ends, further = _plan(context, x)
    inside = bool(context.integer("count_include_pad", 0))
    padded = bool(any((*plan.begin, *ends)))
    sums = _window_means(nn.pad(x, _pads(plan, ends)) if padded else x, plan)
    if not padded or (inside and not further):
        return sums
    # The share of each window that counts: what the model pads, or nothing of it.
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    ends_of_model = tuple(min(e, p) for e, p in zip(ends, plan.end, strict=True))
    if inside:
        ones = nn.pad(ones, _pads(plan, ends_of_model), value=1.0)
        rest = [max(0, e - p) for e, p in zip(ends, ends_of_model, strict=True)]
        ones = nn.pad(ones, [amount for r in reversed(rest) for amount in (0, r)])
    else:
        ones = nn.pad(ones, _pads(plan, ends))
    return sums / _window_means(ones, plan)


def _window_means(x: Tensor, plan: Windows) -> Tensor:
    """Return the mean of each window of an input that is padded already."""
    if all(dilation == 1 for dilation in plan.dilations):
        return _MEAN[x.ndim - 2](x, plan.kernel, plan.strides)
    rank = x.ndim - 2
    for axis, span in enumerate(plan.spans):
        x = x.unfold(2 + axis, span, plan.strides[axis])[..., :: plan.dilations[axis]]
    return x.mean(list(range(-rank, 0)))


def lp_pool(context: Context, x: Tensor) -> Tensor:
    """LpPool: `(Σ |x|^p)^(1/p)` of each window."""
    plan, ends, _ = _plan(context, x)
    p = context.integer("p", 2)
    means = _window_means(nn.pad(x.abs() ** p, _pads(plan, ends)), plan)
    return (means * prod(plan.kernel)) ** (1 / p)


def global_average_pool(context: Context, x: Tensor) -> Tensor:
    """GlobalAveragePool."""
    return x.mean(list(range(2, x.ndim)), True)


def global_max_pool(context: Context, x: Tensor) -> Tensor:
    """GlobalMaxPool."""
    return x.amax(list(range(2, x.ndim)), True)


def global_lp_pool(context: Context, x: Tensor) -> Tensor:
    """GlobalLpPool."""
    return torch.linalg.vector_norm(x, context.integer("p", 2), list(range(2, x.ndim)), True)


def max_unpool(context: Context, x: Tensor, places: Tensor, target: Tensor | None = None) -> Tensor:
    """MaxUnpool: elements go back to their places, zeros elsewhere."""
    plan = windows(context, x.shape[2:], context.integers("kernel_shape") or ())
    inferred = [
        (length - 1) * stride + kernel - begin - end
        for length, stride, kernel, begin, end in zip(
            x.shape[2:], plan.strides, plan.kernel, plan.begin, plan.end, strict=True
        )
    ]
    wanted = [*x.shape[:2], *inferred] if target is None else target.tolist()
    # Places count in the inferred shape; a larger output keeps their coordinates.
    flat = x.new_zeros(x.shape[0] * x.shape[1] * prod(inferred))
    y = flat.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(*x.shape[:2], *inferred)
    amounts = []
    for axis in reversed(range(len(inferred))):
        amounts += [0, wanted[2 + axis] - inferred[axis]]
    return nn.pad(y, amounts)
