"""The command line, thin over the public API.

Exit codes: 0 done; 1 a check failed (a claimed pattern, finite outputs); 2 bad input or usage,
told in one line; 3 a defect of this program, with its traceback; 4 a bound of the caller's does
not hold (--max-output-error); 130 interrupted, 143 terminated, 129 the terminal is gone; 141 nobody
reads the output any more.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from iobs_onnx.commands import bench, compare, distill, inspect, prune, report, verify
from iobs_onnx.commands.printable import Formatter, printable
from iobs_onnx.errors import CheckError, GateError, IobsError

_EXIT_CODES = {CheckError: 1, GateError: 4}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    # Read when torch is loaded. Threads that spin while they wait make the solvers ten times
    # slower as soon as another process wants a core, and gain nothing when none does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = make_parser().parse_args(argv)
    logs = logging.StreamHandler()
    logs.setFormatter(Formatter("iobs-onnx: %(message)s"))
    logging.basicConfig(handlers=[logs], level=logging.WARNING)
    try:
        with _unwinding():
            code = int(arguments.run(arguments))
            sys.stdout.flush()  # what a closed pipe says, it says here
            return code
    except IobsError as error:
        if arguments.debug:
            _print_traceback()
        print(f"iobs-onnx: error: {_one_line(error)}", file=sys.stderr)
        return next((c for kind, c in _EXIT_CODES.items() if isinstance(error, kind)), 2)
    except KeyboardInterrupt:
        print("iobs-onnx: interrupted; nothing was written", file=sys.stderr)
        return 130
    except _Ended as ended:
        print("iobs-onnx: terminated; nothing was written", file=sys.stderr)
        return 128 + ended.signal
    except BrokenPipeError:
        # What is left in the buffer is lost, and Python would complain of that at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        _print_traceback()
        print("iobs-onnx: this is a defect of iobs-onnx; please report it", file=sys.stderr)
        return 3


class _Ended(BaseException):
    """The system asks this program to end."""

    def __init__(self, number: int) -> None:
        self.signal = number


@contextmanager
def _unwinding() -> Iterator[None]:
    """Leave no temporary folder behind where the program is asked to end: unwind, as on Ctrl-C."""

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough; what follows is the cleaning up
        raise _Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    kinds = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {kind: signal.getsignal(kind) for kind in kinds}
    for kind in kinds:
        if before[kind] is not signal.SIG_IGN:  # nohup
            signal.signal(kind, end)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def _print_traceback() -> None:
    print(printable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)


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
    for each in (prune, distill, inspect, verify, report, compare, bench):
        each.add(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
