"""Attention, MultiHeadAttention and GroupQueryAttention of com.microsoft."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.attention import (
    Scores,
    attend,
    attend_openly,
    combined,
    frontier,
    join_heads,
    split_heads,
)
from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.linear import product
from iobs_onnx.runtime.differentiable.rotary import rotate


def _scale(context: Context) -> float | None:
    """Return the scale of a node, where 0 is another word for the default."""
    return context.number("scale", 0.0) or None


def _padding(context: Context, mask: Tensor, batch: int, keys: int, past: int) -> Tensor:
    """Return what a mask adds to the scores, `(batch, 1, 1 or seq, keys)`.

    A mask of one axis has the number of keys of each sample (and may have their first after it).
    """
    filler = context.number("mask_filter_value", -10000.0)
    if mask.ndim == 1:
        places = torch.arange(keys, device=mask.device)
        seen = places < mask[:batch, None]
        if mask.numel() == 2 * batch:
            seen = seen & (places >= mask[batch:, None])
        mask = seen
    view = {2: mask[:, None, None], 3: mask[:, None] if mask.ndim == 3 else mask, 4: mask}
    seen = view[mask.ndim] != 0
    if past and seen.shape[-1] < keys:
        seen = nn.pad(seen, (keys - seen.shape[-1], 0), value=True)
    return torch.where(seen[..., :keys], 0.0, filler)


def _mask(
    context: Context,
    padding: Tensor | None,
    bias: Tensor | None,
    q: Tensor,
    keys: int,
    past: int,
) -> Tensor | None:
    """Return all that is added to the scores and may not be seen."""
    mask = bias
    if padding is not None:
        added = _padding(context, padding, q.shape[0], keys, past).to(q.dtype)
        mask = added if mask is None else mask + added
    seen = (
        frontier(q.shape[2], keys, past, right=0) if context.integer("unidirectional", 0) else None
    )
    return combined(mask, seen, q.dtype)


def attention(
    context: Context,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    added: Tensor | None = None,
    past_length: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention: projects one input to queries, keys and values."""
    if past_length is not None:
        raise context.error("past and present share a buffer")
    if context.integer("do_rotary", 0):
        raise context.error("do_rotary makes its own rotary embedding")
    heads = context.integer("num_heads", 1)
    widths = context.integers("qkv_hidden_sizes") or (weight.shape[1] // 3,) * 3
    projected = product(x, weight)
    projected = projected if bias is None else projected + bias
    q, k, v = (split_heads(part, heads) for part in projected.split(list(widths), -1))
    before = 0
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        before = past.shape[3]
    blend = _mask(context, mask, added, q, k.shape[2], before)
    y = join_heads(attend(q, k, v, blend, Scores(_scale(context))))
    return y if context.outputs == 1 else (y, torch.stack([k, v]))


def multi_head(
    context: Context,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    added: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_length: Tensor | None = None,
    indirection: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """MultiHeadAttention of projected queries, keys and values, packed or apart."""
    if past_length is not None or indirection is not None:
        raise context.error("past and present share a buffer")
    heads = context.integer("num_heads", 1)
    if k is None:
        q, k, v = q.unbind(3)  # (batch, seq, heads, 3, size)
    elif v is None:
        k, v = k.unbind(3)
    parts = []
    biases: tuple[Tensor | None, ...] = (None, None, None)
    if bias is not None:
        widths = [
            x.shape[1] * x.shape[3] if _by_head(x, heads) else x[0, 0].numel() for x in (q, k, v)
        ]
        biases = bias.split(widths)
    for x, one in zip((q, k, v), biases, strict=True):
        if _by_head(x, heads):  # keys and values of cross attention, (batch, heads, seq, size)
            parts.append(x if one is None else x + one.view(heads, 1, -1))
            continue
        x = x.flatten(2)  # noqa: PLW2901
        parts.append(split_heads(x if one is None else x + one, heads))
    q, k, v = parts
    before = 0
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        before = past_key.shape[2]
    mask = _mask(context, padding, added, q, k.shape[2], before)
    scores = Scores(_scale(context))
    if context.outputs > 3:
        y, matrix = attend_openly(q, k, v, mask, scores, 0)
        return join_heads(y), k, v, matrix
    y = join_heads(attend(q, k, v, mask, scores))
    return y if context.outputs == 1 else (y, k, v)


def _by_head(x: Tensor, heads: int) -> bool:
    """Whether heads come before the sequence already."""
    return x.ndim == 4 and x.shape[1] == heads and x.shape[2] != heads


def group_query(
    context: Context,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    lengths: Tensor,
    total: Tensor,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    *scales: Tensor | None,
) -> tuple[Tensor, ...]:
    """GroupQueryAttention: causal, with rotary embedding and a cache.

    Queries that pad a sample behind its own length get what causality gives them; ONNX Runtime
    leaves other numbers there, which nothing may read.
    """
    if any(scale is not None for scale in scales):
        raise context.error("its cache is quantized")
    heads, groups = context.integer("num_heads", 1), context.integer("kv_num_heads", 1)
    if k is None or v is None:
        size = q.shape[-1] // (heads + 2 * groups)
        q, k, v = q.split([heads * size, groups * size, groups * size], -1)
    q, k, v = split_heads(q, heads), split_heads(k, groups), split_heads(v, groups)
    queries, everything = q.shape[2], int(total)
    known = lengths.reshape(-1).long() + 1
    # A prompt starts at the front, whatever pads it.
    first = torch.zeros_like(known) if queries == everything else known - queries
    if context.integer("do_rotary", 0):
        assert cosine is not None
        assert sine is not None
        where = positions
        if where is None:
            where = first[:, None] + torch.arange(queries, device=first.device)
            where = where.clamp(0, cosine.shape[0] - 1)
        interleaved = bool(context.integer("rotary_interleaved", 0))
        q = rotate(q, cosine[where], sine[where], interleaved)
        k = rotate(k, cosine[where], sine[where], interleaved)
    present_k = _cached(past_key, k, first, everything)
    present_v = _cached(past_value, v, first, everything)
    window = context.integer("local_window_size", -1)
    left = window - 1 if window > 0 else -1
    seen = frontier(queries, everything, first, left, 0)
    mask = combined(None if bias is None else bias[..., :everything], seen, q.dtype)
    if sink is None and context.integer("smooth_softmax", 0):
        sink = q.new_zeros(heads)
    scores = Scores(_scale(context), context.number("softcap", 0.0), sink)
    keys, values = present_k[:, :, :everything], present_v[:, :, :everything]
    y = join_heads(attend(q, keys, values, mask, scores))
    return (y, present_k, present_v)[: context.outputs]


def _cached(past: Tensor | None, new: Tensor, first: Tensor, total: int) -> Tensor:
    """Return the cache with what is new behind what each sample had."""
    before = 0 if past is None else past.shape[2]
    if past is None or not before:
        return new
    room = nn.pad(past, (0, 0, 0, max(0, total - before)))
    if bool((first == before).all()):
        return torch.cat([past, new], 2)
    places = first[:, None] + torch.arange(new.shape[2], device=first.device)
    return room.scatter(2, places[:, None, :, None].expand(new.shape), new)
