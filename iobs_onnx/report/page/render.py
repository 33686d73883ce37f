"""Fill the templates: `report.json` in, HTML out."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from iobs_onnx.errors import OptionError
from iobs_onnx.passes import replacing
from iobs_onnx.report.outputs import outputs_told
from iobs_onnx.report.page import figures
from iobs_onnx.report.page.comparison import Comparison
from iobs_onnx.report.page.words import breakable, clamp, count_of, duration, option_text, show
from iobs_onnx.report.sentences import outcome

Report = Mapping[str, Any]


def render_report(report: Report) -> str:
    """Return the page of one run.

    Args:
        report: the content of `report.json`, as :func:`iobs_onnx.report.schema.read_report`
            returns it.
    """
    sites, options = report["sites"], report["options"]
    compare = options["compare"]
    ratios = [site["error_ratio"] for site in sites if site["error_ratio"] is not None]
    trace = report.get("rounds") or []
    distilled = report.get("distillation") or {}
    curve = distilled.get("curve") or []
    blocks = (distilled.get("blocks") or {}).get("each") or []
    trace = trace if len(trace) > 1 else []
    shares = report.get("allocation") or []
    drawn = {
        "layers": sites and figures.layer_errors(sites, options["solver"], compare),
        "sparsity": sites and figures.sparsities(sites),
        "allocation": shares and figures.allocation(shares, sites),
        "ratios": ratios and figures.ratios(sites, compare),
        "rounds": trace and figures.rounds(trace),
        "distillation": curve and figures.distillation(curve),
    }
    sections = [
        ("summary", "Summary"),
        ("fidelity", "Fidelity"),
        ("layers", "Layers"),
        *([("bounds", "Bounds")] if report.get("network_bound") else []),
        *([("allocation", "Allocation")] if shares else []),
        *([("against", f"Against {compare}")] if ratios else []),
        *([("rounds", "Rounds")] if trace else []),
        *([("distillation", "Distillation")] if curve or blocks else []),
        ("mask", "Masks"),
        ("deployment", "Deployment"),
        ("table", "Table"),
        ("declined", "Declined"),
        ("run", "Run"),
    ]
    told, caches = outputs_told(report["verification"])
    return _fill(
        "report.html",
        {
            **report,
            "verification": told,
            "caches": caches,
            "name": Path(report["model"]["path"] or "model in memory").name,
            "sections": sections,
            "bound": report.get("network_bound"),
            "figures": drawn,
            "left_dense": {s["site"] for s in shares} - {s["name"] for s in sites},
            "better": sum(ratio < 1 for ratio in ratios),
            "compared": len(ratios),
            "warnings": _warnings(report),
            "outcome": [line[0].upper() + line[1:] for line in outcome(report)],
            "blocks": blocks,
            "rules": _rules(sites) if _holds_2_4(report) else [],
            "masks": _masks(sites),
            "declined": _by_reason(report["declined"]),
            "times": _times(report["seconds"]),
            "option_pairs": [(_words(k), option_text(v)) for k, v in options.items()],
            "calibration_pairs": [
                (_words(k), option_text(v)) for k, v in report["calibration"].items()
            ],
            "made_with": _made_with(report),
        },
    )


def _holds_2_4(report: Report) -> bool:
    """Whether what engines say of 2:4 is of use: some weight holds it, or was to."""
    counts = report["deployment"]
    return report["options"]["sparsity"] == "2:4" or bool(
        counts["tensorrt"] or counts["cusparselt"]
    )


def render_comparison(names: Sequence[str], reports: Sequence[Report]) -> str:
    """Return the page that sets several runs side by side.

    Args:
        names: a short one for each run.
        reports: as for :func:`render_report`.
    """
    found = Comparison.of(names, reports)
    errors = [site.errors for site in found.sites]
    shared = any(None not in row for row in errors)
    return _fill(
        "compare.html",
        {
            "names": found.names,
            "models": found.models,
            "warnings": found.warnings,
            "rows": found.rows,
            "options": found.options,
            "sites": found.sites,
            "figure": figures.runs(names, reports) if shared else "",
            "sections": [
                ("summary", "Summary"),
                *([("layers", "Layers")] if shared else []),
                ("options", "Options"),
                ("table", "Table"),
            ],
        },
    )


def write_page(path: str | os.PathLike[str], html: str) -> Path:
    """Write a page so that it is either whole or not there; its folder is made if needed.

    Raises:
        OptionError: the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as beside:
            beside.write_bytes(html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OptionError(f"page {path}: cannot be written ({error.strerror})") from error
    return target


def _fill(template: str, values: Mapping[str, Any]) -> str:
    loader = jinja2.PackageLoader("iobs_onnx.report.page")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "show": show,
        "duration": duration,
        "count_of": count_of,
        "clamp": clamp,
        "breakable": breakable,
    }
    own = {
        name: Markup(loader.get_source(environment, file)[0])  # our own files
        for name, file in (("style", "style.css"), ("script", "page.js"))
    }
    version = importlib.metadata.version("iobs-onnx")
    return environment.get_template(template).render({**own, "version": version, **values})


def _warnings(report: Report) -> list[str]:
    """Return what a reader must know before trusting the figures, a line each."""
    lines = [*report["calibration"]["notes"], *report["deployment"]["warnings"]]
    lines += [f"output {o['name']}: {o['note']}" for o in report["verification"] if o.get("note")]
    if kept := report["calibration"]["padding_kept"]:
        lines.append(
            f"padding counts in {', '.join(kept)}: their shape does not show which rows are padding"
        )
    if report["model"]["checker"] != "passed":
        lines.append(
            f"onnx.checker refuses the dense model, as it did before: {report['model']['checker']}"
        )
    if dead := [site["name"] for site in report["sites"] if site["dead_inputs"]]:
        shown = ", ".join(dead[:5]) + " ..." * (len(dead) > 5)
        lines.append(
            f"{count_of(len(dead), 'weight')} had inputs that were zero in all of the calibration "
            f"data, and are pruned there by magnitude: {shown}"
        )
    return lines


def _rules(sites: Sequence[Report]) -> list[dict[str, Any]]:
    """Group the sites by what decides whether an engine can use them; the usable ones first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for site in sites:
        for engine in site["engines"]:
            rule = found.setdefault(
                tuple(engine.values()),
                {**engine, "engine": engine["name"], "count": 0, "weights": 0},
            )
            rule["count"] += 1
            rule["weights"] += site["out_features"] * site["groups"] * site["in_features"]
    return sorted(
        found.values(),
        key=lambda rule: (rule["engine"], -rule["eligible"], -rule["likely"], -rule["weights"]),
    )


def _masks(sites: Sequence[Report]) -> list[dict[str, Any]]:
    """Return the pictures, with the row of the table and the group that the pattern has."""
    return [
        {"row": i, "mask": site["mask"], "group": _group(site["pattern"])}
        for i, site in enumerate(sites, start=1)
        if site.get("mask")
    ]


def _group(pattern: str) -> int:
    _, colon, group = pattern.partition(":")
    return int(group) if colon and group.isdecimal() else 0


def _by_reason(declined: Iterable[Report]) -> list[tuple[str, list[Report]]]:
    found: dict[str, list[Report]] = {}
    for item in declined:
        found.setdefault(item["reason"], []).append(item)
    return sorted(found.items(), key=lambda pair: -len(pair[1]))


def _times(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return where the time went, the parts in the order that they are reported."""
    parts = [(name, value) for name, value in seconds.items() if name != "total" and value]
    rest = (seconds.get("total") or 0.0) - sum(value for _, value in parts)
    return [*parts, ("the rest", round(max(0.0, rest), 3))]


def _made_with(report: Report) -> list[tuple[str, str]]:
    pairs = [*report["runtime"].items(), *report["versions"].items()]
    pairs += [(f"{name} sha256", report[name]["sha256"]) for name in ("model", "output")]
    return [(_words(key), option_text(value)) for key, value in pairs]


def _words(key: str) -> str:
    return key.replace("_", " ")
