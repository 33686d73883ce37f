"""Matrix products: MatMul, Gemm, Einsum and the fused forms of com.microsoft."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable import products
from iobs_onnx.runtime.differentiable.activations import by_name
from iobs_onnx.runtime.differentiable.context import Context


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a b` as numpy.matmul; with a matrix on the right one gemm, forwards and backwards."""
    if not a.is_floating_point() and not a.is_complex():
        return torch.matmul(a.long(), b.long()).to(a.dtype)
    if a.ndim < 2 or b.ndim < 2:
        return torch.matmul(a, b)
    if b.ndim > 2:
        return products.stacked_product(a, b)
    if a.ndim == 2:
        return products.product(a, b)
    return products.product(a.reshape(-1, a.shape[-1]), b).view(*a.shape[:-1], b.shape[-1])


def matmul(context: Context, a: Tensor, b: Tensor) -> Tensor:
    """MatMul, as numpy.matmul."""
    return product(a, b)


def gemm(context: Context, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Gemm: `alpha A' B' + beta C`; FusedGemm applies an activation to it."""
    alpha, beta = context.number("alpha", 1.0), context.number("beta", 1.0)
    a = a.t() if context.integer("transA", 0) else a
    b = b.t() if context.integer("transB", 0) else b
    if not a.is_floating_point():
        y = (alpha * torch.mm(a.long(), b.long())).to(a.dtype)
        y = y if c is None else y + (beta * c).to(a.dtype)
    else:
        y = products.product(a, b)
        y = y if alpha == 1 else alpha * y
        if c is not None:
            y = y + (c if beta == 1 else beta * c)
    name = context.text("activation", "")
    if name:
        parameters = [
            context.attributes[key]
            for key in ("activation_alpha", "activation_beta")
            if key in context.attributes
        ]
        y = by_name(context, name, y, *parameters)
    return y


def einsum(context: Context, *operands: Tensor) -> Tensor:
    """Einsum."""
    return torch.einsum(context.text("equation", "").replace(" ", ""), *operands)


def fused_matmul(context: Context, a: Tensor, b: Tensor) -> Tensor:
    """FusedMatMul and TransposeMatMul: `alpha A' B'`, operands transposed first."""
    a = _transposed(context, a, "A")
    b = _transposed(context, b, "B")
    y = product(a, b)
    alpha = context.number("alpha", 1.0)
    y = y if alpha == 1 else alpha * y
    return by_name(context, context.text("activation", ""), y)


def _transposed(context: Context, x: Tensor, operand: str) -> Tensor:
    if context.integer(f"transBatch{operand}", 0) and x.ndim > 2:
        # The rows were stored before the batch axes.
        x = x.movedim(0, -2)
    return x.mT if context.integer(f"trans{operand}", 0) and x.ndim > 1 else x


def matmul_fast_gelu(context: Context, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """GemmFastGelu: Gelu by tanh of `A B + bias`."""
    y = product(a, b)
    return nn.gelu(y if bias is None else y + bias, approximate="tanh")


def bias_add(context: Context, x: Tensor, bias: Tensor, skip: Tensor | None = None) -> Tensor:
    """BiasAdd: `x + bias + skip`."""
    return x + bias if skip is None else x + bias + skip
