"""Matrix products of float32 on the CPU by oneDNN, which torch carries beside MKL.

MKL runs at half speed on processors that Intel did not make: on an AMD EPYC with AVX-512 a
product of 1024 × 768 by 768 × 288 takes 4.2 ms in `torch.mm` and 1.9 ms in oneDNN, in every layout
that a gradient needs. Only `torch.ops.mkldnn` leads there for float32; where it does not, or the
product is too small to gain, `torch.mm` multiplies.

Within :func:`bfloat16_factors` large products round their factors to bfloat16 and add in float32,
2.6 times as fast there, and those of stacks of matrices (attention) 2 to 4 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Below, the longer way through oneDNN costs more than it gains.
_FEWEST_ROWS = 16
_SMALLEST = 1 << 20


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _available()
_ROUNDED = ContextVar("bfloat16 factors", default=False)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; without, they are slow."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@contextmanager
def bfloat16_factors(enabled: bool = True) -> Iterator[None]:
    """Round the factors of large float32 products, and of their gradients, to bfloat16.

    A product then errs by some `2^-9 ‖a‖ ‖b‖` a row and column, as in mixed-precision training:
    Micikevicius et al., "Mixed Precision Training", 2018, section 3.
    """
    token = _ROUNDED.set(enabled)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product `a b` of two matrices, differentiable any number of times."""
    found: Tensor
    if _large(a, b) and _ROUNDED.get():
        found = _Rounded.apply(a, b)
        return found
    if _large(a, b) and _ONEDNN:
        found = _Product.apply(a, b)
        return found
    return torch.mm(a, b)


def stacked_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the products `a b` of matrices in the last two axes, as numpy.matmul."""
    if _ROUNDED.get() and a.shape[:-2] == b.shape[:-2] and _large(a, b):
        found: Tensor = _Rounded.apply(a, b)
        return found
    return torch.matmul(a, b)


def _large(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and min(a.shape[-2], b.shape[-1]) >= _FEWEST_ROWS
        and a.numel() * b.shape[-1] >= _SMALLEST
    )


class _Product(torch.autograd.Function):
    """`a b` by oneDNN."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            product(gradient, b.t()) if ctx.needs_input_grad[0] else None,
            product(a.t(), gradient) if ctx.needs_input_grad[1] else None,
        )


class _Rounded(torch.autograd.Function):
    """`a b`, also of stacks; the factors in bfloat16 are also what is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.bfloat16(), b.bfloat16()
        ctx.save_for_backward(a, b)
        return torch.matmul(a, b).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        gradient = gradient.bfloat16()
        return (
            torch.matmul(gradient, b.mT).float() if ctx.needs_input_grad[0] else None,
            torch.matmul(a.mT, gradient).float() if ctx.needs_input_grad[1] else None,
        )
