"""`iobs-onnx report`: look at a report again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iobs_onnx.commands.printable import printable, to_json
from iobs_onnx.errors import OptionError
from iobs_onnx.report.schema import read_report


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "report",
        help="draw a report.json as a page",
        description="Draw a report.json as one self-contained HTML file.",
    )
    command.set_defaults(run=_run)
    command.add_argument("report", metavar="REPORT.json")
    command.add_argument(
        "-o", "--output", metavar="FILE.html", help="the page (default: REPORT.html beside it)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from iobs_onnx.report.page import render_report, write_page

    source = Path(arguments.report)
    target = Path(arguments.output or source.with_suffix(".html"))
    if target.absolute() == source.absolute():
        raise OptionError(f"output {target}: would overwrite the report; choose another name")
    page = write_page(target, draw(render_report, read_report(source), arguments.report))
    print(to_json({"page": str(page)}) if arguments.json else f"wrote {printable(str(page))}")
    return 0


def draw(drawing: Any, data: Any, where: str) -> Any:
    """Draw what a file holds, and blame the file where it is not as this package writes it."""
    from jinja2 import UndefinedError

    try:
        return drawing(data)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise OptionError(
            f"report {where}: not as iobs-onnx writes it ({fault}); run iobs-onnx prune again"
        ) from error
