"""Norms with a skip connection, embeddings and other fused operators of com.microsoft."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.normalization import root_mean_square


def skip_layer_norm(
    context: Context,
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """SkipLayerNormalization; the fourth output is the sum that is normalized."""
    total = x + skip
    total = total if bias is None else total + bias
    y = nn.layer_norm(total, total.shape[-1:], scale, shift, context.number("epsilon", 1e-5))
    if context.outputs < 2:
        return (y,)
    mean = total.float().mean(-1, keepdim=True)
    deviation = total.float().var(-1, correction=0, keepdim=True)
    return y, mean, (deviation + context.number("epsilon", 1e-5)).rsqrt(), total


def skip_simplified_layer_norm(
    context: Context, x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """SkipSimplifiedLayerNormalization; the fourth output is the sum that is normalized."""
    total = x + skip
    total = total if bias is None else total + bias
    epsilon = context.number("epsilon", 1e-5)
    y = root_mean_square(total, scale, epsilon)
    if context.outputs < 2:
        return (y,)
    factor = (total.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return y, None, factor, total


def embed_layer_norm(
    context: Context,
    tokens: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """EmbedLayerNormalization; the second output counts the mask, the third is the sum."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    total = nn.embedding(tokens.long(), words) + places[positions.long()]
    if segments is not None and kinds is not None:
        total = total + nn.embedding(segments.long(), kinds)
    y = nn.layer_norm(total, total.shape[-1:], scale, shift, context.number("epsilon", 1e-12))
    if mask is None:
        lengths = torch.zeros(tokens.shape[0], dtype=torch.int32)
    else:
        lengths = (mask == 1).sum(1).to(torch.int32)
    return y, lengths, total


def bias_split_gelu(context: Context, x: Tensor, bias: Tensor) -> Tensor:
    """BiasSplitGelu: one half times Gelu of the other."""
    first, second = (x + bias).chunk(2, -1)
    return first * nn.gelu(second)


def expand_dims(context: Context, x: Tensor, axis: Tensor) -> Tensor:
    """ExpandDims."""
    return x.unsqueeze(int(axis))
