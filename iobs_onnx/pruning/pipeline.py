"""The whole sequence: a model and calibration data in, a sparse model and its report out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.engine import Engine, default_memory_budget, memory_faults
from iobs_onnx.errors import ModelError, OptionError
from iobs_onnx.passes import (
    count_parameters,
    find_sites,
    load_model,
    locked,
    model_hash,
    moving_lengths,
    require_opset,
    scratch,
    working_in,
    writing_to,
)
from iobs_onnx.pruning.bounds import network_bound
from iobs_onnx.pruning.checkpoint import Checkpoint, digest
from iobs_onnx.pruning.distil.stage import DistilBlocks, DistilModel, settle
from iobs_onnx.pruning.executor import Crew, LocalCrew
from iobs_onnx.pruning.finish import Finish
from iobs_onnx.pruning.judge import Judge, find_metric, require_output_error
from iobs_onnx.pruning.leave_dense import LeaveDense, reason
from iobs_onnx.pruning.prior.allocate import allocate
from iobs_onnx.pruning.prior.permute import permuted
from iobs_onnx.pruning.progress import Progress
from iobs_onnx.pruning.records import Facts, Run
from iobs_onnx.pruning.round_after import round_kept
from iobs_onnx.pruning.rounds import UNREACHED, Rounds
from iobs_onnx.pruning.selection import decline, select
from iobs_onnx.pruning.solve import Solve
from iobs_onnx.pruning.sources import calibration_sources, open_sources
from iobs_onnx.pruning.stages import ModelStage, Pruned
from iobs_onnx.pruning.walk import Route
from iobs_onnx.pruning.workers import RayCrew
from iobs_onnx.pruning.write import describe_file, require_form, write_pruned
from iobs_onnx.report.record import CalibrationRecord, PruneReport, build_report
from iobs_onnx.runtime import Data, find_device, input_specs
from iobs_onnx.site import Candidates, Declined

Model = str | os.PathLike[str] | onnx.ModelProto | ir.Model

# Folders for activations that do not fit in memory begin with this.
_STREAMS = "streams-"


@dataclass(frozen=True)
class PruneResult:
    """A pruned model.

    Attributes:
        model: the sparse model, in memory.
        report: what was done, what was not, and what it cost.
        output: the file it was written to, None if none was asked for.
    """

    model: ir.Model
    report: PruneReport
    output: str | None


def prune(
    model: Model,
    *,
    sparsity: Any,
    calibration: Any = None,
    output: str | os.PathLike[str] | None = None,
    holdout: Any = None,
    work_dir: str | os.PathLike[str] | None = None,
    solver: str = "iobs",
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model's weights to a sparsity pattern, layer by layer, and say what it cost.

    Each site's weight `W` is replaced by a sparse one that minimises `½ E‖W x_d − X x_s‖²` over
    the calibration data: `x_d` is the activation that meets it in the dense model, `x_s` the one
    that meets it in the model as pruned so far.

    Args:
        model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.
        sparsity: `"2:4"`, any `"N:M"`, `0.7` or `"70%"`.
        calibration: an `.npz` (input name -> array whose first axis is samples), a directory of
            `.npz` feeds, a `.jsonl` or `.parquet`, `"module:callable"`, an iterable of feeds, a
            dict of arrays, an ONNX Runtime `CalibrationDataReader`, `"random"`, or `"self"` (text
            that a causal language model writes); or a list of these, which are mixed. None where
            `text`, `images` or `audio` among the options names the data.
        output: the file to write, or a folder, which is made: it takes the model under its own
            name, and the rest of a model's own folder goes with it. Nothing is written if anything
            fails.
        holdout: data that only judge, in any of these forms. Without it a tenth of the calibration
            data, at most 64 samples, is held out.
        work_dir: a folder, made if needed, that keeps what is solved: the same call goes on there
            after it was cut off. Delete it when the run is done.
        solver: a name in :data:`iobs_onnx.solvers.SOLVERS`.
        progress: is told how far calibration and solving are.
        options: the other fields of :class:`iobs_onnx.config.PruneConfig`.

    Raises:
        InputError: the model, the data or an option is at fault.
        SolverError: a site could not be solved.
        CheckError: the result does not hold what it promises.
        GateError: it does not hold a bound that an option set.
    """
    config = make_config({"sparsity": sparsity, "solver": solver, **options})
    full = memory_faults(
        f"device {config.device}",
        "make --memory-budget or --batch-size smaller, or use --device cpu",
    )
    with writing_to(output), full:
        return _prune(
            model,
            config,
            calibration=calibration,
            output=output,
            holdout=holdout,
            work_dir=work_dir,
            progress=progress or Progress(),
        )


def _prune(
    model: Model,
    config: PruneConfig,
    *,
    calibration: Any,
    output: str | os.PathLike[str] | None,
    holdout: Any,
    work_dir: str | os.PathLike[str] | None,
    progress: Progress,
) -> PruneResult:
    """Prune a model whose output is this run's alone; see :func:`prune`."""
    started = time.perf_counter()
    device, metric = find_device(config.device), find_metric(config.metric)
    dense = load_model(model)
    place = require_form(dense, model, output, config.emit)
    chosen = _chosen(dense, config)
    sources = calibration_sources(calibration, config, dense, model, input_specs(dense))
    data = _opened(sources, holdout, dense, config)
    config, untrained = settle(config, dense, chosen.sites, data)
    with _work_folder(work_dir) as folder, _spill(folder) as spill, _crew(config) as crew:
        budget = config.memory_budget or default_memory_budget()
        engine = Engine(config.provider, budget, spill, device=device)
        checkpoint = Checkpoint(folder)
        if work_dir is not None:
            checkpoint.claim(_identity(model, work_dir, config, None if holdout is None else data))
        judge = Judge(dense, data, engine, metric)
        run = Run(dense, chosen.sites, {}, data, config, engine, device)
        reordered, permutations = permuted(run)
        run = replace(run, dense=reordered)
        allocation = allocate(run)
        run = replace(run, patterns=allocation.patterns)
        rounds = Rounds(run, Route.of(run), [Solve()], checkpoint, judge, crew)
        with progress.stage("prune", rounds.steps()) as advance:
            rounded = rounds.walk(advance)
        left = LeaveDense(judge, allocation.prices)
        final = _finished(rounds, rounded.pruned, DistilModel(sources, model), left, progress)
        require_output_error(final.verdict.outputs, config.max_output_error)
        calibrated = CalibrationRecord.of(
            sources, data, dataclasses.asdict(rounded.facts), _random_tokens(rounds)
        )
        bound = network_bound(run, final, calibrated)
        written = write_pruned(run, final, model, place)
        report = build_report(
            config=config,
            model={**describe_file(model), "checker": written.checker},
            output=written.output,
            runtime={
                **engine.used(),
                "device": str(device),
                "segments": len(rounds.route.segments),
                "segment_providers": [engine.ran(segment) for segment in rounds.route.segments],
            },
            calibration=calibrated,
            sites=[item.report(site) for site, item in final.sites.items()],
            declined=[*chosen.declined, *_left_dense(run, rounded.pruned, final)],
            bound=bound,
            parameters=count_parameters(dense, chosen.sites),
            deployment=written.deployment,
            permutations=permutations,
            allocation=allocation.as_list(),
            rounds=rounded.trace,
            distillation=untrained or _distillation(final),
            fidelity=final.verdict.outputs,
            seconds={**rounded.seconds, "total": time.perf_counter() - started},
            deciding=_deciding(dense, final, rounded.facts),
        )
    if place.file is None:
        return PruneResult(written.model, report, None)
    return PruneResult(load_model(place.file), report, os.fspath(place.file))


def _opened(sources: Sequence[Any], holdout: Any, dense: ir.Model, config: PruneConfig) -> Data:
    """Return the data, read to their end where that happens more than once."""
    data = open_sources(sources, holdout, input_specs(dense), config)
    once = (config.rounds, config.allocate, config.permute, config.training)
    return data if once == (1, "uniform", False, "none") else data.in_memory()


def _chosen(dense: ir.Model, config: PruneConfig) -> Candidates:
    """Return the sites to prune, and what is left as it is.

    Raises:
        ModelError: there is nothing to prune.
    """
    patterns = config.patterns or [config.sparsity]
    chosen = select(find_sites(dense), patterns, config.include, config.exclude)
    if not chosen.sites:
        reasons = sorted({item.reason for item in chosen.declined})
        listed = f"every candidate is declined: {'; '.join(reasons)}"
        why = listed if reasons else "it holds no weights"
        raise ModelError(f"there is nothing to prune in this model: {why}")
    if config.quantize is not None:
        require_opset(dense, chosen.sites)
    return chosen


def _finished(
    rounds: Rounds,
    pruned: Pruned,
    whole: DistilModel,
    leave_dense: LeaveDense,
    progress: Progress,
) -> Pruned:
    """Do what is done to the whole model after the last round: distil, round, leave dense."""
    run, judge, checkpoint = rounds.run, rounds.judge, rounds.checkpoint
    config, finish = run.config, Finish(run, judge, checkpoint, progress)
    training: list[ModelStage] = []
    if config.distill in ("blocks", "both"):
        training.append(DistilBlocks(checkpoint))
    if config.distill in ("model", "both"):
        training.append(whole)
    pruned = finish.stages(pruned, training)
    if training and config.quantize is not None:
        with progress.stage("round", None) as advance:
            pruned = round_kept(
                run,
                rounds.route,
                pruned,
                judge=judge,
                checkpoint=checkpoint,
                crew=rounds.crew,
                advance=advance,
            )
    bounded = config.budget_error is not None or config.min_metric is not None
    return finish.stages(pruned, [leave_dense] if bounded else [])


def _distillation(final: Pruned) -> dict[str, Any] | None:
    """Return what is told of the whole model's training, with that of the blocks beside it."""
    model, blocks = (final.told.get(name) for name in ("distil", "distil blocks"))
    return None if model is blocks is None else {**(model or {}), "blocks": blocks}


def _random_tokens(rounds: Rounds) -> float:
    """Return the share of the calibration that is random tokens."""
    return rounds.run.config.random_tokens if rounds.route.tokens else 0.0


def _deciding(dense: ir.Model, final: Pruned, facts: Facts) -> list[str]:
    """Return the sites that lengths follow from, where those of the pruned model are others."""
    if not facts.out_of_step:
        return []
    return [site.name for site in final.sites if moving_lengths(dense, [site.initializer])]


def _left_dense(run: Run, reached: Pruned, final: Pruned) -> list[Declined]:
    """Say of every site that is not sparse in the end why not."""
    return [
        decline(
            site,
            reason(run.config) if site in reached.sites else f"calibration data: {UNREACHED}",
        )
        for site in run.sites
        if site not in final.sites
    ]


def _crew(config: PruneConfig) -> AbstractContextManager[Crew]:
    """Enter what runs the walks: this process, or workers."""
    here = config.workers is None and config.ray is None
    return nullcontext(LocalCrew()) if here else RayCrew.started(config)


@contextmanager
def _work_folder(work_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Enter the folder for what is solved; one that was not asked for goes with the run."""
    if work_dir is None:
        with scratch() as temporary:
            yield temporary
        return
    folder = Path(work_dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"work-dir {work_dir}: cannot be used ({error.strerror})") from error
    with (
        locked(folder / ".lock", f"work-dir {work_dir}"),
        working_in(folder, "move it to a larger disk and give --work-dir there"),
    ):
        for left in folder.glob(f"{_STREAMS}*"):  # of a run that was cut off
            shutil.rmtree(left)
        yield folder


@contextmanager
def _spill(folder: Path) -> Iterator[Path]:
    """Enter a folder for activations, which goes with the block."""
    made = TemporaryDirectory(prefix=_STREAMS, dir=folder, ignore_cleanup_errors=True)
    with made as spill:
        yield Path(spill)


def _identity(
    model: Any, work_dir: str | os.PathLike[str], config: PruneConfig, judging: Data | None
) -> dict[str, Any]:
    """Return what two runs that share a work folder have in common, besides their feeds."""
    if not isinstance(model, str | os.PathLike):
        raise OptionError(f"work-dir {work_dir}: give the model as a file, not in memory")
    options = config.as_dict()
    del options["workers"], options["ray"]  # they change no bit
    return {
        "model": model_hash(model),
        "version": importlib.metadata.version("iobs-onnx"),
        "options": options,
        "held-out data": None if judging is None else digest(judging.held_out),
    }
