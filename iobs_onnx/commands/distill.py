"""`iobs-onnx distill`: train what is kept of a sparse model towards its dense one."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from iobs_onnx.commands.printable import to_json
from iobs_onnx.config import PruneConfig
from iobs_onnx.config.checks import seconds
from iobs_onnx.errors import OptionError

# Options of prune that say how data are read.
_DATA = (
    *("text", "tokenizer", "pack", "images", "preprocess", "sequence_length", "start_token"),
    *("samples", "batch_size"),
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "distill",
        help="train what is kept of a sparse model towards its dense one",
        description="Train the kept weights, biases and norms of a sparse model towards the dense "
        "model, without labels. Zeros stay zeros. If the held-out loss does not fall, OUT holds "
        "the sparse model as it came.",
    )
    command.set_defaults(run=_distill)
    command.add_argument("dense", metavar="DENSE", help="the model that SPARSE was made from")
    command.add_argument("sparse", metavar="SPARSE", help="pruned here or elsewhere")
    command.add_argument(
        "--calibration",
        metavar="DATA",
        action="append",
        help="as for prune; with self a language model goes on writing text for as long as "
        "training lasts",
    )
    command.add_argument(
        "--holdout",
        metavar="DATA",
        help="data that only judge (default: a tenth of the calibration data)",
    )
    command.add_argument("--output", metavar="OUT.onnx", required=True, help="as for prune")
    _add_training(command)
    for option in dataclasses.fields(PruneConfig):
        if option.name in _DATA:
            flag = "--" + option.name.replace("_", "-")
            how = option.metadata["how"]
            command.add_argument(flag, default=None, help=option.metadata["help"], **how)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_training(command: Any) -> None:
    """Add how to train."""
    command.add_argument(
        "--distill",
        default="model",
        choices=("blocks", "model", "both"),
        help="block by block towards the dense model's activations, the whole model towards its "
        "outputs, or one after the other (default: model)",
    )
    length = command.add_mutually_exclusive_group()
    length.add_argument(
        "--distill-steps",
        type=int,
        metavar="N",
        help="steps of the whole model (default: 400), and of all blocks together (default: eight "
        "passes of each over the data)",
    )
    length.add_argument(
        "--distill-time",
        metavar="TIME",
        help="as many steps as fit into this: 90s, 20min, 1.5h; of both, half for each",
    )
    command.add_argument(
        "--distill-rate",
        type=float,
        metavar="RATE",
        help="highest learning rate (default: found by a short test)",
    )
    command.add_argument(
        "--loss",
        default="auto",
        choices=("auto", "kl", "mse", "embedding"),
        help="how outputs are matched (default: auto, by what each is)",
    )
    command.add_argument(
        "--mirror", action="store_true", help="mirror images by chance, where that means nothing"
    )
    command.add_argument(
        "--on-interrupt", default="stop", choices=("stop", "keep"), help="as for prune"
    )


def _distill(arguments: argparse.Namespace) -> int:
    from iobs_onnx.commands.console import Bars, make_console
    from iobs_onnx.pruning.distil.run import distil_file
    from iobs_onnx.pruning.distil.settings import DistilSettings
    from iobs_onnx.pruning.progress import Progress

    if arguments.seed < 0:
        raise OptionError(f"seed {arguments.seed}: must not be negative")
    time = arguments.distill_time
    settings = DistilSettings(
        steps=arguments.distill_steps,
        seconds=None if time is None else seconds("distill_time", time),
        rate=arguments.distill_rate,
        loss=arguments.loss,
        keeps=arguments.on_interrupt == "keep",
        seed=arguments.seed,
    )
    console = make_console()
    quiet = arguments.quiet or arguments.json
    found = distil_file(
        arguments.dense,
        arguments.sparse,
        calibration=arguments.calibration,
        holdout=arguments.holdout,
        output=arguments.output,
        distill=arguments.distill,
        mirror=arguments.mirror,
        settings=settings,
        progress=Progress() if quiet or not console.is_terminal else Bars(console),
        **{name: value for name in _DATA if (value := getattr(arguments, name)) is not None},
    )
    if arguments.json:
        print(to_json(found.as_dict()))
    elif not arguments.quiet:
        _show(console, found)
    return 0


def _show(console: Any, found: Any) -> None:
    if found.blocks is not None:
        _show_blocks(console, found.blocks)
    if found.distilled is not None:
        _show_whole(console, found.distilled)
    console.print(f"wrote {found.output}", soft_wrap=True)


def _show_blocks(console: Any, told: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{len(told['each'])} blocks, {told['steps']} steps")
    table.add_column("up to", overflow="fold")
    for heading in ("weights", "held-out loss", "trained", ""):
        table.add_column(heading, justify="right")
    for block in told["each"]:
        losses = [block["before"], block["after"]]
        table.add_row(
            ", ".join(block["outputs"]),
            str(len(block["sites"])),
            *("–" if loss is None else f"{loss:.4g}" for loss in losses),
            "kept" if block["accepted"] else block["reason"],
        )
    console.print(table)
    console.print(
        f"held-out loss of the outputs {told['before']:.4g} → {told['after']:.4g}; "
        f"{told['trained']:,} numbers trained",
        soft_wrap=True,
    )
    _show_end(console, told["notes"], told["accepted"])


def _show_end(console: Any, notes: Any, accepted: bool) -> None:
    for note in notes:
        console.print(note, soft_wrap=True)
    if not accepted:
        console.print(
            "the held-out loss did not fall: the weights were left as they were", style="bold"
        )


def _show_whole(console: Any, distilled: Any) -> None:
    from rich.table import Table

    table = Table(title=f"{distilled.steps} steps, rate {distilled.rate:.2g}")
    for heading in ("step", "training loss", "held-out loss"):
        table.add_column(heading, justify="right")
    for step, loss, judged in distilled.curve:
        table.add_row(str(step), "–" if loss is None else f"{loss:.4g}", f"{judged:.4g}")
    console.print(table)
    kinds = ", ".join(f"{name} by {kind}" for name, kind in distilled.losses.items())
    console.print(
        f"held-out loss {distilled.before:.4g} → {distilled.after:.4g} ({kinds}); "
        f"{distilled.trained:,} numbers trained on {distilled.rows:,} rows",
        soft_wrap=True,
    )
    _show_end(console, distilled.notes, distilled.accepted)
