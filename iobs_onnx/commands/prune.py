"""`iobs-onnx prune`: make the weights of a model sparse."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from iobs_onnx.commands.printable import to_json
from iobs_onnx.config import PruneConfig
from iobs_onnx.config.checks import require_known
from iobs_onnx.errors import OptionError
from iobs_onnx.pruning.progress import Progress

# What a TOML file may hold besides the fields of PruneConfig.
_RUN_OPTIONS = ("calibration", "holdout", "work_dir", "output", "report_dir")
_UNTRAINED = "to win accuracy back, train what was kept: --distill model, or iobs-onnx distill"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "prune",
        help="make the weights of a model sparse",
        description="Prune a model's weights and say what it cost.",
    )
    command.set_defaults(run=_run)
    command.add_argument("model", metavar="MODEL", help="the dense .onnx file")
    command.add_argument(
        "--calibration",
        metavar="DATA",
        action="append",
        help="an .npz, .jsonl or .parquet, a directory of .npz feeds, module:callable, random, or "
        "self (text that a language model writes); may be given more than once",
    )
    command.add_argument(
        "--holdout",
        metavar="DATA",
        help="data that only judge (default: a tenth of the calibration data)",
    )
    command.add_argument(
        "--work-dir",
        metavar="DIR",
        help="keep what is solved here; the same command goes on there after it was cut off",
    )
    command.add_argument(
        "--output",
        metavar="OUT.onnx",
        help="the sparse model to write; or a folder (DIR/), which takes it under its own name, "
        "with configuration and tokenizer if they lie beside the dense one",
    )
    command.add_argument(
        "--report-dir", metavar="DIR", help="write report.json and report.html here"
    )
    command.add_argument("--config", metavar="FILE.toml", help="options; flags override them")
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    add_options(command)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of :class:`PruneConfig`; the value None means that it was not given."""
    for option in dataclasses.fields(PruneConfig):
        flag = "--" + option.name.replace("_", "-")
        if option.default is True:
            flag = flag.replace("--", "--no-", 1)
        # None means "not given": the TOML file or the default of PruneConfig then decides.
        parser.add_argument(
            flag,
            dest=option.name,
            default=None,
            help=_described(option),
            **option.metadata["how"],
        )


def _described(option: dataclasses.Field[Any]) -> str:
    text: str = option.metadata["help"]
    shown = isinstance(option.default, str | float | int) and not isinstance(option.default, bool)
    return f"{text} (default: {option.default})" if shown else text


def _run(arguments: argparse.Namespace) -> int:
    fields = [option.name for option in dataclasses.fields(PruneConfig)]
    known = [*fields, *_RUN_OPTIONS]
    options = _read_toml(arguments.config, known) if arguments.config else {}
    given = {name: getattr(arguments, name) for name in known}
    options |= {name: value for name, value in given.items() if value is not None}
    for name in ("sparsity", "output"):
        if name not in options:
            raise OptionError(f"--{name} is missing: give it as a flag or in the --config file")
    report_dir = options.pop("report_dir", None)

    from iobs_onnx.commands.console import Bars, make_console
    from iobs_onnx.pruning.pipeline import prune
    from iobs_onnx.report.record import require_report_dir
    from iobs_onnx.report.tables import render

    if report_dir is not None:
        require_report_dir(report_dir)
    console = make_console()
    quiet = arguments.quiet or arguments.json
    progress = Progress() if quiet or not console.is_terminal else Bars(console)
    result = prune(arguments.model, progress=progress, **options)
    written = [result.output]
    if report_dir is not None:
        saved = result.report.save(report_dir)
        written += [str(saved), str(saved.with_name("report.html"))]
    if arguments.json:
        print(to_json(json.loads(result.report.to_json())))
    elif not arguments.quiet:
        for part in render(result.report):
            console.print(part)
        console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
        if result.report.distillation is None:
            console.print(_UNTRAINED, soft_wrap=True)
    return 0


def _read_toml(path: str | Path, known: list[str]) -> dict[str, Any]:
    """Return the options in a TOML file; `-` and `_` in keys are the same.

    Raises:
        OptionError: the file cannot be read, is not TOML, or holds a key that is not `known`.
    """
    try:
        with Path(path).open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise OptionError(f"config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"config {path}: not TOML: {error}") from error
    options = {key.replace("-", "_"): value for key, value in table.items()}
    require_known(options, known, f"config {path}: key")
    return options
