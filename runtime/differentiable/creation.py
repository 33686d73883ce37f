"""Operators that make tensors out of little: constants, ranges, windows."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.dtypes import evaluated
from iobs_onnx.runtime.differentiable.shape import sizes


def constant(context: Context) -> Tensor:
    """Constant, in any of its numeric forms."""
    attributes = context.attributes
    if "value" in attributes:
        value: Tensor = attributes["value"]
        return value
    for name in ("value_float", "value_floats"):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=evaluated(torch.float32, context.precision))
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return torch.tensor(attributes[name], dtype=torch.int64)
    raise context.error(f"a constant of kind {next(iter(attributes), 'none')} is no tensor here")


def constant_of_shape(context: Context, target: Tensor) -> Tensor:
    """ConstantOfShape: float zeros unless `value` says otherwise."""
    value = context.attributes.get("value")
    if value is None:
        value = torch.zeros(1, dtype=evaluated(torch.float32, context.precision))
    return torch.full(sizes(target), value.item(), dtype=value.dtype)


def eye_like(context: Context, x: Tensor) -> Tensor:
    """EyeLike: ones on the k-th diagonal."""
    code = context.attributes.get("dtype")
    dtype = x.dtype if code is None else context.dtype(code)
    rows, columns = x.shape
    found = torch.arange(columns) - torch.arange(rows)[:, None] == context.integer("k", 0)
    return found.to(x.device, dtype)


def range_(context: Context, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Range: `start + i delta` below the limit."""
    first, last, step = start.item(), limit.item(), delta.item()
    if isinstance(first, int):
        return torch.arange(first, max(last, first) if step > 0 else min(last, first), step).to(
            start.dtype
        )
    count = max(0, int(-(-(last - first) // step)))
    return start + torch.arange(count, dtype=start.dtype, device=start.device) * delta


def window(context: Context, length: Tensor) -> Tensor:
    """HannWindow, HammingWindow and BlackmanWindow."""
    count = int(length)
    dtype = context.dtype(context.integer("output_datatype", 1))
    span = count if context.integer("periodic", 1) else count - 1
    angle = 2 * pi * torch.arange(count, dtype=torch.float64) / span
    terms = {
        "HannWindow": (0.5, -0.5, 0.0),
        "HammingWindow": (25 / 46, -21 / 46, 0.0),
        "BlackmanWindow": (0.42, -0.5, 0.08),
    }[context.op_type]
    return sum(
        (term * torch.cos(order * angle) for order, term in enumerate(terms)), torch.zeros(count)
    ).to(dtype)
