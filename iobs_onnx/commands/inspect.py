"""`iobs-onnx inspect`: every candidate weight, and the segments that a model is walked in."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iobs_onnx.commands.printable import to_json
from iobs_onnx.config import PruneConfig
from iobs_onnx.config.checks import parse_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from iobs_onnx.inspection import Inspection


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "inspect",
        help="list every candidate weight",
        description="List every candidate weight: a site, or declined and why.",
    )
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--segments", action="store_true", help="list the segments that prune walks instead"
    )
    for option in dataclasses.fields(PruneConfig):
        if option.name in ("sequential", "memory_budget"):
            flag = "--" + option.name.replace("_", "-")
            text = f"with --segments: {option.metadata['help'].partition(' (default')[0]}"
            default = option.default
            command.add_argument(flag, default=default, help=text, **option.metadata["how"])


def _run(arguments: argparse.Namespace) -> int:
    from iobs_onnx.inspection import inspect, inspect_segments

    if arguments.segments:
        segments = inspect_segments(
            arguments.model,
            sequential=arguments.sequential,
            memory_budget=parse_bytes(arguments.memory_budget),
        )
        return _print_segments(segments, as_json=arguments.json)
    found = inspect(arguments.model)
    if arguments.json:
        print(to_json(found.as_dict()))
        return 0

    from iobs_onnx.commands.console import make_console
    from iobs_onnx.report.tables import declined_table

    console = make_console()
    console.print(_sites_table(found))
    if found.declined:
        console.print(declined_table(found.as_dict()["declined"]))
    return 0


def _sites_table(found: Inspection) -> Table:
    from rich.table import Table

    from iobs_onnx.inspection import describe

    taps = dict.fromkeys(tap for site in found.sites for tap in site.taps)
    labels = {tap: str(i) for i, tap in enumerate(taps, start=1)}
    table = Table(title=f"{len(found.sites)} sites, {len(labels)} taps")
    for heading in ("site", "operator", "shape", "axis", "out × in", "tap", "2:4"):
        table.add_column(heading, overflow="fold")
    for site in found.sites:
        row = describe(site)
        table.add_row(
            site.name,
            site.op_type,
            " × ".join(map(str, site.shape)),
            str(site.axis),
            f"{site.groups} × " * (site.groups > 1) + f"{site.out_features} × {site.in_features}",
            ", ".join(labels[tap] for tap in site.taps),
            ("yes: " if row["eligible_2_4"] else "no: ") + row["eligibility_rule"],
        )
    return table


def _print_segments(segments: Sequence[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print(to_json(segments))
        return 0

    from rich.table import Table

    from iobs_onnx.commands.console import make_console

    table = Table(title=f"{len(segments)} segments")
    for heading in ("nodes", "weights, MB", "reads", "taps", "sites"):
        table.add_column(heading, overflow="fold")
    for segment in segments:
        table.add_row(
            str(segment["nodes"]),
            f"{segment['weight_bytes'] / 1e6:.2f}",
            ", ".join(segment["inputs"]),
            ", ".join(segment["taps"]),
            ", ".join(segment["sites"]),
        )
    make_console().print(table)
    return 0
