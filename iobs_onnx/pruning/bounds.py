"""The bound on the network's change, where there is one, as the report tells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.passes import bound_changes
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.stages import Pruned
from iobs_onnx.report.record import CalibrationRecord
from iobs_onnx.runtime import value_shapes

# What an option must be for the errors of the layers to be those that the theorem adds up.
_WANTED: Mapping[str, tuple[Any, str]] = {
    "sequential": (
        "none",
        "layers are measured on the pruned model's inputs, the theorem is of the dense model's",
    ),
    "rounds": (1, "later rounds measure on the pruned model's inputs"),
    "distill": ("none", "weights are trained after their layers are measured"),
    "quantize": (None, "weights are read as integers, whose errors are not followed"),
}


def network_bound(run: Run, pruned: Pruned, calibration: CalibrationRecord) -> dict[str, Any]:
    """Return `network_bound` of `report.json`.

    Each bound is on the root mean square of `‖y − y'‖₂` over the calibration samples, `y` all of a
    value's numbers for one of them in the dense model, `y'` in the pruned one. That of a site
    holds once its bias is added. What a moved bias takes over is left out rightly: with a share `b`
    of the mean `μ` the change is `ΔW(x − bμ)`, whose mean square `tr(ΔW (H − (2b − b²) μμᵀ) ΔWᵀ)`
    is at most what is measured, with `H − b μμᵀ`.

    Args:
        run: of the dense model.
        pruned: what became of it.
        calibration: which rows the layers were measured on.
    """
    if reason := _ruled_out(run.config, calibration):
        return {"reason": reason, "sites": [], "outputs": []}
    model = with_sites(run.dense, pruned.sites, pruned.tensors)
    own = {
        site: math.sqrt(item.measured.excess * item.measured.rows / calibration.samples)
        for site, item in pruned.sites.items()
    }
    found = bound_changes(model, own, value_shapes(model))
    made = {value.name: value for node in model.graph for value in node.outputs}
    made |= {node.name: node.outputs[0] for node in model.graph}
    return {
        "reason": None,
        "sites": [_told(site.name, found, made.get(site.nodes[0])) for site in own],
        "outputs": [_told(value.name or "", found, value) for value in model.graph.outputs],
    }


def _ruled_out(config: PruneConfig, calibration: CalibrationRecord) -> str | None:
    """Say which option or kind of data leaves no bound for any value."""
    for name, (wanted, why) in _WANTED.items():
        if (value := getattr(config, name)) != wanted:
            return f"{name} {value}: {why}"
    if calibration.random_tokens:
        return "random tokens: rows that were measured are no samples of the calibration data"
    if calibration.padding_excluded:
        return "padding is excluded: the change of its rows was not measured"
    return None


def _told(name: str, found: Mapping[str, float | str], value: ir.Value | None) -> dict[str, Any]:
    change = found.get((value and value.name) or "", 0.0)
    known = not isinstance(change, str)
    return {"name": name, "bound": change if known else None, "reason": None if known else change}
