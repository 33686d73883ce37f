"""Elementwise operators: arithmetic, functions of one tensor, and their broadcast."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import onnx_ir as ir
import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.context import Context, Operator

# Integers that torch can hold but hardly compute with.
WIDENED = frozenset({torch.uint16, torch.uint32, torch.uint64})
_NIBBLES = (ir.DataType.INT4, ir.DataType.UINT4)


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """Return the operator for a function of one tensor."""

    def operator(context: Context, x: Tensor) -> Tensor:
        if x.dtype in WIDENED:
            return function(x.long()).to(x.dtype)
        return function(x)

    return operator


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator for a function of two tensors that broadcast."""

    def operator(context: Context, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in WIDENED:
            return function(a.long(), b.long()).to(a.dtype)
        return function(a, b)

    return operator


def comparison(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator for a function of two tensors that gives booleans."""

    def operator(context: Context, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in WIDENED:
            return function(a.long(), b.long())
        return function(a, b)

    return operator


def variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator that folds any number of tensors by a function of two."""
    pair = binary(function)

    def operator(context: Context, *tensors: Tensor) -> Tensor:
        return reduce(lambda a, b: pair(context, a, b), tensors)  # type: ignore[arg-type, return-value]

    return operator


def mean(context: Context, *tensors: Tensor) -> Tensor:
    """Mean: the average of tensors that broadcast."""
    return reduce(torch.add, tensors) / len(tensors)


def divide(context: Context, a: Tensor, b: Tensor) -> Tensor:
    """Div: integers are divided towards zero."""
    if a.is_floating_point() or b.is_floating_point():
        return a / b
    if a.dtype in WIDENED:
        return torch.div(a.long(), b.long(), rounding_mode="trunc").to(a.dtype)
    return torch.div(a, b, rounding_mode="trunc")


def power(context: Context, a: Tensor, b: Tensor) -> Tensor:
    """Pow: the result has the type of the base."""
    if b.dtype in WIDENED:
        b = b.long()
    if b.ndim == 0 and not b.requires_grad:  # torch squares a number's power in one pass
        return torch.pow(a, b.item()).to(a.dtype)
    return torch.pow(a, b).to(a.dtype)


def modulo(context: Context, a: Tensor, b: Tensor) -> Tensor:
    """Mod: the sign is the divisor's, or the dividend's with `fmod`."""
    function = torch.fmod if context.integer("fmod", 0) else torch.remainder
    if a.dtype in WIDENED:
        return function(a.long(), b.long()).to(a.dtype)
    return function(a, b)


def clip(
    context: Context, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Clip: bounds are attributes before operator set 11."""
    if context.version < 11:
        return x.clamp(context.attributes.get("min"), context.attributes.get("max"))
    if low is None and high is None:
        return x
    if x.dtype in WIDENED:
        bounds = [None if bound is None else bound.long() for bound in (low, high)]
        return x.long().clamp(*bounds).to(x.dtype)
    return x.clamp(low, high)


def shift(context: Context, a: Tensor, b: Tensor) -> Tensor:
    """BitShift."""
    left = context.text("direction", "LEFT") == "LEFT"
    function = torch.bitwise_left_shift if left else torch.bitwise_right_shift
    return function(a.long(), b.long()).to(a.dtype)


def where(context: Context, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Where: choose `a` where the condition holds."""
    return torch.where(condition, a, b)


def prelu(context: Context, x: Tensor, slope: Tensor) -> Tensor:
    """PRelu: the slope broadcasts to `x`."""
    return torch.where(x < 0, slope * x, x)


def is_infinite(context: Context, x: Tensor) -> Tensor:
    """IsInf."""
    positive = context.integer("detect_positive", 1)
    negative = context.integer("detect_negative", 1)
    found = torch.zeros_like(x, dtype=torch.bool)
    if positive:
        found = found | (x == float("inf"))
    if negative:
        found = found | (x == float("-inf"))
    return found


def reciprocal_root(x: Tensor) -> Tensor:
    """Return `1 / √x`."""
    return x.rsqrt()


def straight_round(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing were rounded."""
    if not x.requires_grad:
        return x.round()
    return x + (x.round() - x).detach()


def dropout(
    context: Context, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Dropout as in inference: everything is kept."""
    if training is not None and bool(training) and (ratio is None or float(ratio)):
        raise context.error("training_mode drops elements at random")
    mask = torch.ones_like(x, dtype=torch.bool) if context.outputs > 1 else None
    return x, mask


def cast(context: Context, x: Tensor) -> Tensor:
    """Cast to the attribute `to`."""
    return _cast(context, x, ir.DataType(context.integer("to", 1)))


def cast_like(context: Context, x: Tensor, like: Tensor) -> Tensor:
    """CastLike: to the type of the second input."""
    declared = context.types[1]
    return narrowed(x, like.dtype) if declared is None else _cast(context, x, declared)


def _cast(context: Context, x: Tensor, kind: ir.DataType) -> Tensor:
    dtype = context.dtype(kind)
    if x.dtype == dtype and kind not in _NIBBLES:
        return x
    if kind in _NIBBLES:
        # The lowest four bits, as a number with or without sign.
        low = x.to(torch.int32) & 15
        return torch.where((low > 7) & (kind == ir.DataType.INT4), low - 16, low).to(dtype)
    return narrowed(x, dtype, saturate=bool(context.integer("saturate", 1)))


def narrowed(x: Tensor, dtype: torch.dtype, *, saturate: bool = True) -> Tensor:
    """Return `x` in another type; what float8 cannot hold becomes its largest number, or NaN."""
    if dtype.itemsize > 1 or not dtype.is_floating_point or not x.is_floating_point():
        return x.to(dtype)
    bound = torch.finfo(dtype).max
    if saturate:
        return torch.where(x.isnan(), x, x.clamp(-bound, bound)).to(dtype)
    return x.to(dtype)
