"""Matrix products of float32 on the CPU by oneDNN, which torch carries beside MKL.

MKL runs at half speed on processors that Intel did not make: on an AMD EPYC with AVX-512 a
product of 1024 × 768 by 768 × 288 takes 4.2 ms in `torch.mm` and 1.9 ms in oneDNN, in every layout
that a gradient needs. Only `torch.ops.mkldnn` leads there for float32; where it does not, or the
product is too small to gain, `torch.mm` multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Below, the longer way through oneDNN costs more than it gains.
_FEWEST_ROWS = 16
_SMALLEST = 1 << 20


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _available()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product `a b` of two matrices, differentiable any number of times."""
    if (
        _ONEDNN
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and min(a.shape[0], b.shape[1]) >= _FEWEST_ROWS
        and a.shape[0] * a.shape[1] * b.shape[1] >= _SMALLEST
    ):
        found: Tensor = _Product.apply(a, b)
        return found
    return torch.mm(a, b)


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
