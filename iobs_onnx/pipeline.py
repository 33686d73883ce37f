"""The whole sequence: a model and calibration data in, a sparse model and its report out."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.errors import CheckError, DependencyError, IobsError, ModelError
from iobs_onnx.hessian import Hessian, combine, dead_inputs
from iobs_onnx.layer import Solution, solve_stacked
from iobs_onnx.passes import (
    Slot,
    check_model,
    check_pattern,
    find_sites,
    instrument,
    load_model,
    model_hash,
    require_output,
    rewrite,
    save_model,
    stored_slots,
)
from iobs_onnx.progress import Progress
from iobs_onnx.report import CalibrationRecord, PruneReport, SiteReport, build_report
from iobs_onnx.runtime import (
    Calibration,
    Data,
    OutputFidelity,
    calibrate,
    compare,
    input_specs,
    open_data,
    open_session,
    session_info,
)
from iobs_onnx.select import select
from iobs_onnx.site import Candidates, Site, Tap
from iobs_onnx.solvers import make_solver

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


@dataclass(frozen=True)
class _Solved:
    """The sparse tensor of one site, as it is stored, and its line of the report."""

    stored: NDArray[np.generic]
    report: SiteReport


def prune(
    model: Model,
    *,
    calibration: Any,
    sparsity: Any,
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
        calibration: an `.npz` (input name -> array whose first axis is samples), a directory of
            `.npz` feeds, `"module:callable"`, an iterable of feeds, a dict of arrays, or an
            ONNX Runtime `CalibrationDataReader`.
        sparsity: `"2:4"`, any `"N:M"`, `0.7` or `"70%"`.
        output: the file to write; nothing is written if anything fails.
        solver: a name in :data:`iobs_onnx.solvers.SOLVERS`.
        progress: is told how far calibration and solving are.
        options: the other fields of :class:`iobs_onnx.config.PruneConfig`.

    Raises:
        InputError: the model, the data or an option is at fault.
        SolverError: a site could not be solved.
        CheckError: the result does not hold what it promises.
    """
    config = make_config({"sparsity": sparsity, "solver": solver, **options})
    started = time.perf_counter()
    progress = progress or Progress()
    device = _device(config)

    dense = load_model(model)
    if output is not None:
        require_output(dense, output)
    chosen = select(find_sites(dense), config.sparsity, config.include, config.exclude)
    _require_sites(chosen)
    data, measured, runtime = _calibrate(dense, chosen.sites, calibration, config, device, progress)
    calibrated = time.perf_counter()
    solved = _solve(dense, chosen.sites, measured.hessians, config, device, progress)
    solved_at = time.perf_counter()

    sparse = load_model(dense)
    rewrite(sparse, {site.initializer: solved[site].stored for site in chosen.sites})
    complaint = _check(dense, sparse, chosen.sites, config)
    fidelity = _compare(dense, sparse, data, config)
    if output is not None:
        save_model(sparse, output)

    report = build_report(
        config=config,
        model={**_file(model), "checker": complaint or "passed"},
        output=_file(output),
        runtime={**runtime, "device": str(device)},
        calibration=CalibrationRecord.of(calibration, data, measured),
        sites=[solved[site].report for site in chosen.sites],
        declined=chosen.declined,
        fidelity=fidelity,
        seconds={
            "calibrate": calibrated - started,
            "solve": solved_at - calibrated,
            "total": time.perf_counter() - started,
        },
    )
    return PruneResult(sparse, report, report.output["path"])


def _file(path: Any) -> dict[str, str | None]:
    """Path and hash of a model file; both None for a model in memory."""
    if not isinstance(path, str | os.PathLike):
        return {"path": None, "sha256": None}
    return {"path": os.fspath(path), "sha256": model_hash(path)}


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


def _calibrate(
    dense: ir.Model,
    sites: Sequence[Site],
    calibration: Any,
    config: PruneConfig,
    device: torch.device,
    progress: Progress,
) -> tuple[Data, Calibration, dict[str, Any]]:
    """Run the dense model over the calibration feeds and collect every tap's Hessian."""
    taps = list(dict.fromkeys(tap for site in sites for tap in site.taps))
    session = open_session(instrument(dense, [tap.value for tap in taps]), config.provider)
    data = open_data(
        calibration,
        input_specs(session),
        samples=config.samples,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    with progress.stage("calibrate", data.batches) as advance:
        measured = calibrate(
            session,
            taps,
            data.calibration,
            mask_padding=config.mask_padding,
            device=device,
            progress=lambda done: advance(),
        )
    return data, measured, session_info(session)


def _solve(
    dense: ir.Model,
    sites: Sequence[Site],
    hessians: Mapping[Tap, Hessian],
    config: PruneConfig,
    device: torch.device,
    progress: Progress,
) -> dict[Site, _Solved]:
    """Solve every site; sites that read the same taps share one Hessian and its factorisation."""
    together: dict[tuple[Tap, ...], list[Site]] = defaultdict(list)
    for site in sites:
        together[site.taps].append(site)
    slots = stored_slots(dense)
    solved: dict[Site, _Solved] = {}
    with progress.stage("solve", len(sites)) as advance:
        for taps, members in together.items():
            hessian = combine([hessians[tap] for tap in taps])
            try:
                weights = {site: _stored(slots, site) for site in members}
                solved |= _solve_together(weights, hessian, config, device)
            except IobsError as error:
                raise type(error)(f"site {members[0].name!r}: {error}") from error
            for _ in members:
                advance()
    return solved


def _solve_together(
    stored: Mapping[Site, NDArray[np.generic]],
    hessian: Hessian,
    config: PruneConfig,
    device: torch.device,
) -> dict[Site, _Solved]:
    weights = [
        torch.from_numpy(site.to_matrices(array)).to(device) for site, array in stored.items()
    ]

    def solve(
        solver: str, preset: str | None = None
    ) -> tuple[list[list[Solution[torch.Tensor]]], float]:
        started = time.perf_counter()
        by_group = [
            solve_stacked(
                [weight[group] for weight in weights],
                matrix,
                pattern=config.sparsity,
                solver=make_solver(solver, preset),
                damping=config.damping,
            )
            for group, matrix in enumerate(hessian.matrix)
        ]
        return [list(groups) for groups in zip(*by_group, strict=True)], (
            time.perf_counter() - started
        )

    solutions, seconds = solve(config.solver, config.preset)
    baseline = solve(config.compare)[0] if config.compare else [None] * len(stored)
    outputs = sum(site.out_features for site in stored)
    result = {}
    for site, groups, other in zip(stored, solutions, baseline, strict=True):
        sparse = torch.stack([solution.weight for solution in groups]).cpu().numpy()
        tensor = site.to_stored(sparse, stored[site].dtype)
        report = SiteReport.of(
            site,
            tensor,
            pattern=config.sparsity,
            layer_error=_layer_error(groups),
            compared_error=None if other is None else _layer_error(other),
            rows=hessian.rows,
            dead_inputs=int(dead_inputs(hessian.matrix).sum()),
            seconds=seconds * site.out_features / outputs,
        )
        result[site] = _Solved(tensor, report)
    return result


def _stored(slots: Mapping[str, Slot], site: Site) -> NDArray[np.generic]:
    array: NDArray[np.generic] = slots[site.initializer].tensor.numpy()
    if not np.isfinite(array.astype(np.float32)).all():
        raise ModelError(f"weight {site.initializer!r} holds NaN or Inf")
    return array


def _layer_error(groups: Sequence[Solution[torch.Tensor]]) -> float:
    """The layer error of a site whose groups were solved on their own."""
    energy = sum(solution.energy for solution in groups)
    return sum(solution.excess for solution in groups) / energy if energy > 0 else 0.0


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


def _compare(
    dense: ir.Model, sparse: ir.Model, data: Data, config: PruneConfig
) -> list[OutputFidelity]:
    """Run both models on the held-out feeds.

    Raises:
        CheckError: the sparse model puts out values that are not finite.
    """
    if not data.held_out_samples:
        return []
    fidelity = compare(dense, sparse, data.held_out, config.provider)
    if broken := [output.name for output in fidelity if not output.finite]:
        raise CheckError(
            f"output {broken[0]!r} of the sparse model is not finite on held-out feeds; "
            "nothing was written"
        )
    return fidelity
