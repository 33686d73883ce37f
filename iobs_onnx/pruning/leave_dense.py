"""Leave the costliest sites dense until a bound on the whole model holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, GateError
from iobs_onnx.pruning.judge import Judge, Verdict
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.stages import Pruned


@dataclass(frozen=True)
class LeaveDense:
    """Sites go back to dense until `budget_error` and `min_metric` hold.

    They go in the order of their layer error, highest first; how many is found by bisection, as if
    each one that goes back made the model better.

    Attributes:
        judge: of models.
    """

    judge: Judge
    name: str = "leave dense"

    def run(self, run: Run, pruned: Pruned) -> Pruned:
        """Return the model with the sites that may stay sparse.

        Raises:
            DataError: there is a bound on the error, and nothing was held out to measure it.
            GateError: the bound does not hold even where a single site is sparse.
        """
        config, sites = run.config, pruned.sites
        if config.budget_error is not None and pruned.verdict.error is None:
            raise DataError(
                f"budget_error {config.budget_error}: no float output was compared on held-out "
                "samples; give more data, or a metric"
            )
        if _holds(pruned.verdict, config):
            return pruned
        order = sorted(sites, key=lambda site: sites[site].measured.layer_error)

        def cheapest(count: int) -> Pruned:
            chosen = set(order[:count])
            kept = {site: item for site, item in sites.items() if site in chosen}
            verdict = self.judge(with_sites(run.dense, kept, pruned.tensors))
            return replace(pruned, sites=kept, verdict=verdict)

        held, failing = 0, len(order)  # counts of sparse sites
        best: Pruned | None = None
        while failing - held > 1:
            count = (held + failing) // 2
            found = cheapest(count)
            if _holds(found.verdict, config):
                held, best = count, found
            else:
                failing = count
        if best is None:
            raise GateError(
                f"{_bound(config)} does not hold even with one sparse site; choose a weaker bound; "
                "nothing was written"
            )
        return best


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
