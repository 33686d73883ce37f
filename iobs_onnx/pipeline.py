"""The whole sequence: a model and calibration data in, a sparse model and its report out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.errors import CheckError, DependencyError, ModelError
from iobs_onnx.gates import require_output_error
from iobs_onnx.output import describe_deployment, describe_file, require_form, set_form, write
from iobs_onnx.passes import (
    Surroundings,
    check_model,
    check_pattern,
    find_sites,
    find_surroundings,
    find_token_input,
    load_model,
    partition,
    require_opset,
)
from iobs_onnx.permute import permuted
from iobs_onnx.progress import Progress
from iobs_onnx.quantize import store_quantized
from iobs_onnx.report import CalibrationRecord, PruneReport, build_report
from iobs_onnx.runtime import (
    Data,
    Feed,
    OutputFidelity,
    input_specs,
    open_data,
    with_random_tokens,
)
from iobs_onnx.segments import Place, compare, default_memory_budget, prepared
from iobs_onnx.select import select
from iobs_onnx.site import Candidates, Site, Tap
from iobs_onnx.sources import calibration_source
from iobs_onnx.walk import Walk, rewrite_sites

Model = str | os.PathLike[str] | onnx.ModelProto | ir.Model


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
    solver: str = "iobs",
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model's weights to a sparsity pattern, layer by layer, and say what it cost.

    Each site's weight `W` is replaced by a sparse one that minimises `½ E‖W x − X x‖²` over the
    calibration data, `x` being the activation that meets it in the dense model.

    Args:
        model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.
        sparsity: `"2:4"`, any `"N:M"`, `0.7` or `"70%"`.
        calibration: an `.npz` (input name -> array whose first axis is samples), a directory of
            `.npz` feeds, a `.jsonl` or `.parquet`, `"module:callable"`, an iterable of feeds, a
            dict of arrays, an ONNX Runtime `CalibrationDataReader`, or `"random"`. None where
            `text`, `images` or `audio` among the options names the data.
        output: the file to write; nothing is written if anything fails.
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
    started = time.perf_counter()
    progress = progress or Progress()
    device = _device(config)

    dense = load_model(model)
    require_form(dense, output, config.emit)
    chosen = select(find_sites(dense), config.sparsity, config.include, config.exclude)
    _require_sites(chosen)
    if config.quantize is not None:
        require_opset(dense, chosen.sites)
    inputs = input_specs(dense)
    source = calibration_source(calibration, config, dense, model, inputs)
    data = open_data(
        source,
        inputs,
        samples=config.samples,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    with TemporaryDirectory(prefix="iobs-onnx-") as folder:
        place = Place(
            config.provider, config.memory_budget or default_memory_budget(), Path(folder)
        )
        start, permutations = permuted(dense, chosen.sites, data, config, place, device)
        sparse = load_model(start)
        reference, working = prepared(start), prepared(sparse)
        around = find_surroundings(dense, chosen.sites)
        segments = partition(
            reference,
            chosen.sites,
            beside=_residuals(around, config),
            sequential=config.sequential,
            budget=place.budget,
        )
        feeds, batches, random_share = _mixed(dense, data, config)
        steps = None if batches is None else batches * len(segments) + len(chosen.sites)
        with progress.stage("prune", steps) as advance:
            walk = Walk(reference, working, config, place, device, advance, around)
            solved = walk.run(segments, feeds)
        rewrite_sites(sparse, solved, around)
        form = set_form(sparse, chosen.sites, config)
        complaint = _check(dense, sparse, chosen.sites, config)
        fidelity = _compare(dense, sparse, data, place)
        require_output_error(fidelity, config.max_output_error)
    codes = {site: solved[site].codes for site in chosen.sites}
    sites = store_quantized(sparse, chosen.sites, codes, config.sparsity)
    written = write(sparse, sites, output, config)

    report = build_report(
        config=config,
        model={**describe_file(model), "checker": complaint or "passed"},
        output={**written, **form},
        runtime={**place.runtime, "device": str(device), "segments": len(segments)},
        calibration=CalibrationRecord.of(source, data, walk.calibration, random_share),
        sites=[solved[site].report for site in chosen.sites],
        declined=chosen.declined,
        deployment=describe_deployment(
            sparse, sites, [config.sparsity], output, data.held_out, config
        ),
        permutations=permutations,
        fidelity=fidelity,
        seconds={**walk.seconds, "total": time.perf_counter() - started},
    )
    return PruneResult(sparse, report, report.output["path"])


def _require_sites(chosen: Candidates) -> None:
    if chosen.sites:
        return
    reasons = sorted({item.reason for item in chosen.declined})
    why = f"every candidate is declined: {'; '.join(reasons)}" if reasons else "it holds no weights"
    raise ModelError(f"there is nothing to prune in this model: {why}")


def _device(config: PruneConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise DependencyError(
            "device cuda: torch sees no CUDA device; install a CUDA build of torch or use "
            "--device cpu"
        )
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _residuals(around: Mapping[Site, Surroundings], config: PruneConfig) -> dict[Site, Tap]:
    """Return the streams that outputs are added to, where the target takes them into account."""
    if not config.residual or config.target != "dense":
        return {}
    return {site: found.residual for site, found in around.items() if found.residual is not None}


def _mixed(
    dense: ir.Model, data: Data, config: PruneConfig
) -> tuple[Iterable[Feed | tuple[Feed, float]], int | None, float]:
    """Mix random tokens into the feeds of a model that looks up tokens.

    Returns:
        The feeds, how many there are if that is known, and the share of random tokens.
    """
    tokens = find_token_input(dense)
    if tokens is None or config.random_tokens == 0:
        return data.calibration, data.batches, 0.0
    mixed = with_random_tokens(data.calibration, *tokens, config.random_tokens, config.seed)
    count = None if data.batches is None else data.batches + (data.batches + 1) // 2
    return mixed, count, config.random_tokens


def _check(
    dense: ir.Model, sparse: ir.Model, sites: Sequence[Site], config: PruneConfig
) -> str | None:
    """Check the sparse model before anything is written.

    Returns:
        What onnx.checker says against the *dense* model, which pruning neither made nor mends.

    Raises:
        CheckError: a pattern does not hold, or onnx.checker refuses only the sparse model.
    """
    if violations := check_pattern(sparse, sites, {site.name: config.sparsity for site in sites}):
        raise CheckError(violations[0].text)
    try:
        check_model(sparse)
    except CheckError:
        try:
            check_model(dense)
        except CheckError as error:
            return str(error)
        raise
    return None


def _compare(dense: ir.Model, sparse: ir.Model, data: Data, place: Place) -> list[OutputFidelity]:
    """Run both models on the held-out feeds.

    Raises:
        CheckError: the sparse model puts out values that are not finite.
    """
    if not data.held_out_samples:
        return []
    fidelity = compare(dense, sparse, data.held_out, place)
    if broken := [output.name for output in fidelity if not output.finite]:
        raise CheckError(
            f"output {broken[0]!r} of the sparse model is not finite on held-out feeds; "
            "nothing was written"
        )
    return fidelity
