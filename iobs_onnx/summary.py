"""The report of a run on a terminal: tables, and a few lines that sum it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from iobs_onnx.report import PruneReport, geomean


def render(report: PruneReport) -> list[RenderableType]:
    """Return the report for a terminal: the sites, what was declined, and the summary."""
    compared = report.options["compare"]
    sites = Table(title=f"{report.totals['sites']} sites pruned to {report.options['sparsity']}")
    sites.add_column("site", overflow="fold")
    sites.add_column("operator")
    for heading in ("out × in", "zeros", "layer error", *([f"÷ {compared}"] if compared else [])):
        sites.add_column(heading, justify="right")
    sites.add_column("2:4 usable", justify="center")
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


def _sizes(report: PruneReport) -> list[str]:
    """Say how large the files are, and what a form other than the dense one brought."""
    out = report.output
    if out.get("bytes") is None:
        return []
    text = f"written as {out['form']}: {out['bytes']:,} bytes, {out['zstd_bytes']:,} with zstd"
    if report.model.get("bytes") is not None:
        text += (
            f"; the dense model takes {report.model['bytes']:,}, {report.model['zstd_bytes']:,} "
            "with zstd"
        )
    lines = [text]
    if out["left_dense"]:
        lines.append(f"{len(out['left_dense'])} tensors stay dense: report.json says why")
    if out["refused"]:
        lines.append(f"ONNX Runtime does not load this form: {out['refused']}")
    return lines


def _summary(report: PruneReport) -> list[RenderableType]:
    totals, calibration = report.totals, report.calibration
    lines = [
        f"{totals['zeros']:,} of {totals['weights']:,} weights are zero "
        f"({totals['sparsity']:.1%}); geometric mean of layer errors "
        f"{totals['layer_error_geomean']:.4g}"
    ]
    if totals["nearest_error_geomean"] is not None:
        count = sum(site.quantized == "int8" for site in report.sites)
        lines.append(
            f"{count} weights are int8, with that error; had they been rounded to the nearest, it "
            f"would be {totals['nearest_error_geomean']:.4g}"
        )
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
    for output in report.verification:
        lines.append(
            f"output {output.name}: relative error {output.relative_error:.4f}, cosine "
            f"{output.cosine:.4f} against the dense model on held-out samples"
        )
    if not report.verification:
        lines.append("outputs were not compared: the data leave no sample to hold out")
    lines += _sizes(report)
    if report.permutations:
        taken = [item for item in report.permutations if item["taken"]]
        gain = geomean([item["after"] / item["before"] for item in taken])
        lines.append(
            f"{len(taken)} sets of channels put in another order"
            + ("" if gain is None else f": {gain:.3f} × the layer error of their readers")
        )
    engines = report.deployment
    lines.append(
        f"2:4 kernels: TensorRT takes {engines['tensorrt']} of {totals['sites']} weights and is "
        f"likely to pick {engines['tensorrt_likely']}, cuSPARSELt takes {engines['cusparselt']}"
    )
    lines += [f"note: {warning}" for warning in engines["warnings"]]
    if engines["tensorrt"]:
        lines.append(f"try it: {engines['trtexec']}")
    seconds = report.seconds
    lines.append(
        f"{seconds['total']:.1f} s: calibration {seconds['calibrate']:.1f}, solving "
        f"{seconds['solve']:.1f}"
    )
    return list(lines)
