"""Leave the costliest sites dense until a bound on the whole model holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, GateError
from iobs_onnx.pruning.judge import Judge, Verdict
from iobs_onnx.pruning.progress import Advance
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.stages import ModelProposal, Pruned
from iobs_onnx.site import Site


@dataclass(frozen=True)
class LeaveDense:
    """Sites go back to dense until `budget_error` and `min_metric` hold.

    They go in the order of their layer error, times its price in the model's loss where that is
    known, highest first; how many is found by bisection, as if each one that goes back made the
    model better.

    Attributes:
        judge: of models.
        prices: what a layer error of 1 of a site costs; empty where that was not measured.
    """

    judge: Judge
    prices: Mapping[Site, float] = field(default_factory=dict)
    name: str = "leave dense"

    def steps(self, run: Run) -> int | None:
        """Return None: how many models are judged follows from the verdicts."""
        return None

    def run(self, run: Run, pruned: Pruned, advance: Advance) -> ModelProposal:
        """Propose the sites that may stay sparse.

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
            return ModelProposal(list(sites), verdict=pruned.verdict)
        order = sorted(sites, key=lambda s: sites[s].measured.layer_error * self.prices.get(s, 1.0))

        def cheapest(count: int) -> ModelProposal:
            chosen = set(order[:count])
            kept = {site: item for site, item in sites.items() if site in chosen}
            verdict = self.judge(with_sites(run.dense, kept, pruned.tensors))
            advance()
            return ModelProposal(list(kept), verdict=verdict)

        held, failing = 0, len(order)  # counts of sparse sites
        best: ModelProposal | None = None
        while failing - held > 1:
            count = (held + failing) // 2
            found = cheapest(count)
            if found.verdict is not None and _holds(found.verdict, config):
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
    highest = "costs in the model's loss" if config.allocate == "loss" else "layer errors"
    return f"left dense: among the highest {highest}, and {_bound(config)} must hold"


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
