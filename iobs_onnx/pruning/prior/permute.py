"""Reorder channels before pruning: an N:M pattern loses less, and the model stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from iobs_onnx.hessian import Hessian
from iobs_onnx.layer import absolute_damping, solve_stacked
from iobs_onnx.passes import (
    Chain,
    find_chains,
    load_model,
    permute_channels,
    prepare,
    stored_slots,
)
from iobs_onnx.pruning.prior.measure import keep_only, measure_once
from iobs_onnx.pruning.records import Run
from iobs_onnx.site import Site, Tap
from iobs_onnx.solvers import make_solver
from iobs_onnx.solvers.permutation import search_order
from iobs_onnx.solvers.problem import inverse
from iobs_onnx.sparsity import NM

# What an order is worth is measured with the layers solved in both orders, quickly.
_JUDGE = ("iobs", "fast")


def permuted(run: Run) -> tuple[ir.Model, list[dict[str, Any]]]:
    """Return the dense model with its free channels in a better order, and what that gained.

    Each chain's order is searched with the Hessians of the dense model's activations, and taken
    only where the solved layers have a lower error in it.

    Args:
        run: its dense model is unchanged; the result computes the same, to rounding, and the
            run's sites fit it too. Nothing is done without `permute`; with it `sparsity` is an
            N:M pattern.

    Returns:
        The model; and for each chain `sites`, `channels`, `tensors` that were reordered, the layer
        error of its sites `before` and `after`, and whether it was `taken`; for each other site
        the `reason` why the order of its inputs is not free.
    """
    if not run.config.permute:
        return run.dense, []
    chains, reasons = find_chains(run.dense, run.sites)
    result, records = load_model(run.dense), []
    wanted = [site for chain in chains for site in chain.sites]
    model = prepare(run.dense, wanted)
    left = list(chains)
    for _, hessians in measure_once(run, model, wanted) if wanted else ():
        ready = [c for c in left if all(site.taps[0] in hessians for site in c.sites)]
        for chain in ready:
            order, record = _order(model, chain, hessians, run)
            records.append(record)
            if record["taken"]:
                permute_channels(result, chain, order.cpu().numpy())
            left.remove(chain)
        keep_only(hessians, {site.taps[0] for chain in left for site in chain.sites})
    records += [_fixed(site, reason) for site, reason in reasons.items()]
    return result, records


def _fixed(site: Site, reason: str) -> dict[str, Any]:
    return {"sites": [site.name], "taken": False, "reason": reason}


def _order(
    model: ir.Model,
    chain: Chain,
    hessians: dict[Tap, Hessian],
    run: Run,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Search one chain's order and judge it."""
    config, pattern = run.config, run.config.sparsity
    assert isinstance(pattern, NM), "options that do not fit are refused before"
    stored = stored_slots(model)
    layers = []
    for site in chain.sites:
        matrices = site.to_matrices(stored[site.initializer].tensor.numpy())
        # Chains hold sites of one group that read one tap.
        layers.append(
            (torch.from_numpy(matrices[0]).to(run.device), hessians[site.taps[0]].matrix[0])
        )
    scores = [_scores(weight, hessian, config.damping) for weight, hessian in layers]
    # Columns are kernel positions, then channels: every position is as many rows more.
    by_channel = torch.cat([score.reshape(-1, chain.channels) for score in scores])
    order = search_order(by_channel, pattern, seed=config.seed)
    before = _error(layers, None, pattern, config.damping)
    after = _error(layers, order, pattern, config.damping)
    return order, {
        "sites": [site.name for site in chain.sites],
        "channels": chain.channels,
        "tensors": sorted({name for name, _ in chain.slices}),
        "before": before,
        "after": after,
        "taken": after < before,
        "reason": None if after < before else "the order found is no better",
    }


def _scores(weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the OBS cost of removing each weight alone, `w² / [H⁻¹]_jj`."""
    damped = hessian.clone()
    damped.diagonal().add_(absolute_damping(damping, hessian))
    return weight.square() / inverse(damped, "H + λI").diagonal()


def _error(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    order: torch.Tensor | None,
    pattern: NM,
    damping: float,
) -> float:
    """Return the layer error of all sites together with their inputs in an order."""
    excess = energy = 0.0
    for weight, hessian in layers:
        if order is not None:
            # The same order of channels at every kernel position.
            starts = torch.arange(0, len(hessian), len(order), device=order.device)
            columns = (starts[:, None] + order).flatten()
            weight, hessian = weight[:, columns], hessian[columns][:, columns]  # noqa: PLW2901
        [solution] = solve_stacked(
            [weight], hessian, pattern=pattern, solver=make_solver(*_JUDGE), damping=damping
        )
        excess += solution.excess
        energy += solution.energy
    return excess / energy if energy > 0 else 0.0
