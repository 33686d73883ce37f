"""Activation functions."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context


def leaky_relu(context: Context, x: Tensor) -> Tensor:
    """LeakyRelu."""
    return nn.leaky_relu(x, context.number("alpha", 0.01))


def elu(context: Context, x: Tensor) -> Tensor:
    """Elu."""
    return nn.elu(x, context.number("alpha", 1.0))


def celu(context: Context, x: Tensor) -> Tensor:
    """Celu."""
    return nn.celu(x, context.number("alpha", 1.0))


def selu(context: Context, x: Tensor) -> Tensor:
    """Selu: `γ x`, and `γ α (eˣ − 1)` below zero."""
    alpha = context.number("alpha", 1.67326319217681884765625)
    gamma = context.number("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def thresholded_relu(context: Context, x: Tensor) -> Tensor:
    """ThresholdedRelu."""
    return torch.where(x > context.number("alpha", 1.0), x, torch.zeros_like(x))


def shrink(context: Context, x: Tensor) -> Tensor:
    """Shrink: towards zero by `bias` outside of `±lambd`, zero within."""
    bias, lambd = context.number("bias", 0.0), context.number("lambd", 0.5)
    zero = torch.zeros_like(x)
    moved = torch.where(x > lambd, x - bias, zero) + torch.where(x < -lambd, x + bias, zero)
    return moved.to(x.dtype)


def hard_sigmoid(context: Context, x: Tensor) -> Tensor:
    """HardSigmoid."""
    return (context.number("alpha", 0.2) * x + context.number("beta", 0.5)).clamp(0, 1)


def softplus(x: Tensor) -> Tensor:
    """Return `log(1 + eˣ)`."""
    # torch's own is linear above a threshold.
    return torch.logaddexp(x, torch.zeros_like(x))


def gelu(context: Context, x: Tensor) -> Tensor:
    """Gelu."""
    return nn.gelu(x, approximate=context.text("approximate", "none"))


def swish(context: Context, x: Tensor) -> Tensor:
    """Swish and QuickGelu: `x σ(α x)`."""
    default = 1.702 if context.op_type == "QuickGelu" else 1.0
    return x * torch.sigmoid(context.number("alpha", default) * x)


def swiglu(context: Context, gate: Tensor, value: Tensor) -> Tensor:
    """SwiGLU: `a σ(α a) b`."""
    return gate * torch.sigmoid(context.number("alpha", 1.0) * gate) * value


def fast_gelu(context: Context, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """FastGelu: Gelu by tanh, of `x` plus an optional bias."""
    return nn.gelu(x if bias is None else x + bias, approximate="tanh")


def bias_gelu(context: Context, x: Tensor, bias: Tensor) -> Tensor:
    """BiasGelu."""
    return nn.gelu(x + bias)


# What fused operators and recurrent ones name, as functions of x, alpha and beta; with the alpha
# and beta that hold where the node gives none.
NAMED: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float, float]] = {
    "Affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "Clip": (lambda x, alpha, beta: x.clamp(alpha, beta), -inf, inf),
    "Elu": (lambda x, alpha, beta: nn.elu(x, alpha), 1.0, 0.0),
    "Gelu": (lambda x, alpha, beta: nn.gelu(x), 0.0, 0.0),
    "HardSigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), 0.2, 0.5),
    "HardSwish": (lambda x, alpha, beta: nn.hardswish(x), 0.0, 0.0),
    "LeakyRelu": (lambda x, alpha, beta: nn.leaky_relu(x, alpha), 0.01, 0.0),
    "Relu": (lambda x, alpha, beta: torch.relu(x), 0.0, 0.0),
    "ScaledTanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "Sigmoid": (lambda x, alpha, beta: torch.sigmoid(x), 0.0, 0.0),
    "Softplus": (lambda x, alpha, beta: softplus(x), 0.0, 0.0),
    "Softsign": (lambda x, alpha, beta: nn.softsign(x), 0.0, 0.0),
    "Tanh": (lambda x, alpha, beta: torch.tanh(x), 0.0, 0.0),
    "ThresholdedRelu": (lambda x, alpha, beta: torch.where(x > alpha, x, 0), 1.0, 0.0),
}


def by_name(context: Context, name: str, x: Tensor, *parameters: float) -> Tensor:
    """Apply the activation that a fused operator names; parameters are its alpha and beta."""
    if not name:
        return x
    if name not in NAMED:
        raise context.error(f"activation {name!r} is not known")
    function, *defaults = NAMED[name]
    alpha, beta = (*parameters, *defaults[len(parameters) :])
    return function(x, alpha, beta)
