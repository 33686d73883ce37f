"""Quantization: rounding passes the gradient straight through, saturation stops it.

Where a gradient is wanted, a quantized tensor is carried as floats that hold whole numbers, as
integers have no gradient in torch; whatever reads it takes both.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable import convolution
from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.dtypes import TYPES
from iobs_onnx.runtime.differentiable.elementwise import narrowed, straight_round
from iobs_onnx.runtime.differentiable.linear import product

_D = ir.DataType
_BOUNDS = {_D.INT4: (-8, 7), _D.UINT4: (0, 15)}


def _spread(context: Context, parameter: Tensor, x: Tensor) -> Tensor:
    """Shape a scale or zero point so that it broadcasts to `x`: per axis, or per block."""
    block = context.integer("block_size", 0)
    if parameter.numel() == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    axis = context.integer("axis", 1) % x.ndim
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    view = [1] * x.ndim
    view[axis] = -1
    return parameter.reshape(view)


def _saturated(y: Tensor, kind: ir.DataType) -> Tensor:
    dtype = TYPES[kind]
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        y = y.clamp(*_BOUNDS.get(kind, (info.min, info.max)))
    # A gradient needs floats.
    if y.requires_grad:
        return y
    return narrowed(y, dtype)


def quantize(context: Context, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """QuantizeLinear: `saturate(round(x / scale) + zero)`."""
    code = context.integer("output_dtype", 0)
    kind = _D(code) if code else (context.types[2] if zero is not None else None) or _D.UINT8
    precision = context.integer("precision", 0)
    dtype = context.dtype(precision) if precision else scale.dtype
    y = x.to(dtype) / _spread(context, scale.to(dtype), x)
    if not kind.is_floating_point():
        y = straight_round(y)
    if zero is not None:
        y = y + _spread(context, zero, x).to(y.dtype)
    return _saturated(y, kind)


def dequantize(context: Context, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """DequantizeLinear: `(x − zero) scale`."""
    code = context.integer("output_dtype", 0)
    dtype = context.dtype(code) if code else scale.dtype
    y = x.to(dtype)
    if zero is not None:
        y = y - _spread(context, zero, x).to(dtype)
    return y * _spread(context, scale.to(dtype), x)


def dynamic_quantize(context: Context, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear: to eight bits over the range of `x` and zero."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    # A range is no weight: its gradient would move two elements.
    scale = ((high - low) / 255).detach()
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low.detach() / scale).clamp(0, 255).round()
    y = _saturated(straight_round(x / scale) + zero, _D.UINT8)
    return y, scale, zero.to(torch.uint8)


def _centred(x: Tensor, zero: Tensor | None, axis: int | None) -> Tensor:
    """Return `x − zero` as floats: exact in float64, float32 where it has a gradient."""
    dtype = torch.float32 if x.requires_grad else torch.float64
    y = x.to(dtype)
    if zero is None:
        return y
    zero = zero.to(dtype)
    if axis is not None and zero.ndim == 1 and zero.numel() > 1:
        zero = zero.unsqueeze(axis)
    return y - zero


def matmul_integer(
    context: Context,
    a: Tensor,
    b: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
) -> Tensor:
    """MatMulInteger."""
    left, right = _centred(a, a_zero, -1), _centred(b, b_zero, None)
    dtype = torch.promote_types(left.dtype, right.dtype)
    y = product(left.to(dtype), right.to(dtype))
    return y if y.requires_grad else y.round().to(torch.int32)


def qlinear_matmul(
    context: Context,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """QLinearMatMul."""
    left, right = _centred(a, a_zero, -1), _centred(b, b_zero, None)
    dtype = torch.promote_types(left.dtype, right.dtype)
    scale = _column(a_scale.to(dtype), -1) * b_scale.to(dtype) / y_scale.to(dtype)
    y = product(left.to(dtype), right.to(dtype)) * scale
    kind = context.types[7] or _D.UINT8
    return _saturated(straight_round(y) + y_zero.to(dtype), kind)


def _column(scale: Tensor, axis: int) -> Tensor:
    return scale.unsqueeze(axis) if scale.ndim == 1 and scale.numel() > 1 else scale


def qlinear_conv(
    context: Context,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """QLinearConv; the bias counts in `x_scale · weight_scale`."""
    channels = (-1, *[1] * (weight.ndim - 1))
    image = _centred(x, x_zero, None)
    kernel = weight.to(image.dtype) - weight_zero.to(image.dtype).reshape(channels)
    y = convolution.conv(context, image, kernel, None if bias is None else bias.to(image.dtype))
    scale = x_scale.double() * weight_scale.double() / y_scale.double()
    y = y * scale.to(y.dtype).reshape(channels[:-1])
    kind = context.types[7] or _D.UINT8
    return _saturated(straight_round(y) + y_zero.to(y.dtype), kind)


def dynamic_quantize_matmul(
    context: Context,
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """DynamicQuantizeMatMul: `A`, quantized by its range, times an integer matrix."""
    quantized, scale, zero = dynamic_quantize(context, a)
    return matmul_integer_to_float(context, quantized, b, scale, b_scale, zero, b_zero, bias)


def matmul_integer_to_float(
    context: Context,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """MatMulIntegerToFloat."""
    left, right = _centred(a, a_zero, None), _centred(b, b_zero, None)
    dtype = torch.promote_types(left.dtype, right.dtype)
    y = product(left.to(dtype), right.to(dtype)) * (a_scale * b_scale).to(dtype)
    y = y.to(a_scale.dtype)
    return y if bias is None else y + bias


def matmul_n_bits(
    context: Context,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """MatMulNBits: the packed weight is read once; the gradient flows to `A` and the bias."""
    if order is not None:
        raise context.error("g_idx orders the groups of its weight")
    if context.memo.get("packed") is not b:
        context.memo["weight"] = _unpacked(context, b, scales, zeros).to(a.dtype)
        context.memo["packed"] = b
    y = product(a, context.memo["weight"].t())
    return y if bias is None else y + bias


def _unpacked(context: Context, b: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Return the weight `(N, K)` of blocks of 2, 4 or 8 bits along K."""
    k, n = context.integer("K", 0), context.integer("N", 0)
    bits, block = context.integer("bits", 4), context.integer("block_size", 32)
    blocks = -(-k // block)
    values = _bits(b.reshape(n * blocks, -1), bits)[:, :block].reshape(n, blocks, block)
    if zeros is None:
        centre = torch.full((n, blocks), float(1 << (bits - 1)))
    elif zeros.is_floating_point():
        centre = zeros.reshape(n, blocks).float()
    else:
        centre = _bits(zeros.reshape(n, -1), bits)[:, :blocks].float()
    weight = (values.float() - centre[..., None]) * scales.reshape(n, blocks, 1).float()
    return weight.reshape(n, blocks * block)[:, :k]


def gather_block_quantized(
    context: Context,
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
) -> Tensor:
    """GatherBlockQuantized: what is looked up is made floats, no more; no gradient reaches it."""
    across = context.integer("quantize_axis", 1) % data.ndim
    along = context.integer("gather_axis", 0) % data.ndim
    block, bits = context.integer("block_size", 128), context.integer("bits", 4)
    packed = context.types[0] is _D.UINT8
    chosen = indices.reshape(-1).to(torch.int64)
    chosen = torch.where(chosen < 0, chosen + data.shape[along], chosen)

    def looked_up(tensor: Tensor, length: int | None = None) -> Tensor:
        rows = tensor.index_select(along, chosen)
        if packed and bits < 8:  # along the last axis, which is then the one that blocks lie along
            rows = _bits(rows.reshape(-1, rows.shape[-1]), bits).reshape(*rows.shape[:-1], -1)
        return rows if length is None else rows.narrow(across, 0, length)

    values, factors = looked_up(data), scales.index_select(along, chosen)
    if zeros is not None:
        centre = looked_up(zeros, factors.shape[across]).to(factors.dtype)
    else:
        centre = torch.full_like(factors, float(1 << (bits - 1)) if packed else 0.0)
    centre, factors = (
        each.repeat_interleave(block, across).narrow(across, 0, values.shape[across])
        for each in (centre, factors)
    )
    found = (values.to(factors.dtype) - centre) * factors
    return found.unflatten(along, indices.shape) if indices.ndim else found.squeeze(along)


def _bits(packed: Tensor, bits: int) -> Tensor:
    """Return the numbers of `bits` bits in each row of bytes, the lowest first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    spread = packed[..., None] >> shifts & (1 << bits) - 1
    return spread.reshape(packed.shape[0], -1)
