"""Attention: the common core, and the operator of ai.onnx."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context


@dataclass(frozen=True)
class Scores:
    """How the products of queries and keys become weights.

    Attributes:
        scale: of the products; None for `1 / √size`.
        softcap: `c tanh(s / c)` of the scores before the mask; 0 for none.
        sink: `(heads,)` logits of a key that has no value, None for none.
        dtype: in which the softmax is computed, None for the type of the scores.
    """

    scale: float | None = None
    softcap: float = 0.0
    sink: Tensor | None = None
    dtype: torch.dtype | None = None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return `(batch, heads, seq, size)` of `(batch, seq, heads · size)`; that itself if it is."""
    return x if x.ndim == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Return `(batch, seq, heads · size)` of `(batch, heads, seq, size)`."""
    return x.transpose(1, 2).flatten(2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of keys or values for its group of queries."""
    if x.shape[1] == heads:
        return x
    return x.repeat_interleave(heads // x.shape[1], 1)


def frontier(
    queries: int, keys: int, offset: Tensor | int, left: int = -1, right: int = -1
) -> Tensor:
    """Return which keys each query may see: from `left` before it to `right` behind it.

    Args:
        queries: how many there are.
        keys: how many there are.
        offset: the place of the first query among the keys, for each sample or all.
        left: -1 for no bound.
        right: the same.

    Returns:
        `(batch or 1, 1, queries, keys)`, True where a key is seen.
    """
    first = torch.as_tensor(offset).reshape(-1, 1, 1, 1)
    place = first + torch.arange(queries, device=first.device)[:, None]
    distance = torch.arange(keys, device=first.device) - place
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    return seen


def combined(bias: Tensor | None, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return one mask, to add or of booleans, of what is added and what is seen."""
    if seen is None:
        return bias
    if bias is None:
        return seen
    if bias.dtype == torch.bool:
        return bias & seen
    return torch.where(seen.to(bias.device), bias.to(dtype), float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Return the attention `(batch, heads, seq, size)` of queries to keys and values.

    Args:
        q: `(batch, heads, seq, size)`.
        k: `(batch, groups, keys, size)`.
        v: `(batch, groups, keys, any)`.
        mask: added to the scores, or True where a key is seen; broadcasts to
            `(batch, heads, seq, keys)`. A query that sees nothing gets zeros.
        scores: scale and the like.
    """
    if not scores.softcap and scores.sink is None and scores.dtype is None:
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        if mask is not None:
            mask = mask.to(q.device)
            if mask.ndim < 2:
                mask = mask.expand(q.shape[2], -1)
        y = nn.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale)
        return y if mask is None else torch.where(_blind(mask), 0, y)
    y, _ = attend_openly(q, k, v, mask, scores, 3)
    return y


def _blind(mask: Tensor) -> Tensor:
    """Return which queries see no key."""
    if mask.dtype == torch.bool:
        return ~mask.any(-1, keepdim=True)
    return mask.detach().amax(-1, keepdim=True) == float("-inf")


def attend_openly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, stage: int
) -> tuple[Tensor, Tensor]:
    """Return the attention and its matrix at a stage.

    The stages are 0 the products, 1 capped, 2 masked, 3 after the softmax.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scale = q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    root = scale**0.5
    matrix = torch.matmul(q * root, (k * root).mT)
    shown = [matrix]
    if scores.softcap:
        matrix = scores.softcap * torch.tanh(matrix / scores.softcap)
    shown.append(matrix)
    if mask is not None and mask.dtype == torch.bool:
        matrix = torch.where(mask, matrix, float("-inf"))
    elif mask is not None:
        matrix = matrix + mask
    shown.append(matrix)
    wide = matrix if scores.dtype is None else matrix.to(scores.dtype)
    if scores.sink is not None:
        sink = scores.sink.to(wide.dtype).view(1, -1, 1, 1).expand(*wide.shape[:-1], 1)
        weights = torch.softmax(torch.cat([wide, sink], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(wide, -1)
    if mask is not None:
        weights = torch.where(_blind(mask), 0, weights)
    weights = weights.to(q.dtype)
    shown.append(weights)
    return torch.matmul(weights, v), shown[stage]


def attention(
    context: Context,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of ai.onnx."""
    flat = q.ndim == 3
    q = split_heads(q, context.integer("q_num_heads", 0))
    k = split_heads(k, context.integer("kv_num_heads", 0))
    v = split_heads(v, context.integer("kv_num_heads", 0))
    offset: Tensor | int = 0
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        offset = past_key.shape[2]
    elif lengths is not None:
        offset = lengths.reshape(-1) - q.shape[2]
    queries, keys = q.shape[2], k.shape[2]
    if mask is not None and mask.shape[-1] < keys:
        fill = 0 if mask.dtype == torch.bool else float("-inf")
        mask = nn.pad(mask, (0, keys - mask.shape[-1]), value=fill)
    left = context.integer("left_window_size", -1)
    right = 0 if context.integer("is_causal", 0) else context.integer("right_window_size", -1)
    seen = frontier(queries, keys, offset, left, right) if left >= 0 or right >= 0 else None
    if lengths is not None:
        there = torch.arange(keys, device=lengths.device) < lengths.reshape(-1, 1, 1, 1)
        seen = there if seen is None else seen & there
    mask = combined(mask, seen, q.dtype)
    code = context.integer("softmax_precision", 0)
    scale = context.attributes.get("scale")
    dtype = context.dtype(code) if code else None
    scores = Scores(
        scale, context.number("softcap", 0.0), dtype=None if dtype == q.dtype else dtype
    )
    if context.outputs > 3:
        stage = context.integer("qk_matmul_output_mode", 0)
        y, matrix = attend_openly(q, k, v, mask, scores, stage)
        return join_heads(y) if flat else y, k, v, matrix
    y = attend(q, k, v, mask, scores)
    y = join_heads(y) if flat else y
    return y if context.outputs == 1 else (y, k, v)
