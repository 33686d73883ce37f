"""Distillation as the last stage of a run, before bounds are held."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.passes import find_token_input
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.distil.feeds import endless, written
from iobs_onnx.pruning.distil.model import distil, require_trainable
from iobs_onnx.pruning.distil.settings import Distilled, DistilSettings
from iobs_onnx.pruning.distil.trained import kept_masks
from iobs_onnx.pruning.judge import Judge
from iobs_onnx.pruning.progress import Progress
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.stages import Pruned
from iobs_onnx.runtime import Data, Feed, SelfSamples, input_specs, open_session

# Texts in a feed that the model writes while it is distilled.
_WRITTEN = 4


def require_distillable(dense: ir.Model, data: Data) -> None:
    """Raise what distillation would, before hours are spent on what cannot be distilled.

    Raises:
        DataError: no sample is held out to judge by.
        ModelError: torch cannot evaluate the model, or evaluates it otherwise than ONNX Runtime.
    """
    if not data.held_out_samples:
        raise DataError("distill model: the data leave no sample to hold out; give more")
    try:
        require_trainable(dense, next(iter(data.calibration)))
    except ModelError as error:
        raise ModelError(f"{error}; leave out --distill, or give another export") from error


@dataclass(frozen=True)
class DistilModel:
    """Trains what is kept towards the dense model's outputs (:func:`distil`).

    It is taken only if the loss on the held-out feeds falls and the user's metric, where there is
    one, does not.

    Attributes:
        sources: of the run's data; where the model wrote some, it goes on writing.
        path: the dense model as it was given.
        judge: of models.
        checkpoint: takes what was trained.
        progress: is told of every step.
    """

    sources: Sequence[Any]
    path: Any
    judge: Judge
    checkpoint: Checkpoint
    progress: Progress
    name: str = "distil"

    def run(self, run: Run, pruned: Pruned) -> Pruned:
        """Distil, or take what a run that was cut off had distilled."""
        held = self.checkpoint.get_tensors(self.name)
        if held is None:
            found = self._distilled(run, pruned)
            held = self.checkpoint.put_tensors(self.name, found.tensors, found.as_dict())
        tensors, facts = held
        if not facts["accepted"]:
            return dataclasses.replace(pruned, distillation=facts)
        sites = {
            site: dataclasses.replace(item, weight=tensors.get(site.initializer, item.weight))
            for site, item in pruned.sites.items()
        }
        weights = {site.initializer for site in sites}
        others = {name: tensor for name, tensor in tensors.items() if name not in weights}
        verdict = self.judge(with_sites(run.dense, sites, others))
        worse = verdict.metric is not None and not verdict.better_than(pruned.verdict)
        if worse:
            note = "the metric did not rise: what was trained is not taken"
            facts = {**facts, "accepted": False, "notes": [*facts["notes"], note]}
            return dataclasses.replace(pruned, distillation=facts)
        return Pruned(sites, verdict, others, facts)

    def _distilled(self, run: Run, pruned: Pruned) -> Distilled:
        steps, seconds = run.config.distill_steps, run.config.distill_time
        sparse = with_sites(run.dense, pruned.sites)
        with self.progress.stage("distil", None if seconds else steps) as advance:
            return distil(
                run.dense,
                sparse,
                self._feeds(run),
                list(run.data.held_out),
                kept=kept_masks(sparse, list(pruned.sites)),
                settings=DistilSettings(steps=steps, seconds=seconds, seed=run.config.seed),
                told=lambda _step, _steps, _loss: advance(),
            )

    def _feeds(self, run: Run) -> Iterator[Feed]:
        """Yield feeds without end: the calibration data again and again, and the model's text."""
        given = endless(run.data.calibration, run.config.seed)
        if not any(isinstance(source, SelfSamples) for source in self.sources):
            return given
        tokens = find_token_input(run.dense)
        assert tokens is not None, "it wrote text to calibrate on"
        own = written(
            open_session(self.path, run.config.provider),
            input_specs(run.dense),
            tokens[1],
            length=run.config.sequence_length,
            start=run.config.start_token,
            batch=run.config.batch_size or _WRITTEN,
            seed=run.config.seed,
        )
        return _in_turn(given, own)


def _in_turn(*streams: Iterator[Feed]) -> Iterator[Feed]:
    while True:
        for stream in streams:
            yield next(stream)
