"""`iobs-onnx verify`: does a model hold its pattern, and does it still compute?"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iobs_onnx.commands.printable import to_json
from iobs_onnx.config import PruneConfig

if TYPE_CHECKING:
    from rich.table import Table

    from iobs_onnx.verification import Verification


# Options of prune that say how data are read.
_DATA = (
    *("text", "tokenizer", "pack", "images", "audio", "preprocess", "sequence_length"),
    *("samples", "batch_size"),
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "verify",
        help="check a sparse model",
        description="Check that a model holds a pattern and that its outputs are finite.",
    )
    command.set_defaults(run=_run)
    command.add_argument("sparse", metavar="SPARSE")
    command.add_argument("--sparsity", metavar="PATTERN", help="the pattern every site must hold")
    command.add_argument("--dense", metavar="MODEL", help="compare outputs with this; needs data")
    command.add_argument("--data", metavar="DATA", help="feeds, as for prune --calibration")
    for name in ("include", "exclude", "provider", *_DATA):
        option = next(f for f in dataclasses.fields(PruneConfig) if f.name == name)
        flag = "--" + name.replace("_", "-")
        text = option.metadata["help"].replace("calibrate on", "run") if name in _DATA else None
        text = text and text.replace("all but those held out", "all")
        command.add_argument(
            flag, default=option.default or None, help=text, **option.metadata["how"]
        )
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from iobs_onnx.verification import verify

    result = verify(
        arguments.sparse,
        sparsity=arguments.sparsity,
        dense=arguments.dense,
        data=arguments.data,
        include=arguments.include or (),
        exclude=arguments.exclude or (),
        provider=arguments.provider,
        **{name: value for name in _DATA if (value := getattr(arguments, name)) is not None},
    )
    if arguments.json:
        print(to_json(result.as_dict()))
        return 0 if result.ok else 1

    from iobs_onnx.commands.console import make_console
    from iobs_onnx.report.outputs import outputs_told
    from iobs_onnx.report.tables import declined_table

    console = make_console()
    console.print(_sites_table(result))
    if result.declined:
        console.print(declined_table(result.as_dict()["declined"]))
    told, caches = outputs_told(result.outputs)
    for output in told:
        console.print(_output_line(output))
    if caches:
        console.print(caches)
    if not result.outputs:
        console.print("outputs were not checked: give data to run the model on")
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for failure in result.failures:
        console.print(f"FAILED {failure}", style="bold red", soft_wrap=True)
    console.print("verified" if result.ok else f"{len(result.failures)} checks failed")
    return 0 if result.ok else 1


def _sites_table(result: Verification) -> Table:
    from rich.table import Table

    table = Table(title=f"{len(result.sites)} weights")
    for heading in ("site", "shape", "zeros", "holds 2:4", f"beyond {result.pattern or 'claim'}"):
        table.add_column(heading, overflow="fold")
    for site in result.sites:
        holds = {True: "yes", False: "no", None: "cannot"}[site.holds_2_4]
        beyond = "–" if site.violations is None else str(site.violations)
        shape = " × ".join(map(str, site.shape))
        table.add_row(site.name, shape, f"{site.sparsity:.1%}", holds, beyond)
    return table


def _output_line(output: Mapping[str, Any]) -> str:
    near = ""
    if output["cosine"] is not None:
        near = f": relative error {output['relative_error']:.4f}, cosine {output['cosine']:.4f}"
    note = f" ({output['note']})" if output["note"] else ""
    return f"output {output['name']}{near}, {'' if output['finite'] else 'NOT '}finite{note}"
