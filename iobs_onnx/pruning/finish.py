"""What becomes of the model after the last round: its stages, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.judge import Judge, Verdict
from iobs_onnx.pruning.progress import Progress
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.stages import ModelStage, Pruned


@dataclass(frozen=True)
class Finish:
    """Runs stages of the whole model, and decides which of their proposals are taken.

    One is taken if its held-out error falls and the user's metric, where there is one, rises; or if
    there is nothing to choose. What a stage proposed is kept on disk.

    Attributes:
        run: what all parts of the run share.
        judge: of models.
        checkpoint: takes the proposals.
        progress: is told of every step.
    """

    run: Run
    judge: Judge
    checkpoint: Checkpoint
    progress: Progress

    def stages(self, pruned: Pruned, stages: Sequence[ModelStage]) -> Pruned:
        """Run stages in their order."""
        for stage in stages:
            pruned = self._stage(stage, pruned)
        return pruned

    def _stage(self, stage: ModelStage, pruned: Pruned) -> Pruned:
        name, verdict = f"model-{stage.name}", None
        held = self.checkpoint.get_tensors(name)
        if held is None:
            with self.progress.stage(stage.name, stage.steps(self.run)) as advance:
                proposal = stage.run(self.run, pruned, advance)
            verdict = proposal.verdict
            facts: dict[str, Any] = {
                "sites": [site.name for site in proposal.sites],
                "choice": proposal.before is not None,
                "accepted": proposal.accepted,
                "told": proposal.told,
            }
            taken = proposal.tensors if proposal.accepted else {}
            held = self.checkpoint.put_tensors(name, taken, facts)
        tensors, facts = held
        if not facts["accepted"]:
            return _told(pruned, stage, facts)
        new = self._with(pruned, tensors, facts["sites"], verdict)
        measured = facts["choice"] and new.verdict.metric is not None
        if measured and not new.verdict.better_than(pruned.verdict):
            return _told(pruned, stage, facts, "the metric did not rise: it is not taken")
        return _told(new, stage, facts)

    def _with(
        self,
        pruned: Pruned,
        tensors: Mapping[str, ir.TensorProtocol],
        names: Sequence[str],
        verdict: Verdict | None,
    ) -> Pruned:
        """Return the model with other tensors and these sites, judged unless a verdict is known."""
        sites = {
            site: replace(item, weight=tensors.get(site.initializer, item.weight))
            for site, item in pruned.sites.items()
            if site.name in names
        }
        weights = {site.initializer for site in pruned.sites}
        others = {name: item for name, item in tensors.items() if name not in weights}
        others = {**pruned.tensors, **others}
        if verdict is None:
            verdict = self.judge(with_sites(self.run.dense, sites, others))
        return replace(pruned, sites=sites, verdict=verdict, tensors=others)


def _told(pruned: Pruned, stage: ModelStage, facts: Mapping[str, Any], note: str = "") -> Pruned:
    """Add what a stage has to tell, and whether its proposal was taken."""
    told = dict(facts["told"])
    if note:
        told = {**told, "accepted": False, "notes": [*told.get("notes", ()), note]}
    return replace(pruned, told={**pruned.told, stage.name: told})
