"""Leave the costliest sites dense until a bound on the whole model holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, GateError
from iobs_onnx.pruning.checkpoint import Finished
from iobs_onnx.pruning.judge import Judge, Verdict
from iobs_onnx.site import Site


def leave_dense(
    finished: Mapping[Site, Finished],
    verdict: Verdict,
    config: PruneConfig,
    judge: Judge,
    pruned: Callable[[Mapping[Site, Finished]], ir.Model],
) -> tuple[dict[Site, Finished], Verdict]:
    """Return the sites that may stay sparse under `budget_error` and `min_metric`, and the worth.

    Sites go back to dense in the order of their layer error, highest first; how many is found by
    bisection, as if each one that goes back made the model better.

    Args:
        finished: the sparse sites.
        verdict: on the model with all of them sparse.
        config: names the bounds; without one nothing is changed.
        judge: of models.
        pruned: makes the model in which these sites are sparse.

    Raises:
        DataError: there is a bound on the error, and nothing was held out to measure it.
        GateError: the bound does not hold even where a single site is sparse.
    """
    if config.budget_error is not None and verdict.error is None:
        raise DataError(
            f"budget_error {config.budget_error}: no float output was compared on held-out "
            "samples; give more data, or a metric"
        )
    if _holds(verdict, config):
        return dict(finished), verdict
    order = sorted(finished, key=lambda site: finished[site].report.layer_error)

    def cheapest(count: int) -> dict[Site, Finished]:
        chosen = set(order[:count])
        return {site: item for site, item in finished.items() if site in chosen}

    held, failing = 0, len(order)  # counts of sparse sites
    best: Verdict | None = None
    while failing - held > 1:
        count = (held + failing) // 2
        found = judge(pruned(cheapest(count)))
        if _holds(found, config):
            held, best = count, found
        else:
            failing = count
    if best is None:
        raise GateError(
            f"{_bound(config)} does not hold even with one sparse site; choose a weaker bound; "
            "nothing was written"
        )
    return cheapest(held), best


def reason(config: PruneConfig) -> str:
    """Say why sites were left dense."""
    return f"left dense: among the highest layer errors, and {_bound(config)} must hold"


def _bound(config: PruneConfig) -> str:
    bounds = {
        f"held-out output error <= {config.budget_error}": config.budget_error,
        f"metric >= {config.min_metric}": config.min_metric,
    }
    return " and ".join(text for text, bound in bounds.items() if bound is not None)


def _holds(verdict: Verdict, config: PruneConfig) -> bool:
    small = config.budget_error is None or (
        verdict.error is not None and verdict.error <= config.budget_error
    )
    good = config.min_metric is None or (
        verdict.metric is not None and verdict.metric >= config.min_metric
    )
    return small and good
