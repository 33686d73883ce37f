"""Operators that pick elements by index or put them there."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(indices: Tensor, length: int) -> Tensor:
    """Return indices as int64, negative ones counted from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + length, indices)


def gather(context: Context, x: Tensor, indices: Tensor) -> Tensor:
    """Gather slices along `axis`."""
    axis = context.integer("axis", 0)
    if not indices.ndim:
        return x.select(axis, int(indices))
    axis = axis % x.ndim
    indices = _wrapped(indices, x.shape[axis]).to(x.device)
    if not axis and x.ndim == 2 and x.is_floating_point():
        return nn.embedding(indices, x)
    found = x.index_select(axis, indices.reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(context: Context, x: Tensor, indices: Tensor) -> Tensor:
    """GatherElements along `axis`."""
    axis = context.integer("axis", 0) % x.ndim
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


def gather_nd(context: Context, x: Tensor, indices: Tensor) -> Tensor:
    """GatherND: the last axis of the indices addresses `x` behind its batch axes."""
    batch = context.integer("batch_dims", 0)
    depth = indices.shape[-1]
    parts = [_wrapped(part, x.shape[batch + axis]) for axis, part in enumerate(indices.unbind(-1))]
    leading = []
    for axis in range(batch):
        view = [1] * (indices.ndim - 1)
        view[axis] = x.shape[axis]
        leading.append(torch.arange(x.shape[axis], device=x.device).view(view))
    if not depth + batch:
        return x.expand(*indices.shape[:-1], *x.shape)
    found: Tensor = x[(*leading, *parts)]
    return found


def scatter_elements(context: Context, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterElements and Scatter: put or combine `updates` along `axis`."""
    axis = context.integer("axis", 0) % x.ndim
    indices = _wrapped(indices, x.shape[axis])
    reduction = context.text("reduction", "none")
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction], include_self=True)


def scatter_nd(context: Context, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """ScatterND: put or combine slices where the last axis of the indices says."""
    depth = indices.shape[-1]
    lengths, inner = x.shape[:depth], x.shape[depth:]
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, length in enumerate(lengths):
        place = place * length + _wrapped(indices[..., axis], length)
    flat = x.reshape(prod(lengths), -1)
    rows = place.reshape(-1, 1).expand(-1, flat.shape[1])
    values = updates.reshape(rows.shape)
    reduction = context.text("reduction", "none")
    if reduction == "none":
        found = flat.scatter(0, rows, values)
    else:
        found = flat.scatter_reduce(0, rows, values, _REDUCTIONS[reduction], include_self=True)
    return found.reshape(*lengths, *inner)


def tensor_scatter(
    context: Context, past: Tensor, update: Tensor, starts: Tensor | None = None
) -> Tensor:
    """TensorScatter: write a stretch of a cache, from each sample's own place."""
    axis = context.integer("axis", -2) % past.ndim
    length, count = past.shape[axis], update.shape[axis]
    first = torch.zeros(past.shape[0], dtype=torch.int64) if starts is None else starts.long()
    places = first[:, None].to(past.device) + torch.arange(count, device=past.device)
    if context.text("mode", "linear") == "circular":
        places = places % length
    view = [1] * past.ndim
    view[0], view[axis] = past.shape[0], count
    return past.scatter(axis, places.view(view).expand(update.shape), update)


def compress(context: Context, x: Tensor, condition: Tensor) -> Tensor:
    """Compress: slices along `axis`, or elements, where the condition holds."""
    places = condition.nonzero().reshape(-1)
    axis = context.attributes.get("axis")
    if axis is None:
        return x.reshape(-1).index_select(0, places)
    return x.index_select(axis, places)


def nonzero(context: Context, x: Tensor) -> Tensor:
    """NonZero: indices, one column for each element."""
    return x.nonzero().t()


def top_k(context: Context, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """TopK: equal elements in the order of their indices."""
    count = context.integer("k", 1) if k is None else int(k)
    axis = context.integer("axis", -1)
    largest = bool(context.integer("largest", 1))
    wide = x.long() if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x
    order = wide.sort(dim=axis, descending=largest, stable=True).indices.narrow(axis, 0, count)
    return wide.gather(axis, order).to(x.dtype), order


def one_hot(context: Context, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """OneHot: `values` are off and on; indices beyond the depth are off everywhere."""
    length = int(depth)
    axis = context.integer("axis", -1)
    axis = axis + indices.ndim + 1 if axis < 0 else axis
    places = torch.arange(length, device=indices.device)
    places = places.view([-1] + [1] * (indices.ndim - axis))
    wrapped = _wrapped(indices, length)
    return torch.where(wrapped.unsqueeze(axis) == places, values[1], values[0])


def unique(context: Context, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unique: values, first indices, inverse indices and counts."""
    axis = context.attributes.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    _, inverse, counts = torch.unique(
        x.detach(), sorted=True, return_inverse=True, return_counts=True, dim=axis
    )
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel())
    first = torch.full((counts.numel(),), inverse.numel()).scatter_reduce(
        0, inverse, places, "amin", include_self=True
    )
    if not context.integer("sorted", 1):
        order = first.argsort()
        first, counts, inverse = first[order], counts[order], order.argsort()[inverse]
    return x.index_select(axis, first), first, inverse, counts
