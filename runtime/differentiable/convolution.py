"""Conv, ConvTranspose and their fused and integer forms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.activations import by_name
from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.spatial import windows


def conv(context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv over one to three spatial axes."""
    plan = windows(context, x.shape[2:], weight.shape[2:])
    padding = plan.begin
    # torch crops nothing, and pads both ends alike.
    if not plan.symmetric or min(plan.begin) < 0:
        x, padding = nn.pad(x, plan.flat_pads()), (0,) * len(plan.begin)
    return torch.convolution(
        x,
        weight,
        bias,
        plan.strides,
        padding,
        plan.dilations,
        False,
        (0,) * len(plan.begin),
        context.integer("group", 1),
    )


def fused_conv(
    context: Context,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """FusedConv: Conv, a sum, and an activation."""
    y = conv(context, x, weight, bias)
    y = y if added is None else y + added
    parameters = context.attributes.get("activation_params", ())
    return by_name(context, context.text("activation", ""), y, *parameters)


def conv_transpose(
    context: Context, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """ConvTranspose over one to three spatial axes."""
    plan = windows(context, x.shape[2:], weight.shape[2:])
    rank = x.ndim - 2
    extra = context.integers("output_padding") or (0,) * rank
    begin, end = plan.begin, plan.end
    reach = [
        (length - 1) * stride + span
        for length, stride, span in zip(x.shape[2:], plan.strides, plan.spans, strict=True)
    ]
    given = context.integers("output_shape")
    mode = context.text("auto_pad", "NOTSET")
    if given or mode.startswith("SAME"):
        wanted = given or [n * s for n, s in zip(x.shape[2:], plan.strides, strict=True)]
        totals = [r + e - w for r, e, w in zip(reach, extra, wanted[-rank:], strict=True)]
        small = tuple(total // 2 for total in totals)
        large = tuple(total - total // 2 for total in totals)
        begin, end = (small, large) if mode == "SAME_UPPER" else (large, small)
    group = context.integer("group", 1)
    zeros = (0,) * rank
    if (
        begin == end
        and min(begin) >= 0
        and all(e < s for e, s in zip(extra, plan.strides, strict=True))
    ):
        return torch.convolution(
            x, weight, bias, plan.strides, begin, plan.dilations, True, extra, group
        )
    y = torch.convolution(x, weight, None, plan.strides, zeros, plan.dilations, True, zeros, group)
    crops = []
    for axis in reversed(range(rank)):
        crops += [-begin[axis], extra[axis] - end[axis]]
    y = nn.pad(y, crops)
    return y if bias is None else y + bias.view(-1, *[1] * rank)


def conv_integer(
    context: Context,
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """ConvInteger: exact in float64."""
    wide = x.double() if x_zero is None else x.double() - x_zero.double()
    kernel = weight.double()
    if weight_zero is not None:
        kernel = kernel - weight_zero.double().reshape(-1, *[1] * (weight.ndim - 1))
    return conv(context, wide, kernel).round().to(torch.int32)
