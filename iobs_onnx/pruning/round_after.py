"""Int8 behind distillation: round what was trained, in a walk of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from iobs_onnx.errors import IobsError
from iobs_onnx.hessian import combine
from iobs_onnx.layer import Solution
from iobs_onnx.passes import prepare, why_not_integers
from iobs_onnx.pruning.aim import Stored, matrices
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.executor import Crew
from iobs_onnx.pruning.judge import Judge
from iobs_onnx.pruning.records import Run, SolvedSite, with_sites
from iobs_onnx.pruning.rounding import round_site
from iobs_onnx.pruning.rounds import walk_once
from iobs_onnx.pruning.stages import Proposal, Pruned, Work
from iobs_onnx.pruning.walk import Route
from iobs_onnx.site import Site
from iobs_onnx.solvers.quadratic import squared_norm


@dataclass(frozen=True)
class RoundKept:
    """Rounds sparse weights to int8 as they are; the kept ones make up for each other's rounding.

    The aim is the weight itself, on the inputs that the model gives it, earlier sites rounded. What
    rounding costs is added to what the site had cost before.
    """

    name: str = "round"

    def run(self, work: Work, advance: Callable[[], None]) -> Proposal:
        """Round the segment's sites."""
        sites = {}
        for site in work.segment.sites:
            advance()
            if site not in work.start:
                continue  # it is dense: no row reached it
            try:
                sites[site] = _rounded(site, work.start[site], work)
            except IobsError as error:
                raise type(error)(f"site {site.name!r}: {error}") from error
        return Proposal(sites)


def _rounded(site: Site, item: SolvedSite, work: Work) -> SolvedSite:
    if (reason := why_not_integers(site)) is not None:
        return replace(item, measured=replace(item.measured, quantized=reason))
    hessian = combine([work.hessians[tap] for tap in site.taps if tap in work.hessians])
    stored = item.weight.numpy()
    weights = matrices(site, stored, work.run.device)
    solved = [Solution(weight, weight != 0, 0.0, 0.0) for weight in weights]
    codes, nearest = round_site(
        site, solved, weights, hessian, work.run.config.damping, stored.dtype
    )

    def cost(values: Stored) -> float:
        read = matrices(site, values, work.run.device)
        return squared_norm(read - weights, hessian.matrix)

    excess, plain = (cost(found.dequantized()) for found in (codes, nearest))
    measured = replace(
        item.measured,
        excess=item.measured.excess + excess,
        nearest=item.measured.excess + plain,
        quantized="int8",
    )
    return replace(item, weight=ir.Tensor(codes.dequantized()), codes=codes, measured=measured)


def round_kept(
    run: Run,
    route: Route,
    pruned: Pruned,
    *,
    judge: Judge,
    checkpoint: Checkpoint,
    crew: Crew,
    advance: Callable[[], None],
) -> Pruned:
    """Walk through the model once more, and round its sparse weights to int8.

    Args:
        run: what all parts of the run share; its calibration feeds are read again.
        route: of its walks.
        pruned: the model as distilled.
        judge: of models.
        checkpoint: takes what is made.
        crew: where the walk takes place.
        advance: called after every batch that is measured and every site.
    """
    working = prepare(with_sites(run.dense, pruned.sites, pruned.tensors), run.sites)
    # Biases were moved by the solver, and then trained: a walk must not move them back.
    unmoved = {site: replace(item, bias=None) for site, item in pruned.sites.items()}
    walked = walk_once(
        run,
        route,
        run.config.rounds + 1,
        working,
        unmoved,
        run.data.calibration,
        run.data.batches,
        stages=[RoundKept()],
        checkpoint=checkpoint,
        crew=crew,
        advance=advance,
    )
    sites = {
        site: replace(walked.sites.get(site, item), bias=item.bias)
        for site, item in pruned.sites.items()
    }
    verdict = judge(with_sites(run.dense, sites, pruned.tensors))
    return replace(pruned, sites=sites, verdict=verdict)
