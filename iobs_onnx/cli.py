"""The command line, thin over the public API.

Exit codes: 0 done; 1 a check failed (a claimed pattern, finite outputs); 2 bad input or usage,
told in one line; 3 a defect of this program, with its traceback; 4 a bound of the caller's does
not hold (--max-output-error); 130 interrupted; 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from iobs_onnx.commands import bench, distill, report
from iobs_onnx.config import PruneConfig, parse_bytes, read_toml
from iobs_onnx.errors import CheckError, GateError, IobsError, OptionError
from iobs_onnx.pruning.progress import Progress

# What a TOML file may hold besides the fields of PruneConfig.
_RUN_OPTIONS = ("calibration", "holdout", "work_dir", "output", "report_dir")
_EXIT_CODES = {CheckError: 1, GateError: 4}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    # Read when torch is loaded. Threads that spin while they wait make the solvers ten times
    # slower as soon as another process wants a core, and gain nothing when none does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(format="iobs-onnx: %(message)s", level=logging.WARNING)
    try:
        return int(arguments.run(arguments))
    except IobsError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"iobs-onnx: error: {_one_line(error)}", file=sys.stderr)
        return next((c for kind, c in _EXIT_CODES.items() if isinstance(error, kind)), 2)
    except KeyboardInterrupt:
        print("iobs-onnx: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except Exception:
        traceback.print_exc()
        print("iobs-onnx: this is a defect of iobs-onnx; please report it", file=sys.stderr)
        return 3


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _PrintCompletion(argparse.Action):
    """Print a completion script, generated from the parser itself."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        values: Any,
        _option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'iobs-onnx[completion]'")
        print(shtab.complete(parser, shell=values))
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of every command; the documentation is made from it, too."""
    parser = argparse.ArgumentParser(
        prog="iobs-onnx", description="Post-training sparsity for ONNX models with I-OBS."
    )
    version = importlib.metadata.version("iobs-onnx")
    parser.add_argument("--version", action="version", version=f"iobs-onnx {version}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes this command in a shell, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prune(commands)
    _add_inspect(commands)
    _add_verify(commands)
    report.add(commands)
    bench.add(commands)
    distill.add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_prune(commands: Any) -> None:
    command = commands.add_parser(
        "prune",
        help="make the weights of a model sparse",
        description="Prune a model's weights and say what it cost.",
    )
    command.set_defaults(run=_prune)
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
    command.add_argument("--output", metavar="OUT.onnx", help="the sparse model to write")
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
            help=_help(option),
            **option.metadata["how"],
        )


def _help(option: dataclasses.Field[Any]) -> str:
    text: str = option.metadata["help"]
    shown = isinstance(option.default, str | float | int) and not isinstance(option.default, bool)
    return f"{text} (default: {option.default})" if shown else text


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="list every candidate weight",
        description="List every candidate weight: a site, or declined and why.",
    )
    command.set_defaults(run=_inspect)
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


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="check a sparse model",
        description="Check that a model holds a pattern and that its outputs are finite.",
    )
    command.set_defaults(run=_verify)
    command.add_argument("sparse", metavar="SPARSE")
    command.add_argument("--sparsity", metavar="PATTERN", help="the pattern every site must hold")
    command.add_argument("--dense", metavar="MODEL", help="compare outputs with this; needs --data")
    command.add_argument("--data", metavar="DATA", help="feeds, as for prune --calibration")
    for name in ("include", "exclude", "provider"):
        option = next(f for f in dataclasses.fields(PruneConfig) if f.name == name)
        command.add_argument(f"--{name}", default=option.default or None, **option.metadata["how"])
    command.add_argument("--json", action="store_true", help="print JSON")


def _prune(arguments: argparse.Namespace) -> int:
    fields = [option.name for option in dataclasses.fields(PruneConfig)]
    known = [*fields, *_RUN_OPTIONS]
    options = read_toml(arguments.config, known) if arguments.config else {}
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
        print(result.report.to_json())
    elif not arguments.quiet:
        for part in render(result.report):
            console.print(part)
        console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from iobs_onnx.inspection import describe, inspect, inspect_segments

    if arguments.segments:
        segments = inspect_segments(
            arguments.model,
            sequential=arguments.sequential,
            memory_budget=parse_bytes(arguments.memory_budget),
        )
        return _print_segments(segments, as_json=arguments.json)
    found = inspect(arguments.model)
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return 0

    from rich.table import Table

    from iobs_onnx.commands.console import make_console
    from iobs_onnx.report.tables import declined_table

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
    console = make_console()
    console.print(table)
    if found.declined:
        console.print(declined_table(found.as_dict()["declined"]))
    return 0


def _print_segments(segments: Sequence[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(segments, indent=2, ensure_ascii=False))
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


def _verify(arguments: argparse.Namespace) -> int:
    from iobs_onnx.verification import verify

    result = verify(
        arguments.sparse,
        sparsity=arguments.sparsity,
        dense=arguments.dense,
        data=arguments.data,
        include=arguments.include or (),
        exclude=arguments.exclude or (),
        provider=arguments.provider,
    )
    if arguments.json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
        return 0 if result.ok else 1

    from rich.table import Table

    from iobs_onnx.commands.console import make_console
    from iobs_onnx.report.tables import declined_table

    console = make_console()
    table = Table(title=f"{len(result.sites)} weights")
    for heading in ("site", "shape", "zeros", "holds 2:4", f"beyond {result.pattern or 'claim'}"):
        table.add_column(heading, overflow="fold")
    for site in result.sites:
        holds = {True: "yes", False: "no", None: "cannot"}[site.holds_2_4]
        beyond = "–" if site.violations is None else str(site.violations)
        shape = " × ".join(map(str, site.shape))
        table.add_row(site.name, shape, f"{site.sparsity:.1%}", holds, beyond)
    console.print(table)
    if result.declined:
        console.print(declined_table(result.as_dict()["declined"]))
    for output in result.outputs:
        near = (
            ""
            if output["cosine"] is None
            else (f": relative error {output['relative_error']:.4f}, cosine {output['cosine']:.4f}")
        )
        console.print(f"output {output['name']}{near}, {'' if output['finite'] else 'NOT '}finite")
    if not result.outputs:
        console.print("outputs were not checked: give --data to run the model")
    for failure in result.failures:
        console.print(f"FAILED {failure}", style="bold red", soft_wrap=True)
    console.print("verified" if result.ok else f"{len(result.failures)} checks failed")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
