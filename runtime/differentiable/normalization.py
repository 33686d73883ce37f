"""Softmax and the norms."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context, Operator


def softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    """Return Softmax, LogSoftmax or Hardmax: of all axes from `axis` on before set 13."""

    def operator(context: Context, x: Tensor) -> Tensor:
        if context.version >= 13 or context.domain:
            return function(x, context.integer("axis", -1))
        axis = context.integer("axis", 1)
        axis = axis + x.ndim if axis < 0 else axis
        if axis == x.ndim - 1:
            return function(x, axis)
        rows = x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))
        return function(rows, 1).reshape(x.shape)

    return operator


def hardmax(x: Tensor, axis: int) -> Tensor:
    """Return 1 at the first largest element and 0 elsewhere."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, True), 1)


def layer_norm(
    context: Context, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """LayerNormalization of the axes from `axis` on; also mean and 1 / deviation."""
    axis = context.integer("axis", -1) % x.ndim
    epsilon = context.number("epsilon", 1e-5)
    plain = scale.shape == x.shape[axis:] and (bias is None or bias.shape == scale.shape)
    if context.outputs == 1 and plain and scale.dtype == x.dtype:
        return nn.layer_norm(x, scale.shape, scale, bias, epsilon)
    axes = list(range(axis, x.ndim))
    wide = x.float() if x.itemsize < 4 else x
    mean = wide.mean(axes, True)
    centred = wide - mean
    deviation = (centred.square().mean(axes, True) + epsilon).rsqrt()
    y = (centred * deviation).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, deviation


def rms_norm(context: Context, x: Tensor, scale: Tensor) -> Tensor:
    """RMSNormalization of the axes from `axis` on; SimplifiedLayerNormalization."""
    return root_mean_square(x, scale, context.number("epsilon", 1e-5), context.integer("axis", -1))


def simplified_layer_norm(
    context: Context, x: Tensor, scale: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """SimplifiedLayerNormalization; also 1 / root mean square."""
    axis, epsilon = context.integer("axis", -1) % x.ndim, context.number("epsilon", 1e-5)
    y = root_mean_square(x, scale, epsilon, axis)
    if context.outputs == 1:
        return y
    axes = list(range(axis, x.ndim))
    return y, (x.float().square().mean(axes, True) + epsilon).rsqrt()


def root_mean_square(x: Tensor, scale: Tensor, epsilon: float, axis: int = -1) -> Tensor:
    """Return `x / √(mean x² + ε) · scale`."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = x.float() if x.itemsize < 4 else x
    factor = (wide.square().mean(axes, True) + epsilon).rsqrt()
    return (wide * factor).to(x.dtype) * scale


def batch_norm(
    context: Context, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """BatchNormalization by given statistics; in training mode by the batch's own."""
    epsilon = context.number("epsilon", 1e-5)
    if not context.integer("training_mode", 0):
        # torch has no gradient for given statistics.
        trained = mean.requires_grad or variance.requires_grad
        if x.dtype == scale.dtype == mean.dtype and not trained:
            return nn.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
        view = [1, -1] + [1] * (x.ndim - 2)
        factor = scale * (variance + epsilon).rsqrt()
        return ((x - mean.view(view)) * factor.view(view) + bias.view(view)).to(x.dtype)
    momentum = context.number("momentum", 0.9)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    own_mean, own_variance = x.mean(axes), x.var(axes, correction=0)
    y = nn.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return (
        y,
        mean * momentum + own_mean * (1 - momentum),
        variance * momentum + own_variance * (1 - momentum),
    )


def instance_norm(context: Context, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization."""
    return nn.instance_norm(x, weight=scale, bias=bias, eps=context.number("epsilon", 1e-5))


def group_norm(context: Context, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GroupNormalization: scale and bias for each channel, or each group before set 21."""
    groups = context.integer("num_groups", 1)
    if scale.numel() != x.shape[1]:
        scale = scale.repeat_interleave(x.shape[1] // groups)
        bias = bias.repeat_interleave(x.shape[1] // groups)
    return nn.group_norm(x, groups, scale, bias, context.number("epsilon", 1e-5))


def lp_norm(context: Context, x: Tensor) -> Tensor:
    """LpNormalization: zero stays zero."""
    axis, p = context.integer("axis", -1), context.integer("p", 2)
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return x / torch.where(norm == 0, 1, norm)


def mean_variance_norm(context: Context, x: Tensor) -> Tensor:
    """MeanVarianceNormalization."""
    axes = context.integers("axes") or (0, 2, 3)
    centred = x - x.mean(axes, True)
    return centred / (centred.square().mean(axes, True).sqrt() + 1e-9)


def local_response_norm(context: Context, x: Tensor) -> Tensor:
    """LRN: across channels."""
    size = context.integer("size", 1)
    alpha, beta = context.number("alpha", 1e-4), context.number("beta", 0.75)
    before = (size - 1) // 2
    view = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    padded = nn.pad(view, (0, 0, before, size - 1 - before))
    sums = padded.unfold(2, size, 1).sum(-1).reshape(x.shape)
    return x / (context.number("bias", 1.0) + alpha / size * sums) ** beta
