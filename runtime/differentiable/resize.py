"""Resize and Upsample, axis by axis: an axis is gathered from, or multiplied by a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.shape import sizes

_TORCH = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class _Axis:
    """One axis that is resized: `scale` is what the model gives, not always `new / old`."""

    axis: int
    old: int
    new: int
    scale: float
    roi: tuple[float, float]


def resize(
    context: Context,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Resize; before operator set 11 the second input is the scales."""
    if context.version < 11:
        roi, scales = None, roi
    return _resize(context, x, roi, scales, lengths)


def upsample(context: Context, x: Tensor, scales: Tensor | None = None) -> Tensor:
    """Upsample: Resize by the coordinates of operator set 10."""
    if scales is None:
        scales = torch.tensor(context.attributes["scales"])
    return _resize(context, x, None, scales, None)


def _resize(
    context: Context,
    x: Tensor,
    roi: Tensor | None,
    scales: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    old = context.version < 11 or context.op_type == "Upsample"
    mode = context.text("mode", "nearest")
    coordinates = context.text(
        "coordinate_transformation_mode", "asymmetric" if old else "half_pixel"
    )
    axes = _axes(context, x, roi, scales, lengths)
    if mode == "nearest":
        rounding = context.text("nearest_mode", "floor" if old else "round_prefer_floor")
        if old and context.op_type == "Resize" and any(a.scale < 1 for a in axes):
            rounding = "ceil"  # as ONNX Runtime reads what operator set 10 leaves open
        return _nearest(context, x, axes, coordinates, rounding)
    if mode not in ("linear", "cubic"):
        raise context.error(f"mode {mode!r} is not known")
    antialias = bool(context.integer("antialias", 0))
    outside = bool(context.integer("exclude_outside", 0))
    if mode == "linear" and not antialias and not outside:
        fast = _by_torch(x, axes, coordinates)
        if fast is not None:
            return fast
    cubic = context.number("cubic_coeff_a", -0.75) if mode == "cubic" else None
    original = x.dtype
    x = x if x.is_floating_point() else x.float()
    for one in axes:
        place, beyond = _coordinates(context, one, coordinates)
        matrix = _matrix(place, one, cubic, antialias, outside).to(x.device, x.dtype)
        x = torch.matmul(x.movedim(one.axis, -1), matrix.t()).movedim(-1, one.axis)
        x = _extrapolated(context, x, one, beyond)
    if not original.is_floating_point:
        bounds = torch.iinfo(original)
        x = x.clamp(bounds.min, bounds.max).round() if original != torch.uint8 else x
    return x.to(original)


def _axes(
    context: Context,
    x: Tensor,
    roi: Tensor | None,
    scales: Tensor | None,
    lengths: Tensor | None,
) -> list[_Axis]:
    """Return the axes whose size, scale or region is not that of the input."""
    given = context.integers("axes")
    axes = list(range(x.ndim)) if given is None else [axis % x.ndim for axis in given]
    old = [x.shape[axis] for axis in axes]
    if lengths is not None and lengths.numel():
        new = sizes(lengths)
        factors = [n / o for n, o in zip(new, old, strict=True)]
        policy = context.text("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors = [factor] * len(axes)
            new = [floor(factor * length + 0.5) for length in old]
    else:
        assert scales is not None
        factors = scales.tolist()
        new = [floor(factor * length) for factor, length in zip(factors, old, strict=True)]
    corners = [0.0] * len(axes) + [1.0] * len(axes)
    if roi is not None and roi.numel():
        corners = roi.tolist()
    cropped = context.text("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    found = []
    for place, axis in enumerate(axes):
        region = (corners[place], corners[place + len(axes)])
        one = _Axis(axis, old[place], new[place], factors[place], region)
        if one.new != one.old or one.scale != 1 or (cropped and region != (0.0, 1.0)):
            found.append(one)
    return found


def _coordinates(context: Context, one: _Axis, mode: str) -> tuple[Tensor, Tensor | None]:
    """Return where in the input each output lies, and which lie beyond a cropped region.

    In float32, as ONNX Runtime does: half-way places then round alike.
    """
    place = torch.arange(one.new, dtype=torch.float32)
    width = one.scale * one.old
    match mode:
        case "half_pixel":
            return (place + 0.5) / one.scale - 0.5, None
        case "pytorch_half_pixel":
            return (place + 0.5) / one.scale - 0.5 if width != 1 else place * 0 - 0.5, None
        case "asymmetric":
            return place / one.scale, None
        case "align_corners":
            # By the whole number of outputs, as ONNX Runtime does.
            return place * ((one.old - 1) / max(one.new - 1, 1)), None
        case "half_pixel_symmetric":
            offset = one.old / 2 * (1 - one.new / width)
            return offset + (place + 0.5) / one.scale - 0.5, None
        case "tf_crop_and_resize":
            start, end = one.roi
            if one.new > 1:
                place = (start + place * (end - start) / (one.new - 1)) * (one.old - 1)
            else:
                place = place + (start + end) / 2 * (one.old - 1)
            return place, (place < 0) | (place > one.old - 1)
    raise context.error(f"coordinate_transformation_mode {mode!r} is not known")


def _extrapolated(context: Context, x: Tensor, one: _Axis, beyond: Tensor | None) -> Tensor:
    if beyond is None or not beyond.any():
        return x
    view = [1] * x.ndim
    view[one.axis] = -1
    value = context.number("extrapolation_value", 0.0)
    return torch.where(beyond.to(x.device).view(view), value, x)


def _nearest(
    context: Context, x: Tensor, axes: Sequence[_Axis], coordinates: str, rounding: str
) -> Tensor:
    for one in axes:
        place, beyond = _coordinates(context, one, coordinates)
        match rounding:
            case "round_prefer_floor":
                place = torch.ceil(place - 0.5)
            case "round_prefer_ceil":
                place = torch.floor(place + 0.5)
            case "floor":
                place = torch.floor(place)
            case "ceil":
                place = torch.ceil(place)
            case _:
                raise context.error(f"nearest_mode {rounding!r} is not known")
        source = place.long().clamp(0, one.old - 1)
        factor = one.new // one.old if one.old and one.new % one.old == 0 else 0
        if factor and torch.equal(source, torch.arange(one.new) // factor):
            x = _repeated(x, one.axis, factor)
        else:
            x = x.index_select(one.axis, source.to(x.device))
        x = _extrapolated(context, x, one, beyond)
    return x


def _repeated(x: Tensor, axis: int, factor: int) -> Tensor:
    """Repeat each element of an axis; expanding and copying is faster than gathering."""
    shape = [*x.shape[: axis + 1], factor, *x.shape[axis + 1 :]]
    return x.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)


def _by_torch(x: Tensor, axes: Sequence[_Axis], coordinates: str) -> Tensor | None:
    """Interpolate linearly by torch where its coordinates are those asked for."""
    if x.ndim not in _TORCH or any(one.axis < 2 for one in axes) or not x.is_floating_point():
        return None
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    if any(abs(one.scale * one.old - one.new) > 1e-6 or one.new == 1 for one in axes):
        return None
    size = list(x.shape[2:])
    for one in axes:
        size[one.axis - 2] = one.new
    return nn.interpolate(
        x, size, mode=_TORCH[x.ndim], align_corners=coordinates == "align_corners"
    )


def _matrix(
    place: Tensor, one: _Axis, cubic: float | None, antialias: bool, exclude_outside: bool
) -> Tensor:
    """Return the weights `(new, old)` of an axis, by a tent or a cubic around each place."""
    stretch = min(one.scale, 1.0) if antialias else 1.0
    reach = ceil((1 if cubic is None else 2) / stretch) + 1
    places = torch.arange(-reach, one.old + reach, dtype=torch.float64)
    # Outputs far beyond the edges see the edge alone.
    centre = place.clamp(-1, one.old)
    distance = (stretch * (places - centre[:, None])).abs()
    if cubic is None:
        weights = (1 - distance).clamp(min=0)
    else:
        near = ((cubic + 2) * distance - (cubic + 3)) * distance**2 + 1
        far = ((cubic * distance - 5 * cubic) * distance + 8 * cubic) * distance - 4 * cubic
        weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    if exclude_outside:
        weights = torch.where((places >= 0) & (places < one.old), weights, 0.0)
    if exclude_outside or antialias:
        weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(one.new, one.old, dtype=torch.float64)
    return matrix.index_add(1, places.long().clamp(0, one.old - 1), weights)
