"""What a site's weight should be, and what is left to its bias, before any pattern is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import ModelError
from iobs_onnx.hessian import Cross, Hessian
from iobs_onnx.layer import newton_step
from iobs_onnx.site import Site
from iobs_onnx.solvers.quadratic import squared_norm

Stored = NDArray[np.generic]


@dataclass(frozen=True)
class Tensors:
    """The tensors around one site, as they are stored.

    Attributes:
        dense: the weight in the dense model.
        start: that from which the step starts; `dense` itself in a first round.
        bias: in the dense model; None where none is to be compensated.
        residual: `(r_d − r_s)ᵀx_s / n`, `(1, out, in)`, of the stream its output is added to.
    """

    dense: Stored
    start: Stored
    bias: Stored | None = None
    residual: Cross | None = None


def matrices(site: Site, stored: Stored, device: torch.device) -> torch.Tensor:
    """Return a stored tensor as `W`, `(groups, out, in)` float32.

    Raises:
        ModelError: it holds NaN or Inf.
    """
    if not np.isfinite(stored.astype(np.float32)).all():
        raise ModelError(f"weight {site.initializer!r} holds NaN or Inf")
    return torch.from_numpy(site.to_matrices(stored)).to(device)


def centred(hessian: Hessian, share: float) -> Hessian:
    """Take `share` of the product of means out of all second moments: `H − b μμᵀ`."""
    if share == 0.0:
        return hessian
    mean = hessian.mean
    drift = hessian.drift
    return Hessian(
        hessian.matrix - share * _outer(mean, mean),
        hessian.rows,
        hessian.weight,
        mean,
        None
        if drift is None
        else Cross(drift.matrix - share * _outer(drift.mean, mean), drift.mean),
        hessian.shares,
    )


def aim(
    dense: torch.Tensor,
    site: Site,
    tensors: Tensors,
    hessian: Hessian,
    config: PruneConfig,
    *,
    whole: bool,
) -> torch.Tensor:
    """Return what the site's weight would be without a pattern, `(groups, out, in)`.

    It is a step of length η from the start towards the minimiser of
    `½ E‖W_dense x_d + (r_d − r_s) − W x_s‖²`.

    Args:
        dense: `W_dense`, `(groups, out, in)`.
        site: whose weight it is.
        tensors: around it.
        hessian: centred, with the drift of the inputs.
        config: of the step.
        whole: the pattern keeps every weight: there is nothing to make up for but the rounding
            between two runs.
    """
    first = tensors.start is tensors.dense
    nothing_moved = first and hessian.drift is None and tensors.residual is None
    if nothing_moved or whole:
        return dense
    start = dense if first else matrices(site, tensors.start, dense.device)
    gradient = (start - dense) @ hessian.matrix
    if hessian.drift is not None:
        gradient -= dense @ hessian.drift.matrix
    if tensors.residual is not None:
        gradient -= _pull(tensors, tensors.residual, hessian, config)
    return _step(start, gradient, hessian, config)


def bounded(
    dense: torch.Tensor, tensors: Tensors, hessian: Hessian, config: PruneConfig
) -> Tensors:
    """Return the tensors, without the residual where making up for it is no small correction.

    The aim counts all rows alike. A layer that tells them apart badly (attention over near-equal
    scores gives every token the same mean) and puts out little beside its stream could only make
    up for the error of most rows by spoiling the few that had none, such as a class token. That
    shows in the size of the step `R = η r (H + λI)⁻¹`, r the residual: it is left out where
    `tr(R H Rᵀ) > tr(W_dense H W_denseᵀ)`. Held-out rows would not show it: on them, too, the mean
    over all rows gets smaller.

    Args:
        dense: `W_dense`, `(groups, out, in)`.
        tensors: around the site.
        hessian: centred as for :func:`aim`.
        config: of the step.
    """
    if tensors.residual is None:
        return tensors
    pull = _pull(tensors, tensors.residual, hessian, config)
    change = _step(torch.zeros_like(dense), -pull, hessian, config)
    if squared_norm(change, hessian.matrix) <= squared_norm(dense, hessian.matrix):
        return tensors
    return replace(tensors, residual=None)


def compensated_bias(
    dense: torch.Tensor,
    sparse: torch.Tensor,
    tensors: Tensors,
    hessian: Hessian,
    config: PruneConfig,
) -> Stored | None:
    """Return the bias that makes up for the given share of the mean error of the output.

    Args:
        dense, sparse: `W` before and after, `(1, out, in)`.
        tensors: with the bias; without one None is returned.
        hessian: not centred.
        config: names the share.
    """
    if tensors.bias is None or config.bias_compensation == 0.0:
        return None
    mean = torch.zeros_like(hessian.mean[0])
    if hessian.drift is not None:
        mean = hessian.drift.mean[0]
    gain = dense[0] @ mean
    if tensors.residual is not None:
        gain = gain + tensors.residual.mean[0]
    missing = config.learning_rate * gain + (dense[0] - sparse[0]) @ hessian.mean[0]
    shift = (config.bias_compensation * missing).cpu().numpy()
    moved = tensors.bias.astype(np.float32) + shift.reshape(tensors.bias.shape)
    return moved.astype(tensors.bias.dtype)


def _pull(tensors: Tensors, residual: Cross, hessian: Hessian, config: PruneConfig) -> torch.Tensor:
    """Return what a residual takes off the gradient, `(1, out, in)`."""
    share = config.bias_compensation if tensors.bias is not None else 0.0
    return residual.matrix - share * _outer(residual.mean, hessian.mean)


def _step(
    start: torch.Tensor, gradient: torch.Tensor, hessian: Hessian, config: PruneConfig
) -> torch.Tensor:
    steps = [
        newton_step(*group, damping=config.damping, learning_rate=config.learning_rate)
        for group in zip(start, gradient, hessian.matrix, strict=True)
    ]
    return torch.stack(steps)


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)
