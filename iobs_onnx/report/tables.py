"""The report of a run on a terminal: tables, and a few lines that sum it up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from iobs_onnx.report.outputs import outputs_told
from iobs_onnx.report.record import PruneReport
from iobs_onnx.report.sentences import outcome


def render(report: PruneReport) -> list[RenderableType]:
    """Return the report for a terminal: the sites, what was declined, and the summary."""
    compared = report.options["compare"]
    sites = Table(title=f"{report.totals['sites']} sites pruned to {report.options['sparsity']}")
    sites.add_column("site", overflow="fold")
    sites.add_column("operator")
    for heading in ("out × in", "zeros", "layer error", *([f"÷ {compared}"] if compared else [])):
        sites.add_column(heading, justify="right")
    sites.add_column("fits 2:4", justify="center")
    sites.add_column("s", justify="right")
    for site in report.sites:
        ratio = "–" if site.error_ratio is None else f"{site.error_ratio:.3f}"
        sites.add_row(
            site.name,
            site.op_type,
            f"{site.out_features * site.groups} × {site.in_features}",
            f"{site.sparsity:.1%}",
            f"{site.layer_error:.4f}",
            *([ratio] if compared else []),
            "yes" if site.eligible_2_4 else "no",
            f"{site.seconds:.2f}",
        )
    parts: list[RenderableType] = [sites]
    if report.declined:
        parts.append(declined_table(report.declined))
    return [*parts, *_summary(report)]


def declined_table(declined: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a table of declined candidates and why."""
    table = Table(title=f"{len(declined)} candidates left as they were")
    for heading in ("weight", "operator", "shape", "reason"):
        table.add_column(heading, overflow="fold")
    for item in declined:
        shape = " × ".join(map(str, item["shape"]))
        table.add_row(item["name"], item["op_type"], shape, item["reason"])
    return table


def _summary(report: PruneReport) -> list[RenderableType]:
    totals, calibration = report.totals, report.calibration
    lines = [
        f"{totals['zeros']:,} of {totals['weights']:,} weights are zero "
        f"({totals['sparsity']:.1%}), of the {totals['parameters']:,} numbers that the model "
        f"stores {totals['zeros'] / totals['parameters']:.1%}; geometric mean of layer errors "
        f"{totals['layer_error_geomean']:.4g}"
    ]
    if totals["error_ratio_geomean"] is not None:
        lines.append(
            f"layer error {totals['error_ratio_geomean']:.3f} × that of "
            f"{report.options['compare']} (geometric mean)"
        )
    lines.append(
        f"calibrated on {calibration.samples} samples, {calibration.held_out_samples} held out"
        + ("; padding excluded" if calibration.padding_excluded else "")
    )
    if calibration.padding_kept:
        lines.append(f"padding counts in {', '.join(calibration.padding_kept)}")
    lines += calibration.notes
    lines += [
        f"{kind} was {report.runtime[kind]}, as ONNX Runtime does on a CPU"
        for kind in ("float16", "bfloat16")
        if kind in report.runtime
    ]
    told, caches = outputs_told([dataclasses.asdict(output) for output in report.verification])
    for output in told:
        if output["relative_error"] is not None:
            lines.append(
                f"output {output['name']}: relative error {output['relative_error']:.4f}, cosine "
                f"{output['cosine']:.4f} against the dense model on held-out samples"
            )
        if output["note"]:
            lines.append(f"output {output['name']}: {output['note']}")
    if caches:
        lines.append(caches)
    if not report.verification:
        lines.append("outputs were not compared: the data leave no sample to hold out")
    lines += outcome(dataclasses.asdict(report))
    engines = report.deployment
    if engines["tensorrt"] or engines["cusparselt"]:
        lines.append(
            f"2:4 kernels: TensorRT takes {engines['tensorrt']} of {totals['sites']} weights and "
            f"is likely to pick {engines['tensorrt_likely']}, cuSPARSELt takes "
            f"{engines['cusparselt']}"
        )
    lines += [f"note: {warning}" for warning in engines["warnings"]]
    if engines["trtexec"]:
        lines.append(f"try it: {engines['trtexec']}")
    seconds = report.seconds
    lines.append(
        f"{seconds['total']:.1f} s: calibration {seconds['calibrate']:.1f}, solving "
        f"{seconds['solve']:.1f}"
    )
    return list(lines)
