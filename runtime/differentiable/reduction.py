"""Reductions over axes, running sums, and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.context import Context, Operator
from iobs_onnx.runtime.differentiable.elementwise import WIDENED
from iobs_onnx.runtime.differentiable.shape import sizes

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def reduction(function: Reduce, single: Callable[[Tensor], Tensor] = lambda x: x) -> Operator:
    """Return the operator that reduces axes given as an input or an attribute.

    Args:
        function: of a tensor, its axes and whether they are kept with length 1.
        single: what is left of the function where there is no axis to reduce.
    """

    def operator(context: Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = context.integers("axes") if axes is None else sizes(axes)
        if not given and context.integer("noop_with_empty_axes", 0):
            return single(x)
        found = list(given) if given else list(range(x.ndim))
        if not found:
            return single(x)
        wide = x.long() if x.dtype in WIDENED else x
        return function(wide, found, bool(context.integer("keepdims", 1))).to(x.dtype)

    return operator


def total(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `Σ x`."""
    return x.sum(axes, keep)


def mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the mean; of integers towards zero."""
    if x.is_floating_point():
        return x.mean(axes, keep)
    return x.double().mean(axes, keep)


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `Π x`."""
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keep)
    return x


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    if any(not x.shape[axis] for axis in axes):
        # Of no elements: the neutral element.
        if x.is_floating_point():
            neutral: float = float("-inf") if largest else float("inf")
        elif x.dtype == torch.bool:
            neutral = not largest
        else:
            bounds = torch.iinfo(x.dtype)
            neutral = bounds.min if largest else bounds.max
        template = x.sum(axes, keep)
        return torch.full_like(template, neutral, dtype=x.dtype)
    return x.amax(axes, keep) if largest else x.amin(axes, keep)


def maximum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the largest element."""
    return _extreme(x, axes, keep, True)


def minimum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return the smallest element."""
    return _extreme(x, axes, keep, False)


def norm1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `Σ |x|`."""
    return x.abs().sum(axes, keep)


def norm2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `√Σ x²`."""
    if not x.is_floating_point():
        return x.double().square().sum(axes, keep).sqrt()
    return torch.linalg.vector_norm(x, 2, axes, keep)


def sum_of_squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `Σ x²`."""
    return x.square().sum(axes, keep)


def log_of_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `log Σ x`."""
    return x.sum(axes, keep).log()


def log_of_exponentials(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Return `log Σ eˣ`."""
    if not x.is_floating_point():
        x = x.double()
    if any(not x.shape[axis] for axis in axes):
        return x.exp().sum(axes, keep).log()
    return x.logsumexp(axes, keep)


def argument(largest: bool) -> Operator:
    """Return ArgMax or ArgMin."""

    def operator(context: Context, x: Tensor) -> Tensor:
        axis = context.integer("axis", 0) % x.ndim
        keep = bool(context.integer("keepdims", 1))
        if x.dtype in WIDENED:
            x = x.long()
        last = bool(context.integer("select_last_index", 0))
        if last:
            x = x.flip(axis)
        found = x.argmax(axis, keep) if largest else x.argmin(axis, keep)
        return x.shape[axis] - 1 - found if last else found

    return operator


def cumulative(function: Callable[..., Tensor], neutral: float) -> Operator:
    """Return CumSum or CumProd, which may be exclusive and reversed."""

    def operator(context: Context, x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis) % x.ndim
        if context.integer("reverse", 0):
            x = x.flip(along)
        found = function(x, along).to(x.dtype)
        if context.integer("exclusive", 0):
            first = torch.full_like(x.narrow(along, 0, 1), neutral)
            found = torch.cat([first, found.narrow(along, 0, x.shape[along] - 1)], along)
        return found.flip(along) if context.integer("reverse", 0) else found

    return operator
