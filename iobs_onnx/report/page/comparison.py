"""Several runs side by side: what differs and which is best, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iobs_onnx.report.page.words import duration, option_text, show

Report = Mapping[str, Any]


@dataclass(frozen=True)
class ComparedRow:
    """One line of the summary: a cell for each run, and the indices of the best."""

    label: str
    cells: list[str]
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ComparedSite:
    """The layer error of one weight in each run, None where a run did not prune it."""

    name: str
    errors: list[float | None]
    best: frozenset[int]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs.
        models: the different dense models, by file name.
        warnings: what forbids a plain comparison.
        rows: the summary.
        options: those that differ, with each run's value.
        sites: every weight that a run pruned.
    """

    names: list[str]
    models: list[str]
    warnings: list[str]
    rows: list[ComparedRow]
    options: list[tuple[str, list[str]]]
    sites: list[ComparedSite]

    @classmethod
    def of(cls, names: Sequence[str], reports: Sequence[Report]) -> Comparison:
        """Compare reports, each the content of a `report.json`."""
        models = [Path(r["model"]["path"] or "model in memory").name for r in reports]
        return cls(
            list(names),
            list(dict.fromkeys(models)),
            _warnings(reports),
            _rows(reports),
            _options(reports),
            _sites(reports),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "runs": self.names,
            "warnings": self.warnings,
            "summary": [
                {"label": row.label, "values": row.cells, "best": sorted(row.best)}
                for row in self.rows
            ],
            "options": [{"name": name, "values": values} for name, values in self.options],
            "sites": [{"name": s.name, "layer_errors": s.errors} for s in self.sites],
        }


def _warnings(reports: Sequence[Report]) -> list[str]:
    found = []
    if len({r["model"]["sha256"] for r in reports}) > 1:
        found.append("the runs began from different models")
    for part, what in (("source", "data"), ("samples", "numbers of samples")):
        if len({r["calibration"][part] for r in reports}) > 1:
            found.append(
                f"the runs were calibrated on different {what}: layer errors are measured on "
                "each run's own"
            )
    return found


def _rows(reports: Sequence[Report]) -> list[ComparedRow]:
    def row(label: str, get: Callable[[Report], Any], form: str, better: int = 0) -> ComparedRow:
        values = [get(report) for report in reports]
        return ComparedRow(label, [show(v, form) for v in values], _best(values, better))

    outputs = dict.fromkeys(out["name"] for r in reports for out in r["verification"])

    def of_output(name: str, field: str) -> Callable[[Report], Any]:
        return lambda report: next(
            (out[field] for out in report["verification"] if out["name"] == name), None
        )

    rows = [
        row("pattern", lambda r: r["options"]["sparsity"], "{}"),
        row("solver", lambda r: r["options"]["solver"], "{}"),
        row("zeros", lambda r: r["totals"]["sparsity"], "{:.2%}"),
        row(
            "layer error, geometric mean",
            lambda r: r["totals"]["layer_error_geomean"],
            "{:.4g}",
            -1,
        ),
    ]
    for name in outputs:
        rows.append(row(f"{name}: relative error", of_output(name, "relative_error"), "{:.4g}", -1))
        rows.append(row(f"{name}: cosine", of_output(name, "cosine"), "{:.5f}", 1))
    seconds = [r["seconds"]["total"] for r in reports]
    return [
        *rows,
        row("weights pruned", lambda r: r["totals"]["sites"], "{:,}"),
        row("weights left", lambda r: r["totals"]["declined"], "{:,}"),
        row("usable as 2:4", lambda r: r["totals"]["eligible_2_4"], "{:,}"),
        row("samples", lambda r: r["calibration"]["samples"], "{:,}"),
        ComparedRow("time", [duration(value) for value in seconds], _best(seconds, -1)),
    ]


def _options(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    names: Iterable[str] = dict.fromkeys(name for r in reports for name in r["options"])
    values = {name: [option_text(r["options"].get(name)) for r in reports] for name in names}
    return [(name, cells) for name, cells in values.items() if len(set(cells)) > 1]


def _sites(reports: Sequence[Report]) -> list[ComparedSite]:
    errors = [{site["name"]: site["layer_error"] for site in r["sites"]} for r in reports]
    found = []
    for name in dict.fromkeys(name for run in errors for name in run):
        row = [run.get(name) for run in errors]
        found.append(ComparedSite(name, row, _best(row, -1)))
    return found


def _best(values: Sequence[Any], better: int) -> frozenset[int]:
    """Return the indices of the best: less is better (-1), more is (1), or neither (0)."""
    known = [better * value for value in values if better and value is not None]
    if len(known) < 2 or min(known) == max(known):
        return frozenset()
    return frozenset(
        i for i, value in enumerate(values) if value is not None and better * value == max(known)
    )
