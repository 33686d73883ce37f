"""`iobs-onnx report` and `iobs-onnx compare`: look at reports again, and side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iobs_onnx.errors import OptionError
from iobs_onnx.report.schema import read_report


def add(commands: Any) -> None:
    """Add both commands to the parser."""
    report = commands.add_parser(
        "report",
        help="draw a report.json as a page",
        description="Draw a report.json as one self-contained HTML file.",
    )
    report.set_defaults(run=_report)
    report.add_argument("report", metavar="REPORT.json")
    report.add_argument(
        "-o", "--output", metavar="FILE.html", help="the page (default: REPORT.html beside it)"
    )
    report.add_argument("--json", action="store_true", help="print JSON")

    compare = commands.add_parser(
        "compare",
        help="set runs side by side",
        description="Set the reports of several runs side by side.",
    )
    compare.set_defaults(run=_compare)
    compare.add_argument("reports", nargs="+", metavar="REPORT.json")
    compare.add_argument("--html", metavar="FILE.html", help="write a page as well")
    compare.add_argument("--json", action="store_true", help="print JSON")


def run_names(paths: Sequence[str]) -> list[str]:
    """Name each run by the shortest end of its path that no other run has.

    `a/report.json` and `b/report.json` become `a` and `b`: what all have in common is left out.
    """
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    if len(paths) > 1 and len(set(parts)) < len(parts):
        raise OptionError(f"compare: {' '.join(paths)}: the same report is given twice")
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _report(arguments: argparse.Namespace) -> int:
    from iobs_onnx.report.page import render_report, write_page

    source = Path(arguments.report)
    target = Path(arguments.output or source.with_suffix(".html"))
    if target.absolute() == source.absolute():
        raise OptionError(f"output {target}: would overwrite the report; choose another name")
    page = write_page(target, _drawn(render_report, read_report(source), arguments.report))
    print(json.dumps({"page": str(page)}) if arguments.json else f"wrote {page}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    if len(arguments.reports) < 2:
        raise OptionError("compare: give at least two reports")
    names = run_names(arguments.reports)
    reports = [read_report(path) for path in arguments.reports]

    from iobs_onnx.report.page import Comparison, render_comparison, write_page

    where = " ".join(arguments.reports)
    found = _drawn(lambda data: Comparison.of(names, data), reports, where)
    if arguments.html is not None:
        html = _drawn(lambda data: render_comparison(names, data), reports, where)
        write_page(arguments.html, html)
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return 0

    from rich.table import Table
    from rich.text import Text

    from iobs_onnx.commands.console import make_console

    console = make_console()
    summary = Table(title=f"{len(names)} runs of {', '.join(found.models)}")
    for table in (summary, sites := Table(title="layer error of every weight")):
        table.add_column("", overflow="fold")
        for name in names:
            table.add_column(name, justify="right", overflow="fold")

    def cells(texts: Sequence[str], best: frozenset[int]) -> list[Text]:
        return [Text(t, "bold green" if i in best else "") for i, t in enumerate(texts)]

    for row in found.rows:
        summary.add_row(row.label, *cells(row.cells, row.best))
    for option, values in found.options:
        summary.add_row(f"option {option}", *values)
    for site in found.sites:
        shown = ["–" if error is None else f"{error:.4g}" for error in site.errors]
        sites.add_row(site.name, *cells(shown, site.best))
    for part in (sites, summary, *found.warnings):
        console.print(part)
    if arguments.html is not None:
        console.print(f"wrote {arguments.html}", soft_wrap=True)
    return 0


def _drawn(draw: Any, data: Any, where: str) -> Any:
    """Draw what a file holds, and blame the file where it is not as this package writes it."""
    from jinja2 import UndefinedError

    try:
        return draw(data)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise OptionError(
            f"report {where}: not as iobs-onnx writes it ({fault}); run iobs-onnx prune again"
        ) from error
