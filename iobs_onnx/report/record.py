"""The report of a run: what was pruned, what was not and why, and what it cost.

The JSON schema is documented in `docs/report.md`; :mod:`iobs_onnx.report.page` draws it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import OptionError
from iobs_onnx.inspection import describe, describe_declined
from iobs_onnx.passes import achieved_sparsity
from iobs_onnx.report.mask_picture import MaskPicture
from iobs_onnx.report.schema import SCHEMA_VERSION
from iobs_onnx.runtime import Data, OutputFidelity, Samples
from iobs_onnx.site import Declined, Site
from iobs_onnx.sparsity import Pattern

# Below this the smallest eigenvalues of a Hessian are those of the sample, not of the data.
_ROWS_PER_INPUT = 4
_PACKAGES = ("iobs-onnx", "onnx", "onnx-ir", "torch", "numpy")


@dataclass(frozen=True)
class SiteReport:
    """One pruned site; the fields that `inspect` shows, and what pruning did to it.

    Attributes:
        pattern: as text.
        sparsity: fraction of weights that are zero.
        layer_error: `tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)` on the calibration data, `ΔW` the distance from
            the aim; what a compensated bias takes over does not count.
        output_bound: `√tr(ΔW H ΔWᵀ)`, the root mean square change of the output vector.
        quantized: `int8`, or why it was not; None where it was not asked for.
        nearest_error: `layer_error`, had each kept weight been rounded to the nearest instead.
        bias_compensated: whether the bias was moved to make up for the mean error.
        compared_error: the same for the solver named by `compare`, None if none was.
        error_ratio: `layer_error / compared_error`.
        rows: tokens or patches in the Hessian.
        dead_inputs: inputs that were zero in every row.
        seconds: share of the time to solve the sites that were solved together.
        mask: a small picture of which weights are kept.
    """

    name: str
    nodes: list[str]
    op_type: str
    initializer: str
    shape: list[int]
    dtype: str
    axis: int
    groups: int
    out_features: int
    in_features: int
    taps: list[str]
    eligible_2_4: bool
    eligibility_rule: str
    engines: list[dict[str, Any]]
    pattern: str
    sparsity: float
    layer_error: float
    output_bound: float
    quantized: str | None
    nearest_error: float | None
    bias_compensated: bool
    compared_error: float | None
    error_ratio: float | None
    rows: int
    dead_inputs: int
    seconds: float
    mask: MaskPicture

    @classmethod
    def of(
        cls,
        site: Site,
        weight: NDArray[np.float32],
        *,
        pattern: Pattern,
        layer_error: float,
        output_bound: float,
        quantized: str | None = None,
        nearest_error: float | None = None,
        bias_compensated: bool,
        compared_error: float | None,
        rows: int,
        dead_inputs: int,
        seconds: float,
    ) -> SiteReport:
        """Describe a solved site; `weight` holds the numbers that its stored tensor stands for."""
        return cls(
            **describe(site),
            pattern=str(pattern),
            sparsity=achieved_sparsity(weight),
            layer_error=layer_error,
            output_bound=output_bound,
            quantized=quantized,
            nearest_error=nearest_error,
            bias_compensated=bias_compensated,
            compared_error=compared_error,
            error_ratio=layer_error / compared_error if compared_error else None,
            rows=rows,
            dead_inputs=dead_inputs,
            seconds=seconds,
            mask=MaskPicture.of(weight),
        )


@dataclass(frozen=True)
class CalibrationRecord:
    """What the Hessians were made of.

    Attributes:
        source: the path or `module:callable`, with the kind of data; the type's name for data
            given in memory.
        samples, batches: that calibrated.
        random_tokens: share of random tokens mixed in; 0 for a model that looks up no tokens.
        held_out_samples: set aside for verification, never calibrated on.
        padding_excluded: positions whose attention_mask is 0 were left out.
        padding_kept: taps that count padding all the same, because their shape hides it.
        notes: samples that were missing or dropped.
    """

    source: str
    samples: int
    batches: int
    random_tokens: float
    held_out_samples: int
    padding_excluded: bool
    padding_kept: list[str]
    notes: list[str]

    @classmethod
    def of(
        cls, sources: Sequence[Any], data: Data, facts: Mapping[str, Any], random_tokens: float
    ) -> CalibrationRecord:
        """Describe a finished calibration; `facts` are batches and what became of padding."""
        return cls(
            source=" + ".join(map(_label, sources)),
            samples=data.samples,
            random_tokens=random_tokens,
            held_out_samples=data.held_out_samples,
            notes=list(data.notes),
            **facts,
        )


@dataclass(frozen=True)
class Round:
    """One walk through the model, as the report shows it.

    Attributes:
        round: its number, from 1.
        batches: feeds it was calibrated on.
        error: mean relative error of the outputs on held-out feeds, None without any.
        metric: the user's, None without one.
        accepted: whether it was better than all before; if not, the next starts from the best.
        best: whether this is what was written.
    """

    round: int
    batches: int
    error: float | None
    metric: float | None
    accepted: bool
    best: bool = False


def _label(source: Any) -> str:
    if isinstance(source, Samples):
        return source.label
    named = isinstance(source, str | os.PathLike)
    return os.fspath(source) if named else f"in memory ({type(source).__name__})"


@dataclass(frozen=True)
class PruneReport:
    """Everything about one run; `docs/report.md` explains each field."""

    schema_version: int
    model: dict[str, Any]
    output: dict[str, Any]
    versions: dict[str, str]
    runtime: dict[str, Any]
    options: dict[str, Any]
    calibration: CalibrationRecord
    sites: list[SiteReport]
    declined: list[dict[str, Any]]
    totals: dict[str, Any]
    deployment: dict[str, Any]
    permutations: list[dict[str, Any]]
    allocation: list[dict[str, Any]]
    rounds: list[Round]
    verification: list[OutputFidelity]
    seconds: dict[str, float]

    def to_json(self) -> str:
        """Return the report as JSON text; NaN and Inf, which JSON lacks, become null."""
        return json.dumps(_json_safe(dataclasses.asdict(self)), indent=2, ensure_ascii=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `report.json` and `report.html` into a folder, which is made if needed.

        Returns:
            The path of `report.json`.

        Raises:
            OptionError: the folder cannot be written.
        """
        from iobs_onnx.report.page import render_report, write_page

        path = Path(folder, "report.json")
        page = render_report(json.loads(self.to_json()))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(".report.json.part")
            beside.write_text(self.to_json() + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            raise OptionError(f"report {path}: cannot be written ({error.strerror})") from error
        write_page(path.with_name("report.html"), page)
        return path


def require_report_dir(folder: str | os.PathLike[str]) -> None:
    """Raise what :meth:`PruneReport.save` would, before a model is pruned and written.

    Raises:
        OptionError: the folder cannot be written, or cannot be made where it does not exist.
    """
    path = Path(folder).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise OptionError(f"report_dir {folder}: {existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OptionError(f"report_dir {folder}: {existing} cannot be written; choose another")
    for name in ("report.json", "report.html"):
        if (path / name).is_dir():
            raise OptionError(f"report_dir {folder}: its {name} is a folder; choose another")


def build_report(
    *,
    config: PruneConfig,
    model: Mapping[str, Any],
    output: Mapping[str, Any],
    runtime: Mapping[str, Any],
    calibration: CalibrationRecord,
    sites: Sequence[SiteReport],
    declined: Sequence[Declined],
    deployment: Mapping[str, Any],
    permutations: Sequence[Mapping[str, Any]],
    allocation: Sequence[Mapping[str, Any]],
    rounds: Sequence[Round],
    fidelity: Sequence[OutputFidelity],
    seconds: Mapping[str, float],
) -> PruneReport:
    """Put a report together; totals are computed here."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return PruneReport(
        schema_version=SCHEMA_VERSION,
        model=dict(model),
        output=dict(output),
        versions={"python": platform.python_version(), **versions},
        runtime=dict(runtime),
        options=config.as_dict(),
        calibration=dataclasses.replace(
            calibration, notes=[*calibration.notes, *_too_few_rows(sites)]
        ),
        sites=list(sites),
        declined=[describe_declined(item) for item in declined],
        totals=_totals(sites, declined),
        deployment=dict(deployment),
        permutations=[dict(item) for item in permutations],
        allocation=[dict(item) for item in allocation],
        rounds=list(rounds),
        verification=list(fidelity),
        seconds=dict(seconds),
    )


def _too_few_rows(sites: Sequence[SiteReport]) -> list[str]:
    """Say which Hessians rest on too few rows to trust: they fit noise of the calibration data."""
    few = [site for site in sites if site.rows < _ROWS_PER_INPUT * site.in_features]
    if not few:
        return []
    worst = min(few, key=lambda site: site.rows / site.in_features)
    return [
        f"{len(few)} of {len(sites)} sites saw fewer than {_ROWS_PER_INPUT} rows (tokens, patches) "
        f"an input, the least {worst.name!r}: {worst.rows} rows for {worst.in_features} inputs; "
        "calibrate on more samples"
    ]


def _totals(sites: Sequence[SiteReport], declined: Sequence[Declined]) -> dict[str, Any]:
    weights = {site.initializer: math.prod(site.shape) for site in sites}
    zeros = sum(round(site.sparsity * math.prod(site.shape)) for site in sites)
    return {
        "sites": len(sites),
        "declined": len(declined),
        "eligible_2_4": sum(site.eligible_2_4 for site in sites),
        "weights": sum(weights.values()),
        "zeros": zeros,
        "sparsity": zeros / sum(weights.values()),
        "layer_error_geomean": geomean([site.layer_error for site in sites]),
        "nearest_error_geomean": geomean(
            [site.nearest_error for site in sites if site.nearest_error is not None]
        ),
        "error_ratio_geomean": geomean(
            [site.error_ratio for site in sites if site.error_ratio is not None]
        ),
    }


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean; None for no values, 0 where one is 0."""
    if not values:
        return None
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
