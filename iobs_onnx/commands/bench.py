"""`iobs-onnx bench`: is the sparse model faster here?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from iobs_onnx.commands.printable import to_json

if TYPE_CHECKING:
    from rich.table import Table

    from iobs_onnx.runtime.bench import Timing
    from iobs_onnx.runtime.semi_structured import LayerTiming


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "bench",
        help="time a sparse model against its dense one",
        description="Time a dense and a sparse model in turns, on every engine present.",
    )
    command.set_defaults(run=_run)
    command.add_argument("dense", metavar="DENSE")
    command.add_argument("sparse", metavar="SPARSE")
    command.add_argument(
        "--data", metavar="DATA", help="feeds, as for prune --calibration (default: random ones)"
    )
    command.add_argument(
        "--engine",
        action="append",
        choices=("cpu", "cuda", "tensorrt"),
        help="only on this one; may be repeated (default: all that are present)",
    )
    command.add_argument("--batch-size", type=int, metavar="N", help="rows of a feed")
    command.add_argument(
        "--rounds", type=int, default=20, metavar="N", help="how often both run (default: 20)"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> int:
    from iobs_onnx.timing import bench

    found = bench(
        arguments.dense,
        arguments.sparse,
        data=arguments.data,
        engines=arguments.engine or (),
        batch_size=arguments.batch_size,
        rounds=arguments.rounds,
    )
    if arguments.json:
        print(to_json(found.as_dict()))
        return 0

    from iobs_onnx.commands.console import make_console

    console = make_console()
    console.print(_models_table(found.timings))
    if found.layers:
        console.print(_products_table(found.layers))
    for note in found.notes:
        console.print(note, soft_wrap=True)
    return 0


def _models_table(timings: Sequence[Timing]) -> Table:
    from rich.table import Table

    table = Table(title="median of interleaved rounds")
    for heading in ("engine", "batch", "dense", "sparse", "speed-up", "dense", "sparse"):
        table.add_column(heading, justify="right" if heading != "engine" else "left")
    for row in timings:
        low, high = row.speedup_range
        table.add_row(
            row.engine,
            "mixed" if row.batch is None else str(row.batch),
            f"{row.dense_ms:.2f} ms",
            f"{row.sparse_ms:.2f} ms",
            f"{row.speedup:.2f} × ({low:.2f} – {high:.2f})",
            f"{row.dense_per_second:,.1f} /s",
            f"{row.sparse_per_second:,.1f} /s",
        )
    return table


def _products_table(layers: Sequence[LayerTiming]) -> Table:
    from rich.table import Table

    table = Table(title="single products with cuSPARSELt, fp16")
    for heading in ("out × in", "rows", "dense", "sparse", "speed-up"):
        table.add_column(heading, justify="right")
    for layer in layers:
        table.add_row(
            f"{layer.out_features} × {layer.in_features}",
            f"{layer.rows:,}",
            f"{layer.dense_ms:.3f} ms",
            f"{layer.sparse_ms:.3f} ms",
            f"{layer.dense_ms / layer.sparse_ms:.2f} ×",
        )
    return table
