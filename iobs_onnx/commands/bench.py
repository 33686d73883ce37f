"""`iobs-onnx bench`: is the sparse model faster here?"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "bench",
        help="time a sparse model against its dense one",
        description="Time a dense and a sparse model in turns, on every engine present.",
    )
    command.set_defaults(run=_bench)
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


def _bench(arguments: argparse.Namespace) -> int:
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
        print(json.dumps(found.as_dict(), indent=2))
        return 0

    from rich.table import Table

    from iobs_onnx.commands.console import make_console

    console = make_console()
    table = Table(title="median of interleaved rounds")
    for heading in ("engine", "batch", "dense", "sparse", "speed-up", "dense", "sparse"):
        table.add_column(heading, justify="right" if heading != "engine" else "left")
    for row in found.timings:
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
    console.print(table)
    if found.layers:
        layers = Table(title="single products with cuSPARSELt, fp16")
        for heading in ("out × in", "rows", "dense", "sparse", "speed-up"):
            layers.add_column(heading, justify="right")
        for layer in found.layers:
            layers.add_row(
                f"{layer.out_features} × {layer.in_features}",
                f"{layer.rows:,}",
                f"{layer.dense_ms:.3f} ms",
                f"{layer.sparse_ms:.3f} ms",
                f"{layer.dense_ms / layer.sparse_ms:.2f} ×",
            )
        console.print(layers)
    for note in found.notes:
        console.print(note, soft_wrap=True)
    return 0
