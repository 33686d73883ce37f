"""Activation functions."""

from __future__ import annotations

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


def hard_swish(x: Tensor) -> Tensor:
    """Return `x max(0, min(1, x/6 + 1/2))`."""
    return nn.hardswish(x)


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


def by_name(context: Context, name: str, x: Tensor, *parameters: float) -> Tensor:
    """Apply the activation that a fused operator names; parameters are its alpha and beta."""
    alpha = parameters[0] if parameters else None
    beta = parameters[1] if len(parameters) > 1 else None
    match name:
        case "" | "Identity":
            return x
        case "Relu":
            return torch.relu(x)
        case "Tanh":
            return torch.tanh(x)
        case "Sigmoid":
            return torch.sigmoid(x)
        case "LeakyRelu":
            return nn.leaky_relu(x, 0.01 if alpha is None else alpha)
        case "Clip":
            return x.clamp(alpha, beta)
        case "HardSigmoid":
            return ((0.2 if alpha is None else alpha) * x + (0.5 if beta is None else beta)).clamp(
                0, 1
            )
        case "Elu":
            return nn.elu(x, 1.0 if alpha is None else alpha)
        case "ThresholdedRelu":
            return torch.where(x > (1.0 if alpha is None else alpha), x, 0)
        case "Softsign":
            return nn.softsign(x)
        case "Softplus":
            return softplus(x)
        case "Affine":
            return (1.0 if alpha is None else alpha) * x + (beta or 0.0)
        case "ScaledTanh":
            return (1.0 if alpha is None else alpha) * torch.tanh((1.0 if beta is None else beta) * x)
        case "Gelu":
            return nn.gelu(x)
        case "HardSwish":
            return hard_swish(x)
    raise context.error(f"activation {name!r} is not known")
