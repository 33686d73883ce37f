"""Distillation as the last stages of a run, before bounds are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.distil.blocks import distil_blocks
from iobs_onnx.pruning.distil.feeds import endless, in_turn, own_text
from iobs_onnx.pruning.distil.losses import predicts_tokens, steady_targets
from iobs_onnx.pruning.distil.model import distil, require_trainable, telling
from iobs_onnx.pruning.distil.settings import BEST_STEPS, STEPS, DistilSettings
from iobs_onnx.pruning.distil.trained import kept_masks
from iobs_onnx.pruning.progress import Advance
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.stages import ModelProposal, Pruned
from iobs_onnx.runtime import Data, Feed, SelfSamples, input_specs
from iobs_onnx.site import Site


def require_distillable(dense: ir.Model, sites: Sequence[Site], data: Data, how: str) -> None:
    """Raise what distillation would, before hours are spent on what cannot be distilled.

    Args:
        dense: the model.
        sites: that will be sparse.
        data: of the run.
        how: `blocks`, `model` or `both`; of blocks each is looked at when its turn comes.

    Raises:
        DataError: no sample is held out to judge by.
        ModelError: there is no output to match; or the whole is to be trained, and torch cannot
            evaluate it, or evaluates it otherwise than ONNX Runtime, or memory does not hold a
            step.
    """
    if not data.held_out_samples:
        raise DataError(f"distill {how}: the data leave no sample to hold out; give more")
    try:
        if how == "blocks":
            steady_targets(dense, "auto", [site.initializer for site in sites])
            return
        require_trainable(dense, next(iter(data.calibration)), sites)
    except ModelError as error:
        raise ModelError(f"{error}; leave out --distill, or give another export") from error


def settle(
    config: PruneConfig, dense: ir.Model, sites: Sequence[Site], data: Data
) -> tuple[PruneConfig, dict[str, Any] | None]:
    """Decide what is trained, before the work.

    Returns:
        The options with `distill` as it will be; and what the report tells where the preset would
        have trained and cannot, else None.

    Raises:
        DataError, ModelError: what was asked for cannot be trained.
    """
    how = config.training
    if how != "none":
        try:
            require_distillable(dense, sites, data, how)
        except (DataError, ModelError) as error:
            if config.distill is not None:
                raise
            told = {
                "accepted": False,
                "notes": [f"preset {config.preset} trained nothing: {error}"],
            }
            return replace(config, distill="none"), told
    return replace(config, distill=how), None


def _settings(run: Run) -> DistilSettings:
    config = run.config
    seconds = config.distill_time
    if seconds is not None and config.distill == "both":
        seconds /= 2
    steps = config.distill_steps
    if steps is None and config.preset == "best" and config.distill == "model":
        steps = BEST_STEPS
    return DistilSettings(
        steps=steps,
        seconds=seconds,
        keeps=config.on_interrupt == "keep",
        seed=config.seed,
    )


@dataclass(frozen=True)
class DistilBlocks:
    """Trains what is kept block by block towards the dense model (:func:`distil_blocks`).

    Attributes:
        checkpoint: takes every block.
    """

    checkpoint: Checkpoint
    name: str = "distil blocks"

    def steps(self, run: Run) -> int | None:
        """Return None: how many blocks there are shows when the model is cut."""
        return None

    def run(self, run: Run, pruned: Pruned, advance: Advance) -> ModelProposal:
        """Propose the tensors of the blocks that came nearer."""
        sparse = with_sites(run.dense, pruned.sites, pruned.tensors)
        sites = list(pruned.sites)
        found = distil_blocks(
            run.dense,
            sparse,
            sites,
            run.data.calibration,
            list(run.data.held_out),
            kept=kept_masks(sparse, sites),
            engine=run.engine,
            checkpoint=self.checkpoint,
            settings=_settings(run),
            advance=advance,
        )
        return ModelProposal(sites, found.tensors, found.before, found.after, told=found.as_dict())


@dataclass(frozen=True)
class DistilModel:
    """Trains what is kept towards the dense model's outputs (:func:`distil`).

    Attributes:
        sources: of the run's data; where the model wrote some, it goes on writing.
        path: the dense model as it was given.
    """

    sources: Sequence[Any]
    path: Any
    name: str = "distil"

    def steps(self, run: Run) -> int | None:
        """Return the steps of training; None where a time is given instead."""
        return None if run.config.distill_time else _settings(run).steps or STEPS

    def run(self, run: Run, pruned: Pruned, advance: Advance) -> ModelProposal:
        """Propose the tensors that training ended with."""
        sparse = with_sites(run.dense, pruned.sites, pruned.tensors)
        found = distil(
            run.dense,
            sparse,
            self._feeds(run),
            list(run.data.held_out),
            kept=kept_masks(sparse, list(pruned.sites)),
            settings=_settings(run),
            told=telling(advance),
        )
        return ModelProposal(
            list(pruned.sites), found.tensors, found.before, found.after, told=found.as_dict()
        )

    def _feeds(self, run: Run) -> Iterator[Feed]:
        """Yield feeds without end: the calibration data again and again, and the model's text."""
        given = endless(run.data.calibration, run.config.seed, vary=predicts_tokens(run.dense))
        if not any(isinstance(source, SelfSamples) for source in self.sources):
            return given
        own = own_text(run.dense, self.path, input_specs(run.dense), run.config)
        return in_turn(given, own)
