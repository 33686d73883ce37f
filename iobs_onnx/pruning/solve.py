"""Solve the sites that read the same activations, and say what each one cost."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import IobsError, ModelError
from iobs_onnx.hessian import Cross, Hessian, dead_inputs
from iobs_onnx.layer import Solution, newton_step, solve_stacked
from iobs_onnx.passes import Codes, why_not_integers
from iobs_onnx.pruning.rounding import round_site
from iobs_onnx.report.record import SiteReport
from iobs_onnx.site import Site
from iobs_onnx.solvers import make_solver

Stored = NDArray[np.generic]


@dataclass(frozen=True)
class Layer:
    """One site as it is handed to the solver.

    Attributes:
        dense: its stored tensor in the dense model.
        start: that from which the step starts; `dense` itself in a first round.
        bias: the stored bias in the dense model; None where none is to be compensated.
        residual: `(r_d − r_s)ᵀx_s / n`, `(1, out, in)`, of the stream its output is added to.
    """

    dense: Stored
    start: Stored
    bias: Stored | None = None
    residual: Cross | None = None


@dataclass(frozen=True)
class Solved:
    """What one site became.

    Attributes:
        stored: its sparse tensor.
        bias: its new bias, None if it stays.
        report: its line of the report.
        codes: the integers that `stored` is to be written as, None for none.
    """

    stored: Stored
    bias: Stored | None
    report: SiteReport
    codes: Codes | None = None


def solve_sites(
    layers: Mapping[Site, Layer], hessian: Hessian, config: PruneConfig, device: torch.device
) -> dict[Site, Solved]:
    """Solve sites that share one Hessian, stacked, so that it is factorised once.

    Each aims at `f(W) = ½ E‖W_dense x_d + (r_d − r_s) − W x_s‖²`, with the residual where the
    layer has one. With bias compensation `b` the bias takes over that fraction of the mean error,
    and the rest is solved with `H − b μμᵀ`, μ the mean of `x_s`.

    Raises:
        IobsError: as the solver raises it, with the name of the first site.
    """
    try:
        return _solve_sites(layers, hessian, config, device)
    except IobsError as error:
        raise type(error)(f"site {next(iter(layers)).name!r}: {error}") from error


def _solve_sites(
    layers: Mapping[Site, Layer], hessian: Hessian, config: PruneConfig, device: torch.device
) -> dict[Site, Solved]:
    # A mean can be left to biases only where every site of the tap has one.
    biased = all(layer.bias is not None for layer in layers.values())
    biased = biased and config.sparsity.density < 1.0
    centred = _centred(hessian, config.bias_compensation if biased else 0.0)
    dense = [_matrices(site, layer.dense, device) for site, layer in layers.items()]
    aims = [
        _aim(weight, site, layer, centred, config, device)
        for weight, (site, layer) in zip(dense, layers.items(), strict=True)
    ]

    def solve(solver: str, preset: str | None = None) -> list[list[Solution[torch.Tensor]]]:
        by_group = [
            solve_stacked(
                [aim[group] for aim in aims],
                matrix,
                pattern=config.sparsity,
                solver=make_solver(solver, preset),
                damping=config.damping,
            )
            for group, matrix in enumerate(centred.matrix)
        ]
        return [list(groups) for groups in zip(*by_group, strict=True)]

    started = time.perf_counter()
    solutions = solve(config.solver, config.preset)
    seconds = time.perf_counter() - started
    baseline = solve(config.compare) if config.compare else [None] * len(layers)
    outputs = sum(site.out_features for site in layers)
    result = {}
    for (site, layer), weight, aim, groups, other in zip(
        layers.items(), dense, aims, solutions, baseline, strict=True
    ):
        solved = torch.stack([solution.weight for solution in groups])
        # Float64 weights would come back rounded where nothing was asked of them.
        whole = config.sparsity.density == 1.0
        stored = layer.dense if whole else site.to_stored(solved.cpu().numpy(), layer.dense.dtype)
        energy = _quadratic(weight, hessian)
        codes, nearest_error = None, None
        if config.quantize is not None and why_not_integers(site) is None:
            codes, nearest = round_site(
                site, groups, aim, centred, config.damping, layer.dense.dtype
            )
            stored = codes.dequantized()
            lost = _quadratic(_matrices(site, nearest.dequantized(), device) - aim, centred)
            nearest_error = lost / energy if energy > 0 else 0.0
        sparse = _matrices(site, stored, device)  # as it is read: rounded to the stored type
        excess = _quadratic(sparse - aim, centred)
        compared = None if other is None else sum(solution.excess for solution in other)
        report = SiteReport.of(
            site,
            sparse.cpu().numpy(),
            pattern=config.sparsity,
            layer_error=excess / energy if energy > 0 else 0.0,
            output_bound=math.sqrt(excess),
            compared_error=None if compared is None else compared / energy if energy > 0 else 0.0,
            quantized=None if config.quantize is None else why_not_integers(site) or "int8",
            nearest_error=nearest_error,
            bias_compensated=biased and config.bias_compensation > 0,
            rows=hessian.rows,
            dead_inputs=int(dead_inputs(hessian.matrix).sum()),
            seconds=seconds * site.out_features / outputs,
        )
        bias = _bias(weight, sparse, layer, hessian, config) if biased else None
        result[site] = Solved(stored, bias, report, codes)
    return result


def _matrices(site: Site, stored: Stored, device: torch.device) -> torch.Tensor:
    if not np.isfinite(stored.astype(np.float32)).all():
        raise ModelError(f"weight {site.initializer!r} holds NaN or Inf")
    return torch.from_numpy(site.to_matrices(stored)).to(device)


def _centred(hessian: Hessian, share: float) -> Hessian:
    """Take `share` of the product of means out of all second moments."""
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
    )


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _aim(
    dense: torch.Tensor,
    site: Site,
    layer: Layer,
    hessian: Hessian,
    config: PruneConfig,
    device: torch.device,
) -> torch.Tensor:
    """Return what the site's weight would be without a pattern, `(groups, out, in)`."""
    first = layer.start is layer.dense
    nothing_moved = first and hessian.drift is None and layer.residual is None
    # Without a pattern there is nothing to make up for but the rounding between two runs.
    if nothing_moved or config.sparsity.density == 1.0:
        return dense
    start = dense if first else _matrices(site, layer.start, device)
    gradient = (start - dense) @ hessian.matrix
    if hessian.drift is not None:
        gradient -= dense @ hessian.drift.matrix
    if layer.residual is not None:
        share = config.bias_compensation if layer.bias is not None else 0.0
        outer = _outer(layer.residual.mean, hessian.mean)
        gradient -= layer.residual.matrix - share * outer
    steps = [
        newton_step(*matrices, damping=config.damping, learning_rate=config.learning_rate)
        for matrices in zip(start, gradient, hessian.matrix, strict=True)
    ]
    return torch.stack(steps)


def _bias(
    dense: torch.Tensor,
    sparse: torch.Tensor,
    layer: Layer,
    hessian: Hessian,
    config: PruneConfig,
) -> Stored | None:
    """Return the bias that makes up for the given share of the mean error of the output."""
    if layer.bias is None or config.bias_compensation == 0.0:
        return None
    mean = torch.zeros_like(hessian.mean[0])
    if hessian.drift is not None:
        mean = hessian.drift.mean[0]
    gain = dense[0] @ mean
    if layer.residual is not None:
        gain = gain + layer.residual.mean[0]
    missing = config.learning_rate * gain + (dense[0] - sparse[0]) @ hessian.mean[0]
    shift = (config.bias_compensation * missing).cpu().numpy()
    moved = layer.bias.astype(np.float32) + shift.reshape(layer.bias.shape)
    return moved.astype(layer.bias.dtype)


def _quadratic(weight: torch.Tensor, hessian: Hessian) -> float:
    """Return `tr(W H Wᵀ)` over all groups."""
    value = float(((weight @ hessian.matrix) * weight).sum(dtype=torch.float64))
    return max(value, 0.0)
