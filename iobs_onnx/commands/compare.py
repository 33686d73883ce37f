"""`iobs-onnx compare`: reports of several runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iobs_onnx.commands.printable import to_json
from iobs_onnx.commands.report import draw
from iobs_onnx.errors import OptionError
from iobs_onnx.report.schema import read_report

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from iobs_onnx.report.page import Comparison


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "compare",
        help="set runs side by side",
        description="Set the reports of several runs side by side.",
    )
    command.set_defaults(run=_run)
    command.add_argument("reports", nargs="+", metavar="REPORT.json")
    command.add_argument("--html", metavar="FILE.html", help="write a page as well")
    command.add_argument("--json", action="store_true", help="print JSON")


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


def _run(arguments: argparse.Namespace) -> int:
    if len(arguments.reports) < 2:
        raise OptionError("compare: give at least two reports")
    names = run_names(arguments.reports)
    reports = [read_report(path) for path in arguments.reports]

    from iobs_onnx.report.page import Comparison, render_comparison, write_page

    where = " ".join(arguments.reports)
    found = draw(lambda data: Comparison.of(names, data), reports, where)
    if arguments.html is not None:
        html = draw(lambda data: render_comparison(names, data), reports, where)
        write_page(arguments.html, html)
    if arguments.json:
        print(to_json(found.as_dict()))
        return 0

    from iobs_onnx.commands.console import make_console

    console = make_console()
    for part in (_sites_table(found), _summary_table(found), *found.warnings):
        console.print(part)
    if arguments.html is not None:
        console.print(f"wrote {arguments.html}", soft_wrap=True)
    return 0


def _summary_table(found: Comparison) -> Table:
    table = _table(f"{len(found.names)} runs of {', '.join(found.models)}", found.names)
    for row in found.rows:
        table.add_row(row.label, *_cells(row.cells, row.best))
    for option, values in found.options:
        table.add_row(f"option {option}", *values)
    return table


def _sites_table(found: Comparison) -> Table:
    table = _table("layer error of every weight", found.names)
    for site in found.sites:
        shown = ["–" if error is None else f"{error:.4g}" for error in site.errors]
        table.add_row(site.name, *_cells(shown, site.best))
    return table


def _table(title: str, runs: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("", overflow="fold")
    for name in runs:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _cells(texts: Sequence[str], best: frozenset[int]) -> list[Text]:
    from rich.text import Text

    return [Text(text, "bold green" if i in best else "") for i, text in enumerate(texts)]
