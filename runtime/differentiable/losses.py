"""Losses that training graphs carry."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context


def likelihood(context: Context, x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """NegativeLogLikelihoodLoss."""
    ignored = context.integer("ignore_index", -100)
    target = target.long()
    reduction = context.text("reduction", "mean")
    return nn.nll_loss(x, target, weight, ignore_index=ignored, reduction=reduction)


def cross_entropy(
    context: Context, x: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """SoftmaxCrossEntropyLoss, with the logarithms of the softmax if they are asked for."""
    logarithms = torch.log_softmax(x, 1)
    loss = likelihood(context, logarithms, target, weight)
    return loss if context.outputs == 1 else (loss, logarithms)
