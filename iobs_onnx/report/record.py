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

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import OptionError
from iobs_onnx.inspection import describe_declined
from iobs_onnx.passes import replacing
from iobs_onnx.report.schema import SCHEMA_VERSION
from iobs_onnx.report.site_report import SiteReport
from iobs_onnx.report.totals import (
    off_target,
    residuals_left_out,
    thin_groups,
    too_few_rows,
    totals_of,
)
from iobs_onnx.runtime import Data, OutputFidelity, Samples
from iobs_onnx.site import Declined

_PACKAGES = ("iobs-onnx", "onnx", "onnx-ir", "torch", "numpy")


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
        out_of_step: taps that had other lengths in the dense model: their sites aimed at what
            the dense weight makes of the pruned model's activations.
        notes: samples that were missing or dropped.
    """

    source: str
    samples: int
    batches: int
    random_tokens: float
    held_out_samples: int
    padding_excluded: bool
    padding_kept: list[str]
    out_of_step: list[str]
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
    network_bound: dict[str, Any]
    declined: list[dict[str, Any]]
    totals: dict[str, Any]
    deployment: dict[str, Any]
    permutations: list[dict[str, Any]]
    allocation: list[dict[str, Any]]
    rounds: list[Round]
    distillation: dict[str, Any] | None
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
            with replacing(path) as file:
                file.write_text(self.to_json() + "\n", encoding="utf-8")
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
    bound: Mapping[str, Any],
    declined: Sequence[Declined],
    parameters: int,
    deployment: Mapping[str, Any],
    permutations: Sequence[Mapping[str, Any]],
    allocation: Sequence[Mapping[str, Any]],
    rounds: Sequence[Round],
    distillation: Mapping[str, Any] | None,
    fidelity: Sequence[OutputFidelity],
    seconds: Mapping[str, float],
    deciding: Sequence[str],
) -> PruneReport:
    """Put a report together; totals are computed here.

    `deciding` names sites that lengths follow from, where the pruned model's are not the dense's.
    """
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    found = (
        *too_few_rows(sites),
        *thin_groups(sites),
        *residuals_left_out(sites),
        *off_target(sites, calibration.out_of_step, deciding),
    )
    return PruneReport(
        schema_version=SCHEMA_VERSION,
        model=dict(model),
        output=dict(output),
        versions={"python": platform.python_version(), **versions},
        runtime=dict(runtime),
        options=config.as_dict(),
        calibration=dataclasses.replace(calibration, notes=[*calibration.notes, *found]),
        sites=list(sites),
        network_bound=dict(bound),
        declined=[describe_declined(item) for item in declined],
        totals=totals_of(sites, len(declined), parameters),
        deployment=dict(deployment),
        permutations=[dict(item) for item in permutations],
        allocation=[dict(item) for item in allocation],
        rounds=list(rounds),
        distillation=None if distillation is None else dict(distillation),
        verification=list(fidelity),
        seconds=dict(seconds),
    )


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
