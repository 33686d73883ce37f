"""Rotary position embeddings of ai.onnx and com.microsoft."""

from __future__ import annotations

import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.context import Context


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of features of `x` `(batch, heads, seq, size)`.

    Args:
        x: features; those beyond twice the width of `cosine` stay as they are.
        cosine: `(batch or 1, seq, pairs)`.
        sine: the same.
        interleaved: whether a pair are neighbours, or one of each half.
    """
    pairs = cosine.shape[-1]
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    real = cosine * first - sine * second
    imaginary = sine * first + cosine * second
    if interleaved:
        return torch.cat([torch.stack((real, imaginary), -1).flatten(-2), rest], -1)
    return torch.cat([real, imaginary, rest], -1)


def rotary(
    context: Context,
    x: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    """RotaryEmbedding of ai.onnx."""
    if positions is not None:
        cosine, sine = cosine[positions], sine[positions]
    return _by_heads(context, x, cosine, sine, context.integer("num_heads", 0))


def rotary_microsoft(
    context: Context, x: Tensor, positions: Tensor, cosine: Tensor, sine: Tensor
) -> Tensor:
    """RotaryEmbedding of com.microsoft: positions of each token, or of the first."""
    length = x.shape[-2] if x.ndim == 4 else x.shape[1]
    if positions.numel() == 1 and positions.ndim == 1:
        positions = positions + torch.arange(length, device=positions.device)
        positions = positions.expand(x.shape[0], -1)
    cosine, sine = cosine[positions], sine[positions]
    heads = context.integer("num_heads", 0)
    if not heads and x.ndim == 3:
        heads = x.shape[-1] // (2 * cosine.shape[-1])
    return _by_heads(context, x, cosine, sine, heads)


def _by_heads(context: Context, x: Tensor, cosine: Tensor, sine: Tensor, heads: int) -> Tensor:
    interleaved = bool(context.integer("interleaved", 0))
    if x.ndim == 4:
        return rotate(x, cosine, sine, interleaved)
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return rotate(split, cosine, sine, interleaved).transpose(1, 2).flatten(2)
